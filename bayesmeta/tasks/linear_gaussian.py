"""Linear regression with normally distributed weights: the family whose every answer is known in closed form."""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from bayesmeta.episodes import Episode, Points
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import Size, check_request, check_size, draw_mask


@final
class LinearGaussian:
    """w_i ~ N(m, Σ), y_ij = x_ij · w_i + σ ε_ij, ε_ij ~ N(0, 1), x_ij ~ N(0, I).

    ============== ====== =================================================================================
    argument       symbol
    ============== ====== =================================================================================
    weight_mean    m      ``(D,)``
    weight_cov     Σ      ``(D, D)``, symmetric and positive definite
    noise          σ      standard deviation of one y, > 0
    num_support           points a task, or ``(low, high)``: a random number for each task, padded to ``high``
    num_query             the same for the query set
    intercept             True: the first feature is the constant 1
    dtype                 of the episodes; default: that of ``weight_mean``
    ============== ====== =================================================================================

    With w = m + L z, Σ = L Lᵀ, A = X L / σ, r = (y − X m) / σ and P = I + AᵀA, the posterior of z is N(ẑ, P⁻¹),
    ẑ = P⁻¹Aᵀr (Bishop 2006, section 3.3). P's eigenvalues are at least 1, whatever Σ and σ are.

    Raises ValueError where shapes disagree, Σ is not positive definite, or σ is not positive.
    """

    num_tasks: ClassVar[None] = None
    target_scale: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        weight_mean: Any,
        weight_cov: Any,
        noise: float,
        num_support: Size = 10,
        num_query: Size = 10,
        intercept: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        mean, cov = torch.as_tensor(weight_mean, dtype=dtype), torch.as_tensor(weight_cov, dtype=dtype)
        dtype = mean.dtype if mean.is_floating_point() else torch.get_default_dtype()
        if mean.dim() != 1 or cov.shape != (*mean.shape, *mean.shape):
            got = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
            raise ValueError(f"expected weight_mean of shape (D,) and weight_cov of shape (D, D), got {got}")
        self.weight_mean, self.weight_cov = mean.to(dtype), cov.to(dtype)
        if not torch.allclose(self.weight_cov, self.weight_cov.mT):
            raise ValueError("weight_cov: expected a symmetric matrix")
        self._weight_tril, failed = torch.linalg.cholesky_ex(self.weight_cov)
        if failed:
            raise ValueError("weight_cov: expected a positive definite matrix")
        if not 0 < noise < math.inf:
            raise ValueError(f"noise: expected a positive standard deviation, got {noise}")
        check_size("num_support", num_support)
        check_size("num_query", num_query)
        self.noise, self.num_support, self.num_query, self.intercept = noise, num_support, num_query, intercept

    def __repr__(self) -> str:
        return f"LinearGaussian({len(self.weight_mean)} weights, noise={self.noise})"

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """New tasks: x ``(T, N, D)``, y ``(T, N)``, both of the family's dtype; zeros in the padding."""
        check_request(num_tasks, generator)
        with rng(generator):
            tasks = self._draw_tasks(num_tasks)
            return Episode(self._draw_points(tasks, self.num_support), self._draw_points(tasks, self.num_query))

    def sample_tasks(self, num_tasks: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """``weights (T, D)``: those that `sample` draws from the same generator state."""
        check_request(num_tasks, generator)
        with rng(generator):
            return self._draw_tasks(num_tasks)

    def evaluate(self, tasks: dict[str, Tensor], x: Tensor) -> Tensor:
        """The noise-free targets ``(T, N)`` at ``x (T, N, D)``."""
        return _times(x, tasks["weights"])

    def exact_posterior(self, support: Points) -> MultivariateNormal:
        """p(w_i | S_i), batch ``(T,)``, event ``(D,)``, in the dtype of ``support.x``; the prior if S_i is empty."""
        mean, root, _, _ = self._posterior(support)
        # a triangular root by QR, where a Cholesky of B Bᵀ could fail in float32
        r = torch.linalg.qr(root.mT).R
        return MultivariateNormal(mean, scale_tril=(r * r.diagonal(dim1=-2, dim2=-1).sign()[..., None]).mT)

    def exact_predictive(self, support: Points, x: Tensor) -> Normal:
        """p(y | x, S_i) of a new, noisy y at every ``x (T, N, D)``, batch ``(T, N)``."""
        mean, root, _, _ = self._posterior(support)
        return Normal(_times(x, mean), ((x @ root).square().sum(-1) + self.noise**2).sqrt())

    def log_evidence(self, points: Points) -> Tensor:
        """log p(y_i | x_i), the weights integrated out, of each task, ``(T,)``; 0 where a task has no points."""
        _, _, fit, log_det = self._posterior(points)
        # counts are integers: times a Python number they would become float32
        return -0.5 * (fit + log_det + points.counts.to(fit) * math.log(2 * math.pi * self.noise**2))

    def _posterior(self, points: Points) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean ``(T, D)``, root B ``(T, D, D)`` of the covariance BBᵀ; rᵀ(I + AAᵀ)⁻¹r and log|I + AAᵀ|, ``(T,)``."""
        if points.y is None:
            raise ValueError("points.y: expected targets, got None")
        prior_mean, tril = self.weight_mean.to(points.x), self._weight_tril.to(points.x)
        # replaced, not multiplied: the padding may hold NaN
        x = torch.where(points.mask[..., None], points.x, 0)
        r = torch.where(points.mask, points.y - _times(x, prior_mean), 0) / self.noise
        a = x @ tril / self.noise
        chol = torch.linalg.cholesky(torch.eye(len(prior_mean)).to(a) + a.mT @ a)
        z = torch.cholesky_solve(a.mT @ r[..., None], chol)
        # B = L chol⁻ᵀ, so that B Bᵀ = L P⁻¹ Lᵀ
        root = torch.linalg.solve_triangular(chol, tril.mT.expand_as(chol), upper=False).mT
        # two sums of squares, where rᵀr − rᵀAẑ would cancel
        fit = (r - (a @ z)[..., 0]).square().sum(-1) + z[..., 0].square().sum(-1)
        return prior_mean + (tril @ z)[..., 0], root, fit, 2 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _draw_tasks(self, num_tasks: int) -> dict[str, Tensor]:
        z = torch.randn(num_tasks, len(self.weight_mean), dtype=self.weight_mean.dtype)
        return {"weights": self.weight_mean + z @ self._weight_tril.mT}

    def _draw_points(self, tasks: dict[str, Tensor], size: Size) -> Points:
        weights = tasks["weights"]
        mask = draw_mask(size, len(weights))
        x = torch.randn(*mask.shape, weights.shape[1], dtype=weights.dtype)
        if self.intercept:
            x[..., 0] = 1
        y = self.evaluate(tasks, x) + self.noise * torch.randn(mask.shape, dtype=weights.dtype)
        return Points(x.masked_fill(~mask[..., None], 0), y.masked_fill(~mask, 0), mask)


def _times(x: Tensor, weights: Tensor) -> Tensor:
    """x · w: ``(T, N, D)`` and ``(T, D)`` or ``(D,)`` to ``(T, N)``."""
    return (x @ weights[..., None])[..., 0]
