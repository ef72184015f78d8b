"""Exact inference where the log joint is quadratic in φ (linear-Gaussian models): the posterior is Normal, in closed form.

    log p(S_i, φ | θ) = log p(S_i, φ̂ | θ) + gᵀ(φ − φ̂) − ½ (φ − φ̂)ᵀ P (φ − φ̂)      for any φ̂
    q(φ | S_i) = N( φ̂ + P⁻¹ g, P⁻¹ )
    log p(S_i | θ) = log p(S_i, φ̂ | θ) + D/2 log 2π − ½ log det P + ½ gᵀ P⁻¹ g

The model's θ as it stands is used; `meta_loss` is −log p(S_i ∪ Q_i | θ), so that θ can be learned by empirical Bayes.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..posteriors import TaskPosterior
from .base import AbstractMetaLearner
from .steps import derivatives


class Exact(AbstractMetaLearner):
    """The exact posterior; raises ValueError for a model whose log joint is not quadratic in φ."""

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """N(φ̂ + P⁻¹ g, P⁻¹); the prior without support points."""
        with torch.no_grad():
            return TaskPosterior(self.model, self._q(self.prepared(support)))

    def log_evidence(self, points: Points) -> Tensor:
        """log p(y | θ) of each task with φ integrated out, ``(T,)``, differentiable in θ; 0 without points."""
        _, value, gradient, precision = self._expansion(self.prepared(points, "points"))
        factor = torch.linalg.cholesky(precision)
        half = torch.linalg.solve_triangular(factor, gradient[..., None], upper=False)[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return value + 0.5 * (self.model.dim * math.log(2 * math.pi) - log_det + half.square().sum(-1))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """−log p(S_i ∪ Q_i | θ), ``(T,)``."""
        return -self.log_evidence(episode.union())

    def guide(self, data: Points | Episode) -> None:
        """The same q as a Pyro guide: given an Episode it sees only S; given Points it sees them all."""
        self.run_guide(data, self._q)

    def _q(self, support: Points) -> dist.MultivariateNormal:
        phi, _, gradient, precision = self._expansion(support)
        mean = phi + torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(precision))[..., 0]
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def _expansion(self, points: Points) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        phi = self.model.initial(points).detach()
        value, gradient, hessian = derivatives(lambda phi: self.model.log_joint(phi, points), phi, create_graph=torch.is_grad_enabled())
        if self.model.takes_data_as_ready:  # values are not looked at; they were when the program was first met
            return phi, value, gradient, -hessian
        # a quadratic has the same Hessian everywhere
        elsewhere = derivatives(lambda phi: self.model.log_joint(phi, points), phi + torch.linspace(0.5, 1.5, self.model.dim).to(phi))[2]
        size = hessian.detach().abs().amax((-2, -1))
        gap = (hessian.detach() - elsewhere).abs().amax((-2, -1))
        if not bool((gap <= 1e3 * torch.finfo(phi.dtype).eps * (1 + size)).all()):
            raise ValueError(
                "Exact: the log joint is not quadratic in φ (its Hessian changes with φ): use NUTS for this model, "
                "or a Normal prior with a Gaussian likelihood that is linear in φ"
            )
        return phi, value, gradient, -hessian
