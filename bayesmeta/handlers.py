"""Effect handlers that run a Pyro program with its θ and φ given from outside, and add up what it says.

Every handler answers ``pyro.param`` from the model's own parameters, so Pyro's global store stays empty, and
answers ``pyro.sample`` in its own way. Axes of a value inside a program: draws in front, then the ``tasks``
plate, then the ``points`` plate where there is one, then the event.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions.transforms import Transform

from .episodes import Points
from .packing import elementwise, is_identity, log_det, packed_moments, packed_shape, packing_transform, peel

TASKS, TARGET = "tasks", "y"
Parameters = Callable[[str, tuple[Any, ...], Any], Tensor]


@dataclass(frozen=True)
class Site:
    """One latent sample statement: its name, and its shape packed (unconstrained reals) and unpacked (event).

    ``plates``: of a global site, (name, dim, size) of the plates round it, whose axes count as event here.
    """

    name: str
    event_shape: torch.Size
    shape: torch.Size
    plates: tuple[tuple[str, int, int], ...] = ()

    @property
    def size(self) -> int:
        """How many unconstrained reals it takes."""
        return self.shape.numel()


def full_precision(device: torch.device) -> Any:
    """Inside, nothing is autocast on ``device``."""
    enabled = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def param_value(parameters: Parameters, msg: Any) -> Tensor:
    """What answers a param message: ``parameters`` a ``pyro.param`` statement; a module that announces its own parameter has the value."""
    if msg["fn"] == pyro.get_param_store().get_param:
        return parameters(msg["name"], msg["args"][1:], msg["kwargs"].get("constraint"))
    value = msg["fn"](*msg["args"], **msg["kwargs"])
    return value if hasattr(value, "unconstrained") else attach_leaf(value, value)


def attach_leaf(value: Tensor, leaf: Tensor) -> Tensor:
    """``value`` with the attribute by which Pyro's optimisers find the unconstrained ``leaf`` behind it."""
    value = value.view(value.shape) if value is leaf else value
    value.unconstrained = weakref.ref(leaf)  # type: ignore[attr-defined]
    return value


class Program(Messenger):
    """Answers ``pyro.param`` from the model; leaves every sample statement to Pyro, but masks the padding of ``y``."""

    def __init__(self, parameters: Parameters, points: Points) -> None:
        super().__init__()
        self.parameters, self.points = parameters, points

    def _pyro_param(self, msg: Any) -> None:
        msg["value"] = param_value(self.parameters, msg)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == TARGET and not isinstance(msg["fn"], _Subsample):
            target = Target(msg, self.points)
            msg["value"] = target.as_value(msg["value"])
            base = target.base.mask(target.full_mask())
            msg["fn"] = base.to_event(target.event_axes) if target.event_axes else base


