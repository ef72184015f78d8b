"""Complete pooling (Gelman & Hill 2007, chapter 12): every task has the same φ, fitted to all training tasks together.

    φ_c, θ = argmax Σ_i log p(S_i ∪ Q_i | φ_c, θ)

q(φ | S_i) is a Delta at φ_c whatever the support says: the other extreme from no pooling. Its predictive spread is that of a new
point of any task, through the likelihood's own noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import TaskPosterior, delta
from .base import AbstractMetaLearner, LazyParameter, prior_mean


class CompletePooling(AbstractMetaLearner):
    """One φ for all tasks; starts at the prior's mean."""

    def __init__(self, model: HierarchicalModel) -> None:
        super().__init__(model)
        self.centre = LazyParameter(prior_mean)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """A Delta at φ_c for every task."""
        support = self.prepared(support)
        return TaskPosterior(self.model, delta(self.centre.value.detach().expand(support.num_tasks, -1)))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """−log p(S_i ∪ Q_i | φ_c), ``(T,)``, summed over points: a task counts with all its points."""
        both = self.prepared(episode.union(), "episode")
        return -self.model.log_likelihood(self.centre.value.expand(both.num_tasks, -1), both)
