"""One training loop for all meta-learners: `meta_train` moves θ by the mean of the tasks' losses."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tqdm import tqdm

from .adam import AdamStep
from .compiling import Graphs
from .distributed import ranks
from .episodes import Episode
from .learners.base import AbstractMetaLearner, checked_choice, checked_steps
from .meta_gradient import MetaGradient
from .randomness import checked_generator
from .tasks.base import TaskFamily
from .training_run import History, TrainingRun

ALL_TASKS_UP_TO = 100
TASKS_PER_STEP = 25
_GRAPHS: WeakKeyDictionary[AbstractMetaLearner, Graphs] = WeakKeyDictionary()  # of learners' last runs, no part of them: for the next one


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
    same step up to rounding (noise is drawn chunk by chunk too, so a learner that draws takes other numbers). With networks of
    convolutions, which go task by task on CPUs, ``task_chunk=1`` makes the compiled graph that of one task: so it is compiled sooner.

    Validation: every ``validate_every`` steps the predictive NLL on a fixed set of tasks of ``validation``; after ``patience`` of
    them without a new best training stops. The best parameters are kept.

    ``checkpoint``: a file, written whole every ``checkpoint_every`` steps and at the end; ``resume=True`` goes on from it where it
    exists, bit for bit as if never interrupted. ``progress``: a bar with loss and rate (default: on a terminal only).

    ``compile``: "auto" (default) compiles the step (see `bayesmeta.compiling`) where the steps to come save clearly more time than that
    takes (10–40 s), so that short runs never wait; True does so at once, False never. A compiled step equals the eager one to rounding,
    not to the bit: only compile=False gives the same bits whatever the load. A gradient that the graph has used up itself is not told:
    parameters' ``.grad`` is None then. What cannot be compiled is trained eagerly, with a
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
    run = TrainingRun(learner, parameters, optimiser, scheduler, o.generator, gradient, group)
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
