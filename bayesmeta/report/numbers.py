"""Every number of a report's tables: means over tasks, paired differences, and their intervals by resampling tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayesmeta.plots.calibration import coverage_shares
from bayesmeta.plots.confidence import reliability_counts
from bayesmeta.plots.resampling import percentile_band, resampled_shares
from bayesmeta.report.evidence import Evidence
from bayesmeta.report.measures import CALIBRATION_ERROR, ECE, in_order, measure
from bayesmeta.report.results import Array, LearnerResult
from bayesmeta.report.words import nearest

Row = dict[str, Any]
KULESHOV_LEVELS = np.arange(1, 21) / 21
ECE_BINS = 15


def summary(report: Evidence) -> list[Row]:
    """A row ``{learner, metric, estimate, lower, upper, tasks}`` for every number of every learner; ends are 95% intervals.

    Metrics are means over tasks; ``calibration_error`` (Kuleshov, 20 levels) is of the curve that is their mean over
    tasks; ``ece`` (15 bins) pools all points;
    ``seconds`` and ``gradient_evaluations`` have no interval (NaN). A learner whose metric is NaN at a task that has
    query points gets NaN: a mean over the tasks at which it did not fail would be no match for the others'. A metric
    that is of some tasks alone (``report.scored_tasks``) is a mean over those; ``tasks`` says of how many.
    """
    names = in_order({metric for result in report.results.values() for metric in result.metrics})
    columns = [(n, m, r.metrics[m]) for n, r in report.results.items() for m in names if m in r.metrics]
    values = [values for _, _, values in columns]
    intervals = mean_intervals(np.stack(values, axis=1), report, [m for _, m, _ in columns]) if columns else []
    counts = [int(scored(report, m).sum()) for _, m, _ in columns]
    rows = [_row(n, m, count, *interval) for (n, m, _), count, interval in zip(columns, counts, intervals, strict=True)]
    every, asked = len(report.query_sizes), int((report.query_sizes > 0).sum())
    for name, result in report.results.items():
        if result.pit is not None:
            rows.append(_row(name, CALIBRATION_ERROR, asked, *_calibration_error(pit_of(result, report), report.seed)))
        if result.probs is not None:
            rows.append(_row(name, ECE, asked, *_ece(result, report.seed)))
        rows.append(_row(name, "seconds", every, result.seconds))
        rows.append(_row(name, "gradient_evaluations", every, result.gradient_evaluations))
    order = {name: i for i, name in enumerate(report.results)}
    return sorted(rows, key=lambda row: order[row["learner"]])  # stable: metrics stay in order


def paired(report: Evidence, metric: str = "nll", reference: str | None = None) -> list[Row]:
    """A row ``{learner, reference, metric, estimate, lower, upper, excludes_zero}`` for each learner but the reference.

    The mean of learner − reference over the same tasks with its 95% interval. ``reference``: a learner's name, default
    `best` in NLL. Raises ValueError for an unknown learner or a metric the reference does not have.
    """
    reference = best(report) if reference is None else known_learner(report, reference)
    base = report.results[reference].metrics
    if metric not in base:
        raise ValueError(f"{reference} has no metric {metric!r}{nearest(metric, base)}")
    others = [n for n, r in report.results.items() if n != reference and metric in r.metrics]
    if not others:
        return []
    with np.errstate(invalid="ignore"):  # inf − inf is NaN, and is shown as that
        gaps = np.stack([report.results[name].metrics[metric] - base[metric] for name in others], axis=1)
    rows = []
    intervals = mean_intervals(gaps, report, [metric] * len(others))
    for name, (estimate, lower, upper) in zip(others, intervals, strict=True):
        row = {"learner": name, "reference": reference, "metric": metric}
        ends = {"estimate": estimate, "lower": lower, "upper": upper}
        rows.append(row | ends | {"excludes_zero": bool(lower > 0 or upper < 0)})
    return rows


def best(report: Evidence, metric: str = "nll") -> str:
    """The learner with the best mean of ``metric``; the first one where nobody has a finite one."""
    found = {}
    for name, result in report.results.items():
        if metric in result.metrics:
            mean = mean_intervals(result.metrics[metric][:, None], report, [metric])[0][0]
            found[name] = mean * measure(metric).better
    finite = {name: value for name, value in found.items() if np.isfinite(value)}
    return max(finite, key=lambda name: finite[name]) if finite else next(iter(report.results))


def winners(rows: list[Row]) -> set[tuple[str, str]]:
    """(learner, metric) of the best estimate of each metric that has a better and a worse; none without a rival."""
    found = set()
    for metric in {row["metric"] for row in rows if measure(row["metric"]).better}:
        value = {row["learner"]: measure(metric).better * row["estimate"] for row in rows if row["metric"] == metric}
        finite = [v for v in value.values() if np.isfinite(v)]
        if len(value) > 1 and finite:
            found |= {(name, metric) for name, v in value.items() if v == max(finite)}
    return found


def off_nominal(rows: list[Row]) -> set[tuple[str, str]]:
    """(learner, metric) of each coverage whose interval excludes the nominal level."""
    goals = {row["metric"]: measure(row["metric"]).nominal for row in rows}
    found = set()
    for row in rows:
        goal = goals[row["metric"]]
        if goal is not None and (row["lower"] > goal or row["upper"] < goal):
            found.add((row["learner"], row["metric"]))
    return found


def known_learner(report: Evidence, name: str) -> str:
    """``name``, or ValueError with the nearest one where the report has no such learner."""
    if name not in report.results:
        raise ValueError(f"no learner {name!r} in this report{nearest(name, report.results)}")
    return name


def scored(report: Evidence, metric: str) -> Array:
    """The tasks (T,) that a metric is of: those of ``report.scored_tasks``, else all with query points."""
    return report.scored_tasks.get(metric, report.query_sizes > 0)


def mean_intervals(values: Array, report: Evidence, metrics: Sequence[str]) -> list[tuple[float, float, float]]:
    """Mean over tasks and 95% interval of each column of ``values`` (T, K), each of one of K ``metrics``.

    Tasks that the metric is not of are left out. NaN at any other task makes the column NaN. One task alone, or an
    infinite value, has a mean and no interval.
    """
    used = np.stack([scored(report, metric) for metric in metrics], axis=1) | ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = np.where(used, values, 0.0).sum(0) / np.maximum(used.sum(0), 1)
    fine = np.isfinite(means) & (used.sum(0) > 1)
    lower, upper = np.full(len(means), np.nan), np.full(len(means), np.nan)
    if fine.any():
        kept = used[:, fine]
        shares = resampled_shares(np.where(kept, values[:, fine], 0.0), kept.astype(float), seed=report.seed)
        lower[fine], upper[fine] = percentile_band(shares)
    means = np.where(used.any(0), means, np.nan)
    return [(float(m), float(low), float(high)) for m, low, high in zip(means, lower, upper, strict=True)]


def pit_of(result: LearnerResult, report: Evidence) -> Array:
    """The learner's PIT (T, N) with inf, covered by nothing, at query points where it gave none; padding stays NaN."""
    assert result.pit is not None
    pit = np.array(result.pit)
    missing = np.isnan(pit)
    lacking = report.query_sizes - (~missing).sum(1)
    # How many are missing is known, not where: any free places of the task will do, for its points count alike.
    pit[missing & (np.cumsum(missing, axis=1) <= lacking[:, None])] = np.inf
    return pit


