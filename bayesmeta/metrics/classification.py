"""Scores of predicted class probabilities ``probs (T, N, C)`` for labels ``y (T, N)``, integers in 0…C−1 where ``mask (T, N)``.

A ValueError says which shape, label or number of bins is wrong. Calibration is that of the top class, points pooled over tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .intervals import task_mean


class Reliability(NamedTuple):
    """A reliability diagram: mean confidence, accuracy and number of points of each bin ``(B,)`` (NaN where empty), edges ``(B + 1,)``."""

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor
    edges: Tensor


def accuracy(probs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Share of each task's points whose most probable class is right, ``(T,)``, 0 to 1. Points with a NaN probability are wrong."""
    correct = (probs.argmax(-1) == _labels(probs, y, mask)) & ~probs.isnan().any(-1)
    return task_mean(correct.to(probs.dtype), mask)


def brier(probs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Brier score of each task, ``(T,)``, 0 (perfect) to 2: Σ_c (p_c − [y = c])² (Brier 1950), mean over points."""
    truth = torch.nn.functional.one_hot(_labels(probs, y, mask), probs.shape[-1]).to(probs.dtype)
    return task_mean(((probs - truth) ** 2).sum(-1), mask)


def reliability_curve(probs: Tensor, y: Tensor, mask: Tensor, *, bins: int = 15, equal_mass: bool = False) -> Reliability:
    """Confidence of the top class against how often it is right, points pooled over tasks.

    Bins of equal width on [0, 1], or with ``equal_mass`` of equal numbers of points, as nearly as equal confidences, which
    share a bin, allow. Bins are closed above. Raises ValueError for NaN at a real point, which belongs in no bin.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    labels = _labels(probs, y, mask)[mask]
    confidence, top = probs[mask].max(-1)
    if bool(confidence.isnan().any()):
        raise ValueError("probs: expected numbers, got NaN at a real point")
    edges = torch.linspace(0, 1, bins + 1, dtype=probs.dtype, device=probs.device)
    if equal_mass and len(confidence):
        edges = torch.quantile(confidence, edges)
    which = torch.bucketize(confidence, edges[1:-1])
    counts = torch.bincount(which, minlength=bins)
    none = torch.zeros(bins, dtype=torch.float64, device=probs.device)
    sums = [none.index_add(0, which, v.double()) for v in (confidence, top == labels)]
    return Reliability((sums[0] / counts).to(probs.dtype), (sums[1] / counts).to(probs.dtype), counts, edges)


def expected_calibration_error(probs: Tensor, y: Tensor, mask: Tensor, *, bins: int = 15, equal_mass: bool = False) -> Tensor:
    """Σ_b n_b / n |accuracy_b − confidence_b| (Naeini et al. 2015; Guo et al. 2017, eq. 3), ``()``, 0 (ideal) to 1.

    NaN where there is no point, or NaN at one.
    """
    r = _scored(probs, y, mask, bins=bins, equal_mass=equal_mass)
    return (r.counts * (r.accuracy - r.confidence).abs()).sum() / r.counts.sum()


def adaptive_calibration_error(probs: Tensor, y: Tensor, mask: Tensor, *, bins: int = 15) -> Tensor:
    """`expected_calibration_error` over bins of equal numbers of points (Nguyen & O'Connor 2015), ``()``, 0 to 1.

    Of the top class; the ACE of Nixon et al. 2019 averages over all classes.
    """
    return expected_calibration_error(probs, y, mask, bins=bins, equal_mass=True)


def debiased_calibration_error(
    probs: Tensor, y: Tensor, mask: Tensor, *, bins: int = 15, equal_mass: bool = True, squared: bool = False
) -> Tensor:
    """Root mean square gap of the bins, less what chance alone puts there, ``()``, 0 (ideal) to 1: √max(E, 0), or E if ``squared``.

    E = Σ_b n_b / n [(accuracy_b − confidence_b)² − accuracy_b (1 − accuracy_b) / (n_b − 1)], the debiased estimator of Kumar et
    al. 2019 (from Bröcker 2012; Ferro & Fricker 2012). E is unbiased, hence below 0 about every other time for a calibrated
    predictive, if the points of a bin share one confidence; if not, it is low by the variance of theirs over n_b for such a one.

    A bin of one point tells nothing of its variance: it is left out of the sum and of n. NaN where no bin has two points, or
    there is NaN at one.
    """
    r = _scored(probs, y, mask, bins=bins, equal_mass=equal_mass)
    chance = r.accuracy * (1 - r.accuracy) / (r.counts - 1)
    several = r.counts > 1
    gaps, counts = ((r.accuracy - r.confidence) ** 2 - chance)[several], r.counts[several]
    error = (counts * gaps).sum() / counts.sum()
    return error if squared else error.clamp(min=0).sqrt()


def maximum_calibration_error(probs: Tensor, y: Tensor, mask: Tensor, *, bins: int = 15) -> Tensor:
    """The largest gap of a bin that is not empty (Guo et al. 2017, eq. 5), ``()``, 0 to 1; NaN as `expected_calibration_error`."""
    r = _scored(probs, y, mask, bins=bins, equal_mass=False)
    return (r.accuracy - r.confidence).abs().max()


def _scored(probs: Tensor, y: Tensor, mask: Tensor, *, bins: int, equal_mass: bool) -> Reliability:
    """`reliability_curve` without a gap in empty bins, and with accuracy NaN throughout where there is nothing to score."""
    broken = probs.isnan().any(-1)
    r = reliability_curve(torch.where(broken[..., None], 0.0, probs), y, mask, bins=bins, equal_mass=equal_mass)
    confidence, accuracy = (torch.where(r.counts > 0, part, 0.0) for part in (r.confidence, r.accuracy))
    nothing = (broken & mask).any() | ~mask.any()
    return r._replace(confidence=confidence, accuracy=torch.where(nothing, torch.nan, accuracy))


def _labels(probs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """``y`` with 0 in the padding."""
    if not probs.shape[:-1] == y.shape == mask.shape or mask.dtype != torch.bool:
        got = f"{tuple(probs.shape)}, {tuple(y.shape)} and {mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"expected probs (T, N, C), y (T, N) and a bool mask (T, N), got {got}")
    labels, classes = torch.where(mask, y, 0).long(), probs.shape[-1]
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"y: expected labels from 0 to {classes - 1}, got some from {int(labels.min())} to {int(labels.max())}")
    return labels
