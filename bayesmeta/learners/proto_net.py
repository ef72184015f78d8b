"""Prototypical networks (Snell, Swersky & Zemel 2017): a class is the mean of its embedded support points.

    c_ik = 1/|S_ik| Σ_{j ∈ S_ik} e_θ(x_j),  S_ik = { j ∈ S_i : y_j = k }       (eq. 1)
    p(y = k | x, φ_i) = softmax_k( −‖e_θ(x) − c_ik‖² )                         (eq. 2, squared Euclidean)
    loss_i(θ) = −1/N_Q Σ_j log p(y_j | x_j, φ_i),  j ∈ Q_i

q(φ | S_i) is a Delta at φ_i = (c_i1, …, c_iC), D = C · F. θ is the embedding e_θ alone: the prior plays no part. A class without a
support point has no prototype: an error. To train with more classes than the test has (section 2.6), make a second model with another
C on the same ``features``: they share θ.

| argument | symbol | |
|---|---|---|
| model | e_θ, C | ``HierarchicalModel.from_network(PrototypeNetwork(features, F, C), Categorical(C))`` |
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..likelihoods import Categorical
from ..model import HierarchicalModel
from ..networks import PrototypeNetwork
from ..posteriors import TaskPosterior, delta
from ..randomness import rng
from .base import AbstractMetaLearner
from .objectives import class_members, mean_nll


class ProtoNet(AbstractMetaLearner):
    """Class means in a learned embedding; see the module's docstring. Raises ValueError for a model of another kind."""

    def __init__(self, model: HierarchicalModel) -> None:
        super().__init__(model)
        network, likelihood = model.network, getattr(model.program, "likelihood", None)
        if not (isinstance(network, PrototypeNetwork) and isinstance(likelihood, Categorical)):
            got = "a user's program" if network is None else f"a {type(network).__name__} and {type(likelihood).__name__}"
            raise ValueError(f"ProtoNet: expected a model from_network(PrototypeNetwork(...), Categorical(...)), got {got}")

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """A Delta at the prototypes. Raises ValueError naming task and class where a class has no support point."""
        support = self.prepared(support)
        with rng(generator), torch.no_grad():
            return self.posterior(delta(self._prototypes(support)))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean query NLL under the support's prototypes, ``(T,)``; raises as `adapt` does."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        with rng(generator):
            return mean_nll(self.model, self._prototypes(support), query)

    def _prototypes(self, support: Points) -> Tensor:
        """``(T, C · F)``."""
        network = self.model.network
        assert isinstance(network, PrototypeNetwork)
        members = class_members(support, network.num_classes, "ProtoNet", check=not self.model.takes_data_as_ready)
        embedded = self.model.embed(support.x, support.mask)
        share = members.to(embedded) / members.sum(1, keepdim=True)
        return (share.mT @ embedded).flatten(1)
