"""A training step with an inner loop as five graphs whose size does not grow with K: backward from step to step, by hand.

    start    θ, data             → v_0                   what the loop starts from, and the step sizes where they are not all the same
    step     θ, data, v_k, k     → v_k+1                 K times
    finish   θ, data, v_K        → losses, λ_K, ∂/∂θ     λ_k: the gradient of the loss in v_k
    back     θ, data, v_k, k, λ_k+1 → λ_k, ∂/∂θ          K times, from the last to the first; it takes the step anew
    end      θ, data, λ_0, Σ ∂/∂θ → ∂/∂θ                 and what else a step makes of its gradient

What is kept from step to step is v_k, its noise, and what convolutions gave, where that is little (`splitting`). Every graph holds what
stands before the loop again, as far as it has a use for it; so what a learner computes there from θ has its gradient from each. Noise is
drawn in the order in which eager draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from .episodes import Points
from .graphs import Backend, Run, draw_noise_outside, is_random, trace
from .inner_loop import NotOneLoop, after, before, once
from .randomness import rng
from .splitting import split

KEPT = 2**26  # bytes of convolutions' results that all steps together may keep


class Placed(NamedTuple):
    """A step at its inputs: the ``trained`` tensors among them, what gives the tasks' losses ``(T,)`` and θ's own ``()``, the data."""

    trained: list[Tensor]
    losses: Callable[[], tuple[Tensor, Tensor]]
    sets: Sequence[Points]


Place = Callable[[Sequence[Tensor]], Placed]
Result = Callable[[Placed, Sequence[Tensor], Tensor, Tensor, Sequence[Tensor | None]], list[Tensor]]


@dataclass(frozen=True)
class Sweep:
    """The graphs of one step, together a function of its inputs as a single graph would be: ``fixed`` of θ and data, ``extra`` ones, noise.

    ``graphs``: in order; ``runs``: those, or what the compiler made of them. ``own_sizes``: whether every step has its own size.
    ``reached``: which trained tensors' gradients `finish` and `back` have a part in. ``draws``: what draws the noise before the loop, of
    one step, and after the loop; ``counts``: how many tensors the first two draw. ``evaluations``: of gradients in φ in the whole step.
    """

    inner_steps: int
    graphs: Mapping[str, GraphModule]
    runs: Mapping[str, Run]
    fixed: int
    extra: int
    own_sizes: bool
    reached: Mapping[str, Sequence[int]]
    draws: Sequence[GraphModule | None]
    counts: tuple[int, int]
    evaluations: float

    def noise(self) -> list[Tensor]:
        """All that a step draws, from torch's global stream."""
        start, step, finish = self.draws
        return [value for draw in (start, *[step] * self.inner_steps, finish) if draw is not None for value in draw()]

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The step's outputs."""
        fixed, extra, noise = inputs[: self.fixed], inputs[self.fixed :][: self.extra], inputs[self.fixed + self.extra :]
        first, each = self.counts
        common, drawn = noise[:first], [noise[first + k * each :][:each] for k in range(self.inner_steps)]
        values = self.runs["start"](*fixed, *common)
        sizes: list[Any] = [()] * self.inner_steps
        if self.own_sizes:
            values, sizes = values[:-1], [(size,) for size in values[-1]]
        kept, count, numbers = [], len(values), list(torch.arange(self.inner_steps, device=values[0].device))
        for k, size, own in zip(numbers, sizes, drawn, strict=True):
            found = self.runs["step"](*fixed, *values, *size, k, *common, *own)
            kept.append((values, found[count:]))
            values = found[:count]
        losses, loss, *found = self.runs["finish"](*fixed, *values, *common, *noise[first + self.inner_steps * each :])
        slopes, slopes_in_sizes = found[:count], []
        gradients = dict(zip(self.reached["finish"], found[count:], strict=True))
        for k, size, own in zip(reversed(numbers), reversed(sizes), reversed(drawn), strict=True):
            values, results = kept.pop()
            found = list(self.runs["back"](*fixed, *values, *size, k, *results, *slopes, *common, *own))
            slopes, found = found[:count], found[count:]
            if self.own_sizes:
                slopes_in_sizes.append(found.pop(0))
            for i, part in zip(self.reached["back"], found, strict=True):
                gradients[i] = gradients[i] + part if i in gradients else part
        if self.own_sizes:
            slopes.append(torch.stack(slopes_in_sizes[::-1]))
        return self.runs["end"](*fixed, losses, loss, *slopes, *(gradients[i] for i in sorted(gradients)), *extra, *common)

    def compiled(self, backend: Backend, inputs: Sequence[Tensor]) -> Sweep:
        """The same with every graph through ``backend``, for inputs like these: each for what the ones before it give, compiled."""
        runs: dict[str, Run] = {}

        def first(name: str) -> Run:
            def run(*values: Tensor) -> Sequence[Tensor]:
                if name not in runs:
                    runs[name] = backend(self.graphs[name], list(values))
                return runs[name](*values)

            return run

        replace(self, runs={name: first(name) for name in self.graphs})(*inputs)
        return replace(self, runs=runs)


