"""MAML (Finn, Abbeel & Levine 2017, algorithm 2): a point estimate of φ, K gradient steps from the prior's mean.

    φ_0 = E[φ | θ]                                                     (`initial`; the prior's scale plays no part)
    φ_k+1 = φ_k − α ∇_φ [ −1/N_S Σ_j log p(y_j | x_j, φ_k) ],  j ∈ S_i  (eq. 1, on the *mean* support loss)
    loss_i(θ) = −1/N_Q Σ_j log p(y_j | x_j, φ_K),              j ∈ Q_i  (the outer sum of line 10)

q(φ | S_i) is a Delta at φ_K. Second order differentiates through every step; ``first_order`` (FOMAML, section 5.2) takes the
outer gradient at φ_K. ``learn_lr`` learns α: per parameter is Meta-SGD (Li et al. 2017), per step is MAML++ (Antoniou et al. 2019).

| argument | symbol | |
|---|---|---|
| inner_steps | K | steps in training, and at test unless ``adapt_steps`` says otherwise |
| inner_lr | α | step size, the same meaning at every N |
| adapt_steps | K at test | |
| learn_lr | | False, "scalar", "per_parameter", "per_step", "per_step_per_parameter" |
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import TaskPosterior, delta
from ..randomness import rng
from .base import AbstractMetaLearner, LazyParameter, checked_choice, checked_steps, prior_mean
from .objectives import mean_nll
from .steps import descend

LEARN_LR = ("scalar", "per_parameter", "per_step", "per_step_per_parameter")


class MAML(AbstractMetaLearner):
    """Model-agnostic meta-learning; see the module's docstring for the maths and the arguments."""

    def __init__(
        self, model: HierarchicalModel, *, inner_steps: int = 1, inner_lr: float = 0.1, adapt_steps: int | None = None,
        first_order: bool = False, learn_lr: bool | str = False,
    ) -> None:
        super().__init__(model)
        self.inner_steps = checked_steps("inner_steps", inner_steps)
        self.adapt_steps = inner_steps if adapt_steps is None else checked_steps("adapt_steps", adapt_steps)
        self.takes_steps(self.inner_steps, self.adapt_steps)
        self.inner_lr, self.first_order = inner_lr, first_order
        self.learn_lr = "scalar" if learn_lr is True else learn_lr
        if self.learn_lr:
            checked_choice("learn_lr", self.learn_lr, LEARN_LR)
            self.step_size = LazyParameter(self._first_step_sizes)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """A Delta at φ after ``adapt_steps`` steps; without support points, at `initial`."""
        support = self.prepared(support)
        with rng(generator):
            phi = self._phi(support, self.adapt_steps, keep_graph=False)
        return self.posterior(delta(phi))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean query NLL at φ_K, ``(T,)``."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        with rng(generator):
            phi = self._phi(support, self.inner_steps, keep_graph=True)
            return mean_nll(self.model, phi, query)

    def _phi(self, support: Points, steps: int, *, keep_graph: bool) -> Tensor:
        (phi,) = descend(
            lambda phi: mean_nll(self.model, phi, support), (self.model.initial(support),), self._step_sizes(steps),
            first_order=self.first_order, keep_graph=keep_graph,
        )
        return phi

    def _step_sizes(self, steps: int) -> list[Tensor | float]:
        if not self.learn_lr:
            return [self.inner_lr] * steps
        alpha = self.step_size.value
        if "per_step" not in str(self.learn_lr):
            return [alpha] * steps
        return [alpha[min(k, self.inner_steps - 1)] for k in range(steps)]  # further steps at test go on with the last one

    def _first_step_sizes(self, model: HierarchicalModel) -> Tensor:
        shape = {"scalar": (), "per_parameter": (model.dim,), "per_step": (self.inner_steps,)}
        return prior_mean(model).new_full(shape.get(str(self.learn_lr), (self.inner_steps, model.dim)), self.inner_lr)
