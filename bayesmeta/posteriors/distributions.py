"""Distributions over φ in packed space, batch ``(T,)``, event ``(D,)``: those that Pyro lacks, and what is done to one of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..packing import peel


def delta(phi: Tensor) -> dist.Delta:
    """All mass at ``phi (T, D)``."""
    return dist.Delta(phi, event_dim=1)


class Particles(dist.TorchDistribution):
    """Equally weighted draws ``values (M, T, D)``, batch ``(T,)``, event ``(D,)``; it has no density.

    ``chains``: the values are that many chains of equal length behind each other.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, values: Tensor, *, chains: int = 1) -> None:
        if values.dim() < 3 or len(values) % chains:
            raise ValueError(f"values: expected shape (M, T, D) with M a multiple of {chains} chains, got {tuple(values.shape)}")
        self.values, self.chains = values, chains
        super().__init__(values.shape[1:-1], values.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(T, D)``."""
        return self.values.mean(0)

    @property
    def variance(self) -> Tensor:
        """``(T, D)``, of the particles (divided by M)."""
        return self.values.var(0, unbiased=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Particles chosen at random, for each task on its own: ``(*sample_shape, T, D)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        index = torch.randint(len(self.values), shape, device=self.values.device)
        flat = self.values.flatten(1, -2)
        tasks = torch.arange(flat.shape[1], device=flat.device).view(self.batch_shape)
        return flat[index, tasks]

    def select(self, tasks: Tensor) -> Particles:
        """The particles of the chosen tasks."""
        return Particles(self.values[:, tasks], chains=self.chains)

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises NotImplementedError: particles have no density."""
        raise NotImplementedError("particles have no density; compare draws, or fit a Normal to them")


class Mixture(dist.TorchDistribution):
    """An equal mixture of distributions over φ, batch ``(T,)``, event ``(D,)``."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, components: Sequence[Any]) -> None:
        self.components = tuple(components)
        super().__init__(components[0].batch_shape, components[0].event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(T, D)``."""
        return torch.stack([c.mean for c in self.components]).mean(0)

    @property
    def variance(self) -> Tensor:
        """``(T, D)``."""
        means, variances = (torch.stack([getattr(c, name) for c in self.components]) for name in ("mean", "variance"))
        return variances.mean(0) + means.var(0, unbiased=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, T, D)``, each from a component chosen at random."""
        shape = torch.Size(sample_shape) + self.batch_shape
        every = torch.stack([c.sample(torch.Size(sample_shape)) for c in self.components], -1)
        index = torch.randint(len(self.components), shape, device=every.device)
        return every.gather(-1, index[..., None, None].expand(*every.shape[:-1], 1))[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*S, T, D)`` to ``(*S, T)``; NotImplementedError where a component is a Delta or particles, which have no density."""
        if any(isinstance(c, dist.Delta | Particles) for c in self.components):
            raise NotImplementedError("a mixture of points has no density; compare draws")
        return torch.logsumexp(torch.stack([c.log_prob(value) for c in self.components]), 0) - math.log(len(self.components))


def select_tasks(q: Any, tasks: Tensor) -> Any:
    """``q`` of the chosen tasks alone, in that order. Raises TypeError for a kind that is not known."""
    if hasattr(q, "select"):  # the package's own
        return q.select(tasks)
    if isinstance(q, dist.MultivariateNormal):
        return dist.MultivariateNormal(q.loc[tasks], scale_tril=q.scale_tril[tasks], validate_args=False)
    if isinstance(q, dist.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(q.loc[tasks], q.cov_factor[tasks], q.cov_diag[tasks], validate_args=False)
    if isinstance(q, dist.Delta):
        return delta(q.v[tasks])
    base, axes, _ = peel(q)
    if isinstance(base, dist.Normal) and axes == 1:
        return dist.Normal(base.loc[tasks], base.scale[tasks], validate_args=False).to_event(1)
    raise TypeError(f"expected a Delta, Normal, MultivariateNormal, LowRankMultivariateNormal or Particles, got {type(q).__name__}")


def with_points_axis(q: Any) -> Any:
    """``q`` with batch ``(T,)`` as a distribution with batch ``(T, 1)``."""
    if hasattr(q, "with_points_axis"):  # a learner's own kind
        return q.with_points_axis()
    if isinstance(q, Particles):
        return Particles(q.values[:, :, None], chains=q.chains)
    if isinstance(q, dist.MultivariateNormal):
        return dist.MultivariateNormal(q.loc[:, None], scale_tril=q.scale_tril[:, None])
    if isinstance(q, dist.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(q.loc[:, None], q.cov_factor[:, None], q.cov_diag[:, None])
    if isinstance(q, dist.Delta):
        return dist.Delta(q.v[:, None], event_dim=1)
    raise TypeError(f"expected a Delta, a (low-rank) MultivariateNormal or Particles, got {type(q).__name__}")
