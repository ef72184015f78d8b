"""Where data leave several explanations open: how many of them do the draws of a posterior hold?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .intervals import check_mask


class ModeCoverage(NamedTuple):
    """Which explanations the draws hold: ``shares (M, T)`` of the draws are of each, ``covered (T,)`` is the fraction of them found."""

    covered: Tensor
    shares: Tensor


def mode_coverage(
    draws: Tensor, modes: Tensor, mask: Tensor, *, tolerance: float | Tensor = torch.inf, least: float = 0.05,
    present: Tensor | None = None,
) -> ModeCoverage:  # fmt: skip
    """Fraction of the ``modes (M, T, N)`` of each task that ``draws (S, T, N)`` of its curve cover.

    A draw is of the mode that it is nearest to in root mean square over the task's points ``mask (T, N)``, where that is at most
    ``tolerance`` (in units of y; a number, or one a task ``(T,)``), else of none: it lies between the modes, or elsewhere. A mode is
    covered where at least ``least`` of all draws are of it. A draw as near to two modes is of both, so that coinciding modes are
    not held against it. Choose the tolerance below half the distance of the modes, and ``least`` well above 1 / S.

    ``present (M, T)`` bool says which modes a task has (those that its support leaves open): the others take no draws, and their share is
    0. NaN for a task without points or modes. A draw with a NaN or inf is of no mode. ValueError where shapes disagree.

    The coverage of Finn, Xu & Levine (2018) is this with the labellings of each attribute as modes.
    """
    if draws.dim() != 3 or modes.dim() != 3 or draws.shape[1:] != modes.shape[1:]:
        raise ValueError(f"expected draws (S, T, N) and modes (M, T, N), got {tuple(draws.shape)} and {tuple(modes.shape)}")
    if not 0 < least <= 1:
        raise ValueError(f"least: expected a share of the draws in (0, 1], got {least}")
    present = torch.ones(modes.shape[:2], dtype=torch.bool, device=modes.device) if present is None else present
    if present.shape != modes.shape[:2] or present.dtype != torch.bool:
        raise ValueError(f"present: expected bool of shape (M, T) = {tuple(modes.shape[:2])}, got {present.dtype} {tuple(present.shape)}")
    check_mask(draws[0], mask)
    # one mode at a time: (M, S, T, N) would be large
    distance = torch.stack([torch.where(mask, draws - mode, 0.0).square().sum(-1) for mode in modes]) / mask.sum(-1)
    distance = torch.where(present[:, None] & distance.isfinite(), distance.sqrt(), torch.inf)  # (M, S, T)
    near = (distance <= distance.amin(0)) & (distance <= torch.as_tensor(tolerance).to(distance)) & distance.isfinite()
    shares = near.to(draws.dtype).mean(1)
    found = ((shares >= least) & present).sum(0).to(draws.dtype) / present.sum(0)  # 0 / 0 is NaN: a task without modes
    empty = ~mask.any(-1)
    return ModeCoverage(torch.where(empty, torch.nan, found), torch.where(empty, torch.nan, shares))


def label_coverage(
    draws: Tensor, truth: Tensor, mask: Tensor, *, possible: float = 0.1, least: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Of two-class tasks, the same point by point: labels that the truth leaves open and draws give, and draws give and it leaves open.

    ``draws (S, T, N)``: P(y = 1) under each draw, which so gives label 1 where it is above ½. ``truth (T, N)``: the exact predictive.
    A label is open at a point where its exact probability is at least ``possible``, and given where at least ``least`` of the draws give
    it. Returns, each ``(T,)``, over the task's points and both labels: the fraction of open labels that are given (low: the draws
    know too much), and the fraction of given labels that are open (low: they know too little, or what is wrong).

    NaN for a task without points; a draw of NaN gives no label, a NaN of the truth leaves none open. ValueError where shapes disagree.
    """
    if draws.dim() != 3 or draws.shape[1:] != truth.shape:
        raise ValueError(f"expected draws (S, T, N) and truth (T, N), got {tuple(draws.shape)} and {tuple(truth.shape)}")
    for name, value, top in (("possible", possible, 0.5), ("least", least, 1.0)):
        if not 0 < value <= top:
            raise ValueError(f"{name}: expected a number in (0, {top:g}], got {value}")
    check_mask(truth, mask)
    opened = torch.stack([1 - truth >= possible, truth >= possible]) & mask
    given = torch.stack([(draws <= 0.5).to(draws.dtype).mean(0), (draws > 0.5).to(draws.dtype).mean(0)])
    given = (given >= least) & mask
    both = (opened & given).sum((0, 2)).to(draws.dtype)
    return both / opened.sum((0, 2)), both / given.sum((0, 2))
