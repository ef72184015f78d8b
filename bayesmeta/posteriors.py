"""What adaptation returns: `TaskPosterior`, a distribution over φ; `MixturePosterior`, several; `FunctionPosterior`, none over φ at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .packing import peel
from .predictive import Predictive
from .randomness import rng

if TYPE_CHECKING:
    from .episodes import Points
    from .model import HierarchicalModel

DEFAULT_DRAWS = 100
NO_PHI = "this learner goes from support set to prediction directly: it has no φ of fixed size; use predict"


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


class TaskPosterior:
    """q(φ_i | S_i, θ) of ``T`` tasks: a distribution in packed space, batch ``(T,)``, event ``(D,)``.

    ``distribution``: a Delta, a diagonal Normal, a MultivariateNormal or `Particles`. ``diagnostics``: what the
    inference has to say of itself, by name. ``theta``: the packed global sites ``(G,)`` it was inferred under, None for where the
    model stands. The posterior refers to its ``model``: train the model further and its predictions move; draws do not.
    """

    has_phi: ClassVar[bool] = True

    def __init__(
        self, model: HierarchicalModel, distribution: Any, diagnostics: dict[str, float | str] | None = None, *, theta: Tensor | None = None
    ) -> None:
        self.model, self.distribution, self.theta = model, distribution, theta
        self.diagnostics = diagnostics or {}

    @property
    def num_tasks(self) -> int:
        """``T``."""
        return self.distribution.batch_shape[0]

    @property
    def batch_shape(self) -> torch.Size:
        """``(T,)``."""
        return self.distribution.batch_shape

    @property
    def event_shape(self) -> torch.Size:
        """``(D,)``."""
        return self.distribution.event_shape

    @property
    def variance(self) -> Tensor:
        """Variance in packed space, ``(T, D)``; 0 for a Delta."""
        return self.distribution.variance

    @property
    def is_point(self) -> bool:
        """Whether all mass is at one point (a Delta)."""
        return isinstance(self.distribution, dist.Delta)

    @property
    def mean(self) -> Tensor:
        """Mean in packed space, ``(T, D)``."""
        return self.distribution.mean

    def select(self, tasks: list[int]) -> TaskPosterior:
        """The posterior of the chosen tasks, in that order."""
        return TaskPosterior(self.model, _select(self.distribution, torch.as_tensor(tasks)), self.diagnostics, theta=self.theta)

    def draws(self, n: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(S, T, D)`` draws in packed space.

        Without ``n``: one draw of a Delta, every particle of `Particles`, 100 of anything else. Fewer draws than there are
        particles are particles at even distances; more are chosen at random.
        """
        if n is not None and n < 1:
            raise ValueError(f"n: expected at least 1 draw, got {n}")
        q = self.distribution
        if isinstance(q, Particles):
            n = len(q.values) if n is None else n
            if n <= len(q.values):
                return q.values[torch.linspace(0, len(q.values) - 1, n).round().long()]
        n = (1 if self.is_point else DEFAULT_DRAWS) if n is None else n
        with rng(generator), torch.no_grad():  # rsample: a task that has diverged is NaN, where torch's sample of a Normal refuses all
            return q.rsample((n,)) if q.has_rsample else q.sample((n,))

    def sites(self, n: int | None = None, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draws of the program's own task-level sites, by name: ``(S, T, *event)``, in their own (constrained) units."""
        with torch.no_grad(), self.model.theta_at(self.theta):
            return self.model.unpack(self.draws(n, generator=generator))

    def predict(
        self, x: Any, n: int | None = None, *, generator: torch.Generator | None = None, mask: Tensor | None = None
    ) -> Predictive:
        """The predictive distribution of y at ``x (T, N, *I)``, averaged over ``n`` draws of φ (see `draws`).

        ``mask``: as for `HierarchicalModel.predict`. Of particles never more than there are: all of them, once each, are the mixture
        without error.
        """
        n = min(n, len(self.distribution.values)) if n is not None and isinstance(self.distribution, Particles) else n
        with torch.no_grad(), self.model.theta_at(self.theta):
            return Predictive(self.model.predict(self.draws(n, generator=generator), x, mask))

    def log_prob(self, phi: Tensor) -> Tensor:
        """log q(φ) in packed space: ``(*S, T, D)`` to ``(*S, T)``. Raises NotImplementedError for particles."""
        return self.distribution.log_prob(phi)

    def guide(self) -> Callable[..., None]:
        """A Pyro guide that samples the model's sites from this posterior: ``Predictive(model, guide=posterior.guide())``."""

        def guide(data: Points, *_: Any, **__: Any) -> None:
            points = self.model.prepare(data)
            if points.num_tasks != self.num_tasks:
                raise ValueError(f"this posterior is of {self.num_tasks} tasks, got points of {points.num_tasks}")
            self.model.sample_theta_sites()
            self.model.sample_task_sites(self.distribution, points)

        return guide

    def to_arviz(self, n: int | None = None, *, generator: torch.Generator | None = None) -> Any:
        """The draws as ArviZ's InferenceData: variables by site name with dimensions (chain, draw, task, …).

        Raises ImportError without the extra ``arviz``.
        """
        chains = self.distribution.chains if isinstance(self.distribution, Particles) and n is None else 1
        return _inference_data(self.sites(n, generator=generator), chains)


class MixturePosterior:
    """An equal mixture of posteriors that differ in θ: the members of an ensemble, or one learner under several draws of θ.

    ``components``: K `TaskPosterior`, or K `FunctionPosterior`, of the same tasks. It predicts with each component's own model and θ; what
    its components disagree about counts as uncertainty about θ. Raises ValueError for no components or for both kinds.
    """

    is_point: ClassVar[bool] = False
    model: HierarchicalModel
    has_phi: bool
    diagnostics: dict[str, float | str]

    def __init__(self, components: Sequence[Posterior]) -> None:
        if not components:
            raise ValueError("a mixture needs at least one component, got none")
        if len({c.has_phi for c in components}) > 1:
            raise ValueError("a mixture needs components that all have a φ, or none of which has one")
        self.components = tuple(components)
        self.model, self.has_phi = components[0].model, components[0].has_phi
        self.diagnostics = {k: v for c in reversed(components) for k, v in c.diagnostics.items()}

    @property
    def num_tasks(self) -> int:
        """``T``."""
        return self.components[0].num_tasks

    @property
    def distribution(self) -> Mixture:
        """The mixture over φ, batch ``(T,)``, event ``(D,)``. Raises NotImplementedError where the components have no φ."""
        if not self.has_phi:
            raise NotImplementedError(NO_PHI)
        return Mixture([c.distribution for c in self.components if not isinstance(c, FunctionPosterior)])

    @property
    def mean(self) -> Tensor:
        """Mean in packed space, ``(T, D)``."""
        return self.distribution.mean

    def select(self, tasks: list[int]) -> MixturePosterior:
        """The posterior of the chosen tasks, in that order."""
        return MixturePosterior([c.select(tasks) for c in self.components])

    def draws(self, n: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(S, T, D)`` draws in packed space, from the components in turn; by default as many as `TaskPosterior.draws` of each."""
        with rng(generator):
            parts = torch.stack([c.draws(self._each(n), generator=None) for c in self._moving()], 1).flatten(0, 1)
        return parts[:n]

    def sites(self, n: int | None = None, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draws of the program's task-level sites, by name: ``(S, T, *event)``, each in its component's own units."""
        with rng(generator):
            parts = [c.sites(self._each(n)) for c in self._moving()]
        return {name: torch.stack([part[name] for part in parts], 1).flatten(0, 1)[:n] for name in parts[0]}

    def predict(
        self, x: Any, n: int | None = None, *, generator: torch.Generator | None = None, mask: Tensor | None = None
    ) -> Predictive:
        """The predictive at ``x (T, N, *I)``: ``n`` draws shared out equally among components (1 of a Delta), each under its own θ."""
        with rng(generator):
            parts = [c.predict(x, None if c.is_point else self._each(n), mask=mask) for c in self._moving()]
        return Predictive([fn for part in parts for fn in part.components], num_theta=len(parts))

    def log_prob(self, phi: Tensor) -> Tensor:
        """log q(φ) in packed space: ``(*S, T, D)`` to ``(*S, T)``. Raises NotImplementedError where a component has no density."""
        return self.distribution.log_prob(phi)

    def guide(self) -> Callable[..., None]:
        """Raises NotImplementedError: a guide has one θ, and the components have their own. Use ``components[k].guide()``."""
        raise NotImplementedError("the components of a mixture have their own θ, and a guide has one: use components[k].guide()")

    def to_arviz(self, n: int | None = None, *, generator: torch.Generator | None = None) -> Any:
        """As `TaskPosterior.to_arviz`, one chain."""
        return _inference_data(self.sites(n, generator=generator), 1)

    def _each(self, n: int | None) -> int | None:
        return None if n is None else -(-n // len(self.components))

    def _moving(self) -> Any:
        """The components, with a random stream that has moved on between them, so that equal ones do not draw the same."""
        for component in self.components:
            yield component
            torch.rand(())


class FunctionPosterior:
    """A predictive that goes from support set to prediction directly: there is no φ of fixed size to draw.

    ``rule(support, x, mask)`` gives the distribution of one point's y at ``x (T, N, *I)``, batch ``(1, T, N)``. ``predict`` works; `draws`,
    `sites`, `log_prob` and `guide` raise NotImplementedError.
    """

    has_phi: ClassVar[bool] = False
    is_point: ClassVar[bool] = True

    def __init__(self, model: HierarchicalModel, rule: Callable[[Points, Tensor, Tensor | None], Any], support: Points) -> None:
        self.model, self.rule, self.support = model, rule, support
        self.diagnostics: dict[str, float | str] = {}

    @property
    def num_tasks(self) -> int:
        """``T``."""
        return self.support.num_tasks

    def select(self, tasks: list[int]) -> FunctionPosterior:
        """The posterior of the chosen tasks, in that order."""
        return FunctionPosterior(self.model, self.rule, self.support.select(tasks))

    def predict(
        self, x: Any, n: int | None = None, *, generator: torch.Generator | None = None, mask: Tensor | None = None
    ) -> Predictive:
        """The predictive at ``x (T, N, *I)``; nothing is drawn, ``n`` plays no part."""
        x = as_inputs(x)
        x = x.to(device=self.support.x.device, dtype=self.support.x.dtype if x.is_floating_point() else x.dtype)
        with torch.no_grad():
            return Predictive(self.rule(self.support, x, mask))

    def draws(self, n: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Raises NotImplementedError."""
        raise NotImplementedError(NO_PHI)

    def sites(self, n: int | None = None, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Raises NotImplementedError."""
        self.draws()
        return {}

    def log_prob(self, phi: Tensor) -> Tensor:
        """Raises NotImplementedError."""
        return self.draws()

    def guide(self) -> Callable[..., None]:
        """Raises NotImplementedError."""
        self.draws()
        return lambda: None


class TemperedPosterior:
    """``posterior`` with its predicted class probabilities p made p^(1/T) / Σ p^(1/T), T = ``temperature``; φ's distribution is untouched.

    T > 1 takes confidence away, T < 1 gives some; which class is the likeliest stays. Everything but `predict` and `select` is the
    posterior's own.
    """

    def __init__(self, posterior: Posterior, temperature: float) -> None:
        self.posterior, self.temperature = posterior, temperature
        self.diagnostics = {**getattr(posterior, "diagnostics", {}), "temperature": temperature}

    def __getattr__(self, name: str) -> Any:
        if name == "posterior":  # not there yet while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self.posterior, name)

    def select(self, tasks: list[int]) -> TemperedPosterior:
        """The posterior of the chosen tasks, in that order."""
        return TemperedPosterior(self.posterior.select(tasks), self.temperature)

    def predict(
        self, x: Any, n: int | None = None, *, generator: torch.Generator | None = None, mask: Tensor | None = None
    ) -> Predictive:
        """The tempered mixture, as one component: temperature is for the answer, so no part of its entropy is φ's any more.

        NaN for a task whose adaptation diverged, as without a temperature.
        """
        log_probs = self.posterior.predict(x, n, generator=generator, mask=mask).log_probs()
        return Predictive(dist.Categorical(logits=log_probs[None] / self.temperature, validate_args=False))


Posterior = TaskPosterior | MixturePosterior | FunctionPosterior | TemperedPosterior


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


def as_inputs(x: Any) -> Tensor:
    """``x`` as a tensor; TypeError for Points or an Episode, which are more than inputs."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        raise TypeError(f"x: expected inputs of shape (T, N, *I), got {type(x).__name__}: give its x alone, say points.x")
    return torch.as_tensor(x)


def delta(phi: Tensor) -> dist.Delta:
    """All mass at ``phi (T, D)``."""
    return dist.Delta(phi, event_dim=1)


def _select(q: Any, tasks: Tensor) -> Any:
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


def _inference_data(sites: dict[str, Tensor], chains: int) -> Any:
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install 'bayesmeta[arviz]'") from error
    values = {name: np.asarray(v.unflatten(0, (chains, -1)).cpu()) for name, v in sites.items()}
    dims = {name: ["task", *(f"{name}_{i}" for i in range(v.ndim - 3))] for name, v in values.items()}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict({"posterior": values}, dims=dims)
    return arviz.from_dict(posterior=values, dims=dims)
