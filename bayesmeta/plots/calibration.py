"""Does a learner know what it does not know? Coverage curves and histograms of the PIT, for regression.

Each picture has its numbers as data: `coverage`, `pit_heights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes

from bayesmeta.metrics import pit_band
from bayesmeta.metrics import pit_histogram as pit_bars
from bayesmeta.plots.resampling import RESAMPLES, percentile_band, resampled_shares
from bayesmeta.plots.style import (
    FAINT,
    GREY,
    INK,
    PALETTE,
    TICKS,
    Array,
    Look,
    axes_or_new,
    dress,
    halo,
    key,
    legend,
    looks,
    name_panel,
    new_grid,
    share_labels,
    tint,
)

Kind = Literal["central", "quantile"]
LEVELS = np.linspace(0, 1, 21)
AXES = {
    "central": ("nominal coverage of central interval", "observed coverage"),
    "quantile": ("predictive quantile", "share of targets below it"),
}


class Coverage(NamedTuple):
    """Observed against nominal coverage; all (L,). ``lower``, ``upper``: a bootstrap band over tasks."""

    levels: Array
    observed: Array
    lower: Array
    upper: Array


def coverage(
    pit: Array,
    *,
    kind: Kind = "central",
    levels: Array | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Coverage:
    """Share of query targets inside the central interval of each nominal level, or ("quantile") below each quantile.

    ``pit`` (T, N), NaN where there is no point, inf at a point without a prediction, which nothing covers. The mean over
    tasks of each task's own share, so that the curve passes through the coverages of the report's table and one task with
    many points does not speak for all. ``level``: of the bootstrap band over tasks. Raises ValueError where ``kind`` is
    unknown or there is no point.
    """
    if kind not in AXES:
        raise ValueError(f'kind must be "central" or "quantile", got {kind!r}')
    pit = np.atleast_2d(np.asarray(pit, dtype=float))
    if np.isnan(pit).all():
        raise ValueError("there is no point in pit: nothing to calibrate")
    levels = LEVELS if levels is None else np.asarray(levels, dtype=float)
    shares, tasks = coverage_shares(pit, kind=kind, levels=levels)
    resampled = resampled_shares(shares, tasks, resamples=resamples, seed=seed)
    return Coverage(levels, shares.sum(0) / tasks.sum(0), *percentile_band(resampled, level=level))


def coverage_shares(pit: Array, *, kind: Kind, levels: Array) -> tuple[Array, Array]:
    """The share of each task's points that each level covers, and 1 for a task with points, 0 without, (T, L) each."""
    reach = 2 * np.abs(pit - 0.5) if kind == "central" else pit
    # One level at a time: (T, N, L) at once would be large for a thousand tasks. NaN compares as False.
    hits = np.stack([(reach <= one).sum(1) for one in levels], axis=1).astype(float)
    points = (~np.isnan(pit)).sum(1, keepdims=True)
    return hits / np.maximum(points, 1), np.repeat((points > 0).astype(float), len(levels), axis=1)


