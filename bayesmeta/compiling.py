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
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import stateless

from . import costs
from .adam import AdamStep
from .episodes import LARGEST_TARGET, Episode, Points
from .graphs import SHAPES, Backend, Recorded, Run, draw_noise_outside, first_lines, gap, inductor, is_random, tolerance, trace
from .learners.base import AbstractMetaLearner, checked_choice
from .overwriting import overwrite
from .randomness import rng
from .sweep import Place, Placed, Result, Sweep, sweep

log = logging.getLogger(__name__)

Losses = Callable[[Episode], tuple[Tensor, Tensor]]

MOST_SHAPES = 32  # traced in a run: more of them are no use
SMALL = 0.05  # a gradient of that share of the largest's size, or less, is held to eager as if it were that size: it may be rounding alone
NUDGES, NUDGE = 8, 4.0  # how many eager results, at parameters so many units of their last digit away, tell what rounding can do
RESULTS = 4  # of a step with the optimiser's: losses, loss, facts, gradient; what follows is written over the inputs
CHECKS = 2  # how many steps of a new graph are held to eager
WARM_UP = 5  # eager steps that are timed before "auto" thinks of anything better
SWEPT_OPERATIONS = 3_000  # so many more than a sweep's a single graph must have; with fewer it compiles in 40 s, and is a quarter faster
CLEARLY = 1.5  # how many times its cost a faster step must save before "auto" takes the trouble
NOTHING = nullcontext()
SAVED = 0.5  # the share of a step's time that tracing, and compiling after it, was measured to save at least


class Update(NamedTuple):
    """The optimiser's step that a graph has taken, of which ``loss`` is the loss.

    ``new``: parameters and the optimiser's state after it, where it is still to be held to the optimiser's own; empty where the graph has
    put them in their places.
    """

    loss: float
    new: list[Tensor]


class Gradients(NamedTuple):
    """A step's losses ``(T,)``, their mean with θ's share ``()``, and its gradient for each trained parameter (None: not reached).

    ``update``: the optimiser's step along it, where the graph holds that too; once it is trusted, gradients are not told (an empty list).
    """

    losses: Tensor
    loss: Tensor
    gradients: list[Tensor | None]
    update: Update | None = None


def gradients_of(losses: Losses, parameters: Sequence[Tensor], total: int, episode: Episode) -> Gradients:
    """Eager: mean of the tasks' losses + θ's own / ``total``, and its gradient."""
    with torch.enable_grad():
        values, rest = losses(episode)
        loss = values.mean() + rest / total
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return Gradients(values.detach(), loss.detach(), [None if g is None else g.detach() for g in gradients])


