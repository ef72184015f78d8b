"""A predictive on a grid of the first input: bands, mean, a few draws, the points it saw and those it did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bayesmeta.plots.shapes import BandsLike, CurvesLike
from bayesmeta.plots.style import (
    GREY,
    INK,
    PALETTE,
    Array,
    Look,
    axes_or_new,
    dress,
    finite_limits,
    legend,
    literal,
    looks,
    new_grid,
    shade,
    share_labels,
    spread_ranks,
    tint,
)

Points = tuple[Array, Array]
FEW = 6  # an input with at most so many values is drawn as bars side by side, not as a band
BAND90, BAND50 = 0.18, 0.38  # how strong the two tints are
SEEN: dict[str, Any] = {"color": INK, "markersize": 4.6, "markeredgecolor": "white", "markeredgewidth": 0.6}
UNSEEN: dict[str, Any] = {"markerfacecolor": "white", "markersize": 4.0, "markeredgecolor": INK, "markeredgewidth": 0.8}


def predictive_bands(
    curves: CurvesLike,
    *,
    support: Points | None = None,
    query: Points | None = None,
    values: Array | None = None,
    num_draws: int = 6,
    colour: str = PALETTE[0],
    x: str = "",
    y: str = "",
    key_outside: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw one predictive: 50% and 90% bands, mean, ``num_draws`` thin draws of the mean, and the task's points.

    ``curves``: arrays on a grid (G,), draws (S, G), as `bayesmeta.report.Curves`. ``support``, ``query``: inputs and
    targets, (n,) each; support is filled, query hollow. ``values``: the distinct values of a discrete input, drawn as
    bars, points spread sideways over them; default: the grid itself where it has at most 6 values, else the input is
    continuous. ``key_outside``: a legend at the right. What is not finite is left out; where nothing is, the axes say
    so. Axes that come with limits of y other than matplotlib's own keep them.
    """
    ax = axes_or_new(ax, 6.4, 3.6)
    if values is None and len(curves.grid) <= FEW:
        values = np.unique(curves.grid)
    if not np.isfinite(curves.mean).any():
        words: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY, "fontsize": 9, "style": "italic"}
        ax.text(0.5, 0.5, "no prediction", transform=ax.transAxes, **words)
    elif values is None:
        _continuous(ax, curves, num_draws, colour)
    else:
        _discrete(ax, curves, values, num_draws, colour)
    step = 0.0 if values is None else _spacing(values)
    if query is not None:
        ax.plot(_sideways(query[0], 0.3 * step), query[1], "o", zorder=5, **UNSEEN)
    if support is not None:
        ax.plot(_sideways(support[0], 0.16 * step), support[1], "o", zorder=6, **SEEN)
    if values is not None:
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.set_xlim(values.min() - 0.6 * step, values.max() + 0.6 * step)
    else:
        ax.set_xlim(float(np.min(curves.grid)), float(np.max(curves.grid)))
    if key_outside:
        legend(ax, bands_key(colour, support=support is not None, query=query is not None))
    return dress(ax, x=x, y=y)


def bands_key(colour: str, *, support: bool = True, query: bool = True) -> dict[str, Any]:
    """Samples for a legend: which tint is which band, which dot is which point."""
    entries: dict[str, Any] = {
        "mean": Line2D([], [], color=colour, linewidth=1.8),
        "draws of the mean": Line2D([], [], color=colour, linewidth=0.5),
        "50% band": Patch(color=tint(colour, BAND50)),
        "90% band": Patch(color=tint(colour, BAND90)),
    }
    if support:
        entries["support: seen"] = Line2D([], [], marker="o", linestyle="", **SEEN)
    if query:
        entries["query: not seen"] = Line2D([], [], marker="o", linestyle="", **UNSEEN)
    return entries


