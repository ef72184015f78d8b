"""What adaptation returns (`TaskPosterior`) and what it predicts (`Predictive`, the mixture over its draws)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .packing import peel
from .randomness import rng

if TYPE_CHECKING:
    from .episodes import Points
    from .model import HierarchicalModel

DEFAULT_DRAWS = 100


class Particles(dist.TorchDistribution):
    """Equally weighted draws ``values (M, T, D)``, batch ``(T,)``, event ``(D,)``; it has no density.

    ``chains``: the values are that many chains of equal length behind each other.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, values: Tensor, *, chains: int = 1) -> None:
        if values.dim() < 3 or len(values) % chains:
            raise ValueError(f"values: expected shape (M, T, D) with M a multiple of {chains} chains, got {tuple(values.shape)}")
        self.values, self.chains = values, chains
        super().__init__(values.shape[1:-1], values.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(T, D)``."""
        return self.values.mean(0)

    @property
    def variance(self) -> Tensor:
        """``(T, D)``, of the particles (divided by M)."""
        return self.values.var(0, unbiased=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Particles chosen at random, for each task on its own: ``(*sample_shape, T, D)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        index = torch.randint(len(self.values), shape, device=self.values.device)
        flat = self.values.flatten(1, -2)
        tasks = torch.arange(flat.shape[1], device=flat.device).view(self.batch_shape)
        return flat[index, tasks]

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises NotImplementedError: particles have no density."""
        raise NotImplementedError("particles have no density; compare draws, or fit a Normal to them")


class TaskPosterior:
    """q(φ_i | S_i, θ) of ``T`` tasks: a distribution in packed space, batch ``(T,)``, event ``(D,)``.

    ``distribution``: a Delta, a diagonal Normal, a MultivariateNormal or `Particles`. ``diagnostics``: what the
    inference has to say of itself, by name. The posterior refers to its ``model``: train the model further and its predictions
    move; draws do not.
    """

    def __init__(self, model: HierarchicalModel, distribution: Any, diagnostics: dict[str, float | str] | None = None) -> None:
        self.model, self.distribution = model, distribution
        self.diagnostics = diagnostics or {}

    @property
    def num_tasks(self) -> int:
        """``T``."""
        return self.distribution.batch_shape[0]

    @property
    def is_point(self) -> bool:
        """Whether all mass is at one point (a Delta)."""
        return isinstance(self.distribution, dist.Delta)

    @property
    def mean(self) -> Tensor:
        """Mean in packed space, ``(T, D)``."""
        return self.distribution.mean

    def select(self, tasks: list[int]) -> TaskPosterior:
        """The posterior of the chosen tasks, in that order."""
        return TaskPosterior(self.model, _select(self.distribution, torch.as_tensor(tasks)), self.diagnostics)

    def draws(self, n: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(S, T, D)`` draws in packed space.

        Without ``n``: one draw of a Delta, every particle of `Particles`, 100 of anything else. Fewer draws than there are
        particles are particles at even distances; more are chosen at random.
        """
        if n is not None and n < 1:
            raise ValueError(f"n: expected at least 1 draw, got {n}")
        q = self.distribution
        if isinstance(q, Particles):
            n = len(q.values) if n is None else n
            if n <= len(q.values):
                return q.values[torch.linspace(0, len(q.values) - 1, n).round().long()]
        n = (1 if self.is_point else DEFAULT_DRAWS) if n is None else n
        with rng(generator), torch.no_grad():
            return q.sample((n,))

    def sites(self, n: int | None = None, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draws of the program's own task-level sites, by name: ``(S, T, *event)``, in their own (constrained) units."""
        with torch.no_grad():
            return self.model.unpack(self.draws(n, generator=generator))

    def predict(self, x: Any, n: int | None = None, *, generator: torch.Generator | None = None) -> Predictive:
        """The predictive distribution of y at ``x (T, N, *I)``, averaged over ``n`` draws of φ (see `draws`)."""
        with torch.no_grad():
            return Predictive(self.model.predict(self.draws(n, generator=generator), x))

    def log_prob(self, phi: Tensor) -> Tensor:
        """log q(φ) in packed space: ``(*S, T, D)`` to ``(*S, T)``. Raises NotImplementedError for particles."""
        return self.distribution.log_prob(phi)

    def guide(self) -> Callable[..., None]:
        """A Pyro guide that samples the model's sites from this posterior: ``Predictive(model, guide=posterior.guide())``."""

        def guide(data: Points, *_: Any, **__: Any) -> None:
            points = self.model.prepare(data)
            if points.num_tasks != self.num_tasks:
                raise ValueError(f"this posterior is of {self.num_tasks} tasks, got points of {points.num_tasks}")
            self.model.sample_theta_sites()
            self.model.sample_task_sites(self.distribution, points)

        return guide

    def to_arviz(self, n: int | None = None, *, generator: torch.Generator | None = None) -> Any:
        """The draws as ArviZ's InferenceData: variables by site name with dimensions (chain, draw, task, …).

        Raises ImportError without the extra ``arviz``.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError("to_arviz needs ArviZ: pip install 'bayesmeta[arviz]'") from error
        chains = self.distribution.chains if isinstance(self.distribution, Particles) and n is None else 1
        values = {
            name: np.asarray(v.unflatten(0, (chains, -1)).cpu()) for name, v in self.sites(n, generator=generator).items()
        }
        dims = {name: ["task", *(f"{name}_{i}" for i in range(v.ndim - 3))] for name, v in values.items()}
        if int(arviz.__version__.split(".")[0]) >= 1:
            return arviz.from_dict({"posterior": values}, dims=dims)
        return arviz.from_dict(posterior=values, dims=dims)


class Decomposition(NamedTuple):
    """Predictive uncertainty in parts that add up to ``total``, each ``(T, N)``: variances, or entropies in nats for classes.

    ``aleatoric``: what would be left if φ were known. ``phi``: from not knowing the task. ``theta``: from not knowing θ.
    """

    total: Tensor
    aleatoric: Tensor
    phi: Tensor
    theta: Tensor


class Predictive:
    """The equal mixture over ``S`` draws of φ of the distributions of one point's y: ``components`` has batch ``(S, T, N)``.

    Draws may come from several θ: the first S / ``num_theta`` under the first, and so on.
    """

    def __init__(self, components: Any, *, num_theta: int = 1) -> None:
        if components.batch_shape[0] % num_theta:
            raise ValueError(f"{components.batch_shape[0]} draws do not divide into {num_theta} draws of θ")
        self.components, self.num_theta = components, num_theta
        self._base, self._event_axes, _ = peel(components)

    @property
    def num_draws(self) -> int:
        """``S``."""
        return self.components.batch_shape[0]

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
        return self.components.mean.mean(0)

    @property
    def variance(self) -> Tensor:
        """``(T, N)`` or ``(T, N, *O)``: the mean of the variances plus the variance of the means."""
        return self.components.variance.mean(0) + self.components.mean.var(0, unbiased=False)

    @property
    def stddev(self) -> Tensor:
        """√variance."""
        return self.variance.sqrt()

    @property
    def probs(self) -> Tensor:
        """Class probabilities ``(T, N, C)``, averaged over draws; C = 2 for a Bernoulli. Raises where y is no class."""
        if isinstance(self._base, dist.Categorical):
            return self._base.probs.mean(0)
        if isinstance(self._base, dist.Bernoulli):
            one = self._base.probs.mean(0)
            return torch.stack([1 - one, one], -1)
        raise ValueError(f"y is {type(self._base).__name__}: only classes have probs")

    def log_prob(self, y: Tensor) -> Tensor:
        """log of the mixture's density at ``y (T, N)`` (or ``(T, N, *O)``), ``(T, N)``: log-mean-exp over draws."""
        return torch.logsumexp(self.components.log_prob(self._target(y)), 0) - math.log(self.num_draws)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y ≤ y) of the mixture, in the shape of ``y``; each output on its own where there are several."""
        return cdf(self._base, self._target(y)).mean(0)

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
        centre, spread = self._base.mean, self._base.variance.clamp(min=1e-12).sqrt()
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
            y = self.components.sample((passes,)).flatten(0, 1)
            return y[torch.randperm(len(y))[:n]] if passes == 1 else y[:n]

    def decompose(self) -> Decomposition:
        """Splits the predictive variance (entropy, for classes) into aleatoric, φ and θ parts."""
        groups = (self.num_theta, -1)
        if self.is_classification:
            p = self._base.probs
            p = torch.stack([1 - p, p], -1) if isinstance(self._base, dist.Bernoulli) else p
            given_theta = p.unflatten(0, groups).mean(1)
            aleatoric, within, total = _entropy(p).mean(0), _entropy(given_theta).mean(0), _entropy(p.mean(0))
            return Decomposition(total, aleatoric, within - aleatoric, total - within)
        means = self.components.mean.unflatten(0, groups)
        aleatoric = self.components.variance.mean(0)
        phi = means.var(1, unbiased=False).mean(0)
        theta = means.mean(1).var(0, unbiased=False)
        return Decomposition(aleatoric + phi + theta, aleatoric, phi, theta)

    def _target(self, y: Tensor) -> Tensor:
        y = torch.as_tensor(y)
        scalar = len(self.components.event_shape) == 0
        y = y[..., 0] if scalar and y.dim() == 3 and y.shape[-1] == 1 else y
        return y.to(self.components.mean.dtype) if y.is_floating_point() and not self.is_classification else y


def delta(phi: Tensor) -> dist.Delta:
    """All mass at ``phi (T, D)``."""
    return dist.Delta(phi, event_dim=1)


def cdf(fn: Any, y: Tensor) -> Tensor:
    """P(Y ≤ y) under ``fn`` (without event axes), also for Student-t, Poisson and negative binomial, where torch has none."""
    if isinstance(fn, dist.StudentT):
        return _student_cdf((y - fn.loc) / fn.scale, fn.df)
    if isinstance(fn, dist.Poisson):
        return torch.where(y < 0, 0.0, torch.special.gammaincc(y.floor().clamp(min=0) + 1, fn.rate))
    if isinstance(fn, dist.NegativeBinomial):
        return _negative_binomial_cdf(y, fn)
    return fn.cdf(y)


def _select(q: Any, tasks: Tensor) -> Any:
    if isinstance(q, Particles):
        return Particles(q.values[:, tasks], chains=q.chains)
    if isinstance(q, dist.MultivariateNormal):
        return dist.MultivariateNormal(q.loc[tasks], scale_tril=q.scale_tril[tasks])
    if isinstance(q, dist.Delta):
        return delta(q.v[tasks])
    base, axes, _ = peel(q)
    if isinstance(base, dist.Normal) and axes == 1:
        return dist.Normal(base.loc[tasks], base.scale[tasks]).to_event(1)
    raise TypeError(f"expected a Delta, Normal, MultivariateNormal or Particles, got {type(q).__name__}")


def with_points_axis(q: Any) -> Any:
    """``q`` with batch ``(T,)`` as a distribution with batch ``(T, 1)``."""
    if isinstance(q, Particles):
        return Particles(q.values[:, :, None], chains=q.chains)
    if isinstance(q, dist.MultivariateNormal):
        return dist.MultivariateNormal(q.loc[:, None], scale_tril=q.scale_tril[:, None])
    if isinstance(q, dist.Delta):
        return dist.Delta(q.v[:, None], event_dim=1)
    raise TypeError(f"expected a Delta, a MultivariateNormal or Particles, got {type(q).__name__}")


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
