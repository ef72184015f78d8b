"""Standardisation of columns, there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Standardizer:
    """z = (v − mean) / sd along the last axis of v; ``mean`` and ``sd`` are ``(F,)``, or ``()`` for a target."""

    mean: Tensor
    sd: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """From original units."""
        return (values - self.mean) / self.sd

    def inverse(self, values: Tensor) -> Tensor:
        """Back to original units."""
        return values * self.sd + self.mean


@final
@dataclass(frozen=True, eq=False)
class Scaling:
    """The standardisation of a panel's features ``x`` and of its target ``y``."""

    x: Standardizer
    y: Standardizer


def standardizer_of(values: Tensor, which: list[bool]) -> Standardizer:
    """Mean and sd of the columns of ``values (R, F)``; 0 and 1 for those that are not to be standardised."""
    chosen = torch.tensor(which, dtype=torch.bool)
    if not chosen.any():
        return Standardizer(values.new_zeros(len(which)), values.new_ones(len(which)))
    constant = (values == values[0]).all(0)  # rounding gives it an sd of about 1e-17, not 0
    sd = values.std(0, correction=0).masked_fill(constant | ~chosen, 1.0)
    return Standardizer(values.mean(0).masked_fill(~chosen, 0.0), sd)
