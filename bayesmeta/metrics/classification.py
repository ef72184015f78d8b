"""Scores of predicted class probabilities ``probs (T, N, C)`` for labels ``y (T, N)``, integers in 0…C−1 where ``mask (T, N)``."""

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
    """Share of each task's points whose most probable class is right, ``(T,)``. Points with a NaN probability are wrong."""
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
    """Σ_b n_b / n |accuracy_b − confidence_b| (Naeini et al. 2015; Guo et al. 2017, eq. 3), ``()``; adaptive with ``equal_mass``.

    NaN where there is no point, or NaN at one.
    """
    gaps, counts = _gaps(probs, y, mask, bins=bins, equal_mass=equal_mass)
    return (counts * gaps).sum() / counts.sum()


def maximum_calibration_error(probs: Tensor, y: Tensor, mask: Tensor, *, bins: int = 15) -> Tensor:
    """The largest gap of a bin that is not empty (Guo et al. 2017, eq. 5), ``()``; NaN as `expected_calibration_error`."""
    gaps, _ = _gaps(probs, y, mask, bins=bins, equal_mass=False)
    return gaps.max()


def _gaps(probs: Tensor, y: Tensor, mask: Tensor, *, bins: int, equal_mass: bool) -> tuple[Tensor, Tensor]:
    """|accuracy − confidence|, 0 in an empty bin, and points of each bin, ``(B,)`` each; all gaps NaN where there is nothing to score."""
    broken = probs.isnan().any(-1)
    r = reliability_curve(torch.where(broken[..., None], 0.0, probs), y, mask, bins=bins, equal_mass=equal_mass)
    gaps = torch.where(r.counts > 0, (r.accuracy - r.confidence).abs(), 0.0)
    return torch.where((broken & mask).any() | ~mask.any(), torch.nan, gaps), r.counts


def _labels(probs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """``y`` with 0 in the padding."""
    if not probs.shape[:-1] == y.shape == mask.shape or mask.dtype != torch.bool:
        got = f"{tuple(probs.shape)}, {tuple(y.shape)} and {mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"expected probs (T, N, C), y (T, N) and a bool mask (T, N), got {got}")
    labels, classes = torch.where(mask, y, 0).long(), probs.shape[-1]
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"y: expected labels from 0 to {classes - 1}, got some from {int(labels.min())} to {int(labels.max())}")
    return labels
