"""What every learner is: an inference strategy for φ on a `HierarchicalModel`. Training and evaluation know only this file."""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..parameters import announce
from ..posteriors import MixturePosterior, Posterior, TaskPosterior
from ..program_module import refuse_unread
from ..randomness import rng


def _compilable(adapt: Callable[..., Posterior]) -> Callable[..., Posterior]:
    """``adapt`` with ``compile=``, which counts in the call from outside: not where another ``adapt`` of the learner's calls this one."""
    known = inspect.signature(adapt)
    if "compile" in known.parameters:  # it sees to it itself
        return adapt

    @functools.wraps(adapt)
    def either(self: AbstractAdapter, support: Points, *args: Any, compile: bool | str = False, **keywords: Any) -> Posterior:
        if checked_compile(compile) is False or type(self).adapt is not either:
            return adapt(self, support, *args, **keywords)
        return type(self).compiled_by(self, compile).adapt(support, *args, **keywords)

    more = inspect.Parameter("compile", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool | str")
    order = sorted([*known.parameters.values(), more], key=lambda p: p.kind)  # `**keywords` come last
    either.__signature__ = known.replace(parameters=order)  # type: ignore[attr-defined]  # for `help`
    either.takes_compile = True  # type: ignore[attr-defined]
    return either


def checked_compile(compile: bool | str) -> bool | str:
    """``compile`` where it is True, False or "auto", else ValueError."""
    if not isinstance(compile, bool) and compile != "auto":
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}")
    return compile


class AbstractAdapter(nn.Module, ABC):
    """Infers φ from a support set under the model's θ as it stands; it learns nothing."""

    model: HierarchicalModel
    members: Sequence[AbstractMetaLearner]
    why_eager: str | None = None  # why no step of it can be written down as a graph of operations, where that is so
    compiled_by: ClassVar[Callable[[AbstractAdapter, bool | str], AbstractAdapter]]  # `bayesmeta.compiled`, which knows this file, sets it

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Whatever ``adapt`` a learner has, it takes ``compile=`` too."""
        super().__init_subclass__(**keywords)
        if not hasattr(cls.adapt, "takes_compile"):
            cls.adapt = _compilable(cls.adapt)  # type: ignore[method-assign]

    def __init__(self, model: HierarchicalModel) -> None:
        super().__init__()
        if not isinstance(model, HierarchicalModel):
            raise TypeError(f"model: expected a HierarchicalModel, got {type(model).__name__}; write HierarchicalModel(program)")
        self.model = model
        self.members = ()  # an ensemble's, each with a model of its own
        self.register_load_state_dict_pre_hook(_make_all)

    @abstractmethod
    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> Posterior:
        """q(φ_i | S_i, θ) of all tasks in ``support`` at once.

        Randomness comes from ``generator`` alone (see `bayesmeta.randomness.rng`); nothing outside is changed. Raises
        ValueError naming task and argument where a real point of ``support`` is not finite.

        Every learner's takes ``compile=False | True | "auto"`` too, without mentioning it: True runs `bayesmeta.Compiled`, whose graphs are
        kept for later calls; "auto" does so once the eager adaptations of one shape have taken as long as compiling does.
        """

    def adapt_over_theta(self, support: Points, *, num_theta: int = 10, generator: torch.Generator | None = None) -> Posterior:
        """∫ q(φ_i | S_i, θ) q(θ) dθ: `adapt` under ``num_theta`` draws of θ's posterior, as a mixture; `adapt` where θ is a point."""
        self.materialise(support)
        parts: list[TaskPosterior] = []
        with rng(generator):
            for learner in self.members or (self,):
                for _ in range(num_theta):
                    theta = learner.model.draw_theta()
                    torch.rand(())  # the stream moves on, so that the next draw is another
                    if theta is None:
                        return self.adapt(support)
                    with learner.model.theta_at(theta.detach()):
                        posterior = learner.adapt(support)
                    if not isinstance(posterior, TaskPosterior):
                        raise NotImplementedError(f"{type(learner).__name__} has no distribution over φ to average over draws of θ")
                    posterior.theta = theta.detach()
                    parts.append(posterior)
        return MixturePosterior(parts)

    def materialise(self, data: Points | Episode) -> None:
        """Makes every parameter whose shape follows from the program, from the first data seen. Once."""
        self.model.materialise(data)
        for member in self.members:
            member.materialise(data)
        for module in self.modules():
            if isinstance(module, AbstractLazyModule):
                module.build(self.model)

    def prepared(self, points: Points, role: str = "support") -> Points:
        """``points`` checked, in the model's dtype and device, with nothing but real values in them.

        A support set that is empty in every task needs no y.
        """
        if self.model.takes_data_as_ready:
            return points
        if not isinstance(points, Points):
            raise TypeError(f"{role}: expected Points, got {type(points).__name__}")
        points.check(role)
        if points.y is None and points.mask.any():
            raise ValueError(f"{role}.y: expected targets, got None")
        self.materialise(points)
        self.model.check_targets(points, role)
        if points.y is None:
            points = points._replace(y=self.model.made_up_points(points.num_tasks, points.num_points).y)
        return self.model.prepare(points)

    def posterior(self, distribution: Any, diagnostics: dict[str, float | str] | None = None) -> TaskPosterior:
        """What `adapt` returns; a RuntimeWarning where the adaptation of a task diverged, whose predictions are then NaN."""
        if self.model.takes_data_as_ready:  # values are not looked at
            return TaskPosterior(self.model, distribution, diagnostics)
        diverged = ~distribution.mean.isfinite().all(-1)
        if bool(diverged.any()):
            count, first = int(diverged.sum()), int(diverged.nonzero()[0])
            diagnostics = {**(diagnostics or {}), "diverged_tasks": float(count)}
            warnings.warn(
                f"{type(self).__name__}: the adaptation of {count} of {len(diverged)} tasks diverged (the first is task {first}): "
                "φ is not finite there, and no prediction; lower inner_lr (a Gaussian's steps grow as inner_lr / noise²) or take "
                "fewer steps", RuntimeWarning, stacklevel=4,
            )  # fmt: skip
        return TaskPosterior(self.model, distribution, diagnostics)


