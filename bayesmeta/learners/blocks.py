"""A symmetric matrix over φ in blocks, for each task: determinants, solving with it, raising its eigenvalues, the Normal it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class Block(NamedTuple):
    """A block of a precision or curvature of ``T`` tasks: rows and columns ``where``, ``(T, d, d)``, or its diagonal ``(T, d)``.

    ``curved``: False where the likelihood's curvature was left out.
    """

    where: slice
    matrix: Tensor
    curved: bool = True


def plus(blocks: Sequence[Block], precision: Tensor) -> list[Block]:
    """``blocks`` and a precision ``(T, D)`` or ``(T, D, D)``; what the latter has outside of the blocks is left out."""
    return [block._replace(matrix=block.matrix + _cut(precision, block)) for block in blocks]


def floored(blocks: Sequence[Block], sd: Tensor, least: float) -> list[Block]:
    """``blocks`` with no eigenvalue below ``least``, φ taken in units of ``sd (T, D)``: positive definite.

    A task without such an eigenvalue keeps its blocks as they are, to the last bit; in the others what drowns in rounding counts too.
    Differentiable once.
    """
    return [b._replace(matrix=_floored(b.matrix, sd[:, b.where], least)) for b in blocks]


def log_determinant(blocks: Sequence[Block]) -> Tensor:
    """log det of the block-diagonal matrix, ``(T,)``; NaN for a task where it is not positive definite."""
    return torch.stack([2 * _factor(b.matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1) if b.matrix.dim() == 3 else b.matrix.log().sum(-1)
                        for b in blocks]).sum(0)  # fmt: skip


def newton_step(blocks: Sequence[Block], gradient: Tensor) -> Tensor:
    """P⁻¹ g, ``(T, D)``, for ``gradient (T, D)``; 0 for entries that the likelihood's curvature leaves out."""
    steps = []
    for block in blocks:
        g = gradient[:, block.where]
        if not block.curved:
            steps.append(torch.zeros_like(g))
        elif block.matrix.dim() == 3:
            steps.append(torch.cholesky_solve(g[..., None], _factor(block.matrix))[..., 0])
        else:
            steps.append(g / block.matrix)
    return torch.cat(steps, -1)


def normal(mean: Tensor, blocks: Sequence[Block]) -> Any:
    """N(mean, P⁻¹), P of ``blocks`` that cover φ in order: a Normal for one diagonal, a MultivariateNormal for one matrix, a `BlockNormal`.

    Not validated: a task that has diverged is NaN of its own.
    """
    parts = [_part(mean[:, b.where], b.matrix.rsqrt() if b.matrix.dim() == 2 else _scale_tril(b.matrix)) for b in blocks]
    return parts[0] if len(parts) == 1 else BlockNormal(parts)


