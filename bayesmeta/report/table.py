"""The report as an aligned text table, for a terminal or a log; only characters that every code page has."""

from __future__ import annotations

import numpy as np

from bayesmeta.plots.formats import decimals, number
from bayesmeta.report.against import meanings
from bayesmeta.report.evidence import Evidence
from bayesmeta.report.measures import CALIBRATION_ERROR, ECE, HEADLINE, PROPER, measure
from bayesmeta.report.numbers import Row, best, by_learner, failures, known_learner, off_nominal, paired, winners
from bayesmeta.report.words import amount, duration, per_task

FEW_TASKS = 10


def text_table(report: Evidence, rows: list[Row], reference: str | None = None) -> str:
    """Learner × headline metrics with intervals, the best marked; below, paired differences; ``rows`` of `summary`."""
    reference = best(report) if reference is None else known_learner(report, reference)
    tasks = len(report.query_sizes)
    head = f"{report.title}: {tasks} task{'s' if tasks != 1 else ''}"
    sizes = f"support points {per_task(report.support_sizes)}; query points {per_task(report.query_sizes)}"
    lines = [f"{head}; {sizes}", "", *_scores(report, rows)]
    lines += ["", "± is a 95% interval by resampling tasks: half its width."]
    if winners(rows):
        lines.append("* best of its column.")
    if off_nominal(rows):
        lines.append("! the interval of the coverage excludes its nominal level.")
    lines += meanings(report, rows)
    if len(report.results) > 1:
        lines += ["", *_differences(report, rows, reference)]
    if tasks < FEW_TASKS:
        lines.append(f"With {tasks} task{'s' if tasks != 1 else ''} to resample, intervals are too narrow or missing.")
    return "\n".join([*lines, *failures(report), *report.notes])


def _scores(report: Evidence, rows: list[Row]) -> list[str]:
    numbers = by_learner(rows)
    marks = dict.fromkeys(winners(rows), "*") | dict.fromkeys(off_nominal(rows), "!")
    columns = [["", *report.results]]
    for metric in [m for m in HEADLINE if any((n, m) in numbers for n in report.results)]:
        own = {n: numbers[n, metric] for n in report.results if (n, metric) in numbers}
        if metric in (CALIBRATION_ERROR, ECE):  # their intervals are lopsided, no ± would be true of them
            own = {n: (estimate, np.nan, np.nan) for n, (estimate, _, _) in own.items()}
        cells = _cells(own, {n: marks.get((n, metric), " ") for n in own})
        columns.append([measure(metric).label, *(cells.get(n, "- ") for n in report.results)])
    columns.append(["time", *(duration(r.seconds) for r in report.results.values())])
    columns.append(["gradients", *(amount(r.gradient_evaluations) for r in report.results.values())])
    return _aligned(columns)


def _differences(report: Evidence, rows: list[Row], reference: str) -> list[str]:
    others = [name for name in report.results if name != reference]
    columns, clear = [["", *others]], False
    for metric in [m for m in PROPER if m in report.results[reference].metrics]:
        gaps = {row["learner"]: row for row in paired(report, metric, reference)}
        own = {n: (row["estimate"], row["lower"], row["upper"]) for n, row in gaps.items()}
        cells = _gap_cells(own, {n: "†" if row["excludes_zero"] else " " for n, row in gaps.items()})
        columns.append([measure(metric).label, *(cells.get(n, "- ") for n in others)])
        clear |= any(row["excludes_zero"] for row in gaps.values())
    chosen = "the best in NLL, " if (reference, "nll") in winners(rows) else ""
    foot = ["", "† the 95% interval of the difference excludes zero."] if clear else []
    head = f"Difference from {reference}, {chosen}on the same tasks, with its 95% interval"
    return [head, *_aligned(columns), *foot]


def _gap_cells(own: dict[str, tuple[float, float, float]], marks: dict[str, str]) -> dict[str, str]:
    """Both ends, not half the width: the interval of a difference may be lopsided, and whether it holds 0 matters."""
    places = decimals([e for e, _, _ in own.values()], [(upper - lower) / 2 for _, lower, upper in own.values()])
    shown = {n: [f"{'+' * (v >= 0)}{number(v, places)}" for v in values] for n, values in own.items()}
    width = max((len(text) for _, *ends in shown.values() for text in ends), default=0)
    cells = {}
    for name, (estimate, lower, upper) in shown.items():
        ends = f" [{lower:>{width}}, {upper:>{width}}]" if np.isfinite(own[name][1]) else ""
        cells[name] = f"{estimate}{ends}{marks[name]}"
    return cells


def _cells(own: dict[str, tuple[float, float, float]], marks: dict[str, str]) -> dict[str, str]:
    halves = {n: (upper - lower) / 2 for n, (_, lower, upper) in own.items()}
    places = decimals([e for e, _, _ in own.values()], halves.values())
    widest = max((len(number(h, places)) for h in halves.values() if np.isfinite(h)), default=0)
    cells = {}
    for name, (estimate, _, _) in own.items():
        value = number(estimate, places)
        half = f" ± {number(halves[name], places):<{widest}}" if np.isfinite(halves[name]) else ""
        cells[name] = f"{value}{half}{marks[name]}"
    return cells


def _aligned(columns: list[list[str]]) -> list[str]:
    """Rows of text from columns of cells: names at the left, numbers at the right, a rule below the first row."""
    columns = [[" ".join(name.split()) for name in columns[0]], *columns[1:]]  # a name with a line break is one line
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]
