"""Amortisation class by class, VERSA's (Gordon et al. 2019, section 3): a class's weights from that class's support points alone.

    e_c = ( 1/n_c Σ_j g(f_j), f̄_c = 1/n_c Σ_j f_j, log(1 + n_c) ),  j with y_j = c      f_j: the network's own features of x_j
    φ_c = m_c + s_c u_c,   u_c ~ N( μ(e_c), diag r(e_c)² ),   μ(e_c) = A f̄_c + ν(e_c)    m, s: the prior's mean and sd

φ_c is the row w_c of a last layer and its b_c (`HeadNetwork`), or a prototype (`PrototypeNetwork`). One g, A, ν and r serve all classes, so
u is equivariant: with the labels permuted its parts change places and nothing else. So is φ where all classes have one prior, as they have
at the start. A class without points has its prior exactly.

A starts as the identity and ν near 0: a class's weights start along its mean features. On a `PrototypeNetwork`, whose prior starts at
N(0, 1), that is the prototypical network itself. VERSA has a network on the class's mean features and no A; without A learning is far
slower. What is given up: a class's weights know nothing of the other classes, but for what features know of the set at hand (batch norm
by "task").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..likelihoods import Categorical
from ..model import HierarchicalModel
from ..networks import HeadNetwork, PrototypeNetwork
from .base import AbstractLazyModule, LazyParameter, prior_mean
from .encoders import Head, PerClass


class ClassHead(AbstractLazyModule):
    """From each class's encoding to its part of u, packed as the model's network has φ: ν, near 0 at first, and A where ``linear``."""

    def __init__(self, encoder: PerClass, hidden: int, *, linear: bool) -> None:
        super().__init__()
        self.network = Head(encoder, hidden, _numbers_a_class)
        self.linear = LazyParameter(_identity) if linear else None
        self.num_features = 0

    def build(self, model: HierarchicalModel) -> None:
        """Reads off F; the parts make their parameters themselves."""
        assert isinstance(model.network, HeadNetwork | PrototypeNetwork)
        self.num_features = model.network.num_features

    def forward(self, encoding: Tensor) -> Tensor:
        """``(T, C, H)`` to ``(T, D)``, 0 for a class without points."""
        value = self.network(encoding)
        if self.linear is not None:
            value = value + encoding[..., -1 - self.num_features : -1] @ self.linear.value.mT
        value = torch.where(encoding[..., -1:] > 0, value, 0.0)  # log(1 + n_c)
        return torch.cat([part.flatten(1) for part in value.tensor_split((self.num_features,), -1)], -1)


def check_model(model: HierarchicalModel) -> None:
    """Raises ValueError where φ is not a vector of numbers for each class, of features that the network has."""
    network, likelihood = model.network, getattr(model.program, "likelihood", None)
    if not (isinstance(network, HeadNetwork | PrototypeNetwork) and isinstance(likelihood, Categorical)):
        got = "a user's program" if network is None else f"a {type(network).__name__} and {type(likelihood).__name__}"
        raise ValueError(
            f"encoder='per_class': expected a model from_network(HeadNetwork(...) or PrototypeNetwork(...), Categorical(...)), got {got}"
        )


def _numbers_a_class(model: HierarchicalModel) -> int:
    return model.dim // model.program.likelihood.num_classes  # type: ignore[attr-defined]


def _identity(model: HierarchicalModel) -> Tensor:
    assert isinstance(model.network, HeadNetwork | PrototypeNetwork)
    return torch.eye(_numbers_a_class(model), model.network.num_features).to(prior_mean(model))
