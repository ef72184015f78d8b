"""Scores of a predictive for a real (or counted) target. A ValueError says which shape or number of draws is wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .intervals import task_mean


def rmse(mean: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Root mean squared error of each task, ``(T,)``, in units of y; ``mean``, ``y``, ``mask`` are ``(T, N)``. NaN without points."""
    return task_mean((mean - y) ** 2, mask).sqrt()


def crps(samples: Tensor, y: Tensor, *, fair: bool = True) -> Tensor:
    """Continuous ranked probability score of each point, ``(T, N)``, in units of y; 0 is perfect.

    E|X − y| − ½ E|X − X'| (Gneiting & Raftery 2007, eq. 21) from ``samples (S, T, N)``, the second term from the sorted draws.
    ``fair`` divides it by S (S − 1) (Ferro 2014), unbiased at every S; else by S², the score of the draws as an ensemble.
    """
    count = len(samples)
    if samples.shape[1:] != y.shape or count < 1 + fair:
        raise ValueError(f"expected at least {1 + fair} samples (S, T, N) of y {tuple(y.shape)}, got {tuple(samples.shape)}")
    errors = (samples - y).sort(0).values  # the spread of X − y is that of X, and rounds less where y is large
    rank = torch.arange(1, count + 1, dtype=errors.dtype, device=errors.device).view(-1, *(1,) * y.dim())
    spread = ((2 * rank - count - 1) * errors).sum(0) / (count * (count - 1 if fair else count))  # = ½ E|X − X'|
    return errors.abs().mean(0) - spread


def crps_normal(mean: Tensor, sd: Tensor, y: Tensor) -> Tensor:
    """The same score in closed form for a Normal predictive (Gneiting & Raftery 2007, section 4.2, its sign turned); shapes broadcast.

    With sd 0 it is the absolute error. NaN where sd is negative.
    """
    error = y - mean
    sd = torch.where(sd < 0, torch.nan, sd)
    z = torch.where(error == 0, 0.0, error / sd)  # not 0 / 0: a sure prediction that is right
    pdf = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return error * torch.erf(z / math.sqrt(2)) + sd * (2 * pdf - 1 / math.sqrt(math.pi))  # erf(z / √2) = 2 Φ(z) − 1


def interval_coverage(lower: Tensor, upper: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Share of each task's points inside [lower, upper], ``(T,)``, 0 to 1; all arguments ``(T, N)``. A NaN bound covers nothing."""
    return task_mean(((lower <= y) & (y <= upper)).to(lower.dtype), mask)


def interval_width(lower: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
    """Mean width of each task's intervals, ``(T,)``, in units of y."""
    return task_mean(upper - lower, mask)
