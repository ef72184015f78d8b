"""Stein variational gradient descent (Liu & Wang 2016, algorithm 1): pure functions, all tasks at once, differentiable.

    φ_m ← φ_m + ε/M Σ_n [ k(φ_n, φ_m) ∇ log p(φ_n) + ∇_{φ_n} k(φ_n, φ_m) ]      (eq. 8)
    k(a, b) = exp( −Σ_d (a_d − b_d)² / h_d )

The kernel is over the whole flattened particle of a task. Its bandwidth h carries no gradient:

    "scalar"          h = median over pairs of ‖φ_m − φ_n‖² / log(M + 1), the same for every d
    "per_dimension"   h_d = median over pairs of (φ_m,d − φ_n,d)² / log(M + 1), as `pyro.infer.RBFSteinKernel` has it
    a number          h, fixed

A single particle has k = 1 and no bandwidth: gradient ascent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..inner_loop import Values, repeat

BANDWIDTHS = ("scalar", "per_dimension")
# The smallest h, in squared units of φ: particles that coincide would divide 0 by 0.
FLOOR = 1e-8


def checked_bandwidth(value: str | float) -> str | float:
    """``value`` where it is one of `BANDWIDTHS` or a positive number, else ValueError."""
    if isinstance(value, bool) or not (value in BANDWIDTHS if isinstance(value, str) else 0 < value < math.inf):
        raise ValueError(f"bandwidth: expected 'scalar', 'per_dimension' or a positive number, got {value!r}")
    return value


def bandwidth_of(particles: Tensor, kind: str | float) -> Tensor:
    """h of ``particles (M, T, D)``, M > 1: ``(T, 1)``, or ``(T, D)`` for "per_dimension"; a constant for autograd.

    Of an even number of pairs the median is the lower one of the two in the middle, as in Pyro.
    """
    particles = particles.detach()
    if not isinstance(kind, str):
        return particles.new_full((particles.shape[1], 1), kind)
    first, second = torch.triu_indices(len(particles), len(particles), 1, device=particles.device)
    if kind == "scalar":
        squares = _squared_distances(particles)[:, first, second].mT[..., None]
    else:
        squares = (particles[first] - particles[second]).square()
    return (squares.median(0).values / math.log(len(particles) + 1)).clamp(min=FLOOR)


def kernel(particles: Tensor, h: Tensor) -> Tensor:
    """k(φ_m, φ_n) of ``particles (M, T, D)`` under ``h (T, 1)`` or ``(T, D)``: ``(T, M, M)``, 1 on the diagonal."""
    if h.shape[-1] == 1:
        return (-_squared_distances(particles) / h[..., None]).exp()
    return (-_squared_distances(particles / h.sqrt())).exp()


def direction(particles: Tensor, score: Tensor, bandwidth: str | float = "scalar") -> Tensor:
    """φ*(φ_m) = 1/M Σ_n [k ∇ log p(φ_n) + ∇ k] of ``particles`` with gradients ``score``, all ``(M, T, D)``.

    ∇_{φ_n} k(φ_n, φ_m) = 2/h (φ_m − φ_n) k(φ_n, φ_m), so the sum is k (∇ log p − 2/h φ) + 2/h φ Σ_n k: one product with k.
    """
    if len(particles) == 1:
        return score
    h = bandwidth_of(particles, bandwidth)
    k = kernel(particles, h)
    away = 2 / h * _centred(particles)
    return ((k @ (score - away).transpose(0, 1)).transpose(0, 1) + k.sum(-1).mT[..., None] * away) / len(particles)


def transport(
    log_density: Callable[[Tensor], Tensor], start: Tensor, *, steps: int, step_size: float, bandwidth: str | float = "scalar",
    first_order: bool = False, keep_graph: bool = True, first: int = 0,
) -> Tensor:  # fmt: skip
    """``steps`` Stein steps of size ε = ``step_size`` from ``start (M, T, D)`` on ``log_density: (M, T, D) -> (M, T)``.

    Second order differentiates through every step; ``first_order`` takes every step as a constant, so that the result moves as
    ``start`` does; ``keep_graph=False`` cuts the result off from ``start`` altogether. ``first``: the first step's number.
    """
    second_order = keep_graph and not first_order

    def step(values: Values, size: float) -> Values:
        (phi,) = values
        with torch.enable_grad():
            phi = phi if phi.requires_grad else phi.requires_grad_()
            (score,) = torch.autograd.grad(log_density(phi).sum(), phi, create_graph=second_order)
        move = size * direction(phi if second_order else phi.detach(), score, bandwidth)
        return ((phi if keep_graph else phi.detach()) + move,)

    (phi,) = repeat(step, (start if keep_graph else start.detach(),), [step_size] * steps, whole=not keep_graph, first=first)
    return phi


def _centred(particles: Tensor) -> Tensor:
    return particles - particles.mean(0)  # only differences count, and these lose no digits


def _squared_distances(particles: Tensor) -> Tensor:
    """‖φ_m − φ_n‖², ``(T, M, M)``: multiplied out, as ``(M, M, T, D)`` would be large."""
    centred = _centred(particles).transpose(0, 1)
    gram = centred @ centred.mT
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return squares[..., :, None] + squares[..., None, :] - 2 * gram
