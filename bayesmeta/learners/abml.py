"""ABML, amortized Bayesian MAML (Ravi & Beatson 2019): q(φ | S_i) is a Normal, K gradient steps on the support's ELBO.

    q_0 = (μ_θ, σ_θ)                                             the prior p(φ | θ) is also where q starts (section 3.2)
    L_S(μ, σ) = E_q[ log p(S_i | φ) ] − w KL( q ‖ p(φ | θ) )     (eq. 4, likelihoods summed)
    (μ, σ) ← (μ, σ) + α ∇ L_S / max(N_S, 1)                      K times, so that α means the same at every N
    loss_i(θ) = −E_q[ log p(S_i ∪ Q_i | φ) ] + KL( q ‖ p(φ | θ) )  (eq. 3); −log p(θ) is added once, by `global_loss`

q sees the support only; the outer likelihood is over S ∪ Q, so the outer loss is a bound on −log p(S_i ∪ Q_i | θ) that is tight
where q is the posterior given S ∪ Q: trained so, σ shrinks with the number of queries. With w = 1 and K large, q is the
mean-field optimum given S: for a quadratic log joint its mean is the posterior's and its sd 1/√diag(precision). The steps are in
σ itself (a step past 0 counts by its size), not in log σ, whose steps would shrink as N grows.

Beyond the diagonal, ``rank`` R > 0: q = N(μ, diag σ² + U Uᵀ) with U (D, R), stepped as μ and σ are, from a learned U_θ (from 0 it could
never leave, by symmetry). A task without support points has U = 0: q is then the prior. Its KL is taken at the draws.

| argument | symbol | |
|---|---|---|
| inner_steps, inner_lr | K, α | |
| kl_weight | w | weight of the inner KL; the outer one is always 1 |
| num_draws | | draws of φ for each inner expectation; they are shared by all tasks |
| noise | | "whitened" (exact for a quadratic where num_draws > D + R), "antithetic" or "iid" |
| rank | R | 0: a diagonal Normal |
| step_units | | "plain"; "prior": α σ_θ² ∇, for narrow priors, where plain steps diverge at α > 2 N σ_θ²; "auto": "prior" for weights |
| objective | | "elbo", the only one |
| first_order | | take the inner gradients as constants |

The outer expectation takes one draw a task, as `pyro.infer.SVI` does with ``learner.guide``: same loss, same seed.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..networks import WeightNetwork
from ..posteriors import TaskPosterior
from ..randomness import rng
from .base import AbstractMetaLearner, LazyParameter, checked_choice, checked_steps
from .noise import KINDS, standard_noise
from .objectives import counts
from .steps import Values, descend


class ABML(AbstractMetaLearner):
    """Amortized Bayesian MAML; see the module's docstring for the maths and the arguments."""

    def __init__(
        self, model: HierarchicalModel, *, inner_steps: int = 5, inner_lr: float = 0.1, kl_weight: float = 1.0,
        num_draws: int = 5, noise: str = "whitened", rank: int = 0, step_units: str = "auto", first_order: bool = False,
        objective: str = "elbo",
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.inner_steps, self.inner_lr = checked_steps("inner_steps", inner_steps), inner_lr
        self.takes_steps(self.inner_steps)
        self.kl_weight, self.first_order, self.rank = kl_weight, first_order, checked_steps("rank", rank)
        self.num_draws, self.noise = checked_steps("num_draws", num_draws, least=1), checked_choice("noise", noise, KINDS)
        self.step_units = checked_choice("step_units", step_units, ("auto", "plain", "prior"))
        if self.step_units == "auto":
            self.step_units = "prior" if isinstance(model.network, WeightNetwork) else "plain"
        self.objective = checked_choice("objective", objective, ("elbo",))
        if rank:
            self.factor = LazyParameter(self._first_factor)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """A Normal; without support points, N(μ_θ, σ_θ²): the prior itself where that is Normal."""
        support = self.prepared(support)
        with rng(generator):
            return self.posterior(_normal(*self._adapted(support, keep_graph=False)))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """−ELBO of S_i ∪ Q_i under q(φ | S_i), ``(T,)``."""
        support, both = self.prepared(episode.support), self.prepared(episode.union(), "episode")
        with rng(generator):
            values = self._adapted(support, keep_graph=True)
            phi = _normal(*values).rsample() if self.rank else values[0] + values[1].abs() * self.model.noise(support.num_tasks)
            return -self._elbo(phi, values, both, 1.0)

    def guide(self, data: Points | Episode) -> None:
        """The same q as a Pyro guide: given an Episode it sees only S; given Points it sees them all."""
        self.run_guide(data, lambda support: _normal(*self._adapted(support, keep_graph=True)))

    def _adapted(self, support: Points, *, keep_graph: bool) -> Values:
        """(μ, σ) or (μ, σ, U) after K steps; σ may have changed its sign, and counts by its size."""
        start: Values = self.model.prior_moments(support)
        if self.rank:
            start += (torch.where(support.mask.any(1)[:, None, None], self.factor.value, 0.0),)
        n = counts(support)

        def loss(*values: Tensor) -> Tensor:
            noise = standard_noise((self.num_draws, 1, self.model.dim + self.rank), self.noise, like=values[0])
            phi = values[0] + values[1].abs() * noise[..., : self.model.dim]
            if self.rank:
                phi = phi + (values[2] @ noise[..., self.model.dim :, None])[..., 0]
            return -self._elbo(phi, values, support, self.kl_weight).mean(0) / n

        def moved(*steps: Tensor) -> Values:
            return tuple(v + unit * step for v, unit, step in zip(start, units, steps, strict=True))

        alpha: list[Tensor | float] = [self.inner_lr] * self.inner_steps
        if self.step_units == "plain":
            return descend(loss, start, alpha, first_order=self.first_order, keep_graph=keep_graph)
        start = start if keep_graph else tuple(v.detach() for v in start)
        units = (start[1], start[1], start[1][..., None])[: len(start)]
        steps = tuple(torch.zeros_like(v) for v in start)
        steps = descend(lambda *s: loss(*moved(*s)), steps, alpha, first_order=self.first_order, keep_graph=keep_graph)
        return moved(*steps)

    def _elbo(self, phi: Tensor, values: Values, points: Points, kl_weight: float) -> Tensor:
        """log p(points | φ) − w KL at the draws ``phi (*S, T, D)`` of q, ``(*S, T)``."""
        if self.rank:
            log_prior, log_likelihood = self.model.log_parts(phi, points)
            return log_likelihood + kl_weight * (log_prior - _normal(*values).log_prob(phi))
        minus_kl, log_likelihood = self.model.mean_field_parts(phi, values[0], values[1].abs(), points)
        return log_likelihood + kl_weight * minus_kl

    def _first_factor(self, model: HierarchicalModel) -> Tensor:
        sd = model.prior_moments(model.made_up_points(1, 1))[1][0]
        with rng():
            return 0.1 * sd[:, None] * torch.randn(model.dim, self.rank, dtype=sd.dtype, device=sd.device)


def _normal(mean: Tensor, sigma: Tensor, factor: Tensor | None = None) -> Any:
    # not validated: a task that has diverged is NaN of its own
    if factor is None:
        return dist.Normal(mean, sigma.abs(), validate_args=False).to_event(1)
    fine = (mean + sigma).isfinite().all(-1) & factor.isfinite().all(-1).all(-1)  # a Cholesky factor of NaN is an exception for all
    mean = torch.where(fine[:, None], mean, torch.nan)
    factor = torch.where(fine[:, None, None], factor, 0.0)
    return dist.LowRankMultivariateNormal(mean, factor, torch.where(fine[:, None], sigma.square(), 1.0), validate_args=False)
