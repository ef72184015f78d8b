"""Distances between posteriors over φ, task by task."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_wasserstein2(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """2-Wasserstein distance of Normals, ``(T,)``, in units of φ; means ``(T, D)``, covariances ``(T, D, D)`` (Dowson & Landau 1982).

    Covariances may be singular (that of a Delta is 0). NaN for a task with NaN or inf among its numbers.
    """
    m1, c1, m2, c2 = _double(mean1, cov1, mean2, cov2)
    root = _square_root(c1)
    cross = _square_root(root @ c2 @ root)
    trace = (c1 + c2 - 2 * cross).diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((m1 - m2).square().sum(-1) + trace.clamp(min=0)).sqrt().to(mean1.dtype)


def gaussian_kl(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """KL(N₁ ‖ N₂) in nats, ``(T,)``, shapes as in `gaussian_wasserstein2`; NaN for a task where one of them has no density.

    ½ [tr(Σ₂⁻¹ Σ₁) + (μ₂ − μ₁)ᵀ Σ₂⁻¹ (μ₂ − μ₁) − D + log |Σ₂| − log |Σ₁|], by Cholesky factors.
    """
    m1, c1, m2, c2 = _double(mean1, cov1, mean2, cov2)
    (root1, failed1), (root2, failed2) = torch.linalg.cholesky_ex(c1), torch.linalg.cholesky_ex(c2)
    ratio = torch.linalg.solve_triangular(root2, root1, upper=False)
    shift = torch.linalg.solve_triangular(root2, (m2 - m1)[..., None], upper=False)
    squares = ratio.square().sum((-2, -1)) + shift.square().sum((-2, -1)) - m1.shape[-1]
    log_volumes = (root2.diagonal(dim1=-2, dim2=-1).log() - root1.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    return torch.where((failed1 > 0) | (failed2 > 0), torch.nan, squares / 2 + log_volumes).to(mean1.dtype)


def sd_ratio(draws: Tensor, reference_draws: Tensor) -> Tensor:
    """sd of ``draws (S, T, D)`` over sd of ``reference_draws (S', T, D)``, ``(T, D)``; below 1 is overconfident.

    A ValueError where there are fewer than 2 of either, or their ``(T, D)`` differ.
    """
    if min(len(draws), len(reference_draws)) < 2:
        raise ValueError(f"expected at least 2 draws of each, got {len(draws)} and {len(reference_draws)} of the reference")
    if draws.shape[1:] != reference_draws.shape[1:]:
        got = f"{tuple(draws.shape)} and {tuple(reference_draws.shape)}"
        raise ValueError(f"expected draws (S, T, D) of the same tasks and parameters, got {got}")
    return draws.std(0) / reference_draws.std(0)


def _double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)  # the differences below cancel: of equal Normals only √eps of the sd is left


def _square_root(matrix: Tensor) -> Tensor:
    broken = ~matrix.isfinite().all(-1).all(-1)[..., None, None]  # eigh would fail, for every task
    values, vectors = torch.linalg.eigh(torch.where(broken, 0.0, matrix))
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    return torch.where(broken, torch.nan, root)
