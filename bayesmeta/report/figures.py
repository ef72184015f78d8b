"""One picture of a report at a time, on the caller's axes: which arrays of which learner, and in whose colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from bayesmeta import plots
from bayesmeta.plots.bands import band_limits, discrete_values
from bayesmeta.plots.explanations import explained_limits
from bayesmeta.plots.maps import EXACT
from bayesmeta.plots.style import Look, looks, name_panel
from bayesmeta.report.evidence import Evidence
from bayesmeta.report.measures import measure
from bayesmeta.report.numbers import Row, best, known_learner, pit_of, summary
from bayesmeta.report.results import Array, Bands, ProbabilityMap
from bayesmeta.report.words import nearest

PARTIAL = ("NUTS", "Exact", "ABML", "LLAMA", "BayesianBlackBox", "BMAML", "MAML")  # whose pooling to show, if there


def plot(report: Evidence, kind: str, ax: Axes | None, **options: Any) -> Axes:
    """See `Report.plot`."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of plot {kind!r}{nearest(kind, KINDS)}")
    return KINDS[kind](report, ax, **options)


# --- what a report has for which picture


def looks_of(report: Evidence) -> dict[str, Look]:
    """The same colours in every picture; a learner that was trained and not evaluated comes after the others."""
    return looks(dict.fromkeys([*report.results, *report.histories]))


def pits_of(report: Evidence) -> dict[str, Array]:
    """PIT (T, N) by learner, of those that have it; inf where a learner failed at a point."""
    return {name: pit_of(result, report) for name, result in report.results.items() if result.pit is not None}


def probs_of(report: Evidence) -> dict[str, tuple[Array, Array]]:
    """Class probabilities and labels by learner, of those that have them."""
    results = report.results.items()
    return {n: (r.probs, r.labels) for n, r in results if r.probs is not None and r.labels is not None}


def bands_of(report: Evidence) -> dict[str, tuple[Bands, ...]]:
    """Bands by learner, of those that have any."""
    return {name: result.bands for name, result in report.results.items() if result.bands}


def explained_of(report: Evidence) -> dict[str, tuple[Bands, ...]]:
    """Bands of ambiguous tasks by learner, of those that have any."""
    kept = {name: tuple(band for band in bands if band.explanations) for name, bands in bands_of(report).items()}
    return {name: bands for name, bands in kept.items() if bands}


def maps_of(report: Evidence) -> dict[str, tuple[ProbabilityMap, ...]]:
    """Probability maps by learner, of those that have any."""
    return {name: result.maps for name, result in report.results.items() if result.maps}


def history_of(report: Evidence, learner: str) -> dict[str, Any]:
    """What `loss_curve` draws of a learner's training."""
    known = ("step", "loss", "validation_step", "validation")
    return {key: report.histories[learner][key] for key in known if key in report.histories[learner]}


def pooling_roles(report: Evidence) -> list[str]:
    """Who shows no, partial and complete pooling by default, whether in the report or not."""
    return ["NoPooling", next((name for name in PARTIAL if name in report.results), PARTIAL[0]), "CompletePooling"]


def shared_sites(report: Evidence, learners: Sequence[str]) -> list[str]:
    """Scalar task-level sites that all ``learners`` report."""
    first, *others = (report.results[name].sites for name in learners)
    return [site for site in first if all(site in sites for sites in others)]


# --- the kinds


def _metric(report: Evidence, ax: Axes | None, *, metric: str = "nll") -> Axes:
    return metric_axes(report, summary(report), metric, ax, numbers=True)


def metric_axes(report: Evidence, rows: Sequence[Row], metric: str, ax: Axes | None, *, numbers: bool) -> Axes:
    """Dots and intervals of one metric; ``rows`` of `summary`."""
    chosen = [row for row in rows if row["metric"] == metric]
    if not chosen:
        raise ValueError(f"no learner has a metric {metric!r}{nearest(metric, {row['metric'] for row in rows})}")
    estimates = {row["learner"]: (row["estimate"], row["lower"], row["upper"]) for row in chosen}
    what, look = measure(metric), looks_of(report)
    gap = " " if numbers else "\n"  # a panel of a grid is narrow
    label = f"{what.label}{gap}({what.direction})" if what.direction else what.label
    return plots.metric_intervals(estimates, label=label, reference=what.nominal, look=look, numbers=numbers, ax=ax)


def _calibration(
    report: Evidence, ax: Axes | None, *, curve: str = "central", learners: Sequence[str] | None = None
) -> Axes:
    pits = pits_of(report)
    names = list(pits) if learners is None else [_choose(report, name, pits, "PIT values") for name in learners]
    if not names:
        _choose(report, None, pits, "PIT values")
    options: dict[str, Any] = {"kind": curve, "seed": report.seed, "look": looks_of(report)}
    return plots.calibration_curve({name: pits[name] for name in names}, ax=ax, **options)


def _pit(report: Evidence, ax: Axes | None, *, learner: str | None = None, bins: int = 10) -> Axes:
    pits = pits_of(report)
    learner = _choose(report, learner, pits, "PIT values")
    ax = plots.pit_histogram(pits[learner], bins=bins, colour=looks_of(report)[learner].colour, ax=ax)
    return _named(ax, report, learner)


def _reliability(report: Evidence, ax: Axes | None, *, learner: str | None = None, bins: int = 15) -> Axes:
    have = probs_of(report)
    learner = _choose(report, learner, have, "class probabilities")
    look = looks_of(report)[learner]
    ax = plots.reliability_diagram(*have[learner], bins=bins, seed=report.seed, look=look, ax=ax)
    return _named(ax, report, learner)


