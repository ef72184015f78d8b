"""A training step as a graph: traced on a learner's tensors and data, given its inputs at each step, and what it makes of them.

What the graph takes as inputs is followed: every parameter and buffer of the learner, the episode's tensors, the optimiser's state where it
holds that step too, and the step's noise, which is drawn outside in the order in which eager draws it. Parameters and the optimiser's
state are written over where the graph's own checks of data and results are met.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import stateless

from .adam import AdamStep
from .agreement import Gradients, Losses, Update, gradients_of
from .backends import Recorded
from .episodes import LARGEST_TARGET, Episode, Points
from .graphs import Run, draw_noise_outside, first_lines, is_random, settings, trace
from .learners.base import AbstractMetaLearner
from .randomness import rng
from .rewriting import overwrite
from .sweep import Place, Placed, Result, Sweep, sweep

log = logging.getLogger(__name__)

CHECKS = 2  # how many steps of a new graph are held to eager
RESULTS = 4  # of a step with the optimiser's: losses, loss, facts, gradient; what follows is written over the inputs
SWEPT_OPERATIONS = 3_000  # so many more than a sweep's a single graph must have; with fewer it compiles in 40 s, and is a quarter faster
NOTHING = nullcontext()


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


class StepTracer:
    """Traces steps of a learner and runs what was traced.

    ``losses``: an episode's losses ``(T,)`` and θ's own ``()``, with all randomness from ``generator``. ``adam``: a step of the optimiser
    that the graph takes on, where every one of ``parameters`` has a gradient. ``sweeps``: whether a step with many inner ones may be swept.
    """

    def __init__(
        self, learner: AbstractMetaLearner, parameters: Sequence[nn.Parameter], losses: Losses, total: int, generator: torch.Generator,
        adam: AdamStep | None,
    ) -> None:  # fmt: skip
        self.learner, self.model, self.parameters, self.losses = learner, learner.model, list(parameters), losses
        self.total, self.generator, self.adam = total, generator, adam
        tensors = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
        self._names, self.state = list(tensors), [v.detach() for v in tensors.values()]
        trained, order = {id(p) for p in self.parameters}, [id(v) for v in tensors.values()]
        self._trained = [one in trained for one in order]
        self._places = [order.index(id(p)) for p in self.parameters]  # of the trained among all
        self.on_gpu = self.state[0].is_cuda
        self.sweeps = not self.on_gpu  # a recorded piece writes over what it gave the last time

    def kind(self) -> tuple[object, ...]:
        """What is written into a graph, beside the data's shape and the optimiser's settings."""
        kinds = [(n, tuple(v.shape), v.dtype, v.device, t) for n, v, t in zip(self._names, self.state, self._trained, strict=True)]
        return (self.total, kinds, self._places, settings(self.learner))

    def inputs(self, step: TracedStep, episode: Episode) -> list[Tensor]:
        """What the graph takes, noise drawn from torch's global stream."""
        noise = () if step.noise is None else step.noise()
        return [*self.state, *tensors_of(episode), *(self.adam.inputs() if self.adam else ()), *noise]

    def example(self, step: TracedStep, episode: Episode) -> list[Tensor]:
        """Inputs to make a run of a graph with, which may write over them; no random stream moves on."""
        with torch.no_grad(), rng():
            inputs = self.inputs(step, episode)
            _shield(step, inputs)
        return inputs

    def run(self, step: TracedStep, episode: Episode) -> Gradients | None:
        """What a step gives; None where the data are not fine, or what came out is not finite, or the optimiser's state is not whole.

        Nothing is written over then.
        """
        with torch.no_grad(), rng(self.generator) if step.random else NOTHING:
            inputs = self.inputs(step, episode)
            if step.unchecked:
                _shield(step, inputs)
            elif step.written and self.adam is not None and not self.adam.whole:
                return None
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

    def __call__(self, episode: Episode, full: tuple[bool, ...]) -> TracedStep:
        """Traces one step on ``episode``. Raises what tracing raises; the generator is then as it was, or further."""
        model, before = self.model, self.generator.get_state()
        fixed, extra = [*self.state, *tensors_of(episode)], self.adam.inputs() if self.adam else []
        start, reached = model.gradient_evaluations, list[bool]()

        def place(inputs: Sequence[Tensor]) -> Placed:
            state, data, sets = inputs[: len(self.state)], inputs[len(self.state) :], list[Points]()
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
        made.run = self.uncompiled(made, episode)
        return made

    def uncompiled(self, step: TracedStep, episode: Episode) -> Run:
        """The graph as it was traced, recorded on a GPU."""
        if isinstance(step.module, GraphModule) and self.on_gpu:
            return Recorded(step.module, step.module, self.example(step, episode))
        return step.module

    def _swept(self, place: Place, result: Result, fixed: Sequence[Tensor], extra: Sequence[Tensor]) -> Sweep | None:
        """The step as a `Sweep`; None where it has no inner loop, or one of so few operations that a single graph serves better."""
        if not self.sweeps:
            return None
        model, before = self.model, self.generator.get_state()
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

    def _impossible(self, sets: Sequence[Points]) -> Tensor:
        """How many targets no likelihood gives, ``()``."""
        bad = [v for points in sets if (v := self.model.impossible_targets(points)) is not None]
        return torch.stack([v.sum() for v in bad]).sum() if bad else torch.zeros((), device=sets[0].mask.device)


def tensors_of(episode: Episode) -> list[Tensor]:
    """An episode's tensors, in the one order of their numbers that a compiled graph takes."""
    return [v.contiguous() for points in episode for v in points if v is not None]


def _shield(step: TracedStep, inputs: list[Tensor]) -> None:
    """Puts copies in the place of the inputs that the graph writes over."""
    for i in step.written:
        inputs[i] = inputs[i].clone()


def _largest(sets: Sequence[Points]) -> Tensor:
    """The largest real number among the inputs and targets, by size; NaN where one is, ``()``."""
    values = [v for points in sets for v in (points.x, points.y) if v is not None and v.is_floating_point() and v.numel()]
    return torch.stack([v.abs().amax().float() for v in values]).amax() if values else torch.zeros((), device=sets[0].mask.device)