def bands_grid(
    rows: Mapping[str, Sequence[BandsLike]],
    *,
    x: str = "",
    y: str = "",
    look: Mapping[str, Look] | None = None,
    num_draws: int = 6,
) -> list[list[Axes]]:
    """A row a learner: before any data (of the first task), then each task after its support set; one y axis for all.

    ``rows``: the same tasks for each learner. Returns the axes by row. Raises ValueError where tasks are missing.
    """
    tasks = [len(bands) for bands in rows.values()]
    if not tasks or min(tasks) == 0 or min(tasks) != max(tasks):
        raise ValueError(f"every learner needs the same tasks, at least one; got {dict(zip(rows, tasks, strict=True))}")
    look = looks(rows) if look is None else look
    everything = [band for bands in rows.values() for band in bands]
    values, columns = discrete_values(everything), 1 + tasks[0]
    width = 1.9 if columns < 4 else 7.0 / columns
    flat = new_grid(len(rows) * columns, cell=(width, 1.35), columns=columns, sharex=True, sharey=True)
    flat[0].set_ylim(*band_limits(everything))
    axes = [flat[i * columns : (i + 1) * columns] for i in range(len(rows))]
    for row, (name, bands) in zip(axes, rows.items(), strict=True):
        options: dict[str, Any] = {"colour": look[name].colour, "values": values, "num_draws": num_draws}
        predictive_bands(bands[0].before, ax=row[0], key_outside=False, **options)
        for ax, band in zip(row[1:], bands, strict=True):
            points: dict[str, Any] = {
                "support": (band.support_x, band.support_y),
                "query": (band.query_x, band.query_y),
            }
            predictive_bands(band.after, ax=ax, key_outside=False, **points, **options)
        row[0].set_ylabel(literal(name, 16), color=shade(look[name].colour), fontsize=9.5, fontweight="bold")
    words: dict[str, Any] = {"color": INK, "fontsize": 9, "loc": "left"}
    axes[0][0].set_title("before any data", **words)
    for ax, band in zip(axes[0][1:], next(iter(rows.values())), strict=True):
        ax.set_title(f"{literal(band.name, 20)}, n = {len(band.support_x)}", **words)
    share_labels(flat, x=x, y=y)
    return axes


def discrete_values(bands: Sequence[BandsLike]) -> Array | None:
    """The distinct values of a discrete first input, judged by all ``bands`` together; None where it is continuous."""
    grids = np.unique(np.concatenate([band.after.grid for band in bands]))
    if len(grids) <= FEW:
        return grids
    seen = np.concatenate([np.concatenate([band.support_x, band.query_x]) for band in bands])
    seen = seen[(seen >= grids[0]) & (seen <= grids[-1])]
    values = np.unique(seen)
    # Few points share few values by chance: only many points on few values make an input discrete.
    return values if 2 <= len(values) <= FEW and len(seen) >= 4 * len(values) else None


def band_limits(bands: Sequence[BandsLike]) -> tuple[float, float]:
    """Limits of y that show every point, and the 90% bands as far as they stay within reach of the points.

    One learner's endless band must not flatten everybody's picture.
    """
    points = np.concatenate([np.concatenate([band.support_y, band.query_y]) for band in bands])
    both = [curves for band in bands for curves in (band.before, band.after)]
    edges = np.concatenate([np.concatenate([curves.lower90, curves.upper90]) for curves in both])
    if not np.isfinite(points).any():
        return finite_limits(edges)
    low, high = finite_limits(points, margin=0.05)
    reach = 0.6 * (high - low)
    return finite_limits([low, high], np.clip(edges[np.isfinite(edges)], low - reach, high + reach), margin=0.02)


def _continuous(ax: Axes, c: CurvesLike, num_draws: int, colour: str) -> None:
    ax.fill_between(c.grid, c.lower90, c.upper90, color=tint(colour, BAND90), linewidth=0, zorder=1)
    ax.fill_between(c.grid, c.lower50, c.upper50, color=tint(colour, BAND50), linewidth=0, zorder=2)
    for draw in c.draws[:num_draws]:
        ax.plot(c.grid, draw, color=colour, linewidth=0.5, alpha=0.6, zorder=3)
    ax.plot(c.grid, c.mean, color=colour, linewidth=1.8, zorder=4)


def _discrete(ax: Axes, c: CurvesLike, values: Array, num_draws: int, colour: str) -> None:
    def at(curve: Array) -> Array:
        return np.interp(values, c.grid, curve)

    half = 0.4 * _spacing(values)
    for lower, upper, strength in ((c.lower90, c.upper90, BAND90), (c.lower50, c.upper50, BAND50)):
        bars = ax.bar(values, at(upper) - at(lower), 2 * half, at(lower), color=tint(colour, strength), linewidth=0)
        for bar in bars:
            bar.sticky_edges.y.clear()  # else the axes would end flush with the lowest bar
    for draw in c.draws[:num_draws]:  # a thin line from value to value shows how the values move together
        ax.plot(values, at(draw), color=colour, linewidth=0.5, alpha=0.6, zorder=3)
    ax.hlines(at(c.mean), values - half, values + half, color=colour, linewidth=1.8, zorder=4)


def _spacing(values: Array) -> float:
    """The smallest distance of two values of a discrete input; 1 for a single value."""
    values = np.unique(values)
    return float(np.diff(values).min()) if len(values) > 1 else 1.0


def _sideways(x: Array, width: float) -> Array:
    """``x`` with equal values spread sideways by at most ``width``; ``x`` itself where ``width`` is 0."""
    x = np.array(x, dtype=float)
    if width > 0:
        for value in np.unique(x):
            same = np.flatnonzero(x == value)
            x[same] += width * spread_ranks(len(same))
    return x
