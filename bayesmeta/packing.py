"""Packing a constrained value into unconstrained reals: a bijection with a log determinant for every support, and its moments.

Pyro's own `biject_to` serves nearly all supports; added here are the two whose torch transform is no bijection
(it maps n² reals onto a triangle and has no log determinant): Cholesky factors and positive definite matrices.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints, transforms
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from .randomness import rng


class VectorToCholesky(Transform):
    """Reals ``(n (n + 1) / 2,)`` to a lower-triangular matrix ``(n, n)`` with a positive diagonal (through exp)."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorToCholesky)

    def _call(self, x: Tensor) -> Tensor:
        n = self.forward_shape(x.shape[-1:])[0]
        rows, columns = torch.tril_indices(n, n, device=x.device)
        x = torch.where(rows == columns, torch.where(rows == columns, x, 0.0).exp(), x)
        flat = x.new_zeros(*x.shape[:-1], n * n).scatter(-1, (rows * n + columns).expand(x.shape), x)
        return flat.unflatten(-1, (n, n))

    def _inverse(self, y: Tensor) -> Tensor:
        n = y.shape[-1]
        rows, columns = torch.tril_indices(n, n, device=y.device)
        x = y[..., rows, columns]
        return torch.where(rows == columns, x.clamp(min=torch.finfo(x.dtype).tiny).log(), x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ_i log L_ii, ``(*batch,)``: only the exponentials on the diagonal stretch."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """``(*B, n (n + 1) / 2)`` to ``(*B, n, n)``."""
        n = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        if n * (n + 1) // 2 != shape[-1]:
            raise ValueError(f"expected a triangular number of reals, got {shape[-1]}")
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """``(*B, n, n)`` to ``(*B, n (n + 1) / 2)``."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


class CholeskyToPositiveDefinite(Transform):
    """A Cholesky factor ``L`` to ``L Lᵀ``."""

    domain = constraints.lower_cholesky
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CholeskyToPositiveDefinite)

    def _call(self, x: Tensor) -> Tensor:
        return x @ x.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.cholesky(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """n log 2 + Σ_i (n + 1 - i) log L_ii, i = 1…n (Muirhead 1982, theorem 2.1.9)."""
        n = x.shape[-1]
        power = torch.arange(n, 0, -1, device=x.device, dtype=x.dtype)
        return n * math.log(2.0) + (power * x.diagonal(dim1=-2, dim2=-1).log()).sum(-1)


def packing_transform(support: constraints.Constraint) -> Transform:
    """The bijection from unconstrained reals to ``support``, with a log determinant. Raises NotImplementedError without one."""
    if isinstance(support, constraints.independent):
        inner = packing_transform(support.base_constraint)
        return IndependentTransform(inner, support.reinterpreted_batch_ndims) if inner.domain.event_dim == 0 else inner
    if support is constraints.positive or support is constraints.nonnegative:
        return transforms.ExpTransform()  # torch adds an affine map by 0 and 1, and would not know the KL to a LogNormal
    if support is constraints.lower_cholesky:
        return VectorToCholesky()
    if support is constraints.positive_definite:
        return ComposeTransform([VectorToCholesky(), CholeskyToPositiveDefinite()])
    return biject_to(support)


def packed_shape(fn: Any, transform: Transform) -> torch.Size:
    """The shape of a site's packed value behind the batch axes of ``fn``; bounds may have batch axes too."""
    return transform.inverse_shape(fn.batch_shape + fn.event_shape)[len(fn.batch_shape) :]


def is_identity(transform: Transform) -> bool:
    """True where packing changes nothing: an unconstrained support."""
    transform = elementwise(transform)
    return isinstance(transform, ComposeTransform) and not transform.parts


def elementwise(transform: Transform) -> Transform:
    """``transform`` without the wrapper that only counts event dimensions."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def log_det(transform: Transform, u: Tensor, value: Tensor, batch_dims: int) -> Tensor:
    """log |d value / d u| summed over everything behind the first ``batch_dims`` axes."""
    ladj = transform.log_abs_det_jacobian(u, value)
    return ladj.flatten(batch_dims).sum(-1) if ladj.dim() > batch_dims else ladj


def peel(fn: Any) -> tuple[Any, int, list[tuple[Tensor | bool, int]]]:
    """A distribution without its `Independent` and mask wrappers.

    Returns the base, how many of its batch axes were event axes, and the masks, each with the number of event axes
    that had been peeled where it stood.
    """
    axes, masks = 0, []
    while True:
        if isinstance(fn, torch.distributions.Independent):
            axes, fn = axes + fn.reinterpreted_batch_ndims, fn.base_dist
        elif isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, axes))
            fn = fn.base_dist
        else:
            return fn, axes, masks


def packed_moments(fn: Any, transform: Transform, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Mean and sd of the packed value of a site, differentiable in the parameters of ``fn``.

    In closed form for Normal, LogNormal, multivariate Normal, Dirichlet, LKJ (mean) and the symmetric location families (a family
    without a mean gives its centre and scale); by quadrature for any other univariate density; by 4,096 draws
    under a fixed seed for what is left; 0 and 1 for an improper flat density. Both ``(*batch, *shape)``.
    """
    target = fn.batch_shape + shape
    base, _, _ = peel(fn)
    plain = elementwise(transform)
    if isinstance(base, dist.ImproperUniform):
        return torch.zeros(target), torch.ones(target)
    if is_identity(transform) or isinstance(base, dist.LogNormal):
        if isinstance(base, dist.Normal | dist.LogNormal | dist.Laplace | dist.Cauchy | dist.StudentT):
            sd = base.scale * (math.sqrt(2.0) if isinstance(base, dist.Laplace) else 1.0)
            if isinstance(base, dist.StudentT):
                sd = torch.where(base.df > 2, (base.df / (base.df - 2).clamp(min=1e-6)).sqrt(), torch.ones_like(base.df)) * sd
            return base.loc.expand(target), sd.expand(target)
        if isinstance(base, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
            return base.loc.expand(target), base.variance.sqrt().expand(target)
        if isinstance(base, dist.Delta):
            return base.v.expand(target), torch.zeros_like(base.v).expand(target)
    if isinstance(base, dist.Dirichlet) and isinstance(plain, transforms.StickBreakingTransform):
        return _dirichlet_moments(base.concentration.expand(fn.batch_shape + fn.event_shape))
    if base.event_shape == () and plain.domain.event_dim == 0:
        mean, sd = _quadrature_moments(base, plain)
        return mean.expand(target), sd.expand(target)
    with rng(torch.Generator().manual_seed(0)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Wishart remarks on draws that it then repairs
        draws = transform.inv(fn.rsample((4096,)) if fn.has_rsample else fn.sample((4096,)))
    # partial correlations under an LKJ prior are symmetric about 0
    mean = torch.zeros_like(draws[0]) if isinstance(base, dist.LKJ | dist.LKJCholesky) else draws.mean(0)
    return mean.expand(target), draws.std(0).expand(target)


def _dirichlet_moments(concentration: Tensor) -> tuple[Tensor, Tensor]:
    # Stick-breaking fractions of a Dirichlet are Beta(a_k, Σ_{j>k} a_j): the moments of their logits are poly-gammas.
    # torch's transform subtracts log(number of sticks left), so that 0 is the uniform point.
    a = concentration[..., :-1]
    rest = concentration.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    left = torch.arange(a.shape[-1], 0, -1, device=a.device, dtype=a.dtype)
    mean = torch.digamma(a) - torch.digamma(rest) + left.log()
    return mean, (torch.polygamma(1, a) + torch.polygamma(1, rest)).sqrt()


def _first_guess(fn: Any, transform: Transform) -> tuple[Tensor, Tensor]:
    """Mean and sd of ``fn`` itself; NaN where it does not know them (many transformed distributions)."""
    try:
        return fn.mean, fn.stddev
    except NotImplementedError:
        unknown = torch.full_like(fn.log_prob(transform(torch.zeros(()))), torch.nan)
        return unknown, unknown


def _quadrature_moments(fn: Any, transform: Transform) -> tuple[Tensor, Tensor]:
    """Moments of u = transform⁻¹(v), v ~ fn univariate, by the trapezoid rule on u = m + s sinh τ.

    The substitution turns exponential tails (every logarithm or logit of a heavy tail has them) into doubly
    exponential ones, for which the trapezoid rule converges geometrically. m and s are found by repetition.
    """
    nodes = torch.linspace(-6.0, 6.0, 481, dtype=torch.float64)
    nodes = nodes.reshape(-1, *(1,) * len(fn.batch_shape))
    fn = fn.expand(fn.batch_shape)
    fn._validate_args = False
    mean, sd = _first_guess(fn, transform)
    limit = 80.0 if mean.dtype == torch.float32 else 600.0

    def moments(centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        u = centre + scale * nodes.sinh().to(centre)
        inside = u.abs() < limit
        u = torch.where(inside, u, centre)
        v = transform(u)
        log_density = fn.log_prob(v) + transform.log_abs_det_jacobian(u, v)
        inside = inside & log_density.isfinite()
        log_density = torch.where(inside, log_density, log_density.new_tensor(-torch.inf))
        weight = torch.softmax(log_density + nodes.cosh().log().to(u), 0)
        mean = (weight * u).sum(0)
        return mean, (weight * (u - mean) ** 2).sum(0).sqrt()

    with torch.no_grad():
        usable = mean.isfinite() & sd.isfinite() & (sd > 0)
        v = torch.where(usable, mean, transform(torch.zeros_like(mean)))
        centre = transform.inv(v)
        scale = torch.where(usable, sd / transform.log_abs_det_jacobian(centre, v).exp(), torch.ones_like(sd))
        for _ in range(3):
            centre, scale = moments(centre, scale.clamp(min=1e-6))
    return moments(centre, scale)