@dataclass
class TracedStep:
    """A step as a graph: ``module`` takes the learner's tensors, the episode's, and the noise; ``noise`` draws that.

    ``random``: whether it draws at all. ``reached``: which trained parameters have a gradient. ``evaluations``: what a step adds to the
    model's count of gradients. ``written``: which inputs are written over with what the optimiser's step makes of them, none where it is
    not in the graph. ``run``: ``module``, or what the compiler made of it. ``seconds``: of the last steps.
    """

    module: GraphModule | Sweep
    noise: Callable[[], Sequence[Tensor]] | None
    random: bool
    reached: list[bool]
    evaluations: float
    written: list[int]
    run: Run
    compiled: bool = False
    lent: bool = False  # traced on another learner, or in another run
    unchecked: int = CHECKS
    before: float = math.inf  # seconds a step took before it was compiled
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    traced_in: float = 0.0  # seconds
    compile_cost: float | None = None  # seconds, reckoned when first asked for

    @property
    def graphs(self) -> list[GraphModule]:
        """The graph, or those of a sweep."""
        return list(self.module.graphs.values()) if isinstance(self.module, Sweep) else [self.module]

    @property
    def size(self) -> int:
        """How many operations the graphs have."""
        return sum(len(graph.graph.nodes) for graph in self.graphs)


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
        self.learner, self.parameters, self.losses, self.total, self.generator = learner, list(parameters), losses, total, generator
        self.model = learner.model
        self.mode, self.backend, self.adam, self.coarsest = mode, backend or inductor, adam, coarsest
        self.can_compile, self.traced = True, 0
        self.why_eager = "compile=False" if mode is False else learner.why_eager
        self.graphs: Graphs = OrderedDict()
        for key, step in (lent or {}).items():
            self.graphs[key] = replace(step, lent=True, unchecked=CHECKS, seconds=deque(maxlen=20))
        self.seen: Counter[Any] = Counter()
        self._last_masks: list[tuple[Tensor, int]] = []
        self._last_full: tuple[bool, ...] = ()
        self.eager_seconds: deque[float] = deque(maxlen=20)
        tensors = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
        self._names, self._state = list(tensors), [v.detach() for v in tensors.values()]
        trained = {id(p) for p in self.parameters}
        self._trained = [id(v) in trained for v in tensors.values()]
        order = [id(v) for v in tensors.values()]
        self._places = [order.index(id(p)) for p in self.parameters]  # of the trained among all
        # of what is written into a graph, beside the data's shape
        kinds = [(name, tuple(v.shape), v.dtype, v.device, t) for (name, v), t in zip(tensors.items(), self._trained, strict=True)]
        self._kind = repr((total, coarsest, kinds, self._places, settings(learner)))
        self.on_gpu, places = self._state[0].is_cuda, {str(v.device) for v in self._state}
        self.clock = costs.clock(self.on_gpu)
        self.sweeps = not self.on_gpu  # a recorded piece writes over what it gave the last time
        if self.why_eager is None and (len(places) > 1 or not all(v.device.type in ("cpu", "cuda") for v in self._state)):
            self.why_eager = f"steps are compiled on the CPU or on one GPU, and the model is on {', '.join(sorted(places))}"
        if self.why_eager is not None and mode is not False:
            log.info("%s: %s", type(learner).__name__, self.why_eager)
            if mode is True:
                self._warn(self.why_eager)

    def __call__(self, episode: Episode, remaining: int) -> Gradients | None:
        """The step's losses and gradients, all finite; None where the step is eager's to take. ``remaining``: steps to come, with this."""
        if self.why_eager is not None:
            return None
        full = self._whole(episode)
        if self.on_gpu:  # only now: whether there is padding was seen without waiting for the GPU
            episode = episode.to(self._state[0].device)
        key = (*[(v.shape, v.dtype, v.device) for v in _tensors(episode)], full, self.adam and self.adam.settings, self._kind)
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
            step = self.graphs[key] = self._traced(episode, full)
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
            inputs, module = self._example(step, episode), step.module
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
            costs.note_on_disk(step.graphs)
        log.info("%s: compiled it in %.1f s", type(self.learner).__name__, time.perf_counter() - start)

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
                log.info("%s: compiled it is no faster; back to the traced step", type(self.learner).__name__)
                step.run, step.compiled, self.can_compile = self._uncompiled(step, episode), False, False
                step.seconds.clear()
        vars(self.model)["gradient_evaluations"] += step.evaluations  # a module's own way of setting it takes as long as hashing the key
        return found

    def _run(self, step: TracedStep, episode: Episode, before: Tensor | None) -> Gradients | None:
        """None where the data are not fine, or what came out is not finite. ``before``: where the generator is put, if anywhere."""
        if before is not None:
            self.generator.set_state(before)
        with torch.no_grad(), rng(self.generator) if step.random else NOTHING:
            inputs = self._inputs(step, episode)
            if step.unchecked:
                self._shield(step, inputs)
            losses, loss, facts, *tensors = step.run(*inputs)
        value, fine = facts.tolist()
        if not fine:
            return None
        if not step.written:
            rest = iter(tensors)
            return Gradients(losses, loss, [next(rest) if reached else None for reached in step.reached])
        if not step.unchecked:
            return Gradients(losses, loss, [], Update(value, []))
        parts = tensors[0].split([p.numel() for p in self.parameters])
        gradients: list[Tensor | None] = [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]
        return Gradients(losses, loss, gradients, Update(value, [inputs[i] for i in step.written]))

    def _shield(self, step: TracedStep, inputs: list[Tensor]) -> None:
        """Puts copies in the place of the inputs that the graph writes over."""
        for i in step.written:
            inputs[i] = inputs[i].clone()

    # --- held to eager

    def _agrees(self, step: TracedStep, found: Gradients, episode: Episode, before: Tensor) -> bool:
        """Whether ``found`` is eager's; if not, another graph is tried next where there is one to try, else this gives up."""
        after, evaluations = self.generator.get_state(), self.learner.model.gradient_evaluations
        self.generator.set_state(before)
        wanted = gradients_of(self.losses, self.parameters, self.total, episode)
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
            self.sweeps = False
        else:
            self._give_up(why)
        return False

    def _is_unsteady(self, episode: Episode, before: Tensor, wanted: Gradients, near: float, far: float) -> bool:
        """Whether eager's own result moves half as ``far`` or more when parameters move in their last digits.

        So it does at a kink: second derivatives hang on which side of 0 a rectified unit is, and one may be within rounding of it.
        """
        here, after = [p.detach().clone() for p in self.parameters], self.generator.get_state()
        evaluations = self.model.gradient_evaluations
        generator = torch.Generator().manual_seed(0)

        def put(values: Sequence[Tensor]) -> None:
            with torch.no_grad():
                for p, value in zip(self.parameters, values, strict=True):
                    p.copy_(value)

        try:
            for _ in range(NUDGES if math.isfinite(far) else 0):
                self.generator.set_state(before)
                signs = [2.0 * torch.randint(0, 2, v.shape, generator=generator).to(v) - 1 for v in here]
                put([v * (1 + NUDGE * torch.finfo(v.dtype).eps * sign) for v, sign in zip(here, signs, strict=True)])
                moved = gradients_of(self.losses, self.parameters, self.total, episode)
                if 2 * difference(moved, wanted, max(SMALL, near)) >= far:
                    return True
            return False
        finally:
            put(here)
            self.generator.set_state(after)
            self.model.gradient_evaluations = evaluations

    def _agrees_disturbed(self, step: TracedStep, episode: Episode) -> bool:
        before, evaluations = self.generator.get_state(), self.learner.model.gradient_evaluations
        try:
            fine = math.isfinite(gradients_of(self.losses, self.parameters, self.total, episode).loss.item())
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

    # --- the graph

    def _inputs(self, step: TracedStep, episode: Episode) -> list[Tensor]:
        noise = () if step.noise is None else step.noise()
        return [*self._state, *_tensors(episode), *(self.adam.inputs() if self.adam else ()), *noise]

    def _traced(self, episode: Episode, full: tuple[bool, ...]) -> TracedStep:
        """Traces one step on ``episode``. Raises what tracing raises; the generator is then as it was, or further."""
        model, before = self.learner.model, self.generator.get_state()
        fixed, extra = [*self._state, *_tensors(episode)], self.adam.inputs() if self.adam else []
        start, reached = model.gradient_evaluations, list[bool]()

        def place(inputs: Sequence[Tensor]) -> Placed:
            state, data, sets = inputs[: len(self._state)], inputs[len(self._state) :], list[Points]()
            values = [v.detach().requires_grad_() if t else v for v, t in zip(state, self._trained, strict=True)]
            named = dict(zip(self._names, values, strict=True))
            by_id = {id(p): named[n] for n, p in self.learner.named_parameters()}
            for (x, y, mask), whole in zip((data[:3], data[3:]), full, strict=True):
                # prepared once, in the graph: the program's runs then take the data as they are
                sets.append(model.prepare(Points(x, y, torch.ones_like(mask) if whole else mask), full=whole))

            def losses() -> tuple[Tensor, Tensor]:
                with stateless._reparametrize_module(self.learner, named, tie_weights=True), model.data_ready():
                    return self.losses(Episode(*sets))

            return Placed([by_id[id(p)] for p in self.parameters], losses, sets)

        def result(
            placed: Placed, extra: Sequence[Tensor], losses: Tensor, loss: Tensor, gradients: Sequence[Tensor | None]
        ) -> list[Tensor]:
            reached[:] = [g is not None for g in gradients]
            there = [g for g in gradients if g is not None]
            adam = self.adam if all(reached) else None
            if adam is not None:
                there = [torch.cat([g.reshape(-1) for g in there])]
            norm = torch.stack([g.square().sum() for g in there]).sum().sqrt()
            fine = loss.isfinite() & norm.isfinite()
            fine = fine & (_largest(placed.sets) <= LARGEST_TARGET) & (self._impossible(placed.sets) == 0)
            if adam is not None:
                fine, new = adam([p.detach() for p in placed.trained], there[0], norm, fine, extra)
                there += new
            return [losses, loss, torch.stack([loss, fine.to(loss)]), *there]

        def step(*inputs: Tensor) -> list[Tensor]:
            placed = place(inputs[: len(fixed)])
            found = gradients_of(lambda _: placed.losses(), placed.trained, self.total, episode)
            return result(placed, inputs[len(fixed) :], found.losses, found.loss, found.gradients)

        graph: GraphModule | Sweep
        noise: Callable[[], Sequence[Tensor]] | None
        swept = self._swept(place, result, fixed, extra)
        if swept is not None:
            graph, noise, random, evaluations = swept, swept.noise, any(swept.draws), swept.evaluations
        else:
            graph = trace(step, [*fixed, *extra])
            random, evaluations = is_random(graph), model.gradient_evaluations - start
            noise = draw_noise_outside(graph)
        self.generator.set_state(before)
        model.gradient_evaluations = start
        written: list[int] = []
        if self.adam is not None and all(reached):
            last = graph.graphs["end"] if isinstance(graph, Sweep) else graph
            inputs = len(last.graph.find_nodes(op="placeholder"))
            drawn = graph.counts[0] if isinstance(graph, Sweep) else inputs - len(fixed) - len(extra)  # noise comes last
            state = len(extra) - 1  # of the optimiser, behind the learning rate
            written = [*self._places, *range(len(fixed) + 1, len(fixed) + len(extra))]
            overwrite(last, dict(enumerate([*self._places, *range(inputs - drawn - state, inputs - drawn)], start=RESULTS)))
        made = TracedStep(graph, noise, random, reached, evaluations, written, graph)
        made.run = self._uncompiled(made, episode)
        return made

    def _uncompiled(self, step: TracedStep, episode: Episode) -> Run:
        if isinstance(step.module, GraphModule) and self.on_gpu:
            return Recorded(step.module, step.module, self._example(step, episode))
        return step.module

    def _example(self, step: TracedStep, episode: Episode) -> list[Tensor]:
        """Inputs to make a run of a graph with, which may write over them; no random stream moves on."""
        with torch.no_grad(), rng():
            inputs = self._inputs(step, episode)
            self._shield(step, inputs)
        return inputs

    def _swept(self, place: Place, result: Result, fixed: Sequence[Tensor], extra: Sequence[Tensor]) -> Sweep | None:
        """The step as a `Sweep`; None where it has no inner loop, or one of so few operations that a single graph serves better."""
        if not self.sweeps:
            return None
        model, before = self.learner.model, self.generator.get_state()
        evaluations = model.gradient_evaluations
        try:
            return sweep(
                place, result, fixed, extra, total=self.total, spares=SWEPT_OPERATIONS, evaluations=lambda: model.gradient_evaluations
            )  # fmt: skip
        except Exception as error:  # whatever a learner may raise whose loss is run in pieces; it is traced whole next
            log.debug("%s: one graph, no sweep: %s", type(self.learner).__name__, first_lines(error))
            return None
        finally:
            self.generator.set_state(before)
            model.gradient_evaluations = evaluations

    # --- the data

    def _impossible(self, sets: Sequence[Points]) -> Tensor:
        """How many targets no likelihood gives, ``()``."""
        bad = [v for points in sets if (v := self.learner.model.impossible_targets(points)) is not None]
        return torch.stack([v.sum() for v in bad]).sum() if bad else torch.zeros((), device=sets[0].mask.device)

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