def failures(report: Evidence) -> list[str]:
    """A sentence for each learner that gave no number somewhere it should have."""
    sentences = []
    for name, result in report.results.items():
        bad = np.zeros(len(report.query_sizes), dtype=bool)
        for metric, values in result.metrics.items():
            bad |= ~np.isfinite(values) & scored(report, metric)
        if bad.any():
            sentences.append(f"{name} gave no finite score on {int(bad.sum())} of {len(bad)} tasks.")
    return sentences


def _row(
    learner: str, metric: str, tasks: int, estimate: float, lower: float = np.nan, upper: float = np.nan
) -> Row:
    ends = {"estimate": estimate, "lower": lower, "upper": upper}
    return {"learner": learner, "metric": metric} | ends | {"tasks": tasks}


def _calibration_error(pit: Array, seed: int) -> tuple[float, float, float]:
    shares, tasks = coverage_shares(pit, kind="quantile", levels=KULESHOV_LEVELS)
    return _of_means(shares, tasks, lambda curve: ((curve - KULESHOV_LEVELS) ** 2).mean(-1), seed)


def _ece(result: LearnerResult, seed: int) -> tuple[float, float, float]:
    assert result.probs is not None and result.labels is not None
    if np.isnan(result.probs[result.labels >= 0]).any():
        return np.nan, np.nan, np.nan
    hits, sums, counts = reliability_counts(result.probs, result.labels, bins=ECE_BINS)
    points = np.repeat(counts.sum(1, keepdims=True), ECE_BINS, axis=1)
    # Σ_b n_b / n |accuracy_b − confidence_b| = Σ_b |right_b − confidence summed_b| / n
    return _of_means(hits - sums, points, lambda shares: np.abs(shares).sum(-1), seed)


def _of_means(sums: Array, counts: Array, statistic: Any, seed: int) -> tuple[float, float, float]:
    if counts.sum() == 0:
        return np.nan, np.nan, np.nan
    estimate = float(statistic(sums.sum(0) / counts.sum(0)))
    if len(sums) < 2:
        return estimate, np.nan, np.nan
    lower, upper = percentile_band(statistic(resampled_shares(sums, counts, seed=seed))[:, None])
    return estimate, float(lower[0]), float(upper[0])


def by_learner(rows: list[Row]) -> Mapping[tuple[str, str], tuple[float, float, float]]:
    """(estimate, lower, upper) by (learner, metric)."""
    return {(row["learner"], row["metric"]): (row["estimate"], row["lower"], row["upper"]) for row in rows}