class AbstractMetaLearner(AbstractAdapter):
    """An adapter whose θ is learned: it states a loss for each task, and `bayesmeta.meta_train` moves θ."""

    loop_steps = 0  # K of its inner loop in training (`takes_steps`)
    _steps_made: int | None = None

    @abstractmethod
    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """The objective for θ, one value a task, ``(T,)``; its mean over tasks is minimised.

        In a loop of your own give a ``generator``: without one the noise is the same at every call.
        """

    def global_loss(self) -> Tensor:
        """What θ adds once, not per task: −log p(θ), or KL(q(θ) ‖ p(θ)) where θ is variational; ``()``."""
        return self.model.global_loss()

    def takes_steps(self, steps: int, adapt_steps: int | None = None) -> None:
        """Says, once, that the learner's inner loop has K = ``steps`` steps (`bayesmeta.inner_loop`), and ``adapt_steps`` at test.

        Under ``batch_norm="per_step"`` each has statistics of its own from here on. Raises ValueError for fewer ``adapt_steps`` than K: no
        statistics are kept of predictions before the last step.
        """
        self.loop_steps, norms = steps, self.model.batch_norms
        self._steps_made = getattr(self, "inner_steps", None)
        if norms is None or norms.policy != "per_step":
            return
        if adapt_steps is not None and adapt_steps < steps:
            raise ValueError(
                "adapt_steps: batch_norm='per_step' has statistics of predictions after all steps of training, not before: expected "
                f"inner_steps or more, got {steps - adapt_steps} fewer"
            )
        norms.make_room(steps)

    def prepared(self, points: Points, role: str = "support") -> Points:
        """As of every adapter. Raises ValueError where inner steps have statistics of their own and were changed since."""
        norms, steps = self.model.batch_norms, getattr(self, "inner_steps", 0)
        if norms is not None and norms.policy == "per_step" and self._steps_made is not None:
            at_test = getattr(self, "adapt_steps", steps)
            if steps != self._steps_made or at_test < steps:
                raise ValueError(
                    f"inner_steps, adapt_steps: batch_norm='per_step' has statistics of {self._steps_made} steps and of predictions after "
                    f"them: expected inner_steps={self._steps_made} and as many adapt_steps or more, got {steps} and {at_test}"
                )
        return super().prepared(points, role)

    def renew_statistics(self, episode: Episode, *, generator: torch.Generator | None = None, task_chunk: int | None = None) -> None:
        """After a step of training on ``episode``: running batch-norm statistics, if any, move towards those of its points.

        Those of inner steps by another run of `meta_loss`: at step k < K of what the loop learns from, afterwards of what the loss is on.
        ``generator``: is left as it is, its noise comes from a copy. ``task_chunk``: how many tasks are run at once; None: all.
        """
        norms = self.model.batch_norms
        if norms is None or norms.policy != "per_step" or not self.loop_steps:
            return self.model.renew_statistics(episode)
        noise, notes, size = torch.Generator(), [], task_chunk or max(episode.num_tasks, 1)
        noise.set_state((generator or torch.default_generator).get_state())
        for first in range(0, episode.num_tasks, size):
            with norms.noting() as seen:
                self.meta_loss(episode.select(slice(first, first + size)), generator=noise)
            notes.append(seen)
        norms.renew_steps(notes)

    def run_guide(self, data: Points | Episode, q: Callable[[Points], Any]) -> None:
        """Inside a Pyro guide: samples θ's sites, and the task-level sites from ``q(support)`` under that θ.

        An Episode shows q its support set only, Points are all seen.
        """
        support = self.prepared(data.support if isinstance(data, Episode) else data)
        for name, parameter in self.named_parameters():
            if not name.startswith("model."):  # those are the model's to announce
                announce(f"learner.{name}", parameter)
        with self.model.theta_at(self.model.sample_theta_sites()):
            self.model.sample_task_sites(q(support), support)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that the objective depends on, found by following its graph on made-up data; the others stay put."""
        points = self.model.made_up_points(2, max(4, self.model.num_classes or 0))  # of every class a point: some losses need one
        self.materialise(points)
        parameters = [p for p in self.parameters() if p.requires_grad]
        with torch.enable_grad():
            loss = self.meta_loss(Episode(points, points)).sum() + self.global_loss()
            if not parameters or not loss.requires_grad:
                return []
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [p for p, g in zip(parameters, grads, strict=True) if g is not None]


class AbstractLazyModule(nn.Module, ABC):
    """A module whose shapes follow from the program: made by `build` when the program is read."""

    @abstractmethod
    def build(self, model: HierarchicalModel) -> None:
        """Makes the parameters, once; later calls do nothing."""


class LazyParameter(AbstractLazyModule):
    """A learned tensor: ``make(model)`` gives its first value once the program is read.

    ``make``: a function of a module or a method, which a learner can be pickled with; a lambda cannot.
    """

    def __init__(self, make: Callable[[HierarchicalModel], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.value: nn.Parameter
        self.register_parameter("value", None)

    def build(self, model: HierarchicalModel) -> None:
        """Makes the parameter, once."""
        if self.value is None:
            self.value = nn.Parameter(self.make(model).detach().clone())


def _make_all(adapter: AbstractAdapter, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: makes every parameter if the program has been read; RuntimeError where it would be needed."""
    refuse_unread(adapter, state_dict, prefix)
    if all(one.model.has_seen_data for one in (adapter, *adapter.members)):
        adapter.materialise(adapter.model.made_up_points(1, 1))


def prior_mean(model: HierarchicalModel) -> Tensor:
    """E[φ | θ] of one made-up task in packed space, ``(D,)``: what the first value of a `LazyParameter` is made from."""
    return model.initial(model.made_up_points(1, 1))[0]


def checked_steps(name: str, value: int, *, least: int = 0) -> int:
    """``value`` where it is a whole number of at least ``least``, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return value


def checked_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """``value`` where it is one of ``choices``, else ValueError with the nearest."""
    if value not in choices:
        lower = {choice.lower(): choice for choice in choices}
        near = difflib.get_close_matches(str(value).lower(), lower, 1)
        hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}{hint}")
    return str(value)
