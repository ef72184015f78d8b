"""What each metric is called, in which direction it is better, and in which order metrics stand."""

from __future__ import annotations

import re
from typing import NamedTuple


class Measure(NamedTuple):
    """How readers know a metric. ``better``: -1 lower, 1 higher, 0 neither; ``nominal``: a coverage to be hit.

    ``limit``: what the mean cannot be better than.
    """

    label: str
    better: int
    nominal: float | None = None
    limit: float | None = None

    @property
    def direction(self) -> str:
        """The goal in words; "" without one."""
        if self.nominal is not None:
            return f"nominal {self.nominal:g}"
        best = "" if self.limit is None else f", at best {self.limit:g}"
        return {-1: "lower is better", 1: "higher is better", 0: ""}[self.better] + best


AMBIGUOUS = 0.2  # a task is ambiguous where every explanation is at least so likely given its support
OPEN = 0.1  # a label is open where its exact probability is at least this
CALIBRATION_ERROR, ECE = "calibration_error", "ece"  # of all tasks together, unlike the others, which are means over tasks

NAMED = {
    "nll": Measure("NLL", -1),
    "nll_gap": Measure("gap to exact", -1, limit=0),
    "mode_coverage": Measure("mode coverage", 1, limit=1),
    "label_coverage": Measure("label coverage", 1, limit=1),
    "rmse": Measure("RMSE", -1),
    "accuracy": Measure("accuracy", 1),
    "crps": Measure("CRPS", -1),
    "brier": Measure("Brier", -1),
    CALIBRATION_ERROR: Measure("calib. error", -1),
    ECE: Measure("ECE", -1),
    "seconds": Measure("time", 0),
    "gradient_evaluations": Measure("gradients", 0),
}
# The text table has room for these; summary() and the HTML table have all.
HEADLINE = (
    "nll", "nll_gap", "rmse", "accuracy", "crps", "brier", "coverage90", CALIBRATION_ERROR, ECE, "mode_coverage", "label_coverage",
)  # fmt: skip
PROPER = ("nll", "rmse", "accuracy", "crps", "brier")  # of these, differences between learners are shown


def measure(metric: str) -> Measure:
    """The `Measure` of a metric; "coverage90" and "width90" stand for any percentage, an unknown name for itself."""
    if metric in NAMED:
        return NAMED[metric]
    match = re.fullmatch(r"(coverage|width)(\d{1,2})", metric)
    if match is None:
        return Measure(metric, 0)
    kind, percent = match[1], int(match[2])
    return Measure(f"{percent}% {kind}", 0, percent / 100 if kind == "coverage" else None)


def in_order(metrics: set[str]) -> list[str]:
    """``metrics`` as readers expect them: scores, coverage, width, calibration, then the rest by name."""

    def place(metric: str) -> tuple[float, str]:
        if metric == "nll_gap":
            return PROPER.index("nll") + 0.5, ""
        if metric in PROPER:
            return PROPER.index(metric), ""
        for i, start in enumerate(("coverage", "width", CALIBRATION_ERROR, ECE), start=len(PROPER)):
            if metric.startswith(start):
                return i, metric
        return 100, metric

    return sorted(metrics, key=place)
