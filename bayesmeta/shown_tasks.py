"""What an evaluation keeps of the few tasks that are drawn: bands of curves, explanations, maps of probability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .episodes import Episode, Points
from .learners.base import AbstractAdapter
from .posteriors import Posterior
from .report import Bands, Curves, Explanation, ProbabilityMap
from .tasks.base import TaskFamily
from .truth import Truth, has_two_classes, probability_of_1

GRID_POINTS = 100
FEW_VALUES = 6  # a feature with at most so many distinct values is drawn at just those
EXAMPLE_DRAWS = 20
MAP_POINTS, MAP_DRAWS = 40, 8
MAP_DECIMALS = 3  # of what is drawn as a shade of colour
Units = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def units_of(family: TaskFamily | Episode) -> Units:
    """From the model's units back to the family's own, for the first feature and the target."""
    scaling = getattr(family, "scaling", None)
    if scaling is None:
        return (lambda x: x), (lambda y: y)
    return (lambda x: x * scaling.x.sd[0] + scaling.x.mean[0]), scaling.y.inverse


def examples_of(episode: Episode, wanted: int, *, first: Tensor) -> list[int]:
    """Tasks with a support and a query point, spread evenly from the smallest support set to the largest; of ``first (T,)`` if enough."""
    usable = (episode.support.counts > 0) & (episode.query.counts > 0)
    chosen: list[int] = []
    for among in (usable & first, usable & ~first):
        order, room = [int(i) for i in episode.support.counts.argsort(stable=True) if among[i]], wanted - len(chosen)
        chosen += order if len(order) <= room else [order[int(i)] for i in torch.linspace(0, len(order) - 1, room).round()]
    return chosen


class Shown(NamedTuple):
    """A task whose pictures are kept: the values ``grid (G,)`` of its first input, the ``inputs (G, F)`` there, and its explanations."""

    task: int
    name: str
    grid: Tensor
    inputs: Tensor
    explanations: tuple[Explanation, ...]


def shown_task(episode: Episode, task: int, name: str, explanations: tuple[Explanation, ...]) -> Shown:
    """The task with the grid of its bands; an empty one, and no explanations, where inputs are no vectors."""
    if episode.support.x.dim() != 3:
        return Shown(task, name, torch.empty(0), torch.empty(0), ())
    grid = _grid(episode, task)
    return Shown(task, name, grid, _inputs(episode, task, grid), explanations)


def explanations_of(
    family: Any, truth: Truth, episode: Episode, shown: list[int], units: Units
) -> dict[int, tuple[Explanation, ...]]:
    """Of each ambiguous task among those shown, on the grid of its bands."""
    tasks = [task for task in shown if truth.ambiguous[task]]
    if not tasks or episode.support.x.dim() != 3:
        return {}
    x = torch.stack([_inputs(episode, task, _grid(episode, task)) for task in tasks])
    curves = units[1](family.explanations(episode.support.select(tasks), x)).numpy()
    assert truth.probabilities is not None
    likely = truth.probabilities[:, tasks].tolist()
    return {
        task: tuple(Explanation(name=name, probability=likely[m][i], curve=curves[m, i]) for m, name in enumerate(truth.names))
        for i, task in enumerate(tasks)
    }


def bands_of(
    adapter: AbstractAdapter, posterior: Posterior, episode: Episode, first: int, shown: list[Shown], units: Units, num_draws: int,
    seed: int,
) -> tuple[Bands, ...]:  # fmt: skip
    """Of the tasks ``shown``, which are among those of ``posterior`` and ``episode``; task number ``first`` is their first."""
    tasks, y = [one.task - first for one in shown], episode.query.y
    if not tasks or episode.support.x.dim() != 3 or y is None or (y.dim() > 2 and y.shape[-1] != 1):
        return ()
    inputs = torch.stack([one.inputs for one in shown])
    after = _curves(posterior.select(tasks), inputs, num_draws, seed)
    if after is None:  # classes have no curve, and some classifiers no answer to an empty support
        return ()
    support = episode.support.select(tasks)
    empty = Points(support.x, support.y, torch.zeros_like(support.mask))
    before = _curves(adapter.adapt(empty, generator=_seeded(seed)), inputs, num_draws, seed)
    if before is None:
        return ()
    x_units, y_units = units
    bands = []
    for i, (one, task) in enumerate(zip(shown, tasks, strict=True)):
        sets = []
        for points in episode:
            real = points.mask[task]
            assert points.y is not None
            sets += [x_units(points.x[task, real, 0]).numpy(), y_units(points.y[task, real].flatten()).numpy()]
        curves = [_one(c, i, one.grid, units) for c in (before, after)]
        bands.append(Bands(
            task=one.task, name=one.name, before=curves[0], after=curves[1],
            support_x=sets[0], support_y=sets[1], query_x=sets[2], query_y=sets[3], explanations=one.explanations,
        ))  # fmt: skip
    return tuple(bands)


def exact_maps_of(
    family: Any, truth: Truth, episode: Episode, shown: list[int], names: list[str]
) -> tuple[ProbabilityMap, ...]:
    """Of tasks with two inputs and two classes whose exact predictive is known."""
    tasks = [task for task in shown if truth.nll is not None and not truth.nll[task].isnan()]
    if truth.probs is None or not tasks or episode.support.x.dim() != 3 or episode.support.x.shape[-1] != 2:
        return ()
    every = torch.cat([points.x[points.mask] for points in episode])
    first, second = (torch.linspace(float(v.min()), float(v.max()), MAP_POINTS, dtype=v.dtype) for v in every.mT)
    support = episode.support.select(tasks)
    x = _lattice(first, second).expand(len(tasks), -1, -1)
    probs = family.exact_predictive(support, x).mean.unflatten(-1, (MAP_POINTS, MAP_POINTS)).double().numpy()
    assert support.y is not None
    seen = [(support.x[i, real].numpy(), support.y[i, real].numpy()) for i, real in enumerate(support.mask)]
    return tuple(
        ProbabilityMap(
            task=task, name=names[task], first=first.numpy(), second=second.numpy(), probs=probs[i].round(MAP_DECIMALS),
            support_x=seen[i][0], support_y=seen[i][1],
        )
        for i, task in enumerate(tasks)
    )  # fmt: skip


def maps_of(
    posterior: Posterior, first: int, exact: tuple[ProbabilityMap, ...], num_draws: int, seed: int
) -> tuple[ProbabilityMap, ...]:
    """What a learner makes of the tasks and the grids of the ``exact`` maps; its posterior begins with task number ``first``."""
    if not exact:
        return ()
    x = torch.stack([_lattice(*(torch.tensor(v, dtype=torch.get_default_dtype()) for v in (m.first, m.second))) for m in exact])
    p = posterior.select([m.task - first for m in exact]).predict(x, None if posterior.is_point else num_draws, generator=_seeded(seed))
    if not has_two_classes(p):
        return ()
    with torch.no_grad():
        every = probability_of_1(p).unflatten(-1, exact[0].probs.shape).double().cpu()
    few = every[torch.linspace(0, len(every) - 1, min(MAP_DRAWS, len(every))).round().long()]
    mean, draws = (v.numpy().round(MAP_DECIMALS) for v in (every.mean(0), few))
    return tuple(replace(m, probs=mean[i], draws=draws[:, i]) for i, m in enumerate(exact))


def _curves(posterior: Posterior, x: Tensor, num_draws: int, seed: int) -> dict[str, Tensor] | None:
    p = posterior.predict(x, None if posterior.is_point else num_draws, generator=_seeded(seed))
    if p.is_classification or len(p.event_shape):
        return None
    with torch.no_grad():
        (low50, high50), (low90, high90) = p.interval(0.5), p.interval(0.9)
        draws = p.means[torch.linspace(0, p.num_draws - 1, min(EXAMPLE_DRAWS, p.num_draws)).round().long()]
    return {"mean": p.mean, "lower50": low50, "upper50": high50, "lower90": low90, "upper90": high90, "draws": draws}


def _one(curves: dict[str, Tensor], i: int, grid: Tensor, units: Units) -> Curves:
    arrays = {k: units[1]((v[:, i] if k == "draws" else v[i])[..., : len(grid)].cpu()).numpy() for k, v in curves.items()}
    return Curves(grid=units[0](grid).numpy(), **arrays)


def _grid(episode: Episode, task: int) -> Tensor:
    every = torch.cat([p.x[..., 0][p.mask] for p in episode])
    distinct = every.unique()
    if len(distinct) <= FEW_VALUES:
        return distinct
    return torch.linspace(float(every.min()), float(every.max()), GRID_POINTS)


def _inputs(episode: Episode, task: int, grid: Tensor) -> Tensor:
    """The grid in the first feature, with the task's own means in the others, ``(G, F)``."""
    own = torch.cat([p.x[task][p.mask[task]] for p in episode]).mean(0)
    x = own.expand(len(grid), -1).clone()
    x[:, 0] = grid
    return x


def _lattice(first: Tensor, second: Tensor) -> Tensor:
    """All pairs, ``(H · G, 2)``, the first input running fastest."""
    b, a = torch.meshgrid(second, first, indexing="ij")
    return torch.stack([a, b], -1).flatten(0, 1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
