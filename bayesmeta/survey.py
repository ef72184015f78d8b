"""Reads a Pyro program by running it on a few made-up tasks, and checks the rules that a hierarchical model keeps.

The rules, each an error that says how to mend it:

1. There is a plate named "tasks", of size ``points.num_tasks``, and nothing is subsampled in it.
2. There is a site named "y", observed (``obs=points.y``), inside the tasks plate.
3. The tasks plate is the rightmost (dim -1), or stands at dim -2 with one plate over points at dim -1 inside it.
4. Given φ and θ the points are independent: ``.to_event(1)`` over N points, or a points plate.
5. Task-level sites are continuous, stand directly in the tasks plate, and have the same shape whatever T and N are; the bounds of
   their support do not follow from the data.
6. Sites and parameters outside the tasks plate are θ: their shape does not depend on T or N.
7. The program broadcasts: task-level values may carry axes for draws in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample

from .episodes import Points
from .handlers import TARGET, TASKS, Parameters, Site, param_value
from .packing import packed_shape, packing_transform, peel


class ModelError(ValueError):
    """A program breaks a rule of hierarchical models; the message says which and how to mend it."""


@dataclass(frozen=True)
class Statement:
    """One sample statement of a program, as met in a run."""

    name: str
    fn: Any
    frames: tuple[tuple[str, int, int], ...]  # (name, dim, size) of the plates round it
    observed: bool
    infer: dict[str, Any]
    value_shape: torch.Size  # of what is observed; that of fn where nothing is
    weighed: bool  # whether a handler (`poutine.scale`, `poutine.mask`) changes what its log density counts


class Survey(Messenger):
    """Runs a program with zeros (unconstrained) for every latent value and records its sample statements.

    Nothing is drawn, so that improper priors and any random state are left alone.
    """

    def __init__(self, parameters: Parameters, like: torch.Tensor) -> None:
        super().__init__()
        self.parameters, self.like = parameters, like
        self.statements: dict[str, Statement] = {}
        self.asked: set[str] = set()  # the names of pyro.param statements

    def has_factors(self, *, in_tasks: bool) -> bool:
        """Whether an observed statement other than y (``pyro.factor``, say) stands inside, or outside, the tasks plate."""
        return any(s.observed and s.name != TARGET and any(f[0] == TASKS for f in s.frames) == in_tasks for s in self.statements.values())

    def _pyro_param(self, msg: Any) -> None:
        self.asked.add(msg["name"])
        msg["value"] = param_value(self.parameters, msg)

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample) or msg["infer"].get("_deterministic"):
            return
        frames = tuple((f.name, f.dim, f.size) for f in msg["cond_indep_stack"] if f.vectorized)
        scale, mask = msg["scale"], msg["mask"]
        weighed = isinstance(scale, torch.Tensor) or scale != 1 or not (mask is None or mask is True)
        shape = torch.Size(fn.shape()) if msg["value"] is None else torch.as_tensor(msg["value"]).shape
        self.statements[name] = Statement(name, fn, frames, msg["is_observed"], dict(msg["infer"]), shape, weighed)
        if not msg["is_observed"]:
            transform = _transform(name, fn)
            shape = fn.batch_shape + packed_shape(fn, transform)
            like = fn.mean if _floating(fn) else self.like
            msg["value"] = transform(torch.zeros(shape, dtype=like.dtype, device=like.device))


def made_up(row: Points, tasks: int, points: int) -> Points:
    """The first point of the first task, repeated to a batch of the wanted size."""
    x, y = (None if v is None else v[:1, :1].expand(tasks, points, *v.shape[2:]) for v in (row.x, row.y))
    assert x is not None
    return Points(x, y, torch.ones(tasks, points, dtype=torch.bool, device=x.device))


def read(small: Survey, large: Survey, sizes: tuple[tuple[int, int], tuple[int, int]]) -> tuple[list[Site], list[Site], int]:
    """Task-level sites, global sites and the number of plate axes, from two runs of different ``sizes`` (T, N).

    Raises ModelError where the program breaks a rule.
    """
    (tasks, points), (tasks2, points2) = sizes
    plates = _check_target(small, tasks, points)
    _check_target(large, tasks2, points2)
    sites, theta = [], []
    for kind, here, there in (("pyro.param", small.asked, large.asked), ("site", set(small.statements), set(large.statements))):
        for name in sorted(here ^ there):
            with_it, without = ((tasks, points), (tasks2, points2)) if name in here else ((tasks2, points2), (tasks, points))
            raise ModelError(
                f"{kind} '{name}' is there for {with_it[0]} tasks of {with_it[1]} points and not for {without[0]} of {without[1]}: "
                "the program's sites and parameters must not depend on the data"
            )
    for statement in small.statements.values():
        name, fn = statement.name, statement.fn
        other = large.statements[name]
        if statement.observed:
            _check_observed(statement, other)
            continue
        if not any(frame[0] == TASKS for frame in statement.frames):
            shape = fn.batch_shape + fn.event_shape
            if shape != other.fn.batch_shape + other.fn.event_shape:
                raise ModelError(
                    f"site '{name}' stands outside the tasks plate but has one value per task or point (shape {tuple(shape)} for "
                    f'{tasks} tasks): move it inside `with pyro.plate("{TASKS}", points.num_tasks):`'
                )
            packed = fn.batch_shape + packed_shape(fn, _transform(name, fn))
            theta.append(Site(name, torch.Size(shape), packed, statement.frames))
            continue
        if len(statement.frames) > 1:
            extra = next(frame[0] for frame in statement.frames if frame[0] != TASKS)
            raise ModelError(
                f"task-level site '{name}' stands inside the plate '{extra}' too: a task's parameters must not grow with its points; "
                f"sample it directly in the tasks plate, a vector with .to_event(1)"
            )
        if tuple(fn.batch_shape) != (tasks,) + (1,) * (plates - 1):
            raise ModelError(
                f"task-level site '{name}' has batch shape {tuple(fn.batch_shape)}, expected {(tasks,) + (1,) * (plates - 1)}, one value a "
                f"task: a vector needs .to_event(1), and one value per point is no parameter of a task"
            )
        if fn.event_shape != other.fn.event_shape:
            raise ModelError(
                f"task-level site '{name}' has event shape {tuple(fn.event_shape)} for {points} points and {tuple(other.fn.event_shape)} "
                f"for {points2}: a task's parameters must have a fixed size"
            )
        sites.append(Site(name, torch.Size(fn.event_shape), packed_shape(fn, _transform(name, fn))))
    if not sites:
        raise ModelError(f'no latent site in the tasks plate: a task needs parameters, sampled inside `with pyro.plate("{TASKS}", ...)`')
    return sites, theta, plates


def _check_observed(statement: Statement, other: Statement) -> None:
    """Refuses data other than y with one value per point: only y knows which points are padding."""
    if statement.name == TARGET or not any(frame[0] == TASKS for frame in statement.frames):
        return
    one_task, same = (s.fn.batch_shape[1:] + s.fn.event_shape for s in (statement, other))
    if len(statement.frames) > 1 or one_task != same:
        raise ModelError(
            f"observed site '{statement.name}' has one value per point: only \"{TARGET}\" knows which points are real, so observe all "
            f'outputs in "{TARGET}", (T, N, O)'
        )


def _check_target(survey: Survey, tasks: int, points: int) -> int:
    """Checks rules 1 to 4; returns the number of plate axes (1, or 2 with a points plate)."""
    target = survey.statements.get(TARGET)
    frames = {f for s in survey.statements.values() for f in s.frames}
    names = sorted({f[0] for f in frames})
    if TASKS not in names:
        raise ModelError(
            f'no plate named "{TASKS}" (plates found: {names or "none"}): put what belongs to a task inside '
            f'`with pyro.plate("{TASKS}", points.num_tasks):`'
        )
    if target is None:
        raise ModelError(
            f'no site named "{TARGET}" (sites found: {sorted(survey.statements)}): observe the targets with '
            f'`pyro.sample("{TARGET}", ..., obs=points.y)`'
        )
    if not target.observed:
        raise ModelError(f'site "{TARGET}" is not observed: write `pyro.sample("{TARGET}", ..., obs=points.y)`')
    of_target = {name: (dim, size) for name, dim, size in target.frames}
    if TASKS not in of_target:
        raise ModelError(
            f'site "{TARGET}" stands outside the tasks plate: move it inside `with pyro.plate("{TASKS}", points.num_tasks):`'
        )
    dim, size = of_target[TASKS]
    if size != tasks:
        raise ModelError(
            f'the plate "{TASKS}" has size {size} for {tasks} tasks: give it `points.num_tasks` and no subsample_size '
            "(minibatches of tasks are drawn by the package)"
        )
    inner = [(name, d, n) for name, (d, n) in of_target.items() if name != TASKS]
    if not ((not inner and dim == -1) or (len(inner) == 1 and dim == -2 and inner[0][1] == -1)):
        placed = ", ".join(f"'{name}' at dim {d}" for name, (d, _) in of_target.items())
        raise ModelError(
            f'the plates round "{TARGET}" are {placed}: expected "{TASKS}" alone at dim=-1, or "{TASKS}" at dim=-2 with one plate '
            "over points at dim=-1 inside it"
        )
    fn = target.fn
    base, axes, _ = peel(fn)
    batch = tuple(base.batch_shape)
    if inner:
        if inner[0][2] != points:
            raise ModelError(f"the plate '{inner[0][0]}' has size {inner[0][2]} for {points} points: give it `points.num_points`")
        good = tuple(fn.batch_shape) == (tasks, points)
    else:
        good = axes >= 1 and batch[:2] == (tasks, points)
    if not good:
        raise ModelError(
            f'site "{TARGET}" has batch shape {tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)} for {tasks} tasks of '
            f"{points} points: expected one independent distribution per point, ({tasks},) with .to_event(1) over the points, or a plate "
            "over points at dim=-1"
        )
    if len(target.value_shape) != len(fn.shape()):
        raise ModelError(
            f'site "{TARGET}": what is observed has shape {tuple(target.value_shape)}, its distribution {tuple(fn.shape())} for '
            f"{tasks} tasks of {points} points: give y of shape ({', '.join(['T', 'N', *map(str, fn.shape()[2:])])})"
            + (", or observe points.y[..., 0]" if target.value_shape == (*fn.shape(), 1) else "")
        )
    return 1 + len(inner)


def _transform(name: str, fn: Any) -> Any:
    support = fn.support
    if support.is_discrete:
        raise ModelError(
            f"latent site '{name}' is discrete ({type(peel(fn)[0]).__name__}): sum it out, for example with a mixture distribution "
            "(pyro.distributions.MixtureSameFamily)"
        )
    try:
        return packing_transform(support)
    except NotImplementedError:
        raise ModelError(
            f"site '{name}': its support ({support}) has no bijection to unconstrained reals; choose a distribution with another support"
        ) from None


def _floating(fn: Any) -> bool:
    try:
        return isinstance(fn.mean, torch.Tensor)
    except NotImplementedError:
        return False
