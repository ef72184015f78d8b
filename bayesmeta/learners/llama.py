"""LLAMA, MAML as hierarchical Bayes (Grant, Finn, Levine, Darrell & Griffiths 2018): a Laplace approximation at the adapted φ̂.

    "paper"     φ̂ ← φ̂ − α ∇[ −1/N_S Σ_j log p(y_j | x_j, φ̂) ],  j ∈ S_i      K times from φ̂ = E[φ | θ]
                loss_i(θ) = −log p(Q_i | φ̂) + η/2 log det( H_Q + δ I )           (algorithm 2 with subroutine 4, ML-LAPLACE)
    "evidence"  φ̂ ← φ̂ + α ∇ log p(D_i, φ̂ | θ) / max(N_D, 1),  D_i = S_i ∪ Q_i   K times from φ̂ = E[φ | θ]
                loss_i(θ) = −log p(D_i, φ̂ | θ) − D/2 log 2π + ½ log det P − ½ gᵀ P⁻¹ g
                P = H_D + Λ_θ,  g = ∇ log p(D_i, φ̂ | θ)                          (section 4.1's integral, expanded at φ̂ itself)
    q(φ | S_i) = N( φ̂, (H_S + Λ_θ)⁻¹ ),  φ̂ by the same steps on S_i alone

H: curvature of the log-likelihood, summed over the set's points as log p(Q_i | φ̂) is (`bayesmeta.learners.curvature`). Λ_θ: the prior's,
−∇² log p(φ̂ | θ). "paper" learns no prior scale, and predicted with φ̂ alone; draws from q are what gives uncertainty. "evidence" is
−log p(D_i | θ) exactly where the log joint is quadratic, wherever φ̂ stands, also after no step. ½ gᵀ P⁻¹ g is what a Newton step promises to
win; elsewhere it counts for no more than that step wins, else training makes promises without bound. `adapt` takes no such step: let it come
to rest (``adapt_steps``). Without support points q is the prior where that is Normal, else the Laplace approximation of the prior.

Where H is not positive (an exact Hessian of a network) no eigenvalue of H + Λ_θ counts for less than a tenth of the prior's precision,
1/sd[φ | θ]², so q is at most √10 prior sds wide; none of H_Q + δ I for less than δ/10. Elsewhere nothing is changed.

| argument | symbol | |
|---|---|---|
| inner_steps, inner_lr | K, α | "evidence" climbs the prior too: it diverges where α > 2 N min σ_θ² |
| adapt_steps | K at test | |
| objective | | "paper" or "evidence"; says also along which gradient φ̂ is found |
| curvature | | what of H is kept: "full", "diagonal", "kronecker" (linear layers) or "last_layer", where the layers before keep the prior's width and have no part in g |
| hessian | | "exact", or "gauss_newton", which is never negative: better for networks; "sampled", its diagonal by ``fisher_draws`` targets of the model's own: for large networks |
| eta, damping | η, δ | of "paper"; η = 0 spares H in training; q and "evidence" need no damping, the prior gives it |
| first_order | | take the inner gradients as constants |
"""  # noqa: E501 - a table

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import TaskPosterior
from ..randomness import rng
from .base import AbstractMetaLearner, checked_choice, checked_steps
from .blocks import Block, floored, log_determinant, newton_step, normal, plus
from .curvature import HESSIANS, checked_kind, checked_pair, likelihood_curvature, prior_precision
from .objectives import counts, mean_nll
from .steps import descend

FLOOR = 0.1


