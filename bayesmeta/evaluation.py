"""`evaluate`: the same held-out tasks for every adapter, and what each of them knew and did not know."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from . import __version__
from .compiled import Compiled
from .distributed import ranks
from .episodes import Episode, Points
from .learners.base import AbstractAdapter, checked_choice, checked_steps
from .metrics import accuracy, brier, crps, interval_coverage, interval_width, randomized_pit, rmse, task_mean
from .posteriors import Posterior
from .predictive import Predictive
from .report import LearnerResult, ProbabilityMap, Report, joined
from .shown_tasks import Shown, Units, bands_of, exact_maps_of, examples_of, explanations_of, maps_of, shown_task, units_of
from .tasks.base import TaskFamily
from .truth import Truth, truth_of

DEFAULT_TASKS = 1_000
CRPS_SAMPLES = 200
COMPILING_PAYS = 120.0  # seconds of eager adaptation and prediction to come; compiling takes 5–40


def evaluate(
    adapters: AbstractAdapter | Mapping[str, AbstractAdapter], family: TaskFamily | Episode, *, num_tasks: int | None = None,
    num_draws: int = 100, num_theta: int = 10, seed: int = 0, examples: int = 3, title: str = "Held-out tasks", target: str | None = None,
    feature: str | None = None, notes: tuple[str, ...] = (), histories: Mapping[str, Any] | None = None, task_chunk: int | None = None,
    compile: bool | str = "auto",
) -> Report:
    """Adapts every adapter to the same support sets, and scores its predictive on the same query sets.

    ``family``: held-out tasks; a finite family gives each of its tasks once, an endless one 1,000 unless ``num_tasks`` says otherwise,
    drawn by ``seed``. ``num_draws``: draws of φ in each predictive (a Delta takes one). The predictive of a point is the average
    over draws; NLL is −log of it, in nats a point. ``num_theta``: draws of θ, where it is variational or by NUTS, among which the
    draws of φ are shared out. ``examples``: how many tasks are kept for pictures, from the smallest support
    set to the largest, ambiguous ones first where the family knows its explanations. ``target``, ``feature``: names for axes.
    ``histories``: `History` of each learner, for its loss curve. ``task_chunk``: how many tasks are adapted to and predicted at once,
    which bounds the memory; default all. Under ``torchrun`` each process takes its share of the tasks, and all have the whole report.
    Draws are taken chunk by chunk, so Monte Carlo error differs with both. ``compile``: `Compiled` adaptation for the chunks of one
    size; "auto" does so where the chunks to come take clearly longer than compiling.

    Where the family has ``exact_predictive`` every learner's distance to it is scored, and where it has ``explanations`` how many of
    them its draws find in ambiguous tasks: see `bayesmeta.tasks.TaskFamily` and `docs/evaluation.md`.

    Numbers and pictures are in the family's original units (``family.target_scale``, ``family.scaling``).
    Raises ValueError for no adapters, TypeError for what is not an adapter.
    """
    named = named_adapters(adapters)
    if task_chunk is not None:
        checked_steps("task_chunk", task_chunk, least=1)
    if not isinstance(compile, bool):
        checked_choice("compile", compile, ("auto",))
    episode = held_out_episode(family, num_tasks, seed).to("cpu")
    episode.check()
    if episode.query.y is None:
        raise ValueError("query.y: expected targets, got None")
    if not bool(episode.query.mask.any()):
        raise ValueError("no task has a query point: there is nothing to score")
    scale, units = float(getattr(family, "target_scale", 1.0)), units_of(family)
    truth = truth_of(family, episode)
    tasks = examples_of(episode, examples, first=truth.ambiguous)
    names = _task_names(family, episode)
    explained, exact_maps = explanations_of(family, truth, episode, tasks, units), exact_maps_of(family, truth, episode, tasks, names)
    shown = [shown_task(episode, task, names[task], explained.get(task, ())) for task in tasks]
    ask = _Ask(num_draws, num_theta, seed, scale, units, exact_maps, compile)
    results = {name: _result(adapter, episode, truth, shown, ask, task_chunk) for name, adapter in named.items()}
    together = [name for name, adapter in named.items() if adapter.model.network is not None and adapter.model.network.is_transductive]
    if together:
        notes = (*notes, f"Transductive, batch norm by the query set's own statistics: {', '.join(together)}.")
    return Report(
        results=results, scored_tasks={k: v.numpy() for k, v in truth.scored_tasks(episode.query).items()},
        explanation_names=truth.names, exact_maps=exact_maps,
        support_sizes=episode.support.counts.numpy(), query_sizes=episode.query.counts.numpy(), task_names=tuple(names),
        title=title, target=target or str(getattr(family, "target_name", "y")), feature=feature or _feature(family), seed=seed, notes=notes,
        environment=environment(), histories={k: v.as_arrays() for k, v in (histories or {}).items()},
    )  # fmt: skip


def named_adapters(adapters: AbstractAdapter | Mapping[str, AbstractAdapter]) -> dict[str, AbstractAdapter]:
    """By name, one alone by its class's; raises as `evaluate` does."""
    if not isinstance(adapters, AbstractAdapter | Mapping):
        raise TypeError(f"adapters: expected a learner or a dictionary of learners by name, got {type(adapters).__name__}")
    named = {type(adapters).__name__: adapters} if isinstance(adapters, AbstractAdapter) else dict(adapters)
    if not named:
        raise ValueError("adapters: expected at least one, got none")
    for name, adapter in named.items():
        if not isinstance(adapter, AbstractAdapter):
            raise TypeError(f"adapters[{name!r}]: expected a learner, got {_what(adapter)}")
    return named


