"""A run of training: what was recorded, its steps, its validation, and what a checkpoint of it holds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from .agreement import Gradients
from .checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from .distributed import Ranks
from .episodes import Episode
from .learners.base import AbstractAdapter, AbstractMetaLearner
from .meta_gradient import MetaGradient, TrainingError
from .metrics import task_mean
from .randomness import checked_generator


@dataclass
class History:
    """What training recorded.

    ``loss``: of each step, mean over its tasks with θ's share. ``validation_step``, ``validation``: held-out predictive NLL in nats a
    point. ``seconds``: wall time. ``stopped_early``; ``best_step``: whose parameters were kept (None without validation).
    ``skipped``: how many task losses were left out for not being finite.
    """

    loss: list[float] = field(default_factory=list)
    validation_step: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stopped_early: bool = False
    best_step: int | None = None
    skipped: int = 0

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self.loss)

    def as_arrays(self) -> dict[str, np.ndarray]:
        """``step``, ``loss``, ``validation_step``, ``validation`` as arrays."""
        return {
            "step": np.arange(1, self.steps + 1), "loss": np.asarray(self.loss),
            "validation_step": np.asarray(self.validation_step), "validation": np.asarray(self.validation),
        }

    def plot(self, ax: Any = None) -> Any:
        """The loss curve, with validation where there is any; returns the matplotlib Axes."""
        from .plots import loss_curve  # matplotlib is slow to import, and training does without it

        a = self.as_arrays()
        validation: dict[str, Any] = {"validation_step": a["validation_step"], "validation": a["validation"]} if self.validation else {}
        return loss_curve(a["step"], a["loss"], ax=ax, **validation)


@dataclass
class TrainingRun:
    """The state of a run, and how it goes on."""

    learner: AbstractMetaLearner
    parameters: list[Any]
    optimiser: torch.optim.Optimizer
    scheduler: Any
    generator: torch.Generator
    gradient: MetaGradient
    ranks: Ranks
    history: History = field(default_factory=History)
    best: list[Tensor] | None = None
    since_best: int = 0
    last: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        norms = self.learner.model.batch_norms
        self.renews = norms is not None and norms.have_running

    def step(self, episode: Episode, clip: float | None, remaining: int) -> float:
        """One step of θ; returns its loss. Raises TrainingError where it is not finite."""
        number = self.history.steps + 1
        found = self.gradient(episode, number, remaining)
        self.history.skipped = self.gradient.skipped
        adam = self.gradient.compiler.adam
        if adam is not None and found.update is not None and not found.update.new:
            adam.took()
            if self.parameters[0].grad is not None:  # an earlier step's
                self.optimiser.zero_grad()
            loss = found.update.loss
        else:
            loss = self.move(found, clip, number)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.renews:
            self.learner.renew_statistics(episode, generator=self.generator, task_chunk=self.gradient.task_chunk)
        self.history.loss.append(loss)
        return loss

    def move(self, found: Gradients, clip: float | None, number: int) -> float:
        """The optimiser's own step along a gradient; returns the loss."""
        norm = self.put(found, clip)
        if not (bool(found.loss.isfinite()) and bool(norm.isfinite())):
            raise TrainingError(
                f"step {number}: the loss is {found.loss.item()}, the gradient's norm {norm.item()}; "
                "parameters are at their last finite value"
            )
        if not self.last:
            self.last = [p.detach().clone() for p in self.parameters]
        else:
            torch._foreach_copy_(self.last, [p.detach() for p in self.parameters])
        self.optimiser.step()
        if not _all_finite(self.parameters):
            self.restore(self.parameters, self.last)
            raise TrainingError(
                f"step {number}: the step is not finite; parameters are at their last finite value. Lower the learning rate"
            )
        adam = self.gradient.compiler.adam
        if adam is not None:
            adam.moved()
            if found.update is not None and not adam.agrees(found.update.new, self.last):
                self.gradient.compiler.tracer.adam = None  # the graph's gradients are fine, its steps are not
        return found.loss.item()

    def put(self, found: Gradients, clip: float | None) -> Tensor:
        """Puts a step's gradient into the parameters, clipped; returns its norm before."""
        for parameter, gradient in zip(self.parameters, found.gradients, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                # torch's fused optimisers pair numbers by their place in memory, and a graph may give a matrix transposed
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        if clip is not None:
            return clip_grad_norm_(self.parameters, clip)
        return get_total_norm([g for g in found.gradients if g is not None])

    def validate(self, episode: Episode, patience: int | None) -> None:
        """Scores held-out tasks, keeps the best parameters, and says whether to stop."""
        value = self.ranks.agreed(float(predictive_nll(self.learner, episode).nanmean()))
        best = min(self.history.validation, default=float("inf"))
        self.history.validation_step.append(self.history.steps)
        self.history.validation.append(value)
        if value < best:
            self.best, self.since_best = [v.detach().clone() for v in self.learned()], 0
            self.history.best_step = self.history.steps
        else:
            self.since_best += 1
        self.history.stopped_early = patience is not None and self.since_best >= patience

    def learned(self) -> list[Tensor]:
        """All that training changes: the parameters, and running statistics."""
        return [*self.parameters, *self.learner.buffers()]

    def keep_best(self) -> None:
        """Puts back the best parameters, where there was validation."""
        if self.best is not None:
            self.restore(self.learned(), self.best)

    @torch.no_grad()
    def restore(self, places: list[Any], values: list[Tensor]) -> None:
        """Puts ``values`` in their places."""
        for place, value in zip(places, values, strict=True):
            place.copy_(value)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint, whole or not at all."""
        save_checkpoint(path, self.kinds() | {
            "parameters": self.learner.state_dict(), "optimiser_state": self.optimiser.state_dict(),
            "schedule_state": None if self.scheduler is None else self.scheduler.state_dict(), "generator": self.generator.get_state(),
            "history": vars(self.history), "best": self.best, "since_best": self.since_best,
        })  # fmt: skip

    def kinds(self) -> dict[str, str]:
        """What a checkpoint must be of to go on from it."""
        return {
            "learner": type(self.learner).__name__, "optimiser": type(self.optimiser).__name__, "schedule": type(self.scheduler).__name__,
        }  # fmt: skip

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a checkpoint. Raises CheckpointError where it is of something else, before anything is changed."""
        state = load_checkpoint(path)
        for what, kind in self.kinds().items():
            if what not in state:
                raise CheckpointError(f"{path}: not a checkpoint of training: it has no {what}")
            if state[what] != kind:
                raise CheckpointError(f"{path}: {what}: of a {state[what]}, expected a {kind}")
        ours, theirs = (
            {name: tuple(value.shape) for name, value in values.items()} for values in (self.learner.state_dict(), state["parameters"])
        )
        if ours != theirs:
            odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise CheckpointError(f"{path}: of another model: {', '.join(f'{n} is {theirs.get(n)}, expected {ours.get(n)}' for n in odd)}")
        if state["best"] is not None and [v.shape for v in state["best"]] != [v.shape for v in self.learned()]:
            got = len(state["best"])
            raise CheckpointError(f"{path}: best: expected {len(self.learned())} tensors of this learner's shapes, got {got}")
        self.learner.load_state_dict(state["parameters"])
        self.optimiser.load_state_dict(state["optimiser_state"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["schedule_state"])
        self.generator.set_state(state["generator"])
        self.history, self.best, self.since_best = History(**state["history"]), state["best"], state["since_best"]
        self.gradient.skipped = self.history.skipped

    def begin_together(self) -> None:
        """Every process starts where the first one does."""
        self.ranks.same([*self.learner.parameters(), *self.learner.buffers()])
        self.generator.set_state(self.ranks.agreed(self.generator.get_state()))
        self.gradient.noise_seed = self.ranks.agreed(self.gradient.noise_seed)


def predictive_nll(adapter: AbstractAdapter, episode: Episode, *, num_draws: int = 100, generator: torch.Generator | None = None) -> Tensor:
    """Mean −log predictive density of each task's query points, ``(T,)``, in nats a point; NaN for a task without any."""
    generator = checked_generator(generator) or torch.Generator().manual_seed(0)
    query = adapter.prepared(episode.query, "query")
    assert query.y is not None
    posterior = adapter.adapt(episode.support, generator=generator)
    predictive = posterior.predict(query.x, None if posterior.is_point else num_draws, generator=generator, mask=query.mask)
    return task_mean(-predictive.log_prob(query.y), query.mask)


def _all_finite(values: list[Any]) -> bool:
    norms = torch.stack(torch._foreach_norm([v.detach() for v in values]))
    # a norm overflows where no entry does: only then each is looked at
    return bool(norms.isfinite().all()) or all(bool(v.isfinite().all()) for v in values)
