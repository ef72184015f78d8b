"""`AbstractProgramModule`: a Pyro program held in a module that owns its parameters, read once, then run with θ and φ given."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import transform_to

from .episodes import Episode, Points
from .handlers import AllSitesSeen, Fill, Packed, Program, Run, Site, attach_leaf
from .parameters import announce, check_shape, free_key, new_parameter, own_parameters
from .reading import SIZES, Reading, check_bounds, check_draws, check_owned, has_normal_prior, surveyed
from .survey import ModelError, Survey, made_up


class AbstractProgramModule(nn.Module, ABC):
    """A Pyro program in a module: ``pyro.param`` statements are entries of ``params``, made when the program is read.

    The program is read on the first data that any call sees; what is found is a `Reading`, and every later run has φ filled in
    from outside. How global sample sites are held, and where θ starts anew, is for the class to say that inherits from this.
    """

    def __init__(self, program: Callable[[Points], Any]) -> None:
        super().__init__()
        self.program = program
        self.params = nn.ParameterDict()
        self._keys: dict[str, str] = {}  # the names of pyro.param statements, and of their entries in params
        self._reading: Reading | None = None
        self._start: tuple[int, float] | None = None  # another starting point, asked for before the program was read
        self._data_ready = False
        self._precision: torch.dtype | None = None
        self._anchor: Tensor
        self.gradient_evaluations = 0.0
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # knows the device and dtype that .to() asked for
        self._default_dtype = torch.get_default_dtype()

    @abstractmethod
    def _make_theta(self, survey: Survey) -> None:
        """Makes the parameters of the global sample sites, if there are any, once the program is read."""

    @abstractmethod
    def _default_theta(self) -> Fill:
        """What fills in the global sample sites where a run says nothing of them."""

    @abstractmethod
    def reinitialise(self, seed: int, *, jitter: float = 0.1) -> None:
        """Another starting point for θ, drawn by ``seed``; where the program has not been read yet, as soon as it is."""

    # --- data, and how the program is run on them

    def forward(self, data: Points | Episode) -> Any:
        """Runs the program, for `SVI`, `NUTS`, `Predictive` and autoguides; an Episode is observed as S ∪ Q."""
        points = self.prepare(data)
        with own_parameters(self.program, self.device), Program(self._parameter, points):
            if isinstance(self.program, nn.Module) and not isinstance(self.program, PyroModule):
                for name, parameter in self.program.named_parameters():  # a PyroModule announces its own
                    announce(name, parameter)
            return self.program(points)

    def prepare(self, data: Points | Episode, *, full: bool = False) -> Points:
        """Points with the model's dtype and device and only real values in them; reads the program if need be.

        ``data``: Points, or an Episode taken as S ∪ Q. Floating-point tensors take the model's dtype. ``full``: there is no padding.
        """
        points = data.union() if isinstance(data, Episode) else data
        if self._data_ready:
            return points
        self.materialise(points)
        points = points.to(device=self._anchor.device, dtype=self._anchor.dtype)
        return points if full else points.filled()

    @property
    def device(self) -> torch.device:
        """Where the model is, and where data go."""
        return self._anchor.device

    @contextmanager
    def in_precision(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Inside, matrix products and convolutions of the program and of embeddings run in ``dtype`` (see `lowered`); None: as ever."""
        before, self._precision = self._precision, dtype
        try:
            yield
        finally:
            self._precision = before

    @property
    def precision(self) -> torch.dtype | None:
        """What `in_precision` asks for."""
        return self._precision

    def lowered(self) -> contextlib.AbstractContextManager[Any]:
        """What a network is run under: `torch.autocast` to the dtype of `in_precision`, if any. Log densities are taken outside of it."""
        if self._precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._precision, cache_enabled=False)  # a cached cast would not show in a graph

    @contextmanager
    def data_ready(self) -> Iterator[None]:
        """Inside, data count as checked and prepared and are taken as they are: nothing looks at their values from Python."""
        before = self._data_ready
        self._data_ready = True
        try:
            yield
        finally:
            self._data_ready = before

    @property
    def takes_data_as_ready(self) -> bool:
        """Whether this is inside `data_ready`."""
        return self._data_ready

    def check_targets(self, points: Points, role: str = "points") -> None:
        """Raises ValueError naming task and point where a real y is no possible value of the program's likelihood (−1 for a count).

        Bounds that differ from point to point (a binomial's trials) are left to the likelihood itself.
        """
        bad = None if self._data_ready else self.impossible_targets(points)
        if bad is not None and bad.any():
            assert points.y is not None
            task, point = (int(i) for i in bad.nonzero()[0])
            wanted, got = self._known.target_support, points.y[task, point].squeeze().tolist()
            raise ValueError(f"{role}.y: task {task}, point {point}: the likelihood expects a value in {wanted}, got {got}")

    def impossible_targets(self, points: Points) -> Tensor | None:
        """Which real y are no possible values of the likelihood, ``(T, N)``; None where that is not known beforehand."""
        support = self._known.target_support
        if points.y is None or support is None:
            return None
        y = points.y[..., 0] if points.y.dim() == 3 and points.y.shape[-1] == 1 else points.y
        bad = ~support.check(y)
        return (bad.flatten(2).any(-1) if bad.dim() > 2 else bad) & points.mask

    # --- reading the program, once

    def materialise(self, data: Points | Episode) -> None:
        """Reads the program on made-up copies of the first real point of ``data``, and makes θ's parameters. Once.

        Raises ModelError where the program breaks a rule; the model is then as it was before.
        """
        if self._reading is not None:
            return
        points = data.union() if isinstance(data, Episode) else data
        points.check()
        if points.y is None or not points.mask.any():
            raise ModelError(
                "the first data that a model sees must have a real point and its y, got none; "
                "give HierarchicalModel(program, example=points)"
            )
        before, first = self._anchor, next(self.parameters(), None)
        owned = {*self._parameters, *self._buffers}
        if first is not None:
            self._anchor = first.detach().new_zeros(())
        elif self._anchor.dtype == self._default_dtype and points.x.is_floating_point():
            self._anchor = self._anchor.to(points.x.dtype)  # a plain function's θ takes the dtype of the data
        task, point = points.mask.nonzero()[0].tolist()
        here = (slice(task, task + 1), slice(point, point + 1))
        row = Points(points.x[here].detach(), points.y[here].detach(), points.mask[here])
        row = row.to(device=self._anchor.device, dtype=self._anchor.dtype)
        try:
            small, large = (surveyed(self.program, made_up(row, *size), self._parameter, self._anchor) for size in SIZES)
            reading = self._reading = Reading.of(small, large, row)
            for role, part in zip(data._fields, data, strict=True) if isinstance(data, Episode) else [("points", data)]:
                self.check_targets(part, role)
            self._make_theta(small)
            check_draws(self._run, reading, self._anchor)
            check_bounds(self._run, reading, small, self._anchor)
            check_owned(self._run, reading, self.parameters(), self._anchor)
            self._reading = replace(reading, normal_prior=has_normal_prior(self._run, reading, small, self._anchor))
            if self._start is not None:
                self.reinitialise(self._start[0], jitter=self._start[1])
        except BaseException:
            self._reading, self.params, self._keys = None, nn.ParameterDict(), {}
            self._anchor = before
            for name in {*self._parameters, *self._buffers} - owned:  # what `_make_theta` has made
                delattr(self, name)
            raise

    def _parameter(self, name: str, args: tuple[Any, ...], constraint: Any) -> Tensor:
        """Answers the statement ``pyro.param(name, *args, constraint=)`` from ``params``; makes it when the program is first read."""
        if name not in self._keys:
            if self._reading is not None:
                raise ModelError(
                    f"pyro.param('{name}') was not there when the program was first run: parameters must not depend on the data"
                )
            parameter, key = new_parameter(name, args, constraint, self._anchor), free_key(name, self.params)
            self.params[key], self._keys[name] = parameter, key
        leaf = self.params[self._keys[name]]
        value = transform_to(constraint)(leaf)
        if self._reading is None:
            check_shape(name, value, args)
        return attach_leaf(value, leaf)

    # --- what is known of it

    @property
    def has_seen_data(self) -> bool:
        """Whether the program has been read, so that θ and `dim` are known."""
        return self._reading is not None

    @property
    def _known(self) -> Reading:
        if self._reading is None:
            raise RuntimeError(
                "this model has not seen data yet, so its parameters are unknown: give HierarchicalModel(program, example=points), "
                "or call model.materialise(points)"
            )
        return self._reading

    @property
    def dim(self) -> int:
        """``D``, how many unconstrained reals a task's parameters take."""
        return self._known.dim

    @property
    def sites(self) -> list[Site]:
        """The task-level sites, in packing order."""
        return self._known.sites

    @property
    def theta_sites(self) -> list[Site]:
        """The global sample sites, in packing order."""
        return self._known.theta_sites

    @property
    def num_classes(self) -> int | None:
        """C where y is one of the classes 0 … C − 1 (a Categorical), else None."""
        return self._known.num_classes

    def made_up_points(self, tasks: int, points: int) -> Points:
        """``tasks`` equal tasks of ``points`` points at one x, made of the first point the model has seen: for what needs no data.

        y is that point's own; where it is a class, every class in turn.
        """
        same = made_up(self._known.row.to(device=self._anchor.device, dtype=self._anchor.dtype), tasks, points)
        if self._known.num_classes is None or same.y is None:
            return same
        classes = (torch.arange(points) % self._known.num_classes).to(same.y)
        return same._replace(y=classes.view(1, points, *(1,) * (same.y.dim() - 2)).expand_as(same.y))

    # --- running it with φ given

    def log_parts(self, phi: Tensor, points: Points | Episode) -> tuple[Tensor, Tensor]:
        """log p(φ | θ) and log p(y | φ, θ), each ``(*S, T)``, in one run of the program."""
        points = self.prepare(points)
        return self._parts(self._run(Packed(self._checked(phi)), points), phi)

    def _run(self, phi: Fill, points: Points, theta: Fill | None = None, *, sites_only: bool = False) -> Run:
        theta, known = theta or self._default_theta(), self._known
        run = Run(self._parameter, points, known.plates, known.sites, phi, known.theta_sites, theta, sites_only=sites_only)
        # No validation inside: a task whose φ has diverged gives NaN of its own, not an exception for all. Data are checked before.
        unvalidated = pyro.validation_enabled(False)
        own = own_parameters(self.program, self.device)
        with contextlib.suppress(AllSitesSeen), poutine.block(), own, unvalidated, run, self.lowered():
            self.program(points)
        return run

    def _parts(self, run: Run, phi: Tensor) -> tuple[Tensor, Tensor]:
        if phi.requires_grad and torch.is_grad_enabled():
            self.gradient_evaluations += phi[..., 0].numel() / phi.shape[-2]
        return tuple(torch.as_tensor(v).expand(phi.shape[:-1]) for v in (run.prior, run.likelihood))  # type: ignore[return-value]

    def _checked(self, phi: Tensor) -> Tensor:
        if phi.dim() < 2 or phi.shape[-1] != self.dim:
            raise ValueError(f"phi: expected shape (*S, T, D) with D = {self.dim}, got {tuple(phi.shape)}")
        return phi


def refuse_unread(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: RuntimeError where a model in ``module`` that has not seen data would not keep all of it."""
    unread = [part for part in module.modules() if isinstance(part, AbstractProgramModule) and not part.has_seen_data]
    if not unread:
        return
    known = module.state_dict(prefix=prefix)
    unknown = sorted(name for name in state_dict if name.startswith(prefix) and name not in known)
    if unknown or any(model._start is not None for model in unread):
        raise RuntimeError(
            f"load_state_dict: this {type(module).__name__} has not seen data yet, so "
            + (f"it has no place for {', '.join(map(repr, unknown))}" if unknown else "its starting point is still to come")
            + ": give HierarchicalModel(program, example=points), or call materialise(points) first"
        )
