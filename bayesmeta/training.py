"""One training loop for all meta-learners: `meta_train` moves θ by the mean of the tasks' losses."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from .adam import AdamStep
from .agreement import Gradients
from .checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from .compiling import Graphs
from .distributed import Ranks, ranks
from .episodes import Episode
from .learners.base import AbstractAdapter, AbstractMetaLearner, checked_choice, checked_steps
from .meta_gradient import MetaGradient, TrainingError
from .metrics import task_mean
from .randomness import checked_generator
from .tasks.base import TaskFamily

ALL_TASKS_UP_TO = 100
TASKS_PER_STEP = 25
_GRAPHS: WeakKeyDictionary[AbstractMetaLearner, Graphs] = WeakKeyDictionary()  # of learners' last runs, no part of them: for the next one


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
    bad_tasks: str = "raise", task_chunk: int | None = None, checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500, resume: bool = False,
    device: str | torch.device | None = None, progress: bool | None = None, compile: bool | str = "auto",
    autocast: torch.dtype | None = None,
) -> History:
    """Minimises mean over tasks of ``meta_loss`` + ``global_loss()`` / number of training tasks, over ``trained_parameters()``.

    Data: ``tasks_per_step`` tasks are sampled each step (default: all of a finite family of up to 100, else 25); an Episode is one
    fixed batch. ``num_tasks``: how many tasks an endless family stands for; needed only where θ has a hyperprior. ``generator``: all
    randomness (default: seed 0).

    Optimisation: ``optimizer`` and ``schedule`` are factories, ``lambda params: torch.optim.Adam(params, 1e-3)`` being the default;
    ``clip`` bounds the norm of the gradient; ``bad_tasks="skip"`` leaves tasks with a loss or gradient that is not finite out of a
    step, and counts them. ``task_chunk``: how many tasks are held in memory at once, loss and gradient accumulated chunk by chunk: the
    same step up to rounding (noise is drawn chunk by chunk too, so a learner that draws takes other numbers).

    Validation: every ``validate_every`` steps the predictive NLL on a fixed set of tasks of ``validation``; after ``patience`` of
    them without a new best training stops. The best parameters are kept.

    ``checkpoint``: a file, written whole every ``checkpoint_every`` steps and at the end; ``resume=True`` goes on from it where it
    exists, bit for bit as if never interrupted. ``progress``: a bar with loss and rate (default: on a terminal only).

    ``compile``: "auto" (default) compiles the step (see `bayesmeta.compiling`) where the steps to come save clearly more time than that
    takes (10–40 s), so that short runs never wait; True does so at once, False never. A compiled step equals the eager one to rounding,
    not to the bit: only compile=False gives the same bits whatever the load. What cannot be compiled is trained eagerly, with a
    RuntimeWarning that says why. The next call on the same learner takes up its graphs where numbers, words and flags
    among the attributes of its modules are as they were, held to eager for two steps; after changing what a program reads from anywhere
    else (a global, a closure) train a copy (`copy.deepcopy`), which has none.

    ``device``: where the model goes, "cuda" say; data follow it. Noise is drawn on the CPU from ``generator`` and moved, so that a seed
    gives the same run on every device, to rounding. ``autocast=torch.bfloat16``: matrix products and convolutions of the program and of
    embeddings run in bfloat16 (`torch.autocast`) while it trains; θ, gradients, log densities, encoders and linear algebra stay float32.

    Under ``torchrun`` each process takes its share of a step's tasks (`bayesmeta.distributed`): gradients are added up, the first process's
    start, data and validation count for all, and it alone writes. Where a process is lost the others end with an error.

    Raises TrainingError where a loss or gradient is not finite, CheckpointError where ``checkpoint`` cannot be resumed from, ValueError
    for arguments that make no sense, TypeError for what cannot be trained and for an optimiser (LBFGS) or schedule (ReduceLROnPlateau)
    whose ``step()`` needs an argument.
    """
    given = {name: value for name, value in locals().items() if name != "learner"}
    if not isinstance(learner, AbstractMetaLearner):
        fit = "; it has a fit of its own" if hasattr(learner, "fit") else ""
        raise TypeError(f"{type(learner).__name__} adapts and does not learn: it needs no training (it uses its model's θ){fit}")
    return _train(learner, _Options(**given | {"generator": checked_generator(generator) or torch.Generator().manual_seed(0)}))


@dataclass(frozen=True)
class _Options:
    """The arguments of `meta_train`, checked."""

    family: TaskFamily | Episode
    steps: int
    tasks_per_step: int | None
    generator: torch.Generator
    optimizer: Callable[[list[Any]], torch.optim.Optimizer] | None
    schedule: Callable[[torch.optim.Optimizer], Any] | None
    clip: float | None
    num_tasks: int | None
    validation: TaskFamily | Episode | None
    validate_every: int
    patience: int | None
    validation_tasks: int
    bad_tasks: str
    task_chunk: int | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    resume: bool
    device: str | torch.device | None
    progress: bool | None
    compile: bool | str
    autocast: torch.dtype | None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(f"steps: expected a whole number, steps >= 0, got {self.steps!r}")
        if not isinstance(self.resume, bool) or (self.resume and self.checkpoint is None):
            got = f"{self.resume!r} and {self.checkpoint!r}"
            raise ValueError(f"resume: expected True or False, with checkpoint= naming the file, got {got}")
        checked_choice("bad_tasks", self.bad_tasks, ("raise", "skip"))
        for name in ("tasks_per_step", "num_tasks", "patience", "validation_tasks", "validate_every", "checkpoint_every", "task_chunk"):
            value = getattr(self, name)
            if value is not None:
                checked_steps(name, value, least=1)
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast: expected None or torch.bfloat16 (float16 would need its loss scaled, which is not done), got {self.autocast!r}"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: expected a number above 0, got {self.clip}")
        if self.optimizer is not None and isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a factory, say lambda params: torch.optim.Adam(params, 1e-3), got a {type(self.optimizer).__name__}: "
                "parameters may not exist before the first data are seen"
            )


def _train(learner: AbstractMetaLearner, o: _Options, shared: Graphs | None = None, after: int = 0) -> History:
    """Trains one learner, or an ensemble. ``shared``: graphs of learners made alike; ``after``: how many more of those will come."""
    graphs = _GRAPHS.setdefault(learner, Graphs()) if shared is None else shared
    if learner.members:
        return _train_members(learner, o, graphs)
    group = ranks(o.device)
    if o.device is not None:
        learner.to(o.device)
    batch, total = _batches(o.family, o.tasks_per_step)
    before = o.generator.get_state()
    learner.materialise(batch(o.generator))
    o.generator.set_state(before)
    parameters = learner.trained_parameters()
    if not parameters:
        raise ValueError(f"{type(learner).__name__}: nothing to train, no parameter of this model is reached by its objective")
    if o.autocast is not None and any(p.dtype != torch.float32 for p in parameters):
        raise ValueError(f"autocast: expected a model in float32, got {', '.join(sorted({str(p.dtype) for p in parameters}))}")
    total = _number_of_tasks(learner, total, o.num_tasks)
    optimiser = _stepping("optimizer", (o.optimizer or _adam)(parameters), "torch.optim.Adam or SGD")
    scheduler = _stepping("schedule", o.schedule(optimiser), "one of the step's number, as CosineAnnealingLR") if o.schedule else None
    gradient = MetaGradient(
        learner, parameters, total, o.generator if group.size == 1 else torch.Generator(), compile=o.compile, lent=graphs,
        task_chunk=o.task_chunk, bad_tasks=o.bad_tasks, ranks=group, noise_seed=_seed(o.generator),
        adam=AdamStep.of(optimiser, parameters, o.clip), autocast=o.autocast,
    )  # fmt: skip
    run = _Run(learner, parameters, optimiser, scheduler, o.generator, gradient, group)
    if o.resume and o.checkpoint is not None and os.path.exists(o.checkpoint):
        run.load(o.checkpoint)
    run.begin_together()
    held_out = None if o.validation is None else _held_out(o.validation, o.validation_tasks)
    start = time.monotonic() - run.history.seconds
    disabled = group.rank > 0 or not (sys.stderr.isatty() if o.progress is None else o.progress)
    bar = tqdm(total=o.steps, initial=run.history.steps, disable=disabled, unit="step")
    try:
        while run.history.steps < o.steps and not run.history.stopped_early:
            loss = run.step(batch(o.generator), o.clip, o.steps - run.history.steps + after * o.steps)
            step = run.history.steps
            run.history.seconds = time.monotonic() - start
            if not bar.disable:
                bar.update()
                bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            if held_out is not None and (step % o.validate_every == 0 or step == o.steps):
                run.validate(held_out, o.patience)
            last = step == o.steps or run.history.stopped_early
            if group.rank == 0 and o.checkpoint is not None and (step % o.checkpoint_every == 0 or last):
                run.save(o.checkpoint)
    finally:
        bar.close()
        graphs.clear()
        graphs.update(gradient.compiler.graphs)
    run.keep_best()
    return run.history


def _train_members(learner: AbstractMetaLearner, o: _Options, graphs: Graphs) -> History:
    """Each member of an ensemble on its own, one after the other on one random stream: other tasks in another order for each."""
    histories = []
    for i, member in enumerate(learner.members):
        path = None if o.checkpoint is None else f"{os.fspath(o.checkpoint)}.member{i}"
        histories.append(_train(member, replace(o, checkpoint=path), graphs, len(learner.members) - i - 1))
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
    predictive = posterior.predict(query.x, None if posterior.is_point else num_draws, generator=generator, mask=query.mask)
    return task_mean(-predictive.log_prob(query.y), query.mask)


@dataclass
class _Run:
    """The state of a run: what a checkpoint holds."""

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
        if adam is not None and found.update is not None and not adam.agrees(found.update.new):
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
        if self.best is not None:
            self.restore(self.learned(), self.best)

    @torch.no_grad()
    def restore(self, places: list[Any], values: list[Tensor]) -> None:
        for place, value in zip(places, values, strict=True):
            place.copy_(value)

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


def _seed(generator: torch.Generator) -> int:
    """A number that the generator's state decides, and that takes nothing from it."""
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return int(torch.randint(2**62, (), generator=twin, device=generator.device))


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
