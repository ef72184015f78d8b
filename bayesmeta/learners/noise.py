"""Standard normal noise for expectations under a Normal, from torch's global stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("whitened", "antithetic", "iid")


def standard_noise(size: tuple[int, int, int], kind: str, *, like: Tensor) -> Tensor:
    """Noise ``(S, B, D)`` with mean 0 and variance 1, in the dtype and on the device of ``like``.

    ``"iid"``: as it falls. ``"antithetic"``: the second half is the first one's negative, so the sample mean is exactly 0 (for even
    S), and each dimension is scaled to a sample variance of exactly 1. ``"whitened"``: where S > D the sample mean is exactly 0
    and the sample covariance exactly the identity, so that the mean of any quadratic is its expectation; elsewhere antithetic.
    """
    draws, _, dim = size
    noise = torch.randn(size, dtype=like.dtype, device=like.device)
    if kind == "iid" or draws == 1:
        return noise
    if kind == "whitened" and draws > dim:
        noise = noise - noise.mean(0)
        covariance = torch.einsum("sbd,sbe->bde", noise, noise) / draws
        factor, failed = torch.linalg.cholesky_ex(covariance)  # whether it failed is not looked at, which would wait for a GPU
        factor = torch.where(failed[:, None, None] == 0, factor, torch.nan)
        return torch.linalg.solve_triangular(factor, noise.permute(1, 2, 0), upper=False).permute(2, 0, 1)
    half = noise[: math.ceil(draws / 2)]
    half = torch.where(half == 0, torch.finfo(half.dtype).eps, half)  # float32 noise is exactly 0 once in ten million: no scale to scale by
    noise = torch.cat([half, -half])[:draws]
    return noise / noise.square().mean(0).sqrt()
