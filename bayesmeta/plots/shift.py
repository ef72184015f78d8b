"""Classifiers under shift: does confidence fall as accuracy does? Of the rows that `bayesmeta.under_shift` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bayesmeta.plots.style import (
    GREY,
    PALETTE,
    Array,
    Look,
    dress,
    even_columns,
    finite_limits,
    key,
    legend,
    literal,
    looks,
    name_panel,
    new_grid,
    share_labels,
    tint,
)

Rows = Sequence[Mapping[str, Any]]
HALVES = (0, 0.5, 1)  # panels are narrow
LABELS = {"ece": "ECE", "nll": "NLL, nats a point", "brier": "Brier score"}


def severity_curves(
    rows: Rows, *, metric: str = "ece", learners: str | Sequence[str] | None = None, look: Mapping[str, Look] | None = None,
    columns: int = 4,
) -> list[Axes]:
    """``metric`` against severity with its interval, a panel a shift, a line a learner; panels share their y axis.

    ``learners``: which, in this order; default all. Raises ValueError where there is no such metric or learner.
    """
    names = _learners(rows, learners)
    look, kinds = {**looks(names), **(look or {})}, list(dict.fromkeys(str(row["shift"]) for row in rows))
    curves = {(kind, name): _curve(rows, kind, name, metric) for kind in kinds for name in names}
    axes = new_grid(len(kinds), cell=(2.3, 2.6), columns=columns, sharex=True, sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        for name in names:
            severity, estimate, lower, upper = curves[kind, name]
            colour, marker, dash = look[name]
            ax.fill_between(severity, lower, upper, color=tint(colour, 0.25), linewidth=0, alpha=0.5, zorder=1)
            ax.plot(severity, estimate, color=colour, marker=marker, linestyle=dash, markersize=3.5, linewidth=1.3, zorder=2)
        ax.set_title(literal(kind), loc="left", fontsize=10)
        dress(ax, grid="y")
    axes[0].set_ylim(finite_limits(*(values for each in curves.values() for values in each[1:])))
    share_labels(axes, x="severity", y=LABELS.get(metric, metric))
    legend(axes[even_columns(len(axes), columns) - 1], {name: key(look[name]) for name in names})
    return axes


def confidence_under_shift(
    rows: Rows, *, learners: str | Sequence[str] | None = None, look: Mapping[str, Look] | None = None, columns: int = 5
) -> list[Axes]:
    """Mean confidence against accuracy, a panel a learner, a line a shift, from no shift (the large dot) on to the severest.

    On the diagonal a learner is as sure as it is right; above it is overconfident, below underconfident. Who stays calibrated follows the
    diagonal down. ``learners``: which, in this order; default all. Raises ValueError where the rows lack accuracy or confidence.
    """
    names = _learners(rows, learners)
    look, kinds = {**looks(names), **(look or {})}, list(dict.fromkeys(str(row["shift"]) for row in rows))
    lines = looks(kinds)
    axes = new_grid(len(names), cell=(1.95, 2.25), columns=columns, sharex=True, sharey=True)
    lowest = 1.0
    for ax, name in zip(axes, names, strict=True):
        ax.fill_between([0, 1], [0, 1], 1, color=tint(PALETTE[1], 0.08), linewidth=0, zorder=0)
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, zorder=1)
        for kind in kinds:
            accuracy, confidence = (_curve(rows, kind, name, metric)[1] for metric in ("accuracy", "confidence"))
            lowest = min(lowest, *accuracy, *confidence)
            ax.plot(accuracy, confidence, color=lines[kind].colour, linestyle=lines[kind].dash, linewidth=1.3, zorder=2,
                    marker=lines[kind].marker, markersize=3.2)  # fmt: skip
            ax.plot(accuracy[:1], confidence[:1], color=GREY, marker="o", markersize=6, zorder=3, clip_on=False)
        name_panel(ax, name, look[name])
        dress(ax, grid="both")
    if lowest < 0.3:
        axes[0].set(xlim=(0, 1), ylim=(0, 1), xticks=HALVES, yticks=HALVES)
    else:
        axes[0].set(xlim=(lowest - 0.05, 1), ylim=(lowest - 0.05, 1))
    axes[0].annotate("overconfident", (0.04, 0.93), xycoords="axes fraction", fontsize=7.5, color=GREY)
    share_labels(axes, x="accuracy", y="mean confidence")
    first = Line2D([], [], color=GREY, marker="o", markersize=6, linestyle="")
    legend(axes[even_columns(len(axes), columns) - 1], {"no shift": first, **{kind: key(line) for kind, line in lines.items()}})
    return axes


def _learners(rows: Rows, learners: str | Sequence[str] | None) -> list[str]:
    if not rows or not all({"shift", "severity", "learner", "metric", "estimate", "lower", "upper"} <= set(row) for row in rows):
        raise ValueError(f"rows: expected those of under_shift, got {f'rows of {sorted(rows[0])}' if rows else 'none'}")
    there = list(dict.fromkeys(str(row["learner"]) for row in rows))
    wanted = there if learners is None else [learners] if isinstance(learners, str) else list(learners)
    for name in wanted or [""]:
        if name not in there:
            raise ValueError(f"learners: expected some of {', '.join(there)}, got {name or learners!r}")
    return wanted


def _curve(rows: Rows, kind: str, learner: str, metric: str) -> tuple[Array, Array, Array, Array]:
    """Severity, estimate, lower and upper end, in order of severity."""
    chosen = [row for row in rows if (row["shift"], row["learner"], row["metric"]) == (kind, learner, metric)]
    if not chosen:
        raise ValueError(f"metric: expected one of {', '.join(sorted({str(row['metric']) for row in rows}))}, got {metric!r}")
    chosen.sort(key=lambda row: row["severity"])
    severity, estimate, lower, upper = (np.array([float(row[k]) for row in chosen]) for k in ("severity", "estimate", "lower", "upper"))
    return severity, estimate, lower, upper