def calibration_curve(
    pits: Array | Mapping[str, Array],
    *,
    kind: Kind = "central",
    levels: Array | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    look: Mapping[str, Look] | None = None,
    corners: bool = True,
    key_outside: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Observed against nominal coverage, one line a learner, each in the band that resampling tasks gives.

    ``pits``: (T, N), or such an array by learner; NaN where there is no point. ``kind="central"``: share of targets
    inside central intervals, below the diagonal = overconfident. ``kind="quantile"`` (Kuleshov): share below each
    predictive quantile, where overconfidence is a flat S. ``look``: a `Look` by learner, default `looks`.
    ``corners``: the words in the corners. Numbers: `coverage`. Raises ValueError as `coverage` does.
    """
    ax = axes_or_new(ax, 6.2, 4.3)
    named = pits if isinstance(pits, Mapping) else {"": pits}
    look = looks(named) if look is None else look
    options = {"kind": kind, "levels": levels, "level": level, "resamples": resamples, "seed": seed}
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, zorder=1)
    for row, (name, pit) in enumerate(named.items()):
        c, (colour, marker, dash) = coverage(pit, **options), look[name]  # type: ignore[arg-type]
        ax.fill_between(c.levels, c.lower, c.upper, color=colour, alpha=0.13, linewidth=0, zorder=2)
        # A few markers, elsewhere on each line, so that lines are told apart in grey print too.
        every = (1 + row % 5, 5) if len(c.levels) > 10 else 1
        ax.plot(
            c.levels, c.observed, marker, color=colour, linestyle=dash, linewidth=1.7, markersize=4.5, markevery=every,
            zorder=3,
        )  # fmt: skip
    if corners and kind == "central":
        small: dict[str, Any] = {"color": GREY, "fontsize": 8.5, "style": "italic", "path_effects": halo(), "zorder": 4}
        ax.text(0.97, 0.04, "overconfident", ha="right", va="bottom", transform=ax.transAxes, **small)
        ax.text(0.03, 0.96, "underconfident", ha="left", va="top", transform=ax.transAxes, **small)
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=TICKS, yticks=TICKS, aspect="equal")
    if key_outside and isinstance(pits, Mapping):
        legend(ax, {name: key(look[name]) for name in named})
    x, y = AXES[kind]
    return dress(ax, x=x, y=y, grid="both")


def calibration_grid(
    pits: Mapping[str, Array],
    *,
    kind: Kind = "central",
    seed: int = 0,
    columns: int = 3,
    look: Mapping[str, Look] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Axes]:
    """Small multiples of `calibration_curve`: a panel a learner, in its colour with its band, the others in grey.

    ``notes``: a few words by learner for the corner over its panel.
    """
    look = looks(pits) if look is None else look
    axes = new_grid(len(pits), cell=(2.35, 2.55), columns=columns, sharex=True, sharey=True)
    curves = {name: coverage(pit, kind=kind, resamples=2, seed=seed) for name, pit in pits.items()}
    for i, (ax, name) in enumerate(zip(axes, pits, strict=True)):
        for other, c in curves.items():
            if other != name:
                ax.plot(c.levels, c.observed, color=FAINT, linewidth=0.9, zorder=1.5)
        one = {name: pits[name]}
        calibration_curve(one, kind=kind, seed=seed, look=look, corners=i == 0, key_outside=False, ax=ax)
        name_panel(ax, name, look[name], note=(notes or {}).get(name, ""))
        ax.set(xlabel="", ylabel="")
    share_labels(axes, x=AXES[kind][0], y=AXES[kind][1])
    return axes


class Heights(NamedTuple):
    """A PIT histogram: ``edges`` (B + 1,), ``heights`` (B,) where 1 is uniform, and the band that uniformity allows."""

    edges: Array
    heights: Array
    lower: float
    upper: float
    points: int


def pit_heights(pit: Array, *, bins: int = 10, level: float = 0.95) -> Heights:
    """Histogram of ``pit`` (any shape, NaN and inf as `coverage`), and the ``level`` band of one bar under uniformity.

    The band takes points as independent, one bar at a time. Raises ValueError where there is no point, or where there
    are fewer than 2 bins.
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    values = torch.as_tensor(np.array(pit, dtype=float))
    known = ~values.isnan()
    values[values.isinf()] = np.nan  # a point without a prediction: in the number of points, in no bar
    points = int(known.sum())
    if points == 0:
        raise ValueError("there is no point in pit: nothing to show")
    heights, edges = pit_bars(values, known, bins=bins)
    return Heights(edges.numpy(), heights.numpy(), *pit_band(points, bins, level=level), points)


def pit_histogram(
    pit: Array,
    *,
    bins: int = 10,
    level: float = 0.95,
    colour: str = PALETTE[0],
    ceiling: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Where the query targets fell in their predictive distributions: flat is calibrated, a U is overconfident.

    ``pit``: any shape, NaN where there is no point. Heights are relative: 1 is uniform. The grey band holds a bar of
    a calibrated learner with probability ``level``. ``ceiling``: bars above it are cut, their height written on them.
    Numbers: `pit_heights`. Raises ValueError as it does.
    """
    ax = axes_or_new(ax, 4.6, 3.2)
    numbers, width = pit_heights(pit, bins=bins, level=level), 1 / bins
    left = numbers.edges[:-1]
    ax.bar(left, numbers.heights, width, align="edge", color=tint(colour, 0.5), edgecolor="white", linewidth=0.8)
    ax.axhspan(numbers.lower, numbers.upper, color=GREY, alpha=0.25, linewidth=0, zorder=2)
    ax.axhline(1, color=GREY, linewidth=0.8, zorder=2.1)
    if ceiling is not None:
        ax.set_ylim(0, ceiling)
        for x, height in zip(left, numbers.heights, strict=True):
            if height > ceiling:
                middle = (x + width / 2, 0.97 * ceiling)
                ax.text(*middle, f"{height:.1f}", ha="center", va="top", fontsize=7.5, color=INK, rotation=90)
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    return dress(ax, x="PIT of query targets", y="relative to uniform")


def pit_grid(
    pits: Mapping[str, Array], *, bins: int = 10, columns: int = 3, look: Mapping[str, Look] | None = None
) -> list[Axes]:
    """Small multiples of `pit_histogram` on one scale, a panel a learner."""
    look = looks(pits) if look is None else look
    axes = new_grid(len(pits), cell=(2.35, 1.75), columns=columns, sharex=True, sharey=True)
    tallest = max(pit_heights(pit, bins=bins).heights.max() for pit in pits.values())
    ceiling = min(float(tallest) * 1.05, 4.0)  # one learner's spikes must not flatten the others'
    for ax, (name, pit) in zip(axes, pits.items(), strict=True):
        pit_histogram(pit, bins=bins, colour=look[name].colour, ceiling=ceiling, ax=ax)
        name_panel(ax, name, look[name])
        ax.set(xlabel="", ylabel="")
    share_labels(axes, x="PIT of query targets", y="height relative to uniform")
    return axes
