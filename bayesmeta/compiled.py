"""`Compiled`: an adapter whose `adapt` runs as a compiled graph, for many calls with support sets of one shape; ``adapt(compile=)``."""

from __future__ import annotations

import copy
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pyro
import torch
import torch.distributions
from torch import Tensor
from torch.nn.utils import stateless

from .backends import inductor
from .episodes import Points
from .graphs import SHAPES, Backend, Run, draw_noise_outside, first_lines, gap, is_random, settings, tolerance, trace
from .learners.base import AbstractAdapter
from .posteriors import Posterior, TaskPosterior
from .randomness import rng

COMPILING_TAKES = 30.0  # seconds, about


class _Traced(NamedTuple):
    """``run`` gives the tensors of ``template``, a distribution made while the graph was traced, in their order.

    ``evaluations``: what a run adds to the model's count of gradients.
    """

    run: Run
    noise: Callable[[], Any] | None
    random: bool
    template: Any
    diagnostics: dict[str, float | str]
    evaluations: float


@dataclass
class _Kept:
    """What is known of an adapter, by shapes and settings: its graphs, seconds that eager calls took, and why there is no graph."""

    graphs: OrderedDict[Any, _Traced] = field(default_factory=OrderedDict)
    seconds: dict[Any, float] = field(default_factory=dict)
    why_not: dict[Any, str] = field(default_factory=dict)