def held_out_episode(family: TaskFamily | Episode, num_tasks: int | None, seed: int) -> Episode:
    """The episode that ``seed`` fixes: every task of a finite family in order, or ``num_tasks`` (default 1,000) of them at random."""
    if num_tasks is not None:
        checked_steps("num_tasks", num_tasks, least=1)
    if isinstance(family, Episode):
        return family if num_tasks is None else family.select(slice(0, num_tasks))
    generator = torch.Generator().manual_seed(seed)
    total = getattr(family, "num_tasks", None)
    if hasattr(family, "episodes") and total is not None and (num_tasks or DEFAULT_TASKS) >= total:
        return family.episodes(generator=generator)
    wanted = num_tasks or DEFAULT_TASKS
    return family.sample(wanted if total is None else min(wanted, total), generator=generator)


def environment() -> dict[str, str]:
    """Versions, threads and machine: what a number needs beside it to be repeated."""
    return {
        "bayesmeta": __version__, "python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__,
        "numpy": np.__version__, "threads": str(torch.get_num_threads()), "machine": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def _what(value: object) -> str:
    return f"the class {value.__name__}: construct it with a model" if isinstance(value, type) else type(value).__name__


class _Ask(NamedTuple):
    """What every learner is asked: draws, their seed, and the units of the answers."""

    num_draws: int
    num_theta: int
    seed: int
    scale: float
    units: Units
    exact_maps: tuple[ProbabilityMap, ...]
    compile: bool | str


def _result(
    adapter: AbstractAdapter, episode: Episode, truth: Truth, shown: list[Shown], ask: _Ask, task_chunk: int | None
) -> LearnerResult:
    """Chunk after chunk of this process's share of the tasks, and of the other processes', put together."""
    group = ranks()
    share, parts = group.share(episode.num_tasks), []
    size, generator = task_chunk or episode.num_tasks, torch.Generator().manual_seed(ask.seed + group.rank)
    runner = Compiled(adapter) if ask.compile is True else adapter
    for first in range(share.start, share.stop, size):
        here = slice(first, min(first + size, share.stop))
        parts.append(_part(adapter, runner, episode.select(here), truth.select(here), first, shown, ask, generator))
        if ask.compile == "auto" and runner is adapter and (share.stop - first - size) / size * parts[-1].seconds > COMPILING_PAYS:
            runner = Compiled(adapter)
    whole = joined([part for some in group.gathered(parts) for part in some])
    places = [one.task for one in shown]  # from the smallest support set to the largest
    bands = tuple(sorted(whole.bands, key=lambda band: places.index(band.task)))
    maps = tuple(sorted(whole.maps, key=lambda one: places.index(one.task)))
    return replace(whole, bands=bands, maps=maps)


def _part(
    adapter: AbstractAdapter, runner: AbstractAdapter, episode: Episode, truth: Truth, first: int, shown: list[Shown], ask: _Ask,
    generator: torch.Generator,
) -> LearnerResult:  # fmt: skip
    """Of the tasks from number ``first`` on, adapted by ``runner``: the adapter itself, or compiled."""
    query = adapter.prepared(episode.query, "query")
    model = adapter.model
    before = model.gradient_evaluations
    start = time.perf_counter()
    posterior = runner.adapt_over_theta(episode.support, num_theta=ask.num_theta, generator=generator)
    predictive = posterior.predict(query.x, None if posterior.is_point else ask.num_draws, generator=generator, mask=query.mask)
    seconds = time.perf_counter() - start
    gradients = model.gradient_evaluations - before
    here = range(first, first + episode.num_tasks)
    with torch.no_grad():
        scores, arrays = _scores(predictive, query, generator, ask.scale)
        again = torch.Generator().manual_seed(ask.seed)
        scores |= truth.scores(posterior, predictive, scores["nll"], query.mask, num_draws=ask.num_draws, generator=again)
        sites = _site_means(posterior, ask.num_draws, generator)
    return LearnerResult(
        metrics={k: v.cpu().numpy() for k, v in scores.items()}, **arrays, seconds=seconds, gradient_evaluations=gradients,
        sites={k: v.cpu().numpy() for k, v in sites.items()},
        bands=bands_of(adapter, posterior, episode, first, [one for one in shown if one.task in here], ask.units, ask.num_draws, ask.seed),
        maps=maps_of(posterior, first, tuple(one for one in ask.exact_maps if one.task in here), ask.num_draws, ask.seed),
        diagnostics=posterior.diagnostics, settings=_settings(adapter),
    )  # fmt: skip


def _scores(p: Predictive, query: Points, generator: torch.Generator, scale: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    y, mask = query.y, query.mask
    assert y is not None
    y = y[..., 0] if y.dim() == 3 and y.shape[-1] == 1 else y
    nll = task_mean(-p.log_prob(y), mask)
    if p.is_classification:
        probs = p.probs
        labels = y.long()
        scores = {"nll": nll, "accuracy": accuracy(probs, labels, mask), "brier": brier(probs, labels, mask)}
        return scores, {"probs": probs.cpu().numpy(), "labels": torch.where(mask, labels, -1).cpu().numpy()}
    if y.dim() > 2:  # several outputs: only what needs no marginals
        return {"nll": nll}, {}
    scores = {"nll": nll + (0.0 if p.is_discrete else float(np.log(scale))), "rmse": scale * rmse(p.mean, y, mask)}
    scores["crps"] = scale * task_mean(crps(p.sample(CRPS_SAMPLES, generator=generator), y), mask)
    for level in (50, 90):
        lower, upper = p.interval(level / 100)
        scores[f"coverage{level}"] = interval_coverage(lower, upper, y, mask)
        scores[f"width{level}"] = scale * interval_width(lower, upper, mask)
    u = torch.rand(y.shape, generator=generator).to(nll) if p.is_discrete else torch.ones_like(y)
    pit = randomized_pit(p.cdf_below(y), p.cdf(y), u)
    return scores, {"pit": torch.where(mask, pit, torch.nan).cpu().numpy()}


def _site_means(posterior: Posterior, num_draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    if not posterior.has_phi:
        return {}
    sites = posterior.sites(None if posterior.is_point else num_draws, generator=generator)
    return {name: value.mean(0) for name, value in sites.items() if value.dim() == 2}


def _settings(adapter: AbstractAdapter) -> dict[str, Any]:
    return {k: v for k, v in vars(adapter).items() if not k.startswith("_") and k != "training" and isinstance(v, int | float | str | bool)}


def _task_names(family: TaskFamily | Episode, episode: Episode) -> list[str]:
    names = getattr(family, "task_names", None)
    if names is not None and getattr(family, "num_tasks", None) == episode.num_tasks:
        return [str(name) for name in names()]
    return [f"task {i}" for i in range(episode.num_tasks)]


def _feature(family: TaskFamily | Episode) -> str:
    features = getattr(family, "feature_names", None)
    return str(features[0]) if features else "x"
