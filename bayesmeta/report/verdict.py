"""The numbers in a few sentences, no stronger than the intervals allow."""

from __future__ import annotations

import numpy as np

from bayesmeta.report.against import findings
from bayesmeta.report.evidence import Evidence
from bayesmeta.report.measures import CALIBRATION_ERROR, ECE
from bayesmeta.report.numbers import Row, best, by_learner, paired
from bayesmeta.report.words import several


def verdict(report: Evidence, rows: list[Row]) -> list[str]:
    """Who is best in NLL, and from whom that can be told; who sees all that a task may be; whose intervals hold too little or too much."""
    return [*_ranking(report, rows), *findings(report, rows), *_coverage(report, rows), *_calibration(report, rows)]


def _ranking(report: Evidence, rows: list[Row]) -> list[str]:
    first = best(report)
    estimate, lower, upper = by_learner(rows).get((first, "nll"), (np.nan,) * 3)
    if not np.isfinite(estimate):
        return ["No learner has a finite NLL."] if any("nll" in r.metrics for r in report.results.values()) else []
    ends = f" (95% interval {lower:.3g} to {upper:.3g})" if np.isfinite(upper - lower) else ""
    if len(report.results) == 1:
        return [f"{first} has a mean NLL of {estimate:.3g}{ends}."]
    sentences = [f"{first} has the lowest NLL, {estimate:.3g}{ends}."]
    gaps = paired(report, "nll", first)
    worse = [row["learner"] for row in gaps if row["excludes_zero"]]
    close = [row["learner"] for row in gaps if not row["excludes_zero"] and np.isfinite(row["estimate"])]
    if worse:
        sentences.append(f"On the same tasks {several(worse)} {_are(worse)} worse in NLL: the interval excludes zero.")
    if close:
        sentences.append(f"These tasks do not tell {several(close)} from {first}: the interval includes zero.")
    return sentences


def _coverage(report: Evidence, rows: list[Row]) -> list[str]:
    numbers = by_learner(rows)
    have = {n: numbers[n, "coverage90"] for n in report.results if (n, "coverage90") in numbers}
    have = {n: ends for n, ends in have.items() if np.isfinite(sum(ends))}
    below = [f"{n} ({_percent(e)})" for n, (e, _, upper) in have.items() if upper < 0.9]
    above = [f"{n} ({_percent(e)})" for n, (e, lower, _) in have.items() if lower > 0.9]
    right = [f"{n} ({_percent(e)})" for n, (e, lower, upper) in have.items() if lower <= 0.9 <= upper]
    sentences = []
    if below:
        sentences.append(f"Overconfident: the 90% intervals of {several(below)} hold fewer targets than they promise.")
    if above:
        sentences.append(f"Underconfident: the 90% intervals of {several(above)} hold more targets than they promise.")
    if right:
        sentences.append(f"The 90% intervals of {several(right)} are compatible with what they promise.")
    return sentences


def _calibration(report: Evidence, rows: list[Row]) -> list[str]:
    for metric, words in ((CALIBRATION_ERROR, "calibration error of quantiles"), (ECE, "expected calibration error")):
        found = {row["learner"]: row["estimate"] for row in rows if row["metric"] == metric}
        found = {n: value for n, value in found.items() if np.isfinite(value)}
        if len(found) > 1:
            first, last = min(found, key=lambda n: found[n]), max(found, key=lambda n: found[n])
            return [
                f"The {words} is smallest for {first} ({found[first]:.2g}), largest for {last} ({found[last]:.2g})."
            ]
    return []


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
