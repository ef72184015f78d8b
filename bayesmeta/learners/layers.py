"""Small networks that amortising learners are made of, and how their numbers become positive ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

UNIT = math.log(math.e - 1)  # softplus of it is 1


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers; smooth, so that losses are."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def near_zero(network: nn.Sequential) -> nn.Sequential:
    """``network`` with a last layer a hundredth its size: what it puts out starts near 0."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(0.01)
        last.bias.zero_()
    return network


def positive(value: Tensor, floor: float) -> Tensor:
    """Any number to one above ``floor``, 0 to 1: floor + (1 − floor) softplus."""
    return floor + (1 - floor) * softplus(value + UNIT)
