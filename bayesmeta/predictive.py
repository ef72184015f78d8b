"""`Predictive`: the distribution of y at new inputs, an equal mixture over draws of φ (and of θ)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .packing import peel
from .randomness import rng


class Decomposition(NamedTuple):
    """Predictive uncertainty in parts that add up to ``total``, each ``(T, N)``: variances, or entropies in nats for classes.

    ``aleatoric``: what would be left if φ were known. ``phi``: from not knowing the task. ``theta``: from not knowing θ.
    """

    total: Tensor
    aleatoric: Tensor
    phi: Tensor
    theta: Tensor


class Predictive:
    """The equal mixture over ``S`` draws of φ of the distributions of one point's y.

    ``components``: a distribution with batch ``(S, T, N)``, or several of one kind, ``(S_k, T, N)`` each, behind each other. Draws may
    come from several θ: the first S / ``num_theta`` under the first, and so on.
    """

    def __init__(self, components: Any, *, num_theta: int = 1) -> None:
        self.components: tuple[Any, ...] = tuple(components) if isinstance(components, Sequence) else (components,)
        self.num_theta = num_theta
        self._bases, axes, _ = zip(*(peel(fn) for fn in self.components), strict=True)
        self._base, self._event_axes = self._bases[0], axes[0]
        if self.num_draws % num_theta:
            raise ValueError(f"{self.num_draws} draws do not divide into {num_theta} draws of θ")

    @property
    def num_draws(self) -> int:
        """``S``."""
        return sum(fn.batch_shape[0] for fn in self.components)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one point's y: ``()``, or ``O`` where there are several outputs."""
        return self.components[0].event_shape

    @property
    def means(self) -> Tensor:
        """The mean under each draw, ``(S, T, N)`` or ``(S, T, N, *O)``: curves to draw."""
        return self._each(lambda fn: fn.mean)

    @property
    def is_discrete(self) -> bool:
        """Whether y is a class or a count."""
        return bool(self._base.support.is_discrete)

    @property
    def is_classification(self) -> bool:
        """Whether y is a class (Bernoulli or Categorical)."""
        return isinstance(self._base, dist.Bernoulli | dist.Categorical)

    @property
    def mean(self) -> Tensor:
        """``(T, N)`` or ``(T, N, *O)``; the probability of 1 for a Bernoulli. Raises for classes, which have no mean."""
        if isinstance(self._base, dist.Categorical):
            raise ValueError("classes have no mean: use probs")
        return self.means.mean(0)

    @property
    def variance(self) -> Tensor:
        """``(T, N)`` or ``(T, N, *O)``: the mean of the variances plus the variance of the means."""
        return self._each(lambda fn: fn.variance).mean(0) + self.means.var(0, unbiased=False)

    @property
    def stddev(self) -> Tensor:
        """√variance."""
        return self.variance.sqrt()

    @property
    def probs(self) -> Tensor:
        """Class probabilities ``(T, N, C)``, averaged over draws; C = 2 for a Bernoulli. Raises where y is no class."""
        return self._class_probs().mean(0)

    def log_prob(self, y: Tensor) -> Tensor:
        """log of the mixture's density at ``y (T, N)`` (or ``(T, N, *O)``), ``(T, N)``: log-mean-exp over draws."""
        y = self._target(y)
        return torch.logsumexp(torch.cat([fn.log_prob(y) for fn in self.components]), 0) - math.log(self.num_draws)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y ≤ y) of the mixture, in the shape of ``y``; each output on its own where there are several."""
        y = self._target(y)
        return torch.cat([cdf(base, y) for base in self._bases]).mean(0)

    def cdf_below(self, y: Tensor) -> Tensor:
        """P(Y < y): the same as `cdf` but for counts, where it is P(Y ≤ y − 1)."""
        return self.cdf(y - 1) if self.is_discrete else self.cdf(y)

    def quantile(self, q: float) -> Tensor:
        """The value below which the mixture has probability ``q`` (0 < q < 1), ``(T, N)``: by bisection of `cdf`.

        For counts the smallest one that reaches ``q``. Raises ValueError for classes and for q outside (0, 1).
        """
        if not 0 < q < 1:
            raise ValueError(f"q: expected a number between 0 and 1, got {q}")
        if self.is_classification:
            raise ValueError("classes have no quantiles: use probs")
        centre, spread = self.means, self._each(lambda fn: fn.variance).clamp(min=1e-12).sqrt()
        spread = torch.where(spread.isfinite(), spread, torch.ones_like(spread))
        low, high = (centre - 8 * spread).amin(0), (centre + 8 * spread).amax(0)
        for _ in range(60):  # heavy tails: widen until the quantile is inside
            below, above = self.cdf(low) > q, self.cdf(high) < q
            if not bool((below | above).any()):
                break
            width = high - low
            low, high = torch.where(below, low - width, low), torch.where(above, high + width, high)
        if self.is_discrete:
            low, high = low.floor().clamp(min=-1), high.ceil()
        for _ in range(80):
            middle = (low + high) / 2
            middle = middle.floor() if self.is_discrete else middle
            enough = self.cdf(middle) >= q
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
            if bool((high - low <= (1 if self.is_discrete else 1e-7 * (1 + high.abs()))).all()):
                break
        return high if self.is_discrete else (low + high) / 2

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """The central interval of probability ``level``: lower and upper end, each ``(T, N)``."""
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def sample(self, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """``(n, T, N)`` draws of y. One draw is from one φ, so its points belong to one function of x.

        The draws of φ are taken in turn, in random order, so that every one stands for its share of the mixture.
        """
        with rng(generator), torch.no_grad():
            passes = -(-n // self.num_draws)
            y = torch.cat([fn.sample((passes,)) for fn in self.components], 1).flatten(0, 1)
            return y[torch.randperm(len(y))[:n]] if passes == 1 else y[:n]

    def decompose(self) -> Decomposition:
        """Splits the predictive variance (entropy, for classes) into aleatoric, φ and θ parts."""
        groups = (self.num_theta, -1)
        if self.is_classification:
            p = self._class_probs()
            given_theta = p.unflatten(0, groups).mean(1)
            aleatoric, within, total = _entropy(p).mean(0), _entropy(given_theta).mean(0), _entropy(p.mean(0))
            return Decomposition(total, aleatoric, within - aleatoric, total - within)
        means = self.means.unflatten(0, groups)
        aleatoric = self._each(lambda fn: fn.variance).mean(0)
        phi = means.var(1, unbiased=False).mean(0)
        theta = means.mean(1).var(0, unbiased=False)
        return Decomposition(aleatoric + phi + theta, aleatoric, phi, theta)

    def _each(self, of: Callable[[Any], Tensor]) -> Tensor:
        return torch.cat([of(fn) for fn in self.components])

    def _class_probs(self) -> Tensor:
        """``(S, T, N, C)``."""
        if not self.is_classification:
            raise ValueError(f"y is {type(self._base).__name__}: only classes have probs")
        p = torch.cat([base.probs for base in self._bases])
        return torch.stack([1 - p, p], -1) if isinstance(self._base, dist.Bernoulli) else p

    def _target(self, y: Tensor) -> Tensor:
        y = torch.as_tensor(y)
        scalar = len(self.event_shape) == 0
        y = y[..., 0] if scalar and y.dim() == 3 and y.shape[-1] == 1 else y
        return y.to(self._base.mean.dtype) if y.is_floating_point() and not self.is_classification else y


def cdf(fn: Any, y: Tensor) -> Tensor:
    """P(Y ≤ y) under ``fn`` (without event axes), also for Student-t, Poisson and negative binomial, where torch has none."""
    if isinstance(fn, dist.StudentT):
        return _student_cdf((y - fn.loc) / fn.scale, fn.df)
    if isinstance(fn, dist.Poisson):
        return torch.where(y < 0, 0.0, torch.special.gammaincc(y.floor().clamp(min=0) + 1, fn.rate))
    if isinstance(fn, dist.NegativeBinomial):
        return _negative_binomial_cdf(y, fn)
    return fn.cdf(y)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def _student_cdf(t: Tensor, df: Tensor) -> Tensor:
    # t = √df tan a turns the density into C cos^(df-1) a: Gauss-Legendre over [0, atan(|t| / √df)]
    nodes, weights = (torch.as_tensor(v, dtype=t.dtype, device=t.device) for v in np.polynomial.legendre.leggauss(64))
    angle = torch.atan(t.abs() / df.sqrt())
    a = angle[..., None] * (nodes + 1) / 2
    integral = (weights * a.cos() ** (df[..., None] - 1)).sum(-1) * angle / 2
    log_c = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * math.log(math.pi)
    half = (log_c.exp() * integral).clamp(max=0.5)
    return 0.5 + torch.where(t < 0, -half, half)


def _negative_binomial_cdf(y: Tensor, fn: Any) -> Tensor:
    # the probabilities of 0, 1, … summed up to the largest y; each follows from the one before
    y = y.floor()
    r, p = fn.total_count, fn.probs
    term = torch.exp(r * torch.log1p(-p))
    total = torch.zeros(torch.broadcast_shapes(y.shape, term.shape), dtype=term.dtype, device=term.device)
    for k in range(int(y.max().clamp(min=-1)) + 1):
        total = total + torch.where(y >= k, term, 0.0)
        term = term * p * (k + r) / (k + 1)
    return total.clamp(max=1.0)