def _bands(
    report: Evidence, ax: Axes | None, *, learner: str | None = None, task: int = 0, when: str = "after"
) -> Axes:
    have = bands_of(report)
    learner = _choose(report, learner, have, "predictive bands")
    kept = have[learner]
    _check_task(task, kept, "bands")
    if when not in ("before", "after"):
        raise ValueError(f'when must be "before" or "after", got {when!r}')
    band, everything = kept[task], [one for bands in have.values() for one in bands]
    ax = plots.predictive_bands(
        band.after if when == "after" else band.before,
        support=(band.support_x, band.support_y) if when == "after" else None,
        query=(band.query_x, band.query_y),
        values=discrete_values(everything),
        colour=looks_of(report)[learner].colour,
        x=report.feature,
        y=report.target,
        ax=ax,
    )
    ax.set_ylim(*band_limits(everything))  # one scale for all learners and tasks, so that pictures can be compared
    return _named(ax, report, learner, note=f"{when}: {band.name}")


def _explanation(report: Evidence, ax: Axes | None, *, learner: str | None = None, task: int = 0) -> Axes:
    have = explained_of(report)
    learner = _choose(report, learner, have, "draws for an ambiguous task")
    _check_task(task, have[learner], "draws")
    band, look = have[learner][task], looks_of(report)[learner]
    ax = plots.explained_draws(
        band.after,
        band.explanations,
        support=(band.support_x, band.support_y),
        colour=look.colour,
        x=report.feature,
        y=report.target,
        ax=ax,
    )
    ax.set_ylim(*explained_limits([kept[task] for kept in have.values()]))
    return _named(ax, report, learner, note=band.name)


def _map(
    report: Evidence, ax: Axes | None, *, learner: str | None = None, task: int = 0, what: Any = "probability"
) -> Axes:
    have = maps_of(report)
    if not have and not report.exact_maps:
        raise ValueError("no learner in this report has probability maps")
    if learner is None and report.exact_maps:
        kept, look, name = report.exact_maps, EXACT, "exact"
    else:
        name = _choose(report, learner, have, "probability maps")
        kept, look = have[name], looks_of(report)[name]
    _check_task(task, kept, "maps")
    ax = plots.probability_map(kept[task], what=what, colour=look.colour, x="first input", y="second input", ax=ax)
    name_panel(ax, name, look, note=kept[task].name)
    return ax


def shrinkage_axes(
    report: Evidence,
    ax: Axes | None,
    *,
    site: str | None = None,
    no_pooling: str | None = None,
    partial: str | None = None,
    complete: str | None = None,
) -> Axes:
    """Shrinkage of one site. Raises ValueError, saying which, where a learner or the site is missing."""
    named = {"no_pooling": no_pooling, "partial": partial, "complete": complete}
    roles = {role: name or usual for (role, name), usual in zip(named.items(), pooling_roles(report), strict=True)}
    for role, name in roles.items():
        if name not in report.results:
            there = ", ".join(report.results)
            raise ValueError(f"shrinkage needs {name!r}, which is not among {there}; name another by {role}=")
    who, sites = ", ".join(roles.values()), shared_sites(report, list(roles.values()))
    if not sites:
        raise ValueError(f"shrinkage needs a scalar task-level site that all of {who} report; there is none")
    site = sites[0] if site is None else site
    if site not in sites:
        raise ValueError(f"no scalar task-level site {site!r} shared by {who}{nearest(site, sites)}")
    alone, pooled, everyone = (report.results[name].sites[site] for name in roles.values())
    options: dict[str, Any] = {f"{role}_label": name for role, name in roles.items()}
    options["colour"] = looks_of(report)[roles["partial"]].colour
    return plots.shrinkage(alone, pooled, everyone, report.support_sizes, y=site, ax=ax, **options)


def _loss(report: Evidence, ax: Axes | None, *, learner: str | None = None) -> Axes:
    if not report.histories:
        raise ValueError("this report has no training history: build it with histories=")
    learner = next(iter(report.histories)) if learner is None else learner
    if learner not in report.histories:
        raise ValueError(f"no training history of {learner!r}{nearest(learner, report.histories)}")
    ax = plots.loss_curve(**history_of(report, learner), colour=looks_of(report)[learner].colour, ax=ax)
    return _named(ax, report, learner)


KINDS: dict[str, Callable[..., Axes]] = {
    "metric": _metric,
    "calibration": _calibration,
    "pit": _pit,
    "reliability": _reliability,
    "bands": _bands,
    "explanation": _explanation,
    "map": _map,
    "shrinkage": shrinkage_axes,
    "loss": _loss,
}


def _check_task(task: int, kept: Sequence[Any], what: str) -> None:
    if not 0 <= task < len(kept):
        raise ValueError(f"task must be from 0 to {len(kept) - 1}, the tasks whose {what} were kept, got {task}")


def _named(ax: Axes, report: Evidence, learner: str, note: str = "") -> Axes:
    name_panel(ax, learner, looks_of(report)[learner], note=note)
    return ax


def _choose(report: Evidence, learner: str | None, have: Mapping[str, Any], what: str) -> str:
    """``learner``, or the best in NLL if it has what is needed, or the first that has."""
    if not have:
        raise ValueError(f"no learner in this report has {what}")
    if learner is None:
        favourite = best(report)
        return favourite if favourite in have else next(iter(have))
    if known_learner(report, learner) not in have:
        raise ValueError(f"{learner} has no {what} in this report; {', '.join(have)} do")
    return learner