def settings(learner: nn.Module) -> list[tuple[str, str, object]]:
    """Numbers, words and flags among the public attributes of the learner's modules, which a graph takes as they are."""
    changing = ("training", "gradient_evaluations")
    return [
        (name, key, value)
        for name, module in learner.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and not key.startswith("_") and key not in changing
    ]


def disturbed(episode: Episode, full: tuple[bool, ...] = (False, False)) -> Episode:
    """The same tasks and points in another order, and of every second task one point fewer, where it has several and is not ``full``."""

    def other(points: Points, full: bool) -> Points:
        x, y, mask = (None if v is None else v.roll(1, 0).flip(1) for v in points)
        assert x is not None and mask is not None
        several = (mask.sum(1) > (points.num_points if full else 1)) & (torch.arange(len(mask), device=mask.device) % 2 == 0)
        return Points(x, y, mask & ~(several[:, None] & (mask.cumsum(1) == 1)))

    return Episode(*(other(points, whole) for points, whole in zip(episode, full, strict=True)))


def difference(found: Gradients, wanted: Gradients, least: float = SMALL) -> float:
    """The largest gap between two steps' losses or gradients, as a share of the size of the tensor it is in.

    That size is at least ``least`` times the largest gradient's: one that is 0 but for rounding tells nothing.
    """
    pairs = [(found.losses, wanted.losses), (found.loss, wanted.loss)]
    gradients = list(zip(found.gradients, wanted.gradients, strict=True))
    if any((a is None) != (b is None) for a, b in gradients):
        return math.inf
    here = [(a, b) for a, b in gradients if a is not None and b is not None]
    floor = least * max((b.abs().max().item() for _, b in here if b.numel()), default=0.0)
    gaps = [gap(a, b, 0.0) for a, b in pairs] + [gap(a, b, floor) for a, b in here if b.numel()]
    return max(gaps, key=lambda one: math.inf if math.isnan(one) else one)


def _tensors(episode: Episode) -> list[Tensor]:
    return [v.contiguous() for points in episode for v in points if v is not None]  # a compiled graph takes them in one order only


def _largest(sets: Sequence[Points]) -> Tensor:
    """The largest real number among the inputs and targets, by size; NaN where one is, ``()``."""
    values = [v for points in sets for v in (points.x, points.y) if v is not None and v.is_floating_point() and v.numel()]
    return torch.stack([v.abs().amax().float() for v in values]).amax() if values else torch.zeros((), device=sets[0].mask.device)


