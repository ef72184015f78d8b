"""An ensemble of learners: M members, each with its own θ, from another initialisation and another order of tasks.

    q(φ | S_i) = 1/M Σ_m q_m(φ | S_i, θ_m)            a mixture; its predictive averages the members' predictives
    loss_i = 1/M Σ_m loss_i(θ_m)                      each member's own objective

The members of an ensemble of MAMLs are Deltas: what they disagree about is all the uncertainty there is (Lakshminarayanan et al. 2017 for
networks in general). `bayesmeta.meta_train` trains one member after the other on one random stream, so that they see other tasks in another
order; `meta_loss` is for a loop of your own and shows all members the same tasks.

| argument | symbol | |
|---|---|---|
| make | | the constructor of a member: ``lambda model: MAML(model, inner_lr=0.01)`` |
| size | M | |
| seed, jitter | | where members start: networks are drawn anew, a user's program moved by ``jitter`` (`HierarchicalModel.reinitialise`) |
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import MixturePosterior
from ..randomness import rng
from .base import AbstractMetaLearner, checked_compile, checked_steps


class Ensemble(AbstractMetaLearner):
    """M copies of a learner, each on its own copy of ``model``; see the module's docstring."""

    def __init__(
        self, model: HierarchicalModel, make: Callable[[HierarchicalModel], AbstractMetaLearner], *, size: int = 5,
        seed: int = 0, jitter: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.size, self.seed, self.jitter = checked_steps("size", size, least=1), seed, jitter
        models = [model] + [copy.deepcopy(model) for _ in range(size - 1)]
        for k in range(1, size):
            models[k].reinitialise(seed + k, jitter=jitter)
        self.members = nn.ModuleList(make(one) for one in models)  # type: ignore[assignment]

    def adapt(self, support: Points, *, generator: torch.Generator | None = None, compile: bool | str = False) -> MixturePosterior:
        """The mixture of the members' posteriors; ``compile`` is for each of them."""
        checked_compile(compile)
        self.materialise(support)
        with rng(generator):
            adapting: list[Any] = [member.adapt for member in self.members]  # each takes ``compile``, without mentioning it
            return MixturePosterior([adapt(support, compile=compile) for adapt in adapting])

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of the members' losses, ``(T,)``."""
        self.materialise(episode)
        with rng(generator):
            return torch.stack([member.meta_loss(episode) for member in self.members]).mean(0)