class BlockNormal(dist.TorchDistribution):
    """Independent ``parts`` behind each other, each a Normal or MultivariateNormal with batch ``(T,)``, event ``(d,)``: event ``(D,)``."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        self._sizes = [part.event_shape[0] for part in self.parts]
        super().__init__(parts[0].batch_shape, torch.Size((sum(self._sizes),)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(T, D)``."""
        return torch.cat([part.mean for part in self.parts], -1)

    @property
    def variance(self) -> Tensor:
        """``(T, D)``."""
        return torch.cat([part.variance for part in self.parts], -1)

    @property
    def covariance_matrix(self) -> Tensor:
        """``(T, D, D)``, written out: zeros between the parts."""
        whole = self.mean.new_zeros(*self.batch_shape, *self.event_shape * 2)
        start = 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            where = slice(start, start := start + size)
            whole[..., where, where] = getattr(part, "covariance_matrix", torch.diag_embed(part.variance))
        return whole

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own default
        """Draws ``(*sample_shape, T, D)``, differentiable."""
        return torch.cat([part.rsample(sample_shape) for part in self.parts], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*S, T, D)`` to ``(*S, T)``."""
        return torch.stack([part.log_prob(v) for part, v in zip(self.parts, value.split(self._sizes, -1), strict=True)]).sum(0)

    def select(self, tasks: Tensor) -> BlockNormal:
        """The chosen tasks."""
        return BlockNormal([_part(p.mean[tasks], p.scale_tril[tasks] if hasattr(p, "scale_tril") else p.stddev[tasks]) for p in self.parts])


def _floored(matrix: Tensor, sd: Tensor, least: float) -> Tensor:
    if matrix.dim() == 2:
        return torch.maximum(matrix, _least(least, matrix) * sd**-2)
    floored: Tensor = _raised(matrix, sd[:, :, None] * sd[:, None, :], least)
    return floored


# Which tasks need it hangs on values: an operation of its own, so that a step with it can be written down as a graph.
@torch.library.custom_op("bayesmeta::raised", mutates_args=())
def _raised(matrix: Tensor, units: Tensor, least: float) -> Tensor:
    """``matrix (T, d, d)``, in the tasks where ``matrix * units`` has an eigenvalue below ``least`` with those raised to it."""
    low, raised = _low(matrix * units, least), matrix.clone(memory_format=torch.contiguous_format)
    if len(low):
        values, vectors, floor = _eigen((matrix * units)[low], least)
        raised[low] = (vectors * torch.maximum(values, floor)[:, None, :]) @ vectors.mT / units[low]
    return raised


@torch.library.custom_op("bayesmeta::raised_backward", mutates_args=())
def _raised_backward(gradient: Tensor, matrix: Tensor, units: Tensor, raised: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """V (K ∘ Vᵀ G V) Vᵀ, K the divided differences of max(λ, floor) (Daleckii & Krein 1965), in ``matrix`` and ``units``.

    Its own derivative, because that of eigenvectors does not exist where eigenvalues are equal.
    """
    low, in_units = _low(matrix * units, least), units.new_zeros(units.shape)
    in_matrix = gradient.clone(memory_format=torch.contiguous_format)
    if len(low):
        g = gradient[low] / units[low]
        values, vectors, floor = _eigen((matrix * units)[low], least)
        above = values > floor
        row, column = above[:, :, None], above[:, None, :]
        high = torch.maximum(values[:, :, None], values[:, None, :])
        distance = torch.where(row ^ column, (values[:, :, None] - values[:, None, :]).abs(), torch.ones_like(high))
        slope = torch.where(row & column, 1.0, torch.where(row ^ column, (high - floor[..., None]) / distance, 0.0))
        scaled = vectors @ (slope * (vectors.mT @ ((g + g.mT) / 2) @ vectors)) @ vectors.mT
        in_matrix[low], in_units[low] = scaled * units[low], scaled * matrix[low] - g * raised[low]
    return in_matrix, in_units


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    matrix, units, ctx.least = inputs
    ctx.save_for_backward(matrix, units, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_raised_backward(gradient, *ctx.saved_tensors, ctx.least), None


_raised.register_autograd(_backward, setup_context=_keep)
_raised.register_fake(lambda matrix, units, least: matrix.new_empty(matrix.shape))
_raised_backward.register_fake(lambda g, matrix, units, raised, least: (matrix.new_empty(matrix.shape), units.new_empty(units.shape)))


def _low(scaled: Tensor, least: float) -> Tensor:
    """Which tasks have an eigenvalue below ``least``: a factor is far cheaper than eigenvalues. One that has diverged stays NaN."""
    eye = torch.eye(scaled.shape[-1]).to(scaled)
    return (torch.linalg.cholesky_ex(torch.where(_finite(scaled), scaled, (1 + least) * eye) - least * eye)[1] != 0).nonzero()[:, 0]


def _eigen(scaled: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors, and ``least`` or rounding where that is larger."""
    values, vectors = torch.linalg.eigh(scaled)
    floor = (torch.finfo(scaled.dtype).eps * values.abs().amax(-1, keepdim=True)).clamp(min=_least(least, scaled))
    return values, vectors, floor


def _least(least: float, like: Tensor) -> float:
    return max(least, torch.finfo(like.dtype).tiny)  # 0 has no logarithm


def _finite(matrix: Tensor) -> Tensor:
    return matrix.isfinite().all(-1).all(-1)[:, None, None]


def _factor(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor ``(T, d, d)``; NaN for a task that has none, so that it does not stop the others."""
    finite = _finite(matrix)
    factor, failed = torch.linalg.cholesky_ex(torch.where(finite, matrix, torch.eye(matrix.shape[-1]).to(matrix)))
    return torch.where(finite & (failed == 0)[:, None, None], factor, torch.nan)


def _scale_tril(precision: Tensor) -> Tensor:
    """The lower Cholesky factor of the inverse, from the upper one of the precision itself: the inverse is never formed."""
    upper = _factor(precision.flip(-2, -1)).flip(-2, -1)
    return torch.linalg.solve_triangular(upper.mT, torch.eye(precision.shape[-1]).to(precision), upper=False)


def _part(mean: Tensor, scale: Tensor) -> Any:
    if scale.dim() == 2:
        return dist.Normal(mean, scale, validate_args=False).to_event(1)
    return dist.MultivariateNormal(mean, scale_tril=scale, validate_args=False)


def _cut(precision: Tensor, block: Block) -> Tensor:
    diagonal = block.matrix.dim() == 2
    if precision.dim() == 2:
        return precision[:, block.where] if diagonal else torch.diag_embed(precision[:, block.where])
    cut = precision[:, block.where, block.where]
    return cut.diagonal(dim1=-2, dim2=-1) if diagonal else cut
