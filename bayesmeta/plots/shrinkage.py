"""The classical picture of pooling: the fewer a task's data, the further it is drawn from its own estimate."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from bayesmeta.plots.style import GREY, PALETTE, Array, axes_or_new, dress, finite_limits, legend, spread_ranks

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
NO_POINT = 0.5  # where tasks without any support point stand on the log axis
LINE: dict[str, Any] = {"color": GREY, "linewidth": 1.0, "linestyle": (0, (4, 2))}
HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": GREY, "markeredgewidth": 0.9, "linestyle": ""}


def shrinkage(
    no_pooling: Array,
    partial: Array,
    complete: Array | float,
    support_sizes: Array,
    *,
    colour: str = PALETTE[0],
    partial_label: str = "partial pooling",
    no_pooling_label: str = "no pooling",
    complete_label: str = "complete pooling",
    y: str = "estimate",
    ax: Axes | None = None,
) -> Axes:
    """Per task: hollow where it stands alone, filled where pooling puts it, a thin line between the two.

    ``no_pooling``, ``partial``, ``support_sizes`` (T,), at least one task; ``complete``: one number, or one for each
    task, drawn as a horizontal line at their mean. x is the support size, spread a little among equal sizes, on a log
    scale; where all sizes are equal, tasks stand by rank of their estimate without pooling. Estimates without pooling
    far out of the others' range become triangles at the edge. Raises ValueError where shapes differ.
    """
    alone, pooled = np.asarray(no_pooling, dtype=float), np.asarray(partial, dtype=float)
    sizes, everyone = np.asarray(support_sizes, dtype=float), float(np.mean(complete))
    if not alone.shape == pooled.shape == sizes.shape or alone.ndim != 1:
        shapes = f"{alone.shape}, {pooled.shape} and {sizes.shape}"
        raise ValueError(f"no_pooling, partial and support_sizes must have one shape (T,), got {shapes}")
    ax = axes_or_new(ax, 7.0, 3.6)
    where, by_size = shrinkage_positions(sizes, alone)
    usual = alone[np.isfinite(alone)]
    if len(usual) > 20:
        usual = np.quantile(usual, [0.02, 0.98])
    low, high = finite_limits(pooled, [everyone], usual)
    shown = np.clip(alone, low, high)
    size = float(np.clip(5.4 - 1.4 * np.log10(max(len(alone), 10) / 10), 1.8, 5))  # smaller dots for more tasks

    ax.axhline(everyone, zorder=1, **LINE)
    ax.vlines(where, shown, pooled, color=colour, alpha=0.7, linewidth=0.8, zorder=2)
    beyond = (alone > high) | (alone < low)
    for chosen, marker in ((~beyond, "o"), (alone > high, "^"), (alone < low, "v")):
        ax.plot(where[chosen], shown[chosen], marker, markersize=size, zorder=3, clip_on=False, **HOLLOW)
    dot: dict[str, Any] = {"marker": "o", "linestyle": "", "color": colour, "markeredgecolor": "white"}
    ax.plot(where, pooled, markersize=size, markeredgewidth=0.4, zorder=4, **dot)
    ax.set_ylim(low, high)
    entries = {
        no_pooling_label: Line2D([], [], marker="o", markersize=5, **HOLLOW),
        partial_label: Line2D([], [], markersize=5, **dot),
        complete_label: Line2D([], [], **LINE),
    }
    if beyond.any():
        entries["beyond the axis"] = Line2D([], [], marker="v", markersize=5, **HOLLOW)
    legend(ax, entries)
    if not by_size:
        return dress(ax, x="tasks, by rank of their estimate without pooling", y=y)
    _size_axis(ax, where)
    return dress(ax, x="support points of the task (log scale)", y=y)


def shrinkage_positions(support_sizes: Array, no_pooling: Array) -> tuple[Array, bool]:
    """Where each task stands on the x axis (T,), and whether that is its support size (else its rank, 1 to T)."""
    sizes = np.asarray(support_sizes, dtype=float)
    if len(np.unique(sizes)) == 1:
        return np.argsort(np.argsort(no_pooling, kind="stable"), kind="stable") + 1.0, False
    x = np.where(sizes > 0, sizes, NO_POINT)
    for value in np.unique(x):
        same = np.flatnonzero(x == value)
        x[same] *= 2 ** (0.15 * spread_ranks(len(same)))
    return x, True


def _size_axis(ax: Axes, where: Array) -> None:
    low, high = float(where.min()) / 1.2, float(where.max()) * 1.2
    places = {size: str(size) for size in SIZES} | {NO_POINT: "0"}
    ticks = sorted(place for place in places if low <= place <= high)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([places[tick] for tick in ticks])