class Target:
    """The distribution of ``y`` taken apart: one distribution a point, and which points count."""

    def __init__(self, msg: Any, points: Points) -> None:
        self.base, self.event_axes, masks = peel(msg["fn"])
        self.points, self.frames = points, [frame.name for frame in msg["cond_indep_stack"] if frame.vectorized]
        # a points plate makes N a batch axis of fn; without one it is the first of fn's event axes
        self.in_event = len(self.frames) == 1
        self.point_axes = self.event_axes - self.in_event
        self.masks = [(m, axes) for m, axes in [*masks, (msg["mask"], 0)] if m is not None and m is not True]
        self.scale = msg["scale"]

    def point(self) -> Any:
        """The distribution of one point's y, batch ``(*S, T, N)``."""
        return self.base.to_event(self.point_axes) if self.point_axes else self.base

    def as_value(self, y: Any) -> Any:
        """``y``; whole-number labels of a Bernoulli as the real numbers that torch wants."""
        whole = isinstance(y, Tensor) and not y.is_floating_point()
        return y.to(self.base.mean.dtype) if whole and isinstance(self.base, dist.Bernoulli) else y

    def full_mask(self) -> Tensor:
        """The program's masks and the padding's, shaped to stand before the base's batch axes."""
        mask = self.points.mask[(...,) + (None,) * self.point_axes]
        for own, axes in self.masks:
            own = torch.as_tensor(own, device=mask.device)
            mask = mask & (own[(...,) + (None,) * (self.event_axes - axes)] if own.dim() else own)
        return mask

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | φ, θ) of each task, ``(*S, T)``; what is masked counts 0. Raises ValueError for a y with too many or too few axes."""
        if y.dim() != 2 + self.point_axes + len(self.base.event_shape):
            shape = ", ".join(["T", "N", *map(str, self.point().event_shape)])
            raise ValueError(f"y: expected shape ({shape}), as the program's likelihood has it, got {tuple(y.shape)}")
        value = torch.where(self.full_mask(), self.base.log_prob(self.as_value(y)), 0.0) * self.scale
        return value.flatten(value.dim() - self.point_axes - 1).sum(-1)


class AllSitesSeen(Exception):
    """Ends a run that wants nothing of the program but its task-level sites: the likelihood, a network say, is spared."""


class Run(Messenger):
    """Runs the program with every latent site filled in by ``phi`` (task level) or ``theta`` (global), and adds up.

    ``prior``: what ``phi`` counts at its sites, log p(φ | θ) for `Packed` and −KL for `MeanField`, ``(*S, T)``.
    ``hyper``: what ``theta`` counts, ``()``. ``likelihood``: log p(y | φ, θ), ``(*S, T)``. ``target``: the
    distribution of y. ``values``: the constrained values of the task-level sites, ``(*S, T, *event)``. With ``sites_only`` it
    raises `AllSitesSeen` at the last of those.
    """

    def __init__(
        self, parameters: Parameters, points: Points, plates: int,
        sites: Iterable[Site], phi: Fill, theta_sites: Iterable[Site], theta: Fill, *, sites_only: bool = False,
    ) -> None:
        super().__init__()
        self.sites_only = sites_only
        self.parameters, self.points, self.plates = parameters, points, plates
        self.sites, self.phi = _slices(sites), phi
        self.theta_sites, self.theta = _slices(theta_sites), theta
        self.values: dict[str, Tensor] = {}
        self.theta_values: dict[str, Tensor] = {}
        self.hyper: Tensor | float = 0.0
        self.prior: Tensor | float = 0.0
        self.likelihood: Tensor | float = 0.0
        self.target: Target | None = None

    def _pyro_param(self, msg: Any) -> None:
        msg["value"] = param_value(self.parameters, msg)

    def _pyro_sample(self, msg: Any) -> None:
        with full_precision(self.points.mask.device):
            self._fill(msg)

    def _fill(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample) or msg["infer"].get("_deterministic"):
            return
        if name == TARGET:
            self.target = Target(msg, self.points)
            if msg["value"] is None:  # nothing is drawn: only the distribution is wanted
                msg["value"] = torch.zeros(fn.shape(), device=self.points.mask.device)
            else:
                self.likelihood = self.target.log_prob(msg["value"])
        elif msg["is_observed"]:
            self._count(msg, fn.log_prob(msg["value"]))
        elif name in self.theta_sites:
            site, where = self.theta_sites[name]
            part = Part(site, where, site.shape, 0)
            msg["value"], term = self.theta(fn, packing_transform(fn.support), part)
            self.theta_values[name] = msg["value"]
            self._count(msg, term)
        else:
            site, where = self.sites[name]
            part = Part(site, where, torch.Size((1,) * (self.plates - 1)) + site.shape, self.plates)
            msg["value"], term = self.phi(fn, packing_transform(fn.support), part)
            axis = msg["value"].dim() - len(site.event_shape) - 1
            self.values[name] = msg["value"].squeeze(axis) if self.plates == 2 else msg["value"]
            self._count(msg, term)
            if self.sites_only and len(self.values) == len(self.sites):
                raise AllSitesSeen

    def _count(self, msg: Any, term: Tensor | float) -> None:
        value, mask = torch.as_tensor(term) * msg["scale"], msg["mask"]
        value = value if mask is None else torch.where(torch.as_tensor(mask), value, 0.0)
        if any(frame.name == TASKS for frame in msg["cond_indep_stack"]):
            self.prior = self.prior + (value.sum(-1) if self.plates == 2 and value.dim() else value)
        else:
            self.hyper = self.hyper + value.sum()


class Part(NamedTuple):
    """Where one site lies in a packed vector, and the axes its part takes inside the program.

    ``plates`` is how many plate axes stand between the draws and the event (0 for a global site, whose own
    plates count as event).
    """

    site: Site
    where: slice
    shape: torch.Size
    plates: int

    def of(self, packed: Tensor) -> Tensor:
        """The part of packed values ``(*batch, D)`` that is this site's, shaped for the program."""
        return packed[..., self.where].reshape(packed.shape[:-1] + self.shape)


class Fill(Protocol):
    """Chooses the value of a latent site, and says what it counts."""

    def __call__(self, fn: Any, transform: Transform, part: Part, /) -> tuple[Tensor, Tensor | float]:
        """The site's constrained value, and a term with the batch axes of ``fn``."""


