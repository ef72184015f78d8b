"""ABML, amortized Bayesian MAML (Ravi & Beatson 2019): q(φ | S_i) is a diagonal Normal, K gradient steps on the support's ELBO.

    q_0 = (μ_θ, σ_θ)                                             the prior p(φ | θ) is also where q starts (section 3.2)
    L_S(μ, σ) = E_q[ log p(S_i | φ) ] − w KL( q ‖ p(φ | θ) )     (eq. 4, likelihoods summed)
    (μ, σ) ← (μ, σ) + α ∇ L_S / max(N_S, 1)                      K times, so that α means the same at every N
    loss_i(θ) = −E_q[ log p(S_i ∪ Q_i | φ) ] + KL( q ‖ p(φ | θ) )  (eq. 3); −log p(θ) is added once, by `global_loss`

q sees the support only; the outer likelihood is over S ∪ Q, so the outer loss is a bound on −log p(S_i ∪ Q_i | θ) that is tight
where q is the posterior given S ∪ Q: trained so, σ shrinks with the number of queries. With w = 1 and K large, q is the
mean-field optimum given S: for a quadratic log joint its mean is the posterior's and its sd 1/√diag(precision). The steps are in
σ itself (a step past 0 counts by its size), not in log σ, whose steps would shrink as N grows.

| argument | symbol | |
|---|---|---|
| inner_steps, inner_lr | K, α | |
| kl_weight | w | weight of the inner KL; the outer one is always 1 |
| num_draws | | draws of φ for each inner expectation; they are shared by all tasks |
| noise | | "whitened" (exact for a quadratic where num_draws > D), "antithetic" or "iid" |
| first_order | | take the inner gradients as constants |

The outer expectation takes one draw a task, as `pyro.infer.SVI` does with ``learner.guide``: same loss, same seed.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import TaskPosterior
from ..randomness import rng
from .base import AbstractMetaLearner, checked_choice, checked_steps
from .noise import KINDS, standard_noise
from .objectives import counts
from .steps import descend


class ABML(AbstractMetaLearner):
    """Amortized Bayesian MAML; see the module's docstring for the maths and the arguments."""

    def __init__(
        self, model: HierarchicalModel, *, inner_steps: int = 5, inner_lr: float = 0.1, kl_weight: float = 1.0,
        num_draws: int = 5, noise: str = "whitened", first_order: bool = False,
    ) -> None:
        super().__init__(model)
        self.inner_steps, self.inner_lr = checked_steps("inner_steps", inner_steps), inner_lr
        self.kl_weight, self.first_order = kl_weight, first_order
        self.num_draws, self.noise = checked_steps("num_draws", num_draws, least=1), checked_choice("noise", noise, KINDS)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """A diagonal Normal; without support points, N(μ_θ, σ_θ²): the prior itself where that is Normal."""
        support = self.prepared(support)
        with rng(generator):
            mean, sd = self._q(support, keep_graph=False)
        return self.posterior(dist.Normal(mean, sd, validate_args=False).to_event(1))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """−ELBO of S_i ∪ Q_i under q(φ | S_i), ``(T,)``."""
        support, both = self.prepared(episode.support), self.prepared(episode.union(), "episode")
        with rng(generator):
            mean, sd = self._q(support, keep_graph=True)
            phi = mean + sd * self.model.noise(support.num_tasks)
            minus_kl, log_likelihood = self.model.mean_field_parts(phi, mean, sd, both)
        return -(log_likelihood + minus_kl)

    def guide(self, data: Points | Episode) -> None:
        """The same q as a Pyro guide: given an Episode it sees only S; given Points it sees them all."""
        self.run_guide(data, lambda support: dist.Normal(*self._q(support, keep_graph=True)).to_event(1))

    def _q(self, support: Points, *, keep_graph: bool) -> tuple[Tensor, Tensor]:
        mean, sd = self.model.prior_moments(support)
        size = (self.num_draws, 1, self.model.dim)
        n = counts(support)

        def loss(mean: Tensor, sigma: Tensor) -> Tensor:
            phi = mean + sigma.abs() * standard_noise(size, self.noise, like=mean)
            minus_kl, log_likelihood = self.model.mean_field_parts(phi, mean, sigma.abs(), support)
            return -(log_likelihood + self.kl_weight * minus_kl).mean(0) / n

        alpha: list[Tensor | float] = [self.inner_lr] * self.inner_steps
        mean, sigma = descend(loss, (mean, sd), alpha, first_order=self.first_order, keep_graph=keep_graph)
        return mean, sigma.abs()