class LLAMA(AbstractMetaLearner):
    """Lightweight Laplace approximation for meta-adaptation; see the module's docstring for the maths and the arguments.

    Raises ValueError for an unknown option, a negative ``damping`` or ``eta``, and a curvature by layers of a model without them.
    """

    def __init__(
        self, model: HierarchicalModel, *, inner_steps: int = 5, inner_lr: float = 0.1, adapt_steps: int | None = None,
        objective: str = "paper", curvature: str = "full", hessian: str = "exact", damping: float = 1e-3, eta: float = 1e-6,
        fisher_draws: int = 20, first_order: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.inner_steps, self.inner_lr = checked_steps("inner_steps", inner_steps), inner_lr
        self.adapt_steps = inner_steps if adapt_steps is None else checked_steps("adapt_steps", adapt_steps)
        self.takes_steps(self.inner_steps, self.adapt_steps)
        self.objective = checked_choice("objective", objective, ("paper", "evidence"))
        self.curvature, self.hessian = checked_kind(curvature, model.network), checked_choice("hessian", hessian, HESSIANS)
        checked_pair(self.curvature, self.hessian)
        self.fisher_draws = checked_steps("fisher_draws", fisher_draws, least=1)
        for name, value in (("damping", damping), ("eta", eta)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
        self.damping, self.eta, self.first_order = damping, eta, first_order

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """N(φ̂, (H_S + Λ_θ)⁻¹), from the support alone; without support points N(μ_θ, σ_θ²) for a Normal prior."""
        support = self.prepared(support)
        with rng(generator), torch.no_grad():
            return self.posterior(self._q(support, keep_graph=False))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """The objective, ``(T,)``; log p(Q_i | φ̂) is summed over queries, so a task with more of them weighs more."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        with rng(generator):
            if self.objective == "evidence":
                return -self._log_evidence(self.prepared(support.union(query), "episode"))
            phi = self._phi(support, self.inner_steps, keep_graph=True)
            if self.eta == 0:
                return -self.model.log_likelihood(phi, query)
            damped = plus(self._curvature(phi, query, keep_graph=True), torch.full_like(phi, self.damping))
            damped = floored(damped, torch.ones_like(phi), FLOOR * self.damping)
            return -self.model.log_likelihood(phi, query) + self.eta / 2 * log_determinant(damped)

    def guide(self, data: Points | Episode) -> None:
        """The same q as a Pyro guide: given an Episode it sees only S; given Points it sees them all."""
        self.run_guide(data, lambda support: self._q(support, keep_graph=True))

    def _q(self, support: Points, *, keep_graph: bool) -> Any:
        phi = self._phi(support, self.adapt_steps, keep_graph=keep_graph)
        return normal(phi, self._precision(phi, support, keep_graph=keep_graph))

    def _log_evidence(self, points: Points) -> Tensor:
        """log p(D_i | θ) of the quadratic that touches the log joint at φ̂, integrated over φ, ``(T,)``."""
        phi = self._phi(points, self.inner_steps, keep_graph=True)
        precision = self._precision(phi, points, keep_graph=True)
        with torch.enable_grad():
            move = torch.zeros_like(phi).requires_grad_()
            value = self.model.log_joint(phi + move, points)
            (gradient,) = torch.autograd.grad(value.sum(), move, create_graph=True)
        step = newton_step(precision, gradient)
        promised = (gradient * step).sum(-1) / 2
        kept = self.model.log_joint(phi + step, points) - value
        volume = (self.model.dim * math.log(2 * math.pi) - log_determinant(precision)) / 2
        return value + torch.minimum(promised, kept.clamp(min=0)) + volume

    def _phi(self, points: Points, steps: int, *, keep_graph: bool) -> Tensor:
        def loss(phi: Tensor) -> Tensor:
            return mean_nll(self.model, phi, points) if self.objective == "paper" else -self.model.log_joint(phi, points) / counts(points)

        alpha: list[Tensor | float] = [self.inner_lr] * steps
        (phi,) = descend(loss, (self.model.initial(points),), alpha, first_order=self.first_order, keep_graph=keep_graph)
        return phi

    def _precision(self, phi: Tensor, points: Points, *, keep_graph: bool) -> list[Block]:
        """H + Λ_θ, positive definite."""
        prior = prior_precision(self.model, phi, points, create_graph=keep_graph and torch.is_grad_enabled())
        sd = self.model.prior_moments(points)[1]
        return floored(plus(self._curvature(phi, points, keep_graph=keep_graph), prior), sd, FLOOR)

    def _curvature(self, phi: Tensor, points: Points, *, keep_graph: bool) -> list[Block]:
        create_graph = keep_graph and torch.is_grad_enabled()
        return likelihood_curvature(
            self.model, phi, points, kind=self.curvature, hessian=self.hessian, draws=self.fisher_draws, create_graph=create_graph
        )