class Packed:
    """The site's part of given packed values; counts its log density, with the Jacobian of the packing unless told."""

    def __init__(self, values: Tensor, *, jacobian: bool = True) -> None:
        self.values, self.jacobian = values, jacobian

    def __call__(self, fn: Any, transform: Transform, part: Part) -> tuple[Tensor, Tensor]:
        """The site's constrained value and its term (see `Fill`)."""
        u = part.of(self.values)
        value = transform(u)
        term = fn.log_prob(value)
        return value, term + log_det(transform, u, value, term.dim()) if self.jacobian else term


class MeanField:
    """Given draws from a diagonal Normal q over the packed values; counts −KL(q ‖ prior of the site).

    Analytic where Pyro knows it, else log p − log q at the draw: what `pyro.infer.TraceMeanField_ELBO` does, so
    that the two agree to rounding.
    """

    def __init__(self, values: Tensor, mean: Tensor, sd: Tensor) -> None:
        self.values, self.mean, self.sd = values, mean, sd

    def __call__(self, fn: Any, transform: Transform, part: Part) -> tuple[Tensor, Tensor]:
        """The site's constrained value and its term (see `Fill`)."""
        guide = site_normal(part.of(self.mean), part.of(self.sd), transform, fn)
        value = transform(part.of(self.values))
        return value, -site_kl(guide, fn, value)


class Moments:
    """The site's prior mean in packed space, given the sites before it; collects ``means`` and ``sds``."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.sds: list[Tensor] = []

    def __call__(self, fn: Any, transform: Transform, part: Part) -> tuple[Tensor, float]:
        """The site's constrained value and its term (see `Fill`)."""
        mean, sd = packed_moments(fn, transform, packed_shape(fn, transform))
        axes = (*mean.shape[: 1 if part.plates else 0], part.site.size)
        self.means.append(mean.reshape(axes))
        self.sds.append(sd.reshape(axes))
        return transform(mean), 0.0


class Ancestral:
    """A draw from the site's prior, ``draws`` in front; collects the ``packed`` values."""

    def __init__(self, draws: tuple[int, ...] = ()) -> None:
        self.draws = torch.Size(draws)
        self.packed: list[Tensor] = []

    def __call__(self, fn: Any, transform: Transform, part: Part) -> tuple[Tensor, float]:
        """The site's constrained value and its term (see `Fill`)."""
        own = fn.batch_shape[len(fn.batch_shape) - part.plates :] if part.plates else fn.batch_shape
        fn = fn.expand(self.draws + own)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Singular sample")  # Wishart remarks on draws that it then repairs
            value = fn.rsample() if fn.has_rsample else fn.sample()
        batch = value.shape[: len(self.draws) + (1 if part.plates else 0)]
        self.packed.append(transform.inv(value).reshape(*batch, part.site.size))
        return value, 0.0


class Condition:
    """The site's given constrained value ``(*S, T, *event)``; collects the ``packed`` values."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.packed: list[Tensor] = []

    def __call__(self, fn: Any, transform: Transform, part: Part) -> tuple[Tensor, float]:
        """The site's constrained value and its term (see `Fill`)."""
        value = self.values[part.site.name]
        batch = value.shape[: value.dim() - len(part.site.event_shape)]
        value = value.reshape(*batch, *(1,) * (part.plates - 1), *part.site.event_shape)
        self.packed.append(transform.inv(value).reshape(*batch, part.site.size))
        return value, 0.0


def site_normal(mean: Tensor, sd: Tensor, transform: Transform, like: Any) -> Any:
    """The diagonal Normal over a site's packed value, as a distribution over its constrained value, shaped as ``like``."""
    plain = elementwise(transform)
    fn = dist.Normal(mean, sd)
    if not is_identity(plain):
        fn = dist.TransformedDistribution(fn, [plain])
    missing = len(like.event_shape) - len(fn.event_shape)
    return fn.to_event(missing) if missing else fn


def site_kl(guide: Any, fn: Any, value: Tensor) -> Tensor:
    """KL(guide ‖ fn) with the batch axes of both: analytic where registered, else log guide − log fn at ``value``."""
    try:
        return torch.distributions.kl_divergence(guide, fn)
    except NotImplementedError:
        return guide.log_prob(value) - fn.log_prob(value)


def _slices(sites: Iterable[Site]) -> dict[str, tuple[Site, slice]]:
    start, slices = 0, {}
    for site in sites:
        slices[site.name] = (site, slice(start, start + site.size))
        start += site.size
    return slices
