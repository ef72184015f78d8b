"""One training loop for all meta-learners: `meta_train` moves θ by the mean of the tasks' losses."""

from __future__ import annotations

import inspect
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from .checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from .compiling import Gradients, StepCompiler
from .episodes import Episode
from .learners.base import AbstractAdapter, AbstractMetaLearner, checked_choice, checked_steps
from .metrics import task_mean
from .randomness import checked_generator
from .tasks.base import TaskFamily

ALL_TASKS_UP_TO = 100
TASKS_PER_STEP = 25


class TrainingError(ArithmeticError):
    """A loss or gradient is not finite; parameters are at their last finite value. The message names step and task."""


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


def meta_train(
    learner: AbstractMetaLearner, family: TaskFamily | Episode, *, steps: int, tasks_per_step: int | None = None,
    generator: torch.Generator | None = None, optimizer: Callable[[list[Any]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None, clip: float | None = None, num_tasks: int | None = None,
    validation: TaskFamily | Episode | None = None, validate_every: int = 100, patience: int | None = None, validation_tasks: int = 100,
    bad_tasks: str = "raise", checkpoint: str | os.PathLike[str] | None = None, checkpoint_every: int = 500, resume: bool = False,
    device: str | torch.device | None = None, progress: bool | None = None, compile: bool | str = False,
) -> History:
    """Minimises mean over tasks of ``meta_loss`` + ``global_loss()`` / number of training tasks, over ``trained_parameters()``.

    Data: ``tasks_per_step`` tasks are sampled each step (default: all of a finite family of up to 100, else 25); an Episode is one
    fixed batch. ``num_tasks``: how many tasks an endless family stands for; needed only where θ has a hyperprior. ``generator``: all
    randomness (default: seed 0).

    Optimisation: ``optimizer`` and ``schedule`` are factories, ``lambda params: torch.optim.Adam(params, 1e-3)`` being the default;
    ``clip`` bounds the norm of the gradient; ``bad_tasks="skip"`` leaves tasks with a loss or gradient that is not finite out of a
    step, and counts them.

    Validation: every ``validate_every`` steps the predictive NLL on a fixed set of tasks of ``validation``; after ``patience`` of
    them without a new best training stops. The best parameters are kept.

    ``checkpoint``: a file, written whole every ``checkpoint_every`` steps and at the end; ``resume=True`` goes on from it where it
    exists, bit for bit as if never interrupted. ``progress``: a bar with loss and rate (default: on a terminal only).

    ``compile``: False (default) never compiles the step, True does at once (see `bayesmeta.compiling`); "auto" does where the steps to
    come save clearly more time than compiling takes (10–40 s), so that short runs never wait. A compiled step equals the eager one to
    rounding, not to the bit; what cannot be compiled is trained eagerly, and a RuntimeWarning says why.

    Raises TrainingError where a loss or gradient is not finite, CheckpointError where ``checkpoint`` cannot be resumed from, ValueError
    for arguments that make no sense, TypeError for what cannot be trained and for an optimiser (LBFGS) or schedule (ReduceLROnPlateau)
    whose ``step()`` needs an argument.
    """
    arguments = {name: value for name, value in locals().items() if name != "learner"}
    if not isinstance(learner, AbstractMetaLearner):
        raise TypeError(f"{type(learner).__name__} adapts and does not learn: it needs no training (it uses its model's θ)")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps: expected a whole number, steps >= 0, got {steps!r}")
    if not isinstance(resume, bool) or (resume and checkpoint is None):
        raise ValueError(f"resume: expected True or False, with checkpoint= naming the file, got {resume!r} and {checkpoint!r}")
    checked_choice("bad_tasks", bad_tasks, ("raise", "skip"))
    for name, value in (
        ("tasks_per_step", tasks_per_step), ("num_tasks", num_tasks), ("patience", patience), ("validation_tasks", validation_tasks),
        ("validate_every", validate_every), ("checkpoint_every", checkpoint_every),
    ):  # fmt: skip
        if value is not None:
            checked_steps(name, value, least=1)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0, got {clip}")
    if optimizer is not None and isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a factory, say lambda params: torch.optim.Adam(params, 1e-3), got a {type(optimizer).__name__}: "
            "parameters may not exist before the first data are seen"
        )
    generator = checked_generator(generator) or torch.Generator().manual_seed(0)
    if learner.members:
        return _train_members(learner, arguments | {"generator": generator})
    if device is not None:
        learner.to(device)
    batch, total = _batches(family, tasks_per_step)
    before = generator.get_state()
    learner.materialise(batch(generator))
    generator.set_state(before)
    parameters = learner.trained_parameters()
    if not parameters:
        raise ValueError(f"{type(learner).__name__}: nothing to train, no parameter of this model is reached by its objective")
    total = _number_of_tasks(learner, total, num_tasks)
    optimiser = _stepping("optimizer", (optimizer or _adam)(parameters), "torch.optim.Adam or SGD")
    scheduler = _stepping("schedule", schedule(optimiser), "one of the step's number, as CosineAnnealingLR") if schedule else None
    run = _Run(learner, parameters, optimiser, scheduler, generator)
    run.compiler = StepCompiler(learner, parameters, run.losses, total, generator, mode=compile)
    if resume and checkpoint is not None and os.path.exists(checkpoint):
        run.load(checkpoint)
    held_out = None if validation is None else _held_out(validation, validation_tasks)
    start = time.monotonic() - run.history.seconds
    bar = tqdm(total=steps, initial=run.history.steps, disable=not (sys.stderr.isatty() if progress is None else progress), unit="step")
    try:
        while run.history.steps < steps and not run.history.stopped_early:
            loss = run.step(batch(generator), total, clip, bad_tasks, steps - run.history.steps)
            step = run.history.steps
            run.history.seconds = time.monotonic() - start
            if not bar.disable:
                bar.update()
                bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            if held_out is not None and (step % validate_every == 0 or step == steps):
                run.validate(held_out, patience)
            if checkpoint is not None and (step % checkpoint_every == 0 or step == steps or run.history.stopped_early):
                run.save(checkpoint)
    finally:
        bar.close()
    run.keep_best()
    return run.history


def _train_members(learner: AbstractMetaLearner, arguments: dict[str, Any]) -> History:
    """Each member of an ensemble on its own, one after the other on one random stream: other tasks in another order for each."""
    histories, checkpoint = [], arguments.pop("checkpoint")
    for i, member in enumerate(learner.members):
        path = None if checkpoint is None else f"{os.fspath(checkpoint)}.member{i}"
        histories.append(meta_train(member, checkpoint=path, **arguments))
    steps = min(h.steps for h in histories)
    return History(
        loss=np.mean([h.loss[:steps] for h in histories], 0).tolist(), seconds=sum(h.seconds for h in histories),
        stopped_early=any(h.stopped_early for h in histories), skipped=sum(h.skipped for h in histories),
    )  # fmt: skip


def predictive_nll(adapter: AbstractAdapter, episode: Episode, *, num_draws: int = 100, generator: torch.Generator | None = None) -> Tensor:
    """Mean −log predictive density of each task's query points, ``(T,)``, in nats a point; NaN for a task without any."""
    generator = checked_generator(generator) or torch.Generator().manual_seed(0)
    query = adapter.prepared(episode.query, "query")
    assert query.y is not None
    posterior = adapter.adapt(episode.support, generator=generator)
    predictive = posterior.predict(query.x, None if posterior.is_point else num_draws, generator=generator)
    return task_mean(-predictive.log_prob(query.y), query.mask)


@dataclass
class _Run:
    """The state of a run: what a checkpoint holds."""

    learner: AbstractMetaLearner
    parameters: list[Any]
    optimiser: torch.optim.Optimizer
    scheduler: Any
    generator: torch.Generator
    history: History = field(default_factory=History)
    best: list[Tensor] | None = None
    since_best: int = 0
    compiler: StepCompiler | None = None
    last: list[Tensor] = field(default_factory=list)

    def step(self, episode: Episode, total: int, clip: float | None, bad_tasks: str, remaining: int) -> float:
        before = self.generator.get_state()
        found = None if self.compiler is None else self.compiler(episode, remaining)
        if found is not None:
            loss, norm = self.take(found, clip)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                self.generator.set_state(before)  # eagerly once more: there every case is told apart
                found = None
        if found is None:
            loss = self.eager(episode, before, total, clip, bad_tasks)
        if not self.last:
            self.last = [p.detach().clone() for p in self.parameters]
        else:
            torch._foreach_copy_(self.last, [p.detach() for p in self.parameters])
        self.optimiser.step()
        if not _all_finite(self.parameters):
            self.restore(self.last)
            raise TrainingError(
                f"step {self.history.steps + 1}: the step is not finite; parameters are at their last finite value. Lower the learning rate"
            )
        if self.scheduler is not None:
            self.scheduler.step()
        self.history.loss.append(loss.item())
        return self.history.loss[-1]

    def take(self, found: Gradients, clip: float | None) -> tuple[Tensor, Tensor]:
        """Puts a compiled step's gradient into the parameters; returns its loss and the gradient's norm before it was clipped."""
        for parameter, gradient in zip(self.parameters, found.gradients, strict=True):
            parameter.grad = gradient
        if clip is None:
            return found.loss, get_total_norm([g for g in found.gradients if g is not None])
        return found.loss, clip_grad_norm_(self.parameters, clip)

    def eager(self, episode: Episode, before: Tensor, total: int, clip: float | None, bad_tasks: str) -> Tensor:
        """Loss and gradient without a graph; returns the loss. Raises TrainingError where one is not finite."""
        where, start = f"step {self.history.steps + 1}", time.perf_counter()
        losses, rest = self.losses(episode)
        bad = ~losses.detach().isfinite()
        if bool(bad.any()):
            if bad_tasks == "raise" or bool(bad.all()):
                task = int(bad.nonzero()[0])
                raise TrainingError(
                    f"{where}: the loss of task {task} is {losses[task].item()} ({int(bad.sum())} of {len(losses)} tasks); "
                    "parameters are at their last finite value. Lower inner_lr or the learning rate, give clip=, or bad_tasks='skip'"
                )
            episode, losses, rest = self.without(bad, episode, before)
        loss, norm = self.backward(losses, rest, total, clip)
        if bad_tasks == "skip" and not bool(norm.isfinite()):
            bad = self.bad_gradients(episode, before)
            if bool(bad.any()) and not bool(bad.all()):
                episode, losses, rest = self.without(bad, episode, before)
                loss, norm = self.backward(losses, rest, total, clip)
        if not (bool(loss.isfinite()) and bool(norm.isfinite())):
            raise TrainingError(
                f"{where}: the loss is {loss.item()}, the gradient's norm {norm.item()}; parameters are at their last finite value"
            )
        if self.compiler is not None:
            self.compiler.eager_took(time.perf_counter() - start)
        return loss

    def losses(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """The tasks' losses ``(T,)`` and θ's own, under one draw of θ where it is variational."""
        model = self.learner.model
        with model.theta_at(model.draw_theta(self.generator)):
            return self.learner.meta_loss(episode, generator=self.generator), self.learner.global_loss()

    def without(self, bad: Tensor, episode: Episode, state: Tensor) -> tuple[Episode, Tensor, Tensor]:
        """The other tasks and their losses, anew: the gradient of a loss that is not finite is NaN even when masked."""
        self.history.skipped += int(bad.sum())
        self.generator.set_state(state)
        episode = episode.select(~bad)
        return episode, *self.losses(episode)

    def backward(self, losses: Tensor, rest: Tensor, total: int, clip: float | None) -> tuple[Tensor, Tensor]:
        """Puts the gradient of the step's loss into the parameters; returns the loss and the gradient's norm before it was clipped."""
        loss = losses.mean() + rest / total
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward(inputs=self.parameters)
        return loss, clip_grad_norm_(self.parameters, float("inf") if clip is None else clip)

    def bad_gradients(self, episode: Episode, state: Tensor) -> Tensor:
        """Which tasks have a finite loss and a gradient that is not, ``(T,)``: each alone, since NaN spreads through what they share."""
        bad = []
        for task in range(episode.num_tasks):
            self.generator.set_state(state)
            losses, _ = self.losses(episode.select(task))
            gradients = torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)
            bad.append(not all(g is None or bool(g.isfinite().all()) for g in gradients))
        return torch.tensor(bad)

    def validate(self, episode: Episode, patience: int | None) -> None:
        value = float(predictive_nll(self.learner, episode).nanmean())
        best = min(self.history.validation, default=float("inf"))
        self.history.validation_step.append(self.history.steps)
        self.history.validation.append(value)
        if value < best:
            self.best, self.since_best = [p.detach().clone() for p in self.parameters], 0
            self.history.best_step = self.history.steps
        else:
            self.since_best += 1
        self.history.stopped_early = patience is not None and self.since_best >= patience

    def keep_best(self) -> None:
        if self.best is not None:
            self.restore(self.best)

    def restore(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def save(self, path: str | os.PathLike[str]) -> None:
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
        self.learner.load_state_dict(state["parameters"])
        self.optimiser.load_state_dict(state["optimiser_state"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["schedule_state"])
        self.generator.set_state(state["generator"])
        self.history, self.best, self.since_best = History(**state["history"]), state["best"], state["since_best"]


def _adam(parameters: list[Any]) -> torch.optim.Optimizer:
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.Adam(parameters, 1e-3, fused=fused)


def _stepping(name: str, made: Any, instead: str) -> Any:
    """What a factory made, where its ``step()`` needs no argument, else TypeError."""
    if not callable(getattr(made, "step", None)):
        raise TypeError(f"{name}: expected a factory of something with step(), say {instead}, got one of {type(made).__name__}")
    parameters = inspect.signature(made.step).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise TypeError(
            f"{name}: {type(made).__name__} needs step({', '.join(needed)}), and training calls step() after the gradient of each step: "
            f"take {instead}"
        )
    return made


def _all_finite(values: list[Any]) -> bool:
    norms = torch.stack(torch._foreach_norm([v.detach() for v in values]))
    # a norm overflows where no entry does: only then each is looked at
    return bool(norms.isfinite().all()) or all(bool(v.isfinite().all()) for v in values)


def _batches(family: TaskFamily | Episode, tasks_per_step: int | None) -> tuple[Callable[[torch.Generator], Episode], int | None]:
    if isinstance(family, Episode):
        family.check()
        return (lambda generator: family), family.num_tasks
    total: int | None = getattr(family, "num_tasks", None)
    size = tasks_per_step or (total if total is not None and total <= ALL_TASKS_UP_TO else TASKS_PER_STEP)
    return (lambda generator: family.sample(size, generator=generator)), total


def _number_of_tasks(learner: AbstractMetaLearner, total: int | None, num_tasks: int | None) -> int:
    number = num_tasks or total
    if number is None and learner.global_loss().requires_grad:
        raise ValueError("θ has a hyperprior and the family is endless: say how many tasks it stands for, num_tasks=")
    return number or 1


def _held_out(validation: TaskFamily | Episode, num_tasks: int) -> Episode:
    if isinstance(validation, Episode):
        return validation
    generator = torch.Generator().manual_seed(0)
    total = getattr(validation, "num_tasks", None)
    return validation.sample(num_tasks if total is None else min(num_tasks, total), generator=generator)
