"""Reptile (Nichol, Achiam & Schulman 2018): θ moves towards where K gradient steps on a task lead, without a split.

    φ_0 = E[φ | θ]                                                    (`initial`; the prior's scale plays no part)
    φ_k+1 = φ_k − α ∇_φ [ −1/N_D Σ_j log p(y_j | x_j, φ_k) ],  j ∈ D_i = S_i ∪ Q_i
    θ ← θ + ε 1/T Σ_i (φ_K,i − θ)                                     (the paper's batched version)
    loss_i(θ) = ½ ‖φ_0 − stop(φ_K)‖²                                  so that a gradient step of size ε is that update

q(φ | S_i) is a Delta at φ_K, K steps on the support alone. Whatever of θ is not where φ starts but part of the likelihood (noise, the
features under a head) has no φ_K − θ: it is trained by −1/N_D Σ_j log p(y_j | x_j, stop(φ_K)), which adds its gradient to the loss
and nothing to its value. K = 1 would be joint training on all tasks, so K ≥ 2.

| argument | symbol | |
|---|---|---|
| inner_steps | K | steps in training, and at test unless ``adapt_steps`` says otherwise |
| inner_lr | α | step size, the same meaning at every N |
| adapt_steps | K at test | |
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import TaskPosterior, delta
from ..randomness import rng
from .base import AbstractMetaLearner, checked_steps
from .objectives import mean_nll, value_of
from .steps import descend


class Reptile(AbstractMetaLearner):
    """First-order meta-learning without a split; see the module's docstring for the maths and the arguments."""

    def __init__(
        self, model: HierarchicalModel, *, inner_steps: int = 5, inner_lr: float = 0.1, adapt_steps: int | None = None
    ) -> None:
        super().__init__(model)
        self.inner_steps, self.inner_lr = checked_steps("inner_steps", inner_steps, least=2), inner_lr
        self.adapt_steps = inner_steps if adapt_steps is None else checked_steps("adapt_steps", adapt_steps)
        self.takes_steps(self.inner_steps, self.adapt_steps)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """A Delta at φ after ``adapt_steps`` steps; without support points, at `initial`."""
        support = self.prepared(support)
        with rng(generator):
            return self.posterior(delta(self._phi(support, self.adapt_steps)))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """½ ‖θ − φ_K‖² in packed space, ``(T,)``; its gradient in the likelihood's parameters is that of the mean NLL at φ_K."""
        both = self.prepared(episode.union(), "episode")
        with rng(generator):
            phi = self._phi(both, self.inner_steps)
            distance = 0.5 * (self.model.initial(both) - phi).square().sum(-1)
            nll = mean_nll(self.model, phi, both)
            return distance + value_of(torch.zeros_like(nll), nll)

    def _phi(self, points: Points, steps: int) -> Tensor:
        (phi,) = descend(
            lambda phi: mean_nll(self.model, phi, points), (self.model.initial(points),), [self.inner_lr] * steps, keep_graph=False
        )
        return phi.detach()
