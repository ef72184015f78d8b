"""No pooling (Gelman & Hill 2007, chapter 12): every task on its own, by maximum likelihood, as if there were no others.

    φ_c = argmax Σ_i log p(S_i ∪ Q_i | φ_c)                   complete pooling: where what a task cannot tell is taken from
    φ̂_i = φ_c + argmin ‖δ‖  over  argmax_δ log p(S_i | φ_c + δ)   the maximum likelihood estimate nearest to φ_c
    loss_i(θ) = −log p(D_i | φ̂_i) + ½ log pdet H_i,  H_i = −∇² log p(D_i | φ̂_i),  D_i = S_i ∪ Q_i

q(φ | S_i) is a Delta at φ̂_i: a flat prior and no uncertainty. The loss is the evidence under a flat prior (Laplace); for Gaussian
noise it is restricted maximum likelihood, so the noise pooled over training tasks is Σ RSS_i / Σ (N_i − rank_i), not biased by the
φ's that were fitted. θ's prior parameters play no part.

For D ≤ ``newton_dim`` the estimate takes Newton steps with a pseudo-inverse (exact in one for a linear model); where the maximum
lies at infinity (classes that can be told apart) it stops after ``inner_steps`` on the way there. For larger D, ``inner_steps``
Adam steps from φ_c, and the noise is learned on the query set, since a network fits its support to the point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import TaskPosterior, delta
from ..randomness import rng
from .base import AbstractMetaLearner, LazyParameter, checked_steps, prior_mean
from .objectives import mean_nll, value_of
from .steps import adam, derivatives, log_pseudo_determinant, newton


class NoPooling(AbstractMetaLearner):
    """Maximum likelihood for each task alone; see the module's docstring.

    ``inner_steps``: at most so many Newton (or Adam) steps. ``inner_lr``: Adam's step size, not used by Newton.
    """

    def __init__(self, model: HierarchicalModel, *, inner_steps: int = 50, inner_lr: float = 0.01, newton_dim: int = 50) -> None:
        super().__init__(model)
        self.inner_steps, self.inner_lr, self.newton_dim = checked_steps("inner_steps", inner_steps), inner_lr, newton_dim
        self.why_eager = "maximum likelihood takes as many steps as the values ask for"
        self.centre = LazyParameter(prior_mean)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """A Delta at the maximum likelihood estimate nearest to φ_c; at φ_c without support points."""
        support = self.prepared(support)
        with rng(generator):
            return self.posterior(delta(self._estimate(support)))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """−log evidence of S_i ∪ Q_i under a flat prior, ``(T,)``; its gradient also fits φ_c."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        both = self.prepared(episode.union(), "episode")
        if self.model.dim > self.newton_dim:
            with rng(generator):
                loss = -self.model.log_likelihood(self._estimate(support), query)
        else:
            phi = self._estimate(both)
            nll, _, hessian = derivatives(lambda phi: -self.model.log_likelihood(phi, both), phi, create_graph=True)
            loss = nll + 0.5 * log_pseudo_determinant(hessian)
        return value_of(loss, loss + self._pooled(both))

    def _estimate(self, points: Points) -> Tensor:
        start = self.centre.value.detach().expand(points.num_tasks, -1)
        if self.model.dim > self.newton_dim:
            return adam(lambda phi: mean_nll(self.model, phi, points), start, steps=self.inner_steps, lr=self.inner_lr)
        return newton(lambda phi: -self.model.log_likelihood(phi, points), start, steps=self.inner_steps)[0]

    def _pooled(self, both: Points) -> Tensor:
        # the complete-pooling loss with a gradient for φ_c alone: its own noise would be another, larger one
        with torch.enable_grad():
            centre = self.centre.value.detach().expand(both.num_tasks, -1).requires_grad_()
            (gradient,) = torch.autograd.grad(-self.model.log_likelihood(centre, both).sum(), centre)
        return (gradient * self.centre.value).sum(-1)
