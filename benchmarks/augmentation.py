"""Drawings moved a little, each its own way: what few training images lack."""

import math

import torch
from torch import Tensor

DEGREES, SCALE, SHARE = 15.0, 0.15, 0.08  # of turning, of stretching either way, of moving by the image's side


def jittered(images: Tensor) -> Tensor:
    """``images (M, C, H, W)`` each turned, stretched and moved at random, from torch's global stream; zeros come in from outside."""
    number = len(images)
    angle = math.radians(DEGREES) * (2 * torch.rand(number) - 1)
    stretch = 1 + SCALE * (2 * torch.rand(2, number) - 1)
    move = 2 * SHARE * (2 * torch.rand(number, 2) - 1)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], 1)
    rows = torch.cat([turn * stretch.T[:, None], move[..., None]], -1).to(images)
    grid = torch.nn.functional.affine_grid(rows, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)
