"""What one adaptation under one θ returns: `TaskPosterior`, a distribution over φ; `FunctionPosterior`, none over φ at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from ..predictive import Predictive
from ..randomness import rng
from .distributions import Particles, select_tasks

if TYPE_CHECKING:
    from ..episodes import Points
    from ..model import HierarchicalModel

DEFAULT_DRAWS = 100
NO_PHI = "this learner goes from support set to prediction directly: it has no φ of fixed size; use predict"


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
        return TaskPosterior(self.model, select_tasks(self.distribution, torch.as_tensor(tasks)), self.diagnostics, theta=self.theta)

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
        return inference_data(self.sites(n, generator=generator), chains)


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


def as_inputs(x: Any) -> Tensor:
    """``x`` as a tensor; TypeError for Points or an Episode, which are more than inputs."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        raise TypeError(f"x: expected inputs of shape (T, N, *I), got {type(x).__name__}: give its x alone, say points.x")
    return torch.as_tensor(x)


def inference_data(sites: dict[str, Tensor], chains: int) -> Any:
    """Draws ``(S, T, *event)`` by site, S being that many chains behind each other, as ArviZ's InferenceData."""
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install 'bayesmeta[arviz]'") from error
    values = {name: np.asarray(v.unflatten(0, (chains, -1)).cpu()) for name, v in sites.items()}
    dims = {name: ["task", *(f"{name}_{i}" for i in range(v.ndim - 3))] for name, v in values.items()}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict({"posterior": values}, dims=dims)
    return arviz.from_dict(posterior=values, dims=dims)
