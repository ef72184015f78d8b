"""Pseudo-observations: what each point says of φ by itself, put together as a linear-Gaussian model does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..model import HierarchicalModel
from ..randomness import rng
from .base import AbstractLazyModule
from .encoders import AbstractEncoder
from .layers import mlp, near_zero


class Factors(AbstractLazyModule):
    """Each point as pseudo-observations t_j ~ N(b_jᵀu, 1) of a u ~ N(0, I), whose posterior is N(C Σ b_j t_j, C), C = (I + Σ b_j b_jᵀ)⁻¹.

    b_j = b(x_j, g e), t_j = t(x_j, y_j, g e), each a linear map plus a network; as many for each point as y has numbers. b_j stands where
    a Gauss-Newton step has a Jacobian, and t_j where it has a residual. This holds the posterior of every linear-Gaussian model exactly, at
    any N, as no plain network does. (Volpp et al. 2021 aggregate a context's points so for neural processes, with diagonal factors.)

    The gate g starts at 0: what each point says by itself is learned first. Open from the start, the encoding gives t the whole answer
    before b has found its form, and learning stalls there (measured on linear-Gaussian tasks: 0.7 nats from the optimum instead of 0.03).
    """

    def __init__(self, encoder: AbstractEncoder, hidden: int) -> None:
        super().__init__()
        self._encoder = [encoder]  # the learner's, which registers its parameters
        self.hidden, self.num_inputs, self.ranks = hidden, 0, 0
        self._seed = int(torch.randint(2**62, ()))
        self.linear, self.network = nn.ModuleDict(), nn.ModuleDict()
        self.gate = nn.Parameter(torch.zeros(()))

    def build(self, model: HierarchicalModel) -> None:
        """Makes the layers, once; after the encoder."""
        if self.ranks:
            return
        points, encoding = self._encoder[0].points, self._encoder[0].size
        self.num_inputs, self.ranks = points.num_inputs, points.num_targets
        with rng(torch.Generator().manual_seed(self._seed)):
            for name, features, outputs in (("b", self.num_inputs, model.dim), ("t", self.num_inputs + self.ranks, 1)):
                self.linear[name] = nn.Linear(features, self.ranks * outputs)
                self.network[name] = near_zero(mlp(features + encoding, self.hidden, self.ranks * outputs))
        with torch.no_grad():  # near the prior at the start, yet not at 0, where b and t have no gradient
            for name, parameter in self.linear.named_parameters():
                parameter.mul_(0.3 if name.endswith("weight") else 0.0)
        self.to(model.initial(model.made_up_points(1, 1)))

    def forward(self, f: Tensor, encoding: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``f (T, N, F)``, ``encoding (T, H)``, ``mask (T, N)`` to b ``(T, J, D)`` and t ``(T, J, 1)``, J = N · ``ranks``; padding 0."""
        encoding, parts = self.gate * encoding, []
        for name, features in (("b", self.num_inputs), ("t", self.num_inputs + self.ranks)):  # x; x and y; no products: heavy tails
            own = f[..., :features]
            each = self.linear[name](own) + self._through(self.network[name], own, encoding)
            parts.append(torch.where(mask[..., None], each, 0.0).unflatten(-1, (self.ranks, -1)).flatten(1, 2))
        return parts[0], parts[1]

    @staticmethod
    def _through(network: Any, own: Tensor, encoding: Tensor) -> Tensor:
        """``network`` of both behind each other, ``own (T, N, ·)`` and ``encoding (T, H)``, whose share is taken once a task."""
        first = network[0]
        of_point, of_task = first.weight.split([own.shape[-1], encoding.shape[-1]], -1)
        value = linear(own, of_point) + linear(encoding, of_task, first.bias)[:, None]
        for layer in network[1:]:
            value = layer(value)
        return value


def pseudo_posterior(b: Tensor, t: Tensor, *, mean_field: bool) -> tuple[Tensor, Tensor]:
    """Mean ``(T, D)`` and covariance C ``(T, D, D)`` of u (see `Factors`); with ``mean_field`` the variances 1 / (1 + Σ b_j²) ``(T, D)``.

    The mean field's mean is the same (its precision is C⁻¹'s diagonal), found by the smaller of two systems: D or J equations.
    """
    if mean_field and b.shape[-1] > b.shape[-2]:
        inverse = _inverse(_one_plus(b @ b.mT))
        mean = (b.mT @ (inverse @ t))[..., 0]
    else:
        inverse = _inverse(_one_plus(b.mT @ b))
        mean = (inverse @ (b.mT @ t))[..., 0]
    return mean, 1 / (1 + b.square().sum(-2)) if mean_field else inverse


def cholesky(matrix: Tensor) -> Tensor:
    """The factor; NaN for a task that has none, without an exception for the others."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where((failed > 0)[..., None, None], torch.nan, factor)


def _inverse(matrix: Tensor) -> Tensor:
    factor = cholesky(matrix)
    if not factor.is_cuda:
        return torch.cholesky_inverse(factor)
    # a GPU's cholesky_inverse cannot be recorded; on a CPU this way is slower by half
    half = torch.linalg.solve_triangular(factor, torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device), upper=False)
    return half.mT @ half


def _one_plus(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
