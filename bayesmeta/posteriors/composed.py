"""Posteriors made of others: `MixturePosterior`, several that differ in θ; `TemperedPosterior`, one with other class probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from ..predictive import Predictive
from ..randomness import rng
from .distributions import Mixture
from .single import NO_PHI, FunctionPosterior, TaskPosterior, inference_data

if TYPE_CHECKING:
    from ..model import HierarchicalModel


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
        return inference_data(self.sites(n, generator=generator), 1)

    def _each(self, n: int | None) -> int | None:
        return None if n is None else -(-n // len(self.components))

    def _moving(self) -> Any:
        """The components, with a random stream that has moved on between them, so that equal ones do not draw the same."""
        for component in self.components:
            yield component
            torch.rand(())


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
