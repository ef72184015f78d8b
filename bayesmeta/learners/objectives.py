"""Objectives that several learners share: functions of a model, φ and points, one value a task."""

from __future__ import annotations

from torch import Tensor

from ..episodes import Points
from ..model import HierarchicalModel


def counts(points: Points) -> Tensor:
    """max(N_i, 1), ``(T,)``: what a mean over a task's points divides by."""
    return points.counts.clamp(min=1)


def mean_nll(model: HierarchicalModel, phi: Tensor, points: Points) -> Tensor:
    """−1/N_i Σ_j log p(y_ij | x_ij, φ_i), ``(*S, T)``; 0 for a task without points."""
    return -model.log_likelihood(phi, points) / counts(points)


def value_of(loss: Tensor, surrogate: Tensor) -> Tensor:
    """The value of ``loss`` with the gradient of ``surrogate``."""
    return loss.detach() + surrogate - surrogate.detach()