class Compiled(AbstractAdapter):
    """``adapter`` with its `adapt` traced and compiled at the first call with a new shape, which takes 5–40 seconds.

    The posterior is ``adapter``'s own to rounding, from the same random numbers; every new graph is held to it once. What cannot be traced
    (a flow, whose posterior is a network) stays eager, and a RuntimeWarning says why, but of learners that say so themselves
    (``why_eager``); of an ensemble each member's own `adapt` is compiled. Only for adaptation: train ``adapter`` itself. ``mode``: True;
    or "auto", which waits until a shape's eager calls have taken as long as compiling does.
    """

    def __init__(self, adapter: AbstractAdapter, *, mode: bool | str = True, backend: Backend | None = None) -> None:
        super().__init__(adapter.model)
        self.adapter, self.mode, self.backend, self.members = adapter, mode, backend or inductor, adapter.members
        self._kept = _Kept()

    @property
    def why_eager(self) -> str | None:  # type: ignore[override]
        """Why it was not compiled, the first time that it was not."""
        return next(iter(self._kept.why_not.values()), None)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> Posterior:
        """As the adapter's own."""
        adapt: Any = self.adapter.adapt
        if self.adapter.members and not hasattr(adapt, "takes_compile"):  # it sees to its members itself
            return adapt(support, generator=generator, compile=self.mode)
        points, kept = self.adapter.prepared(support), self._kept
        given = self.model.theta_given  # a draw of θ that a posterior over θ stands at
        data, state = [v.contiguous() for v in (*points, given) if v is not None], self._state()
        precision = (self.model.precision, torch.is_autocast_enabled(self.model.device.type))
        key = (precision, *[(v.shape, v.stride(), v.dtype, v.device) for v in (*state, *data)], *settings(self.adapter))
        if key in kept.why_not:
            return self.adapter.adapt(support, generator=generator)
        if key not in kept.graphs:
            if self.mode == "auto" and kept.seconds.get(key, 0.0) < COMPILING_TAKES:
                return self._timed(key, support, generator)
            why_not = self._compile(key, points, data, generator)
            if why_not is not None:
                posterior = self.adapter.adapt(support, generator=generator)  # where it raises too, nothing is known of the next call
                kept.why_not[key] = why_not
                if self.adapter.why_eager is None:  # else it says so itself
                    message = f"{type(self.adapter).__name__}: adaptation is not compiled: {why_not}"
                    warnings.warn(message, RuntimeWarning, stacklevel=4)
                return posterior
        kept.graphs.move_to_end(key)
        step = kept.graphs[key]
        self.model.gradient_evaluations += step.evaluations
        return self.adapter.posterior(self._distribution(step, state, data, generator), dict(step.diagnostics))

    def _timed(self, key: Any, support: Points, generator: torch.Generator | None) -> Posterior:
        start = time.perf_counter()
        posterior = self.adapter.adapt(support, generator=generator)
        self._kept.seconds[key] = self._kept.seconds.get(key, 0.0) + time.perf_counter() - start
        return posterior

    def _compile(self, key: Any, points: Points, data: list[Tensor], generator: torch.Generator | None) -> str | None:
        """Puts the graph for a new shape with the others, or says why there is none. The generator stays where it was."""
        if self.adapter.why_eager is not None:
            return self.adapter.why_eager
        state, before = torch.empty(0) if generator is None else generator.get_state(), self.model.gradient_evaluations
        try:
            self._kept.graphs[key] = self._traced(points, data, generator)
        except Exception as error:  # whatever a program, a tracer or a compiler may raise
            return f"{type(error).__name__}: {first_lines(error)}"
        finally:
            self.model.gradient_evaluations = before
            if generator is not None:
                generator.set_state(state)
        if len(self._kept.graphs) > SHAPES:
            self._kept.graphs.popitem(last=False)
        return None

    def _distribution(self, step: _Traced, state: list[Tensor], data: list[Tensor], generator: torch.Generator | None) -> Any:
        with torch.no_grad(), rng(generator) if step.random else nullcontext():
            noise = () if step.noise is None else step.noise()
            values = step.run(*state, *data, *noise)
        values = [v.clone() if v.is_cuda else v for v in values]  # on a GPU the next call writes over them
        memo: dict[int, Any] = {id(old): new for old, new in zip(_tensors(step.template), values, strict=True)}
        return copy.deepcopy(step.template, memo)

    def _state(self) -> list[Tensor]:
        return [v.detach() for v in (*self.adapter.parameters(), *self.adapter.buffers())]

    def _traced(self, points: Points, data: list[Tensor], generator: torch.Generator | None) -> _Traced:
        adapter = self.adapter
        names = [name for name, _ in (*adapter.named_parameters(), *adapter.named_buffers())]
        made: list[TaskPosterior] = []

        def function(*inputs: Tensor) -> list[Tensor]:
            state, (x, y, mask, *theta) = dict(zip(names, inputs, strict=False)), inputs[len(names) :]
            with (
                stateless._reparametrize_module(adapter, state, tie_weights=True), adapter.model.theta_at(theta[0] if theta else None),
                adapter.model.data_ready(), pyro.validation_enabled(False),  # values are not looked at
            ):  # fmt: skip
                posterior = adapter.adapt(Points(x, y, mask))
            if not isinstance(posterior, TaskPosterior):
                raise TypeError(f"its posterior is a {type(posterior).__name__}, with no distribution over φ")
            made[:] = [posterior]
            return list(_tensors(posterior.distribution))

        inputs, before = [*self._state(), *data], self.model.gradient_evaluations
        with rng(None):
            module = trace(function, inputs)
        evaluations = self.model.gradient_evaluations - before
        template, random = made[0].distribution, is_random(module)
        noise = draw_noise_outside(module)
        state = torch.empty(0) if generator is None else generator.get_state()
        with torch.no_grad(), rng(None):
            extra = () if noise is None else noise()
        with torch.no_grad():
            run = self.backend(module, [*inputs, *extra])
        step = _Traced(run, noise, random, template, made[0].diagnostics, evaluations)
        found = self._distribution(step, self._state(), data, generator)
        if generator is not None:
            generator.set_state(state)
        wanted = adapter.adapt(points, generator=generator)
        assert isinstance(wanted, TaskPosterior)
        pairs = [(a, b) for a, b in zip(_tensors(found), _tensors(wanted.distribution), strict=True) if b.is_floating_point() and b.numel()]
        if not all(torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs):
            raise RuntimeError("the compiled posterior is not finite where the eager one is, or the other way round")
        far = [gap(torch.where(b.isfinite(), a, 0.0), torch.where(b.isfinite(), b, 0.0)) for a, b in pairs]
        if not all(one <= tolerance(wanted.mean.dtype) for one in far):
            raise RuntimeError(f"the compiled posterior differs from the eager one by {max(far):.1e} of its size")
        return step


_OF_LEARNERS: WeakKeyDictionary[AbstractAdapter, _Kept] = WeakKeyDictionary()  # what ``adapt(compile=)`` keeps, no part of them


def _as_before(adapter: AbstractAdapter, mode: bool | str) -> AbstractAdapter:
    """`Compiled` with what earlier calls left."""
    if isinstance(adapter, Compiled):
        return adapter
    compiled = Compiled(adapter, mode=mode)
    compiled._kept = _OF_LEARNERS.setdefault(adapter, compiled._kept)
    return compiled


AbstractAdapter.compiled_by = staticmethod(_as_before)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a distribution is made of, each once."""
    seen = set[int]()
    for part in _parts(value):
        if isinstance(part, Tensor) and id(part) not in seen:
            seen.add(id(part))
            yield part


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _parts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
    elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        yield from _parts(vars(value))
