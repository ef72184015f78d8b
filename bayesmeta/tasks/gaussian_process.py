"""Draws from Gaussian processes: the regression families of neural processes, with the exact answer beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from bayesmeta.episodes import Episode, Points
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import Size, check_prior, check_request, check_size, draw, draw_mask

KERNELS = ("rbf", "matern52", "periodic")
LENGTHS, AMPLITUDES = 24, 16  # Gauss-Legendre nodes of the two hyperparameters
BLOCK = 2**22  # numbers held at once


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianProcess:
    """f_i ~ GP(0, a² k(x, x′; l)), y_ij = f_i(x_ij) + σ ε_ij; every task has its own length scale l and amplitude a.

    ======================= ====== ===========================================================================
    argument                symbol
    ======================= ====== ===========================================================================
    kernel                  k      "rbf": exp(−d²/2l²); "matern52": (1 + s + s²/3) exp(−s), s = √5 d/l;
                                   "periodic": exp(−2 sin²(π d/p)/l²)
    length_scale, amplitude l, a   bounds ``(low, high)`` of uniforms, low > 0; a is the sd of f at one x
    period                  p      of the periodic kernel alone, the same in every task
    noise                   σ      standard deviation of the noise on y, > 0
    x_range                        bounds of the inputs, uniform
    num_support, num_query         points a task, or ``(low, high)``: a random number for each task, padded to ``high``
    dtype                          of the episodes; default torch's
    ======================= ====== ===========================================================================

    The defaults are those of the neural-process literature: x ∈ [−2, 2], l ~ U[0.6, 1), a ~ U[0.1, 1), σ = 0.02, 3 to 47 context points.
    A function of that family has no finite φ: what a task is has its hyperparameters in `sample_tasks`, and its function is drawn
    at the points asked for, jointly and exactly; `exact_posterior` is the posterior of the function at points asked for. A learner does not
    know l and a either, so that, `exact_predictive` and `log_evidence` integrate them out (Gauss-Legendre, to about 1e-4 nats and 1e-6
    in the mean); with ``tasks=`` they are given.

    Raises ValueError where an argument is out of its range.
    """

    num_tasks: ClassVar[None] = None
    target_scale: ClassVar[float] = 1.0

    kernel: str = "rbf"
    length_scale: tuple[float, float] = (0.6, 1.0)
    amplitude: tuple[float, float] = (0.1, 1.0)
    period: float = 1.0
    noise: float = 0.02
    x_range: tuple[float, float] = (-2.0, 2.0)
    num_support: Size = (3, 47)
    num_query: Size = 50
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel: expected one of {', '.join(map(repr, KERNELS))}, got {self.kernel!r}")
        for name in ("length_scale", "amplitude", "x_range"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name}: expected bounds (low, high), got {getattr(self, name)}")
            check_prior(name, getattr(self, name))
        for name in ("length_scale", "amplitude"):
            if not getattr(self, name)[0] > 0:
                raise ValueError(f"{name}: expected positive bounds, got {getattr(self, name)}")
        for name in ("period", "noise"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        check_size("num_support", self.num_support)
        check_size("num_query", self.num_query)

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """New tasks with x ``(T, N, 1)`` and y ``(T, N)``, one function a task on both sets; zeros in the padding."""
        check_request(num_tasks, generator)
        with rng(generator):
            tasks = self._draw_tasks(num_tasks)
            masks = [draw_mask(size, num_tasks) for size in (self.num_support, self.num_query)]
            low, high = self.x_range
            width = masks[0].shape[1] + masks[1].shape[1]
            x = low + (high - low) * torch.rand(num_tasks, width, 1, dtype=self.dtype)
            length, amplitude = (tasks[name].double()[:, None, None] for name in ("length_scale", "amplitude"))
            covariance = amplitude.square() * self._correlation(x, x, length) + self.noise**2 * torch.eye(width, dtype=torch.float64)
            z = torch.randn(num_tasks, width, 1, dtype=torch.float64)
            y = (torch.linalg.cholesky(covariance) @ z)[..., 0].to(x)
        sets, split = [], masks[0].shape[1]
        for mask, here in zip(masks, (slice(0, split), slice(split, None)), strict=True):
            sets.append(Points(x[:, here].masked_fill(~mask[..., None], 0), y[:, here].masked_fill(~mask, 0), mask))
        return Episode(*sets)

    def sample_tasks(self, num_tasks: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """``length_scale`` and ``amplitude``, each ``(T,)``: those of `sample` from the same generator state."""
        check_request(num_tasks, generator)
        with rng(generator):
            return self._draw_tasks(num_tasks)

    def exact_predictive(
        self, support: Points, x: Tensor, *, tasks: dict[str, Tensor] | None = None
    ) -> Normal | MixtureSameFamily:
        """p(y | x, S_i) of a new, noisy y at every ``x (T, N, 1)``, batch ``(T, N)``, in the dtype of ``support.x``.

        Length scale and amplitude are integrated out: a mixture of Normals, the best that any learner can do. Given ``tasks`` (of
        `sample_tasks`) it is the Normal of a learner that is told them.
        """
        logits, means, variances = [], [], []
        for here, grid in self._blocks(support, tasks, x.shape[1]):
            log_weight, mean, variance = self._condition(support.select(here), x[here], *grid)
            logits.append(log_weight)
            means.append(mean)
            variances.append(variance)
        mean, sd = torch.cat(means).to(support.x), torch.cat(variances).sqrt().to(support.x)
        if tasks is not None:
            return Normal(mean[..., 0], sd[..., 0])
        weights = torch.cat(logits).to(support.x)[:, None].expand(mean.shape)
        return MixtureSameFamily(Categorical(logits=weights), Normal(mean, sd))

    def exact_posterior(
        self, support: Points, x: Tensor, *, tasks: dict[str, Tensor] | None = None
    ) -> MultivariateNormal | MixtureSameFamily:
        """p(f(x) | S_i) of the function, without noise, at all of a task's ``x (T, N, 1)`` jointly: batch ``(T,)``, event ``(N,)``.

        A mixture of multivariate Normals, one for each of 384 nodes of length scale and amplitude (3 MB a task with N = 32), or a single
        one given ``tasks``. In float64: the covariances are nearly singular, so 1e-8 a² is added to their diagonals.
        """
        logits, means, factors = [], [], []
        for here, grid in self._blocks(support, tasks, x.shape[1] ** 2):
            log_weight, mean, covariance = self._condition_jointly(support.select(here), x[here], *grid)
            logits.append(log_weight)
            means.append(mean)
            factors.append(torch.linalg.cholesky(covariance))
        mean, factor = torch.cat(means), torch.cat(factors)
        if tasks is not None:
            return MultivariateNormal(mean[:, 0], scale_tril=factor[:, 0])
        return MixtureSameFamily(Categorical(logits=torch.cat(logits)), MultivariateNormal(mean, scale_tril=factor))

    def log_evidence(self, points: Points, *, tasks: dict[str, Tensor] | None = None) -> Tensor:
        """log p(y_i | x_i), f integrated out, and length scale and amplitude too unless ``tasks`` has them, ``(T,)``; 0 without points."""
        none = points.x[:, :0]
        parts = [self._condition(points.select(here), none[here], *grid)[0].logsumexp(-1) for here, grid in self._blocks(points, tasks, 0)]
        return torch.cat(parts).to(points.x)

    def _blocks(self, points: Points, tasks: dict[str, Tensor] | None, asked: int) -> list[tuple[slice, tuple[Tensor, ...]]]:
        """Slices of tasks that fit into memory, each with nodes l ``(T, L)``, a ``(T, A)`` and their log weights."""
        if points.y is None:
            raise ValueError("points.y: expected targets, got None")
        if tasks is None:
            nodes = [_nodes(self.length_scale, LENGTHS), _nodes(self.amplitude, AMPLITUDES)]
            grids = [value.expand(points.num_tasks, -1) for node in nodes for value in node]
        else:
            one = torch.zeros(points.num_tasks, 1, dtype=torch.float64)
            grids = [v for name in ("length_scale", "amplitude") for v in (tasks[name].double()[:, None], one)]
        wide = max(points.num_points, 1) * grids[0].shape[1] * max(points.num_points, asked + grids[2].shape[1], asked * grids[2].shape[1])
        rows = max(1, BLOCK // wide)
        starts = range(0, points.num_tasks, rows)
        return [(slice(s, s + rows), tuple(grid[s : s + rows] for grid in grids)) for s in starts]

    def _condition(self, points: Points, x: Tensor, *grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(y, l, a) at every node ``(T, L · A)``; mean and variance of a new y there, ``(T, N, L · A)``."""
        log_joint, cross, turned, spread, a2 = self._rotated(points, x, *grid)
        mean = (cross @ (a2 * turned / spread).mT).permute(0, 2, 1, 3).flatten(2)
        gain = (cross.square() @ (a2.square() / spread).mT).permute(0, 2, 1, 3)  # (T, N', L, A)
        variance = (a2[..., 0].unsqueeze(1) - gain).clamp(min=0) + self.noise**2
        return log_joint, mean, variance.flatten(2)

    def _condition_jointly(self, points: Points, x: Tensor, length: Tensor, *grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(y, l, a) at every node ``(T, L · A)``; mean ``(T, L · A, N)`` and covariance ``(T, L · A, N, N)`` of f there."""
        log_joint, cross, turned, spread, a2 = self._rotated(points, x, length, *grid)
        mean = (cross @ (a2 * turned / spread).mT).mT.flatten(1, 2)
        prior = self._correlation(x[:, None], x[:, None], length[..., None, None])[:, :, None]  # (T, L, 1, N', N')
        gain = (cross[:, :, None] * (a2 / spread)[..., None, :]) @ cross[:, :, None].mT
        covariance = a2[..., None] * (prior - gain + 1e-8 * torch.eye(x.shape[1], dtype=torch.float64))
        return log_joint, mean, covariance.flatten(1, 2)

    def _rotated(
        self, points: Points, x: Tensor, length: Tensor, log_wl: Tensor, amplitude: Tensor, log_wa: Tensor
    ) -> tuple[Tensor, ...]:
        """log p(y, l, a) at every node ``(T, L · A)``, and in the eigenvectors U of the correlations K = U Λ Uᵀ of each length scale

        k(x, x_S) U ``(T, L, N', N)``, Uᵀ y ``(T, L, 1, N)``, a²Λ + σ² ``(T, L, A, N)`` and a² ``(T, 1, A, 1)``: so a²K + σ²I is inverted
        for every amplitude at once.
        """
        assert points.y is not None
        mask = points.mask[:, None]  # (T, 1, N)
        there = torch.where(points.mask[..., None], points.x, 0)
        y = torch.where(points.mask, points.y, 0).double()
        both = mask[..., None, :] & mask[..., None]
        k = torch.where(both, self._correlation(there[:, None], there[:, None], length[..., None, None]), 0.0)
        values, u = torch.linalg.eigh(k)  # a padded point has a direction with eigenvalue 0 to itself
        a2, s2 = amplitude.square()[:, None, :, None], self.noise**2
        spread = a2 * values.clamp(min=0)[:, :, None] + s2
        turned = (u.mT @ y[:, None, :, None])[..., 0][:, :, None]
        counts = points.counts.double()[:, None, None]  # integers times a Python number would become float32
        padded, count = (points.num_points - counts) * math.log(s2), counts * math.log(2 * math.pi)
        log_evidence = -0.5 * ((turned.square() / spread).sum(-1) + spread.log().sum(-1) - padded + count)
        log_joint = (log_evidence + log_wl[..., None] + log_wa[:, None]).flatten(1)
        cross = self._correlation(x[:, None], there[:, None], length[..., None, None])
        return log_joint, torch.where(mask[..., None, :], cross, 0.0) @ u, turned, spread, a2

    def _correlation(self, x: Tensor, other: Tensor, length: Tensor) -> Tensor:
        """k at ``x (…, N, 1)`` and ``other (…, N', 1)``, ``(…, N, N')``, in float64."""
        d = (x.double() - other.double().mT).abs()
        if self.kernel == "rbf":
            return (-0.5 * (d / length).square()).exp()
        if self.kernel == "matern52":
            s = math.sqrt(5) * d / length
            return (1 + s + s.square() / 3) * (-s).exp()
        return (-2 * (torch.sin(math.pi * d / self.period) / length).square()).exp()

    def _draw_tasks(self, num_tasks: int) -> dict[str, Tensor]:
        return {name: draw(getattr(self, name), num_tasks, self.dtype) for name in ("length_scale", "amplitude")}


def _nodes(bounds: tuple[float, float], count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and log weights of the mean over ``bounds``, ``(count,)`` each; a single one where they are equal."""
    low, high = bounds
    if low == high:
        return torch.tensor([low], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(count))
    return low + (high - low) * (nodes + 1) / 2, (weights / 2).log()