def sweep(
    place: Place, result: Result, fixed: Sequence[Tensor], extra: Sequence[Tensor], *, total: int, spares: int,
    evaluations: Callable[[], float],
) -> Sweep | None:  # fmt: skip
    """Traces a step on its inputs ``fixed`` (θ and data) and ``extra``; the loss is the mean over tasks + θ's own / ``total``.

    ``place`` makes the step of ``fixed``; ``result(placed, extra, losses, loss, gradients)`` gives its outputs, where None is the gradient
    of what is not reached. ``evaluations`` counts gradients in φ. Returns None where a single graph would not have ``spares`` operations
    more. Raises NotOneLoop where the losses have no loop or several, or draw noise that hangs on values; and what tracing raises.
    """
    with rng():  # what is drawn for examples is no part of any stream
        return _Tracer(place, result, list(fixed), list(extra), total, evaluations).sweep(spares)


class _Tracer:
    """A step's pieces as functions to trace, each of ``fixed`` and of what else the table above says; a step is a part of `back`'s."""

    def __init__(
        self, place: Place, result: Result, fixed: list[Tensor], extra: list[Tensor], total: int, evaluations: Callable[[], float]
    ) -> None:
        self.place, self.result, self.fixed, self.extra, self.total, self.evaluations = place, result, fixed, extra, total, evaluations
        self.graphs, self.draws, self.taken = dict[str, GraphModule](), dict[str, GraphModule | None](), dict[str, float]()
        self.inner_steps, self.own_sizes, self.count = 0, False, 0
        self.common: list[Tensor] = []  # noise drawn before the loop
        self.reached: dict[str, list[int]] = {}

    def sweep(self, spares: int) -> Sweep | None:
        values, self.common = self.traced(self.start)
        sizes = [values.pop()] if self.own_sizes else []
        size, k = [every[0] for every in sizes], torch.zeros((), dtype=torch.long, device=values[0].device)
        self.count = len(values)
        found, each = self.traced(self.back, *values, *size, k, *values)
        whole, back = self.graphs["back"], found[self.count :]
        if (self.inner_steps - 1) * len(whole.graph.nodes) < spares:
            return None
        first = len(self.fixed) + len(values) + len(size) + 1
        self.graphs["step"], self.graphs["back"] = split(whole, range(first, first + self.count), self.count, KEPT / self.inner_steps)
        (losses, loss, *finish), _ = self.traced(self.finish, *values)
        parts = dict(zip(self.reached["back"], back[self.count + len(size) :], strict=True))
        parts |= dict(zip(self.reached["finish"], finish[self.count :], strict=True))
        self.reached["end"] = sorted(parts)
        _, none = self.traced(self.end, losses, loss, *values, *sizes, *(parts[i] for i in sorted(parts)), *self.extra)
        if none:
            raise NotOneLoop("it draws noise after its gradient")
        taken = self.taken
        return Sweep(
            self.inner_steps, self.graphs, self.graphs, len(self.fixed), len(self.extra), self.own_sizes, self.reached,
            [self.draws[name] for name in ("start", "back", "finish")], (len(self.common), len(each)),
            self.inner_steps * (taken["back"] - taken["start"]) + taken["finish"],
        )  # fmt: skip

    def traced(self, piece: Callable[..., list[Tensor]], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Traces a piece; what it gives for these inputs, and the noise that it draws after what is drawn before the loop."""
        name, before = piece.__name__, self.evaluations()
        given = [v.detach() for v in (*self.fixed, *inputs)]  # one of them twice would be one input
        module = self.graphs[name] = trace(lambda *every: piece(every[: len(self.fixed)], *every[len(self.fixed) :]), given)
        self.taken[name] = self.evaluations() - before
        draw = self.draws[name] = draw_noise_outside(module, given=len(self.common))
        if is_random(module):
            raise NotOneLoop("it draws noise that hangs on values")
        module.graph.eliminate_dead_code()
        module.recompile()
        noise = [] if draw is None else list(draw())
        return list(module(*given, *self.common, *noise)), noise

    def start(self, fixed: Sequence[Tensor]) -> list[Tensor]:
        return [v.contiguous() for v in self.started(self.place(fixed))]

    def back(self, fixed: Sequence[Tensor], *inputs: Tensor) -> list[Tensor]:
        *here, k = inputs[: -self.count]
        placed, leaves = self.place(fixed), _leaves(here)
        values, size = leaves[: self.count], leaves[self.count :]
        new = once(placed.losses, values, *size, k=k)
        return [*(v.detach().contiguous() for v in new), *self.slopes("back", new, inputs[-self.count :], leaves, placed.trained)]

    def finish(self, fixed: Sequence[Tensor], *inputs: Tensor) -> list[Tensor]:
        placed, values = self.place(fixed), _leaves(inputs)
        losses, rest = after(placed.losses, values)
        loss = losses.mean() + rest / self.total
        return [losses.detach(), loss.detach(), *self.slopes("finish", [loss], [torch.ones_like(loss)], values, placed.trained)]

    def end(self, fixed: Sequence[Tensor], losses: Tensor, loss: Tensor, *inputs: Tensor) -> list[Tensor]:
        placed = self.place(fixed)
        starts = self.started(placed)
        along, parts = inputs[: len(starts)], inputs[len(starts) :][: len(self.reached["end"])]
        gradients = _gradients(starts, along, placed.trained)
        for i, part in zip(self.reached["end"], parts, strict=True):
            own = gradients[i]
            gradients[i] = part if own is None else own + part
        return self.result(placed, inputs[len(along) + len(parts) :], losses, loss, gradients)

    def started(self, placed: Placed) -> list[Tensor]:
        """What the loop starts from and, where they are not all the same, its step sizes ``(K, ...)``."""
        values, sizes = before(placed.losses)
        self.inner_steps = len(sizes)
        self.own_sizes = any(size is not sizes[0] and (isinstance(size, Tensor) or size != sizes[0]) for size in sizes)
        return [*values, torch.stack([torch.as_tensor(size).to(values[0]) for size in sizes])] if self.own_sizes else [*values]

    def slopes(
        self, name: str, outputs: Sequence[Tensor], along: Sequence[Tensor], inputs: Sequence[Tensor], trained: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradients of Σ along · outputs in ``inputs``, 0 where not reached, and in those of ``trained`` that are reached."""
        found = _gradients(outputs, along, [*inputs, *trained])
        first, parts = found[: len(inputs)], found[len(inputs) :]
        self.reached[name] = [i for i, g in enumerate(parts) if g is not None]
        whole = [torch.zeros_like(v) if g is None else g for v, g in zip(inputs, first, strict=True)]
        return [g.contiguous() for g in (*whole, *parts) if g is not None]


def _leaves(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(v.detach().requires_grad_() for v in values)


def _gradients(outputs: Sequence[Tensor], along: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of Σ along · outputs in each of ``inputs``; None where it is not reached."""
    pairs = [(value, slope) for value, slope in zip(outputs, along, strict=True) if value.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    values, slopes = zip(*pairs, strict=True)
    return list(torch.autograd.grad(values, list(inputs), slopes, allow_unused=True))
