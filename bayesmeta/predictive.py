"""`Predictive`: the distribution of y at new inputs, an equal mixture over draws of φ (and of θ)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from scipy import special
from torch import Tensor
from torch.distributions import constraints, transform_to

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
        """``(T, N)`` or ``(T, N, *O)``: the mean of the variances plus the variance of the means. Raises for classes."""
        if isinstance(self._base, dist.Categorical):
            raise ValueError("classes have no variance: use probs")
        return self._each(lambda fn: fn.variance).mean(0) + self.means.var(0, unbiased=False)

    @property
    def stddev(self) -> Tensor:
        """√variance."""
        return self.variance.sqrt()

    @property
    def probs(self) -> Tensor:
        """Class probabilities ``(T, N, C)``, averaged over draws; C = 2 for a Bernoulli. Raises where y is no class."""
        return self._class_probs().mean(0)

    def log_probs(self) -> Tensor:
        """log `probs`, ``(T, N, C)``, by log-mean-exp over draws: finite where a probability is too small for a float."""
        shape = self.probs.shape
        return torch.stack([self.log_prob(torch.full(shape[:-1], c)) for c in range(shape[-1])], -1)

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
        with torch.no_grad():
            low, high = self._bracket(q)
            below, above = self.cdf(low), self.cdf(high)
            for _ in range(2_000):  # halving reaches the last bit of any float long before
                middle = low + (high - low) / 2
                middle = middle.floor() if self.is_discrete else middle
                reached = self.cdf(middle)
                enough = reached >= q
                low, below = torch.where(enough, low, middle), torch.where(enough, below, reached)
                high, above = torch.where(enough, middle, high), torch.where(enough, reached, above)
                if self.is_discrete:
                    done = high - low <= 1
                else:
                    eps = 4 * torch.finfo(low.dtype).eps
                    done = (high - low <= eps * torch.maximum(low.abs(), high.abs())) | (above - below <= eps)
                if bool((done | reached.isnan()).all()):
                    break
            return high if self.is_discrete else low + (high - low) / 2

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """The central interval of probability ``level``: lower and upper end, each ``(T, N)``."""
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def sample(self, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """``(n, T, N)`` draws of y. One draw is from one φ, so its points belong to one function of x.

        The draws of φ are taken in turn, and the last incomplete turn at random, so that every one stands for its share of the mixture.
        """
        with rng(generator), torch.no_grad():
            whole, rest = divmod(n, self.num_draws)
            y = torch.cat([fn.sample((whole + (rest > 0),)) for fn in self.components], 1).flatten(0, 1)
            return torch.cat([y[: n - rest], y[n - rest :][torch.randperm(self.num_draws)[:rest]]]) if rest else y

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

    def _bracket(self, q: float) -> tuple[Tensor, Tensor]:
        """Values with the mixture's quantile between them: the least and the largest quantile of a component, or found by doubling."""
        if self.is_discrete:
            low = torch.full_like(self.means[0], -1.0)
            high = low.neg()
        else:
            try:
                ends = torch.cat([base.icdf(self.means.new_full((), q)) for base in self._bases])
                low, high = ends.amin(0), ends.amax(0)
            except NotImplementedError:
                shape = torch.broadcast_shapes(*(base.batch_shape[1:] for base in self._bases))
                high = self._base.sample().new_ones(shape)
                low = high.neg()
        # a unit of one last bit where all components agree
        width = torch.maximum(high - low, 4 * torch.finfo(low.dtype).eps * low.abs().clamp(min=torch.finfo(low.dtype).tiny))
        for _ in range(1_100):
            too_high, too_low = self.cdf(low) > q, self.cdf(high) < q
            if not bool((too_high | too_low).any()):
                break
            low, high = torch.where(too_high, low - width, low), torch.where(too_low, high + width, high)
            width = 2 * width
        return low, high

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
        if isinstance(self._base, dist.Categorical):
            return y.to(self._base.probs.device)
        return y.to(self._base.mean)


def cdf(fn: Any, y: Tensor) -> Tensor:
    """P(Y ≤ y) under ``fn`` (without event axes) at any real y; by scipy's special functions where torch has none."""
    if isinstance(fn, dist.StudentT):
        return _by_scipy(special.stdtr, fn.df, (y - fn.loc) / fn.scale)
    if isinstance(fn, dist.Poisson):
        k = y.floor()
        return torch.where(k < 0, 0.0, _by_scipy(special.pdtr, k.clamp(min=0), fn.rate))
    if isinstance(fn, dist.NegativeBinomial):
        k = y.floor()
        return torch.where(k < 0, 0.0, _by_scipy(special.betaincc, k.clamp(min=0) + 1, fn.total_count, fn.probs))
    if isinstance(fn, dist.Binomial):
        k, trials = y.floor(), fn.total_count
        inside = (k >= 0) & (k < trials)
        part = _by_scipy(special.bdtr, torch.where(inside, k, 0.0), trials.clamp(min=1), fn.probs)
        return torch.where(inside, part, (k >= 0).to(part.dtype))
    if fn.support.is_discrete or fn.support is constraints.real:
        return fn.cdf(y)
    inside = fn.support.check(y)  # a positive target: nothing lies below 0
    part = fn.cdf(torch.where(inside, y, transform_to(fn.support)(torch.zeros_like(y))))
    return torch.where(inside, part, (y >= getattr(fn.support, "upper_bound", math.inf)).to(part.dtype))


def _by_scipy(function: Callable[..., Any], *arguments: Tensor) -> Tensor:
    values = function(*(a.detach().double().cpu().numpy() for a in torch.broadcast_tensors(*arguments)))
    return torch.as_tensor(values).to(arguments[0])


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)
