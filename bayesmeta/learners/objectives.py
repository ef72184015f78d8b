"""Objectives that several learners share: functions of a model, φ and points, one value a task."""

from __future__ import annotations

import torch
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


def class_members(support: Points, num_classes: int, learner: str, *, check: bool = True) -> Tensor:
    """Which real point is of which class, ``(T, N, C)`` bool.

    ``check``: raises ValueError naming task and class where a class has no point: it then has no place in the embedding.
    """
    assert support.y is not None
    y = support.y[..., 0] if support.y.dim() == 3 else support.y
    members = (y[..., None] == torch.arange(num_classes, device=y.device)) & support.mask[..., None]
    empty = ~members.any(1)
    if check and bool(empty.any()):
        task, label = (int(i) for i in empty.nonzero()[0])
        raise ValueError(
            f"{learner}: support: task {task} has no point of class {label}: expected one or more of each of the {num_classes} classes"
        )
    return members
