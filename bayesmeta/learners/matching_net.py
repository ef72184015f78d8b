"""Matching networks (Vinyals, Blundell, Lillicrap & Wierstra 2016): a query point is labelled as the support points it resembles.

    a(x, x_j) = softmax_{j ∈ S_i}( s(e_θ(x), e_θ(x_j)) / τ )                  (section 2.1; s: cosine similarity, τ = 1)
    p(y = k | x, S_i) = Σ_{j ∈ S_i} a(x, x_j) 1[y_j = k]                       (eq. 1)
    loss_i(θ) = −1/N_Q Σ_j log p(y_j | x_j, S_i),  j ∈ Q_i                     (section 2.2)

There is no φ of fixed size: `adapt` gives the prediction as a function of the support set, which `predict` runs and `draws` refuses. θ is
the embedding e_θ (and τ where it is learned); the model's prior and head play no part. A class without a support point would have
probability 0: an error. With cosines in [−1, 1] and τ = 1, the paper's, no class of C can have more than e² / (e² + C − 1) at one shot:
a smaller or learned τ lets the network be sure. With ``attention="squared_distance"`` and one shot this is a prototypical network.
The paper's full-context embeddings (LSTMs over the support set) are not here: they depend on the order of its points.

| argument | symbol | |
|---|---|---|
| model | e_θ, C | ``from_network(network, Categorical(C))``, the network a `HeadNetwork` or a `PrototypeNetwork`: what has ``embed`` |
| attention | s | "cosine", or "squared_distance": −‖e − e_j‖² |
| temperature | τ | where it starts |
| learn_temperature | | True: log τ belongs to θ |
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import Categorical as Classes
from torch import Tensor
from torch.nn.functional import normalize

from ..episodes import Episode, Points
from ..likelihoods import Categorical
from ..model import HierarchicalModel
from ..networks import HeadNetwork, PrototypeNetwork
from ..posteriors import FunctionPosterior
from ..randomness import rng
from .base import AbstractMetaLearner, LazyParameter, checked_choice, prior_mean
from .objectives import class_members, counts

ATTENTION = ("cosine", "squared_distance")


class MatchingNet(AbstractMetaLearner):
    """Attention over the support set; see the module's docstring. Raises ValueError for a model without an embedding or classes."""

    def __init__(
        self, model: HierarchicalModel, *, attention: str = "cosine", temperature: float = 1.0, learn_temperature: bool = False
    ) -> None:
        super().__init__(model)
        self.why_eager = "it looks for classes without a support point"
        network, likelihood = model.network, getattr(model.program, "likelihood", None)
        if not (isinstance(network, HeadNetwork | PrototypeNetwork) and isinstance(likelihood, Categorical)):
            got = "a user's program" if network is None else f"a {type(network).__name__} and {type(likelihood).__name__}"
            raise ValueError(
                f"MatchingNet: expected a model from_network(HeadNetwork(...) or PrototypeNetwork(...), Categorical(...)), got {got}"
            )
        self.attention = checked_choice("attention", attention, ATTENTION)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        self.temperature, self.learn_temperature = temperature, learn_temperature
        if learn_temperature:
            self.log_temperature = LazyParameter(self._first_log_temperature)
        self._num_classes = likelihood.num_classes

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> FunctionPosterior:
        """The labelling rule of ``support``. Raises ValueError naming task and class where a class has no support point."""
        support = self.prepared(support)
        class_members(support, self._num_classes, "MatchingNet")
        return FunctionPosterior(self.model, self._rule, support)

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean query NLL, ``(T,)``; raises as `adapt` does."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        assert query.y is not None
        with rng(generator):
            y = query.y[..., 0] if query.y.dim() == 3 else query.y
            log_prob = self._rule(support, query.x, query.mask).log_prob(y)[0]
            return -torch.where(query.mask, log_prob, 0.0).sum(-1) / counts(query)

    def _rule(self, support: Points, x: Tensor, mask: Tensor | None = None) -> Classes:
        """p(y | x, S_i) at ``x (T, N, *I)``, batch ``(1, T, N)``."""
        members = class_members(support, self._num_classes, "MatchingNet")
        scores = self._similarity(self.model.embed(x, mask), self.model.embed(support.x, support.mask)) / self._tau()
        # in logs, so that a class far away has a small probability and not 0; `Classes` divides by their sum
        return Classes(logits=torch.where(members[:, None], scores[..., None], -torch.inf).logsumexp(-2)[None])

    def _similarity(self, e: Tensor, of_support: Tensor) -> Tensor:
        """``(T, N, F)`` and ``(T, N_S, F)`` to ``(T, N, N_S)``."""
        if self.attention == "cosine":
            return normalize(e, dim=-1) @ normalize(of_support, dim=-1).mT
        return 2 * e @ of_support.mT - e.square().sum(-1, keepdim=True) - of_support.square().sum(-1)[..., None, :]

    def _tau(self) -> Tensor | float:
        return self.log_temperature.value.exp() if self.learn_temperature else self.temperature

    def _first_log_temperature(self, model: HierarchicalModel) -> Tensor:
        return prior_mean(model).new_tensor(math.log(self.temperature))
