"""Steps in φ: gradient descent, curvature, Newton. Pure functions of tensors, all tasks at once, differentiable where said."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..inner_loop import Values, repeat


def descend(
    loss: Callable[..., Tensor], start: Values, step_sizes: list[Tensor | float], *, first_order: bool = False, keep_graph: bool = True,
    first: int = 0,
) -> Values:  # fmt: skip
    """Gradient descent, one step for each of ``step_sizes``: v ← v − α_k ∇ loss(v).

    ``loss`` maps the ``start`` tensors, each ``(*S, T, ·)``, to ``(*S, T)``; its sum's gradient is every task's own. Second order
    differentiates through every step; ``first_order`` takes the gradients as constants; ``keep_graph=False`` cuts the result
    off from ``start`` altogether (adaptation without learning). ``first``: the first step's number (`bayesmeta.inner_loop.repeat`).
    """

    def step(values: Values, alpha: Tensor | float) -> Values:
        with torch.enable_grad():
            values = tuple(v if v.requires_grad else v.requires_grad_() for v in values)
            gradients = torch.autograd.grad(loss(*values).sum(), values, create_graph=keep_graph and not first_order)
        values = tuple(v - alpha * g for v, g in zip(values, gradients, strict=True))
        return values if keep_graph else tuple(v.detach() for v in values)

    return repeat(step, start if keep_graph else tuple(v.detach() for v in start), step_sizes, whole=not keep_graph, first=first)


def derivatives(f: Callable[[Tensor], Tensor], phi: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``(T,)``, gradient ``(T, D)`` and Hessian ``(T, D, D)`` of ``f: (T, D) -> (T,)`` at ``phi``, task by task.

    One backward pass for each of the D rows, all tasks at once. ``create_graph``: keep them differentiable in θ.
    """
    with torch.enable_grad():
        phi = phi if phi.requires_grad else phi.detach().requires_grad_()
        value = f(phi)
        (gradient,) = torch.autograd.grad(value.sum(), phi, create_graph=True)
        rows = [_row(gradient[:, d], phi, create_graph) for d in range(phi.shape[-1])]
    hessian = torch.stack(rows, -2)
    hessian = (hessian + hessian.mT) / 2
    return (value, gradient, hessian) if create_graph else (value.detach(), gradient.detach(), hessian.detach())


def _row(column: Tensor, phi: Tensor, create_graph: bool) -> Tensor:
    if not column.requires_grad:  # f is linear in φ
        return torch.zeros_like(phi)
    (row,) = torch.autograd.grad(column.sum(), phi, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(phi) if row is None else row


def newton(loss: Callable[[Tensor], Tensor], start: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Minimises ``loss: (T, D) -> (T,)`` by Newton steps with a pseudo-inverse, halved until the loss falls.

    A direction without curvature is not moved, so from ``start`` a quadratic is solved in one step by the minimum of least
    distance to ``start``. A task stops where the fall that is promised drowns in rounding. Returns φ ``(T, D)`` and the Hessian
    there. Negative curvature is taken by its size.
    """
    phi = start.detach()
    value, gradient, hessian = derivatives(loss, phi)
    for _ in range(steps):
        step = -(pseudo_inverse(hessian) @ gradient[..., None])[..., 0]
        promised = -(gradient * step).sum(-1) / 2
        going = promised > 8 * torch.finfo(phi.dtype).eps * (1 + value.abs())
        if not bool(going.any()):
            break
        scale = going.to(phi.dtype)
        for _ in range(20):
            with torch.no_grad():
                worse = going & ~(loss(phi + scale[:, None] * step) <= value)
            if not bool(worse.any()):
                break
            scale = torch.where(worse, scale / 2, scale)
        phi = phi + torch.where(worse, 0.0, scale)[:, None] * step
        value, gradient, hessian = derivatives(loss, phi)
    return phi, hessian


def eigenvalue_cut(hessian: Tensor) -> Tensor:
    """The size ``(T, 1)`` under which an eigenvalue of ``hessian (T, D, D)`` counts as no curvature (rounding)."""
    largest = torch.linalg.eigvalsh(hessian.detach()).abs().amax(-1, keepdim=True)
    return hessian.shape[-1] * 10 * torch.finfo(hessian.dtype).eps * largest


def pseudo_inverse(hessian: Tensor) -> Tensor:
    """|H|⁺: eigenvalues by their size, directions without curvature left out; ``(T, D, D)``."""
    values, vectors = torch.linalg.eigh(hessian)
    cut = eigenvalue_cut(hessian)
    inverse = torch.where(values.abs() > cut, 1 / values.abs().clamp(min=torch.finfo(values.dtype).tiny), 0.0)
    return (vectors * inverse[..., None, :]) @ vectors.mT


def log_pseudo_determinant(hessian: Tensor) -> Tensor:
    """Σ log of the eigenvalues with curvature, ``(T,)``, differentiable; 0 for a task without any."""
    values = torch.linalg.eigvalsh(hessian)
    keep = values > eigenvalue_cut(hessian)
    return torch.where(keep, torch.where(keep, values, torch.ones_like(values)).log(), 0.0).sum(-1)


def adam(loss: Callable[[Tensor], Tensor], start: Tensor, *, steps: int, lr: float) -> Tensor:
    """``steps`` of Adam (Kingma & Ba 2015) on ``loss: (T, D) -> (T,)`` from ``start``; the result carries no gradient."""
    phi = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([phi], lr)
    for _ in range(steps):
        with torch.enable_grad():
            (phi.grad,) = torch.autograd.grad(loss(phi).sum(), phi)
        optimiser.step()
    return phi.detach()
