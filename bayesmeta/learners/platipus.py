"""PLATIPUS, probabilistic MAML (Finn, Xu & Levine 2018, algorithms 1 and 2): MAML from a starting point that is itself uncertain.

    p(φ_0 | S_i) = N( μ_θ − γ_p ∇ℓ(μ_θ, S_i), σ_θ² )                            (algorithms 1 and 2)
    q(φ_0 | Q_i) = N( μ_θ − γ_q ∇ℓ(μ_θ, Q_i), v_q² )                            (algorithm 1)
    φ_k+1 = φ_k − α ∇ℓ(φ_k, S_i),  K times
    loss_i = 1/N_Q [ −E_{φ_0 ~ q} log p(Q_i | φ_K) + w KL( q(φ_0 | Q_i) ‖ p(φ_0 | S_i) ) ]

ℓ is the *mean* NLL of a set and μ_θ, σ_θ are the prior's own mean and sd in packed space (its moments, where it is not Normal). φ_0 is
the paper's θ: a task's draw of where MAML starts. q(φ | S_i) of a task to adapt to is M draws from p(φ_0 | S_i), never from q, each
*then* adapted. v_q (a sd), γ_p and γ_q are vectors with an entry for each of φ, multiplied pointwise; the gradient goes through the
shifts in second order, always.

Steps on the mean, so that α and γ mean the same at every N; the loss is in nats a query point, so that learning rates do. Likelihood
and KL are weighed as sums before they are divided: w = 1 is the variational bound on log p(Q_i | S_i), smaller w is looser.

μ_θ is where MAML starts, too: ``PLATIPUS(maml.model, …)`` goes on from a trained MAML. v_q starts at σ_θ, so KL starts near 0; σ_θ at what
the prior says, for a network a tenth of its weights' size (`NormalPrior`), which leaves draws close to the network it starts at. Without
support points and steps (or with γ_p = 0 and K = 0) the particles are draws from the prior's Normal.

| argument | symbol | |
|---|---|---|
| inner_steps, inner_lr | K, α | ``adapt_steps``: K at test |
| shift_lr | γ_p, γ_q | where both start (None: ``inner_lr``); learned, each its own |
| num_draws | | draws of φ_0 from q for each task in training |
| num_particles | M | draws of φ_0 from p in `adapt`, the same noise for all tasks |
| noise | | of `adapt`: "iid", or "antithetic" (for even M their mean and sd are exactly p's) |
| kl_weight | w | |
| first_order | | take the gradients of the K steps as constants (never those of the shifts) |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import Particles, TaskPosterior
from ..randomness import rng
from .base import AbstractMetaLearner, LazyParameter, checked_choice, checked_steps, prior_mean
from .noise import KINDS, standard_noise
from .objectives import counts, mean_nll
from .steps import descend


class PLATIPUS(AbstractMetaLearner):
    """Probabilistic MAML; see the module's docstring for the maths and the arguments."""

    def __init__(
        self, model: HierarchicalModel, *, inner_steps: int = 1, inner_lr: float = 0.01, adapt_steps: int | None = None,
        shift_lr: float | None = None, num_draws: int = 1, num_particles: int = 10, noise: str = "iid", kl_weight: float = 1.0,
        first_order: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.inner_steps, self.inner_lr = checked_steps("inner_steps", inner_steps), inner_lr
        self.adapt_steps = inner_steps if adapt_steps is None else checked_steps("adapt_steps", adapt_steps)
        self.takes_steps(self.inner_steps + 1, self.adapt_steps + 1)  # the shift is a step, too
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight: expected a number of at least 0, got {kl_weight}")
        self.shift_lr = inner_lr if shift_lr is None else shift_lr
        self.num_draws = checked_steps("num_draws", num_draws, least=1)
        self.num_particles = checked_steps("num_particles", num_particles, least=1)
        self.noise, self.kl_weight, self.first_order = checked_choice("noise", noise, KINDS), kl_weight, first_order
        self.log_v_q = LazyParameter(self._first_log_v_q)
        self.gamma_p, self.gamma_q = LazyParameter(self._first_gamma), LazyParameter(self._first_gamma)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """`Particles`: draws from p(φ_0 | S_i) after ``adapt_steps`` steps; without support points, draws from the prior."""
        support = self.prepared(support)
        with rng(generator):
            mean, sd = (v.detach() for v in self._p(support, keep_graph=False))
            start = mean + sd * standard_noise((self.num_particles, 1, self.model.dim), self.noise, like=mean)
            return self.posterior(Particles(self._adapted(start, support, self.adapt_steps, keep_graph=False)))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """The variational bound in nats a query point, ``(T,)``."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        with rng(generator):
            q, p = (Normal(*moments, validate_args=False) for moments in (self._q(query), self._p(support)))
            noise = standard_noise((self.num_draws, support.num_tasks, self.model.dim), "iid", like=q.loc)
            phi = self._adapted(q.loc + q.scale * noise, support, self.inner_steps, keep_graph=True)
            return mean_nll(self.model, phi, query).mean(0) + self.kl_weight * kl_divergence(q, p).sum(-1) / counts(query)

    def _p(self, support: Points, *, keep_graph: bool = True) -> tuple[Tensor, Tensor]:
        """Mean and sd of p(φ_0 | S_i), each ``(T, D)``."""
        mean, sd = self.model.prior_moments(support)
        return self._shifted(mean, support, self.gamma_p.value, keep_graph=keep_graph), sd

    def _q(self, query: Points) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(φ_0 | Q_i), each ``(T, D)``."""
        mean = self._shifted(self.model.initial(query), query, self.gamma_q.value, keep_graph=True)
        return mean, self.log_v_q.value.exp().expand_as(mean)

    def _shifted(self, mean: Tensor, points: Points, gamma: Tensor, *, keep_graph: bool) -> Tensor:
        (shifted,) = descend(lambda phi: mean_nll(self.model, phi, points), (mean,), [gamma], keep_graph=keep_graph)
        return shifted

    def _adapted(self, start: Tensor, support: Points, steps: int, *, keep_graph: bool) -> Tensor:
        alpha: list[Tensor | float] = [self.inner_lr] * steps
        (phi,) = descend(
            lambda phi: mean_nll(self.model, phi, support), (start,), alpha, first_order=self.first_order, keep_graph=keep_graph, first=1
        )
        return phi

    def _first_gamma(self, model: HierarchicalModel) -> Tensor:
        return prior_mean(model).new_full((model.dim,), self.shift_lr)

    def _first_log_v_q(self, model: HierarchicalModel) -> Tensor:
        return model.prior_moments(model.made_up_points(1, 1))[1][0].log()
