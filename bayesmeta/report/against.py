"""Scores against the truth in words: what each of them is, of which tasks, and who sees all that a task may be."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bayesmeta.report.evidence import Evidence
from bayesmeta.report.measures import AMBIGUOUS, OPEN, measure
from bayesmeta.report.numbers import Row, by_learner, scored
from bayesmeta.report.words import several

GAP, MODES, LABELS = "nll_gap", "mode_coverage", "label_coverage"


def meanings(report: Evidence, rows: list[Row]) -> list[str]:
    """A sentence for each score against the truth that the report has."""
    have = {row["metric"] for row in rows}
    sentences = []
    if GAP in have:
        what = "NLL minus that of the exact predictive, which nobody can beat, in nats a point"
        sentences.append(f"{_name(GAP)}: {what}{_known(report, GAP)}.")
    if MODES in have:
        names, count = several(list(report.explanation_names)), int(scored(report, MODES).sum())
        which = f"{tasks_of(count, len(report.query_sizes))} whose support leaves {names} open, each at least {AMBIGUOUS:.0%} likely"
        sentences.append(f"{_name(MODES)}: in the {which}, the share of them that the learner's draws are near to; one answer finds one.")
    if LABELS in have:
        what = f"of the labels that the support leaves open, at least {OPEN:.0%} likely, the share that the learner's draws give"
        sentences.append(f"{_name(LABELS)}: {what}{_known(report, LABELS)}.")
    return sentences


def findings(report: Evidence, rows: list[Row]) -> list[str]:
    """How far the nearest learner is from the exact predictive, and in how many ambiguous tasks each sees every explanation."""
    sentences = []
    gaps = {name: ends for (name, metric), ends in by_learner(rows).items() if metric == GAP and np.isfinite(ends[0])}
    if gaps:
        first = min(gaps, key=lambda name: gaps[name][0])
        estimate, lower, upper = gaps[first]
        ends = f" (95% interval {lower:.2g} to {upper:.2g})" if np.isfinite(upper - lower) else ""
        sentences.append(f"The exact predictive is the best that can be: {first} comes nearest, {estimate:.2g} nats a point from it{ends}.")
    if report.explanation_names and (shares := finds_all(report)):
        count, tasks = int(scored(report, MODES).sum()), len(report.query_sizes)
        which = f"{tasks_of(count, tasks)} leave{'s' * (count == 1)} {all_of(report)} open ({', '.join(report.explanation_names)})"
        sentences.append(f"{which}. The share of them in which draws find {all_of(report).split()[0]}: {_ranked(shares)}.")
    elif report.explanation_names:
        sentences.append(f"No task leaves {all_of(report)} open ({', '.join(report.explanation_names)}).")
    labels = {name: ends[0] for (name, metric), ends in by_learner(rows).items() if metric == LABELS and np.isfinite(ends[0])}
    if labels:
        sentences.append(f"Of the labels that a support set leaves open, draws give this share: {_ranked(labels)}.")
    return sentences


def finds_all(report: Evidence) -> dict[str, float]:
    """The share of ambiguous tasks in which a learner's draws find every explanation, by learner."""
    tasks = scored(report, MODES)
    have = {name: result.metrics[MODES] for name, result in report.results.items() if MODES in result.metrics}
    return {name: float(np.mean(values[tasks] == 1)) for name, values in have.items()} if tasks.any() else {}


def all_of(report: Evidence) -> str:
    """The explanations as a phrase: "both explanations"."""
    return "both explanations" if len(report.explanation_names) == 2 else "all explanations"


def tasks_of(count: int, total: int) -> str:
    """``count`` of ``total`` tasks, in words."""
    return f"{count:,} of {total:,} tasks"


def _ranked(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda pair: -pair[1]))


def _name(metric: str) -> str:
    label = measure(metric).label
    return label[0].upper() + label[1:]


def _known(report: Evidence, metric: str) -> str:
    """Of how many tasks the truth is known, where not of all."""
    known, asked = int(scored(report, metric).sum()), int((report.query_sizes > 0).sum())
    return f" ({tasks_of(known, asked)}, where it is known)" if known < asked else ""
