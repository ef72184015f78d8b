"""The gradient of one training step for θ: eager or compiled, in chunks of tasks, shared out over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .adam import AdamStep
from .agreement import Gradients
from .compiling import Graphs, StepCompiler
from .distributed import Ranks
from .episodes import Episode
from .learners.base import AbstractMetaLearner

LARGE = 1_000_003  # a prime: steps and processes have seeds of their own


class TrainingError(ArithmeticError):
    """A loss or gradient is not finite; parameters are at their last finite value. The message names step and task."""


class MetaGradient:
    """Gradient of the mean over an episode's tasks of ``meta_loss`` + ``global_loss()`` / ``total`` in ``parameters``.

    All randomness comes from ``generator``. ``compile``, ``lent``: as for `StepCompiler`. ``task_chunk``: how many tasks are held in
    memory at once; None takes all. ``adam``: an optimiser's step for the graph to take, where all tasks are taken at once by one process.
    ``bad_tasks``: "raise" or "skip", where a task's loss or gradient is not finite; ``skipped`` counts
    them. ``ranks``: among which processes tasks are shared out; each draws noise of its own, seeded by ``noise_seed``, the step and its
    number. ``autocast``: as for `bayesmeta.meta_train`.
    """

    def __init__(
        self, learner: AbstractMetaLearner, parameters: Sequence[nn.Parameter], total: int, generator: torch.Generator, *,
        compile: bool | str = "auto", lent: Graphs | None = None, task_chunk: int | None = None, bad_tasks: str = "raise",
        ranks: Ranks = Ranks(), noise_seed: int = 0, adam: AdamStep | None = None,  # noqa: B008 - a tuple
        autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.learner, self.parameters, self.total, self.generator = learner, list(parameters), total, generator
        self.task_chunk, self.bad_tasks, self.ranks, self.noise_seed = task_chunk, bad_tasks, ranks, noise_seed
        adam, self.autocast = None if task_chunk or ranks.size > 1 else adam, autocast
        self.compiler = StepCompiler(
            learner, parameters, self.losses, total, generator, mode=compile, lent=lent, adam=adam, coarsest=autocast
        )  # fmt: skip
        self.skipped = 0

    def __call__(self, episode: Episode, step: int, remaining: int) -> Gradients:
        """The gradient of step number ``step``. ``remaining``: steps to come, this one included.

        Raises TrainingError, in every process, where a loss is not finite or no task is left; a gradient may be anything.
        """
        if self.ranks.size == 1:
            found, count = self._of(episode, step, 0, remaining)
        else:
            found, count = self._shared_out(episode, step, remaining)
        if not count:
            raise TrainingError(
                f"step {step}: loss or gradient of all {episode.num_tasks} tasks is not finite; parameters are at their last finite value"
            )
        return found

    def _shared_out(self, episode: Episode, step: int, remaining: int) -> tuple[Gradients, int]:
        """This process's share of the tasks, put together with all others'."""
        self.generator.manual_seed((self.noise_seed + LARGE * step + self.ranks.rank) % 2**63)
        share, skipped = self.ranks.share(episode.num_tasks), self.skipped
        error: TrainingError | None = None
        try:
            found, count = self._of(episode.select(share), step, share.start, remaining)
        except TrainingError as here:
            found, count, error = self._nothing(), 0, here
        return self._together(found, count, skipped, error)

    def losses(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """The tasks' losses ``(T,)`` and θ's own, under one draw of θ where it is variational."""
        model = self.learner.model
        with model.in_precision(self.autocast), model.theta_at(model.draw_theta(self.generator)):
            return self.learner.meta_loss(episode, generator=self.generator), self.learner.global_loss()

    def _of(self, episode: Episode, step: int, number: int, remaining: int) -> tuple[Gradients, int]:
        """The mean over the tasks of ``episode``, whose first is task ``number``, and how many tasks are in it; chunk after chunk."""
        tasks = episode.num_tasks
        size = self.task_chunk or max(tasks, 1)
        total: Gradients | None = None
        chunks = math.ceil(tasks / size)
        for first in range(0, tasks, size):
            part = episode if chunks == 1 else episode.select(slice(first, first + size))
            found = self.compiler(part, remaining * chunks)
            found = self._eager(part, f"step {step}", number + first) if found is None else found
            total = found if total is None else merged(total, found)
        total = total or self._nothing()
        return total, len(total.losses)

    def _nothing(self) -> Gradients:
        zero = self.parameters[0].detach().new_zeros(())
        return Gradients(zero.expand(0), zero, [None] * len(self.parameters))

    def _eager(self, episode: Episode, where: str, number: int) -> Gradients:
        """Without a graph; bad tasks are left out where that is asked for."""
        start, before = self.compiler.clock(), self.generator.get_state()
        losses, rest = self.losses(episode)
        bad = ~losses.detach().isfinite()
        if bool(bad.any()):
            if self.bad_tasks == "raise":
                task = int(bad.nonzero()[0])
                raise TrainingError(
                    f"{where}: the loss of task {number + task} is {losses[task].item()} ({int(bad.sum())} of {len(losses)} tasks); "
                    "parameters are at their last finite value. Lower inner_lr or the learning rate, give clip=, or bad_tasks='skip'"
                )
            episode, found = self._without(bad, episode, before)
        else:
            found = self._backward(losses, rest)
        if self.bad_tasks == "skip" and not all(g is None or bool(g.isfinite().all()) for g in found.gradients):
            bad = self._bad_gradients(episode, before)
            if bool(bad.any()):
                episode, found = self._without(bad, episode, before)
        if found.loss.is_cuda:
            torch.cuda.synchronize(found.loss.device)
        self.compiler.eager_took(self.compiler.clock() - start)
        return found

    def _backward(self, losses: Tensor, rest: Tensor) -> Gradients:
        loss = losses.mean() + rest / self.total
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return Gradients(losses.detach(), loss.detach(), list(gradients))

    def _without(self, bad: Tensor, episode: Episode, state: Tensor) -> tuple[Episode, Gradients]:
        """The other tasks, anew: the gradient of a loss that is not finite is NaN even when masked."""
        self.skipped += int(bad.sum())
        episode = episode.select(~bad)
        if not episode.num_tasks:
            return episode, self._nothing()
        self.generator.set_state(state)
        return episode, self._backward(*self.losses(episode))

    def _bad_gradients(self, episode: Episode, state: Tensor) -> Tensor:
        """Which tasks have a finite loss and a gradient that is not, ``(T,)``: each alone, since NaN spreads through what they share."""
        bad = []
        for task in range(episode.num_tasks):
            self.generator.set_state(state)
            losses, _ = self.losses(episode.select(task))
            gradients = torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)
            bad.append(not all(g is None or bool(g.isfinite().all()) for g in gradients))
        return torch.tensor(bad, device=episode.support.mask.device)

    def _together(self, mine: Gradients, count: int, skipped: int, error: TrainingError | None) -> tuple[Gradients, int]:
        """The mean over the tasks of all processes, and their number; in every process the error of any."""
        reached = [g is not None for g in mine.gradients]
        facts = [count, self.skipped - skipped, error is not None, *reached]
        weighted = [p.new_zeros(p.shape) if g is None else count * g for p, g in zip(self.parameters, mine.gradients, strict=True)]
        numbers = mine.loss.new_tensor([float(fact) for fact in facts])
        numbers, loss, *sums = self.ranks.total([numbers, count * mine.loss, *weighted])
        total, lost, failed, *anywhere = (round(value) for value in numbers.tolist())
        if failed:
            raise error or TrainingError("another process found a loss that is not finite; parameters are at their last finite value")
        self.skipped = skipped + lost
        gradients = [g / max(total, 1) if there else None for g, there in zip(sums, anywhere, strict=True)]
        return Gradients(mine.losses, loss / max(total, 1), gradients), total


def merged(one: Gradients, other: Gradients) -> Gradients:
    """The gradients of one step over the tasks of both: their mean, by numbers of tasks."""
    share = len(other.losses) / max(len(one.losses) + len(other.losses), 1)
    gradients: list[Tensor | None] = []
    for a, b in zip(one.gradients, other.gradients, strict=True):
        reached = [w * g for w, g in ((1 - share, a), (share, b)) if g is not None]
        gradients.append(sum(reached[1:], reached[0]) if reached else None)
    loss = (1 - share) * one.loss + share * other.loss
    return Gradients(torch.cat([one.losses, other.losses]), loss, gradients)
