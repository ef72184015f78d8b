"""A training step traced once through Pyro into a graph of tensor operations, and compiled: the same numbers without the effect handlers.

    eager      Python, Pyro and autograd at every step
    traced     the operations of one eager step written down (`make_fx`) and done again: the same kernels in the same order, the same bits
    compiled   the traced graph through TorchInductor: the same arithmetic, fused; equal to rounding
    swept      where one graph of all inner steps would be large: a graph of one of them, run K times and back by hand (`sweep`)

On a GPU the kernels of either are recorded once and launched by one call (a CUDA graph), and a step waits for the GPU once, at its end.

What the graph takes as inputs is followed: every parameter and buffer of the learner, the episode's tensors, and the step's noise, which is
drawn outside from the caller's generator in the order in which eager draws it, so that the random stream is eager's own. What Python
decides while the step is traced is settled for good: a learner's own settings (``kl_weight``) must not change during a run. New shapes
are traced again. Values that Python looks at (``if``, ``float``) cannot be traced: such a step stays eager, one RuntimeWarning says why.

Every new graph is held to eager: on the data it was traced on, on a disturbed copy of them (other order, other padding), and on the next
step's, in loss, gradients and the state of the generator. So what Python took from the data behind the graph's back shows.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import costs
from .adam import AdamStep
from .agreement import SMALL, Gradients, Losses, difference, disturbed, gradients_of, is_unsteady
from .backends import inductor
from .episodes import Episode
from .graphs import SHAPES, Backend, first_lines, tolerance
from .learners.base import AbstractMetaLearner, checked_choice
from .sweep import Sweep
from .traced_step import CHECKS, StepTracer, TracedStep, tensors_of

log = logging.getLogger(__name__)

MOST_SHAPES = 32  # traced in a run: more of them are no use
WARM_UP = 5  # eager steps that are timed before "auto" thinks of anything better
CLEARLY = 1.5  # how many times its cost a faster step must save before "auto" takes the trouble
SAVED = 0.5  # the share of a step's time that tracing, and compiling after it, was measured to save at least
Graphs = OrderedDict[Any, TracedStep]


class StepCompiler:
    """Takes training steps for a learner, faster than eager where it can and where it pays.

    ``losses``: an episode's losses ``(T,)`` and θ's own ``()``, with all randomness from ``generator``; run eagerly it is the measure of
    all that is done here. ``mode``: True compiles at once, False never, "auto" first times eager, then traces, then compiles, each only
    where the steps to come will save clearly more time than it takes (`costs`). ``backend``: what compiles a graph. ``lent``: the graphs
    of a learner that is made alike (another member of an ensemble), or of an earlier run of this one, held to eager once more. ``adam``: a
    step of the optimiser that the graph may take on. ``coarsest``: the type of the least exact arithmetic in ``losses``, where that is not
    the parameters'.

    Raises ValueError for another ``mode``.
    """

    def __init__(
        self, learner: AbstractMetaLearner, parameters: Sequence[nn.Parameter], losses: Losses, total: int, generator: torch.Generator,
        *, mode: bool | str = "auto", backend: Backend | None = None, lent: Graphs | None = None,
        adam: AdamStep | None = None, coarsest: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(mode, bool):
            checked_choice("compile", mode, ("auto",))
        self.learner, self.parameters, self.generator = learner, list(parameters), generator
        self.tracer = StepTracer(learner, self.parameters, losses, total, generator, adam)
        self.mode, self.backend, self.coarsest = mode, backend or inductor, coarsest
        self.can_compile, self.traced = True, 0
        self.why_eager = "compile=False" if mode is False else learner.why_eager
        self.graphs: Graphs = OrderedDict()
        for key, step in (lent or {}).items():
            self.graphs[key] = replace(step, lent=True, unchecked=CHECKS, seconds=deque(maxlen=20))
        self.seen: Counter[Any] = Counter()
        self._last_masks: list[tuple[Tensor, int]] = []
        self._last_full: tuple[bool, ...] = ()
        self.eager_seconds: deque[float] = deque(maxlen=20)
        self._kind = repr((coarsest, self.tracer.kind()))
        self.clock = costs.clock(self.tracer.on_gpu)
        places = {v.device for v in self.tracer.state}
        if self.why_eager is None and (len(places) > 1 or not all(place.type in ("cpu", "cuda") for place in places)):
            self.why_eager = f"steps are compiled on the CPU or on one GPU, and the model is on {', '.join(sorted(map(str, places)))}"
        if self.why_eager is not None and mode is not False:
            log.info("%s: %s", type(learner).__name__, self.why_eager)
            if mode is True:
                self._warn(self.why_eager)

    def __call__(self, episode: Episode, remaining: int) -> Gradients | None:
        """The step's losses and gradients, all finite; None where the step is eager's to take. ``remaining``: steps to come, with this."""
        if self.why_eager is not None:
            return None
        if self.adam is not None and not self.adam.applies():
            self.tracer.adam = None  # from now on graphs give gradients, and the optimiser takes its own steps
        full = self._whole(episode)
        if self.tracer.on_gpu:  # only now: whether there is padding was seen without waiting for the GPU
            episode = episode.to(self.tracer.state[0].device)
        key = (*[(v.shape, v.dtype, v.device) for v in tensors_of(episode)], full, self.adam and self.adam.settings, self._kind)
        step = self.graphs.get(key)
        if step is None and not self._has_shape(episode):
            return None
        self.seen[key] += 1
        settled = step is not None and step.compiled and not step.unchecked
        # of a short step copying the generator's state is a part
        before = None if settled and not step.random else self.generator.get_state()  # type: ignore[union-attr]
        try:
            if settled:
                self.graphs.move_to_end(key)
            else:
                step = self._step(key, episode, full, remaining)
            found = None if step is None else self._taken(step, episode, before)
        except Exception as error:  # whatever a program or a tracer may raise; the eager step that follows raises it again where it is real
            self._give_up(f"{type(error).__name__}: {first_lines(error)}")
            found = None
        if found is None and before is not None:
            self.generator.set_state(before)
        return found

    @property
    def adam(self) -> AdamStep | None:
        """The optimiser's step that graphs take on."""
        return self.tracer.adam

    def _whole(self, episode: Episode) -> tuple[bool, ...]:
        """Which sets have no padding; masks that were met in the last step are not looked at again, which would wait for a GPU."""
        masks = [(points.mask, points.mask._version) for points in episode]
        same = [a[0] is b[0] and a[1] == b[1] for a, b in zip(masks, self._last_masks, strict=False)]
        if not (same and all(same)):
            self._last_masks, self._last_full = masks, tuple(bool(mask.all()) for mask, _ in masks)
        return self._last_full

    def eager_took(self, seconds: float) -> None:
        """Says how long loss and gradient of an eager step took; the first ones of a run, which warm up, are not counted."""
        self.eager_seconds.append(seconds)

    def _step(self, key: Any, episode: Episode, full: tuple[bool, ...], remaining: int) -> TracedStep | None:
        step = self.graphs.get(key)
        to_come = remaining * self.seen[key] / self.seen.total()
        if step is None:
            if self.mode == "auto" and not self._pays(self.eager_seconds, to_come, costs.tracing):
                return None
            if not self._is_fine(episode):  # eager says what is wrong with it
                return None
            if self.traced == MOST_SHAPES:
                self._warn(f"steps had {MOST_SHAPES} different shapes: further ones are not traced; pad all tasks to one number of points")
            self.traced += 1
            if self.traced > MOST_SHAPES:
                return None
            start = self.clock()
            step = self.graphs[key] = self.tracer(episode, full)
            step.traced_in = self.clock() - start
            if not self._agrees_disturbed(step, disturbed(episode, full)):
                return None
            log.info(
                "%s: traced a step of %d tasks in %.1f s, %d operations%s",
                type(self.learner).__name__, episode.num_tasks, step.traced_in, step.size,
                f", swept over {step.module.inner_steps} inner steps" if isinstance(step.module, Sweep) else "",
            )  # fmt: skip
            if len(self.graphs) > SHAPES:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        if not step.compiled and self.can_compile and (self.mode is True or self._compiling_pays(step, to_come)):
            self._compile(step, episode)
        return None if self.mode == "auto" and not step.compiled and self._is_slow(step) else step

    def _compiling_pays(self, step: TracedStep, to_come: float) -> bool:
        if step.unchecked:
            return False
        cost = step.compile_cost = step.compile_cost or costs.compiling(step.graphs, step.traced_in)
        return self._pays(self.eager_seconds if self._is_slow(step) else step.seconds, to_come, lambda _: cost)

    def _is_slow(self, step: TracedStep) -> bool:
        """Whether a traced step is known to be slower than an eager one."""
        known = min(len(step.seconds), len(self.eager_seconds)) >= WARM_UP
        return known and statistics.median(step.seconds) > statistics.median(self.eager_seconds)

    def _compile(self, step: TracedStep, episode: Episode) -> None:
        start, before = time.perf_counter(), self.generator.get_state()
        try:
            inputs, module = self.tracer.example(step, episode), step.module
            with torch.no_grad():
                step.run = module.compiled(self.backend, inputs) if isinstance(module, Sweep) else self.backend(module, inputs)
        except Exception as error:  # whatever a compiler may raise: none installed, an operation it does not know
            self.can_compile = False
            self._warn(f"the step is traced but not compiled, which is slower: {type(error).__name__}: {first_lines(error)}")
            return
        finally:
            self.generator.set_state(before)
        step.compiled, step.unchecked = True, CHECKS
        step.before = statistics.median(step.seconds) if step.seconds else math.inf
        step.seconds.clear()
        if self.backend is inductor:
            costs.note_on_disk(step.graphs, [*step.run.runs.values()] if isinstance(step.run, Sweep) else [step.run])
        log.info("%s: compiled it in %.1f s", type(self.learner).__name__, time.perf_counter() - start)

    def _go_back(self, step: TracedStep, episode: Episode) -> None:
        """To the traced step, if it can be had: this one is taken already, and must not fail any more."""
        try:
            run = self.tracer.uncompiled(step, episode)
        except Exception as error:  # a GPU's memory may be full
            log.info("%s: compiled it is no faster, and stays: %s", type(self.learner).__name__, first_lines(error))
            return
        log.info("%s: compiled it is no faster; back to the traced step", type(self.learner).__name__)
        step.run, step.compiled, self.can_compile = run, False, False
        step.seconds.clear()

    def _pays(self, seconds: deque[float], to_come: float, cost: Callable[[float], float]) -> bool:
        """Whether steps of ``seconds`` each so far, ``to_come`` of them, save clearly more than it costs to make them faster."""
        if len(seconds) < WARM_UP:
            return False
        each = statistics.median(seconds)
        return to_come * SAVED * each > CLEARLY * cost(each)

    def _taken(self, step: TracedStep, episode: Episode, before: Tensor | None) -> Gradients | None:
        timed = self.mode == "auto" and not (step.compiled and len(step.seconds) == WARM_UP)
        start = self.clock() if timed else 0.0
        found = self._run(step, episode, before)
        if found is None:  # eager tells every case apart
            return None
        if before is not None and step.unchecked:
            step.unchecked -= 1
            if not self._agrees(step, found, episode, before):
                return None
        elif timed:
            step.seconds.append(self.clock() - start)
            if step.compiled and len(step.seconds) == WARM_UP and statistics.median(step.seconds) > step.before:
                self._go_back(step, episode)
        # a module's own way of setting it takes as long as hashing the key
        vars(self.learner.model)["gradient_evaluations"] += step.evaluations
        return found

    def _run(self, step: TracedStep, episode: Episode, before: Tensor | None) -> Gradients | None:
        """``before``: where the generator is put, if anywhere."""
        if before is not None:
            self.generator.set_state(before)
        return self.tracer.run(step, episode)

    # --- held to eager

    def _agrees(self, step: TracedStep, found: Gradients, episode: Episode, before: Tensor) -> bool:
        """Whether ``found`` is eager's; if not, another graph is tried next where there is one to try, else this gives up."""
        after, evaluations = self.generator.get_state(), self.learner.model.gradient_evaluations
        self.generator.set_state(before)
        wanted = self._eager(episode)
        self.learner.model.gradient_evaluations = evaluations
        how, near = "compiled" if step.compiled else "traced", tolerance(self.coarsest or found.loss.dtype)
        if not torch.equal(after, self.generator.get_state()):
            why = f"the {how} step draws other random numbers than the eager one"
        elif (far := difference(found, wanted, max(SMALL, near))) > near and not self._is_unsteady(episode, before, wanted, near, far):
            why = f"loss or gradients of the {how} step differ from the eager one's by {far:.1e} of their size"
        else:
            return True
        if step.lent:  # the learners are not alike after all, or it was changed since: this one needs a graph of its own
            self.graphs.clear()
        elif isinstance(step.module, Sweep):  # its pieces do not make up the step: it needs a single graph
            log.info("%s: no sweep over inner steps: %s", type(self.learner).__name__, why)
            self.graphs.clear()
            self.tracer.sweeps = False
        else:
            self._give_up(why)
        return False

    def _is_unsteady(self, episode: Episode, before: Tensor, wanted: Gradients, near: float, far: float) -> bool:
        after, evaluations = self.generator.get_state(), self.learner.model.gradient_evaluations

        def again() -> Gradients:
            self.generator.set_state(before)
            return self._eager(episode)

        try:
            return is_unsteady(again, self.parameters, wanted, near, far)
        finally:
            self.generator.set_state(after)
            self.learner.model.gradient_evaluations = evaluations

    def _eager(self, episode: Episode) -> Gradients:
        return gradients_of(self.tracer.losses, self.parameters, self.tracer.total, episode)

    def _agrees_disturbed(self, step: TracedStep, episode: Episode) -> bool:
        before, evaluations = self.generator.get_state(), self.learner.model.gradient_evaluations
        try:
            fine = bool(self._eager(episode).loss.isfinite())
        except ValueError:  # no data for this learner: a class without a point, say
            fine = False
        found = self._run(step, episode, before) if fine else None
        agrees = found is None or self._agrees(step, found, episode, before)
        self.generator.set_state(before)
        self.learner.model.gradient_evaluations = evaluations
        return agrees

    def _give_up(self, why: str) -> None:
        self.why_eager = why
        self.graphs.clear()
        self._warn(f"training goes on step by step through Python, with the same results: {why}")

    def _warn(self, what: str) -> None:
        warnings.warn(f"{type(self.learner).__name__}: compile={self.mode!r}: {what}", RuntimeWarning, stacklevel=2)

    # --- the data

    def _has_shape(self, episode: Episode) -> bool:
        """Whether a graph could take it at all; of what is wrong eager gives account."""
        if episode.support.y is None or episode.query.y is None or not episode.support.num_tasks == episode.query.num_tasks > 0:
            return False
        try:
            for points in episode:
                points.check_shapes()
        except ValueError:
            return False
        return True

    def _is_fine(self, episode: Episode) -> bool:
        """Whether no check of the data can fail."""
        try:
            for points, role in zip(episode, ("support", "query"), strict=True):
                points.check(role)
                self.learner.model.check_targets(points, role)
        except ValueError:
            return False
        return True
