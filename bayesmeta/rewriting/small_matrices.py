"""Cholesky's factor, and solving with it, of matrices of up to 3 × 3 as plain operations, which a compiled graph fuses over all tasks.

A graph with a library's factor in it calls all its kernels from Python. Signatures are those of torch's operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 3


def cholesky_ex(a: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """L ``(..., n, n)`` with L Lᵀ = A, its transpose where ``upper``, and ``(...)``: 0, or which pivot is not positive and finite first.

    From that pivot on L is NaN. ``check_errors`` is left to who reads the number.
    """
    n, zero = a.shape[-1], torch.zeros_like(a[..., 0, 0])
    factor = [[zero] * n for _ in range(n)]
    info = torch.zeros_like(zero, dtype=torch.int32)
    for j in range(n):
        pivot = a[..., j, j] - sum((factor[j][k].square() for k in range(j)), zero)
        fine = (pivot > 0) & pivot.isfinite()
        info = torch.where((info == 0) & ~fine, j + 1, info)
        factor[j][j] = torch.where(fine, pivot, torch.nan).sqrt()
        for i in range(j + 1, n):
            rest = a[..., j, i] if upper else a[..., i, j]
            factor[i][j] = (rest - sum((factor[i][k] * factor[j][k] for k in range(j)), zero)) / factor[j][j]
    rows = zip(*factor, strict=True) if upper else factor
    return torch.stack([torch.stack(list(row), -1) for row in rows], -2), info


def solve_triangular(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Tensor:
    """X with A X = B, where ``left``, else X A = B, by substitution."""
    if not left:
        return solve_triangular(a.mT, b.mT, upper=not upper, unitriangular=unitriangular).mT
    n, rows = a.shape[-1], dict[int, Tensor]()
    for i in reversed(range(n)) if upper else range(n):
        rest = b[..., i, :]
        for j, row in rows.items():
            rest = rest - a[..., i, j, None] * row
        rows[i] = rest if unitriangular else rest / a[..., i, i, None]
    return torch.stack(torch.broadcast_tensors(*(rows[i] for i in range(n))), -2)


def cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    """X with L Lᵀ X = B; ``factor`` is Lᵀ where ``upper``."""
    lower = factor.mT if upper else factor
    return solve_triangular(lower.mT, solve_triangular(lower, b, upper=False), upper=True)


def cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    """(L Lᵀ)⁻¹; ``factor`` is Lᵀ where ``upper``."""
    return cholesky_solve(torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor), factor, upper)
