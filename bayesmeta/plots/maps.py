"""Two inputs and two classes: how probable class 1 is over the plane, and how uncertain that leaves a point's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from bayesmeta.plots.shapes import MapLike
from bayesmeta.plots.style import (
    GREY,
    INK,
    Array,
    Look,
    axes_or_new,
    dress,
    literal,
    looks,
    name_panel,
    new_grid,
    share_labels,
)

What = Literal["probability", "entropy"]
KINDS: tuple[What, What] = ("probability", "entropy")
SHADES = {
    "probability": LinearSegmentedColormap.from_list("probability", ["#ffffff", "#9ecae1", "#2171b5", "#08306b"]),
    "entropy": LinearSegmentedColormap.from_list("entropy", ["#ffffff", "#fdd0a2", "#e6550d", "#7f2704"]),
}
LABELS = {"probability": "P(y = 1)", "entropy": "entropy (nats)"}
LARGEST = {"probability": 1.0, "entropy": float(np.log(2))}
POINT: dict[str, Any] = {"markersize": 5.5, "markeredgewidth": 1.0, "linestyle": "", "zorder": 5}
EXACT = Look(INK, "o", "-")


def probability_map(
    m: MapLike,
    *,
    what: What = "probability",
    colour: str = INK,
    x: str = "",
    y: str = "",
    key_outside: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """P(y = 1) over two inputs as shades, or the entropy of it, with the support points and each draw's own border.

    ``m``: probs (H, G) and draws (S, H, G) as `bayesmeta.report.ProbabilityMap`. A thin line is where one draw has
    P(y = 1) = ½ (not drawn with the entropy). Support: a cross in class 1, a circle in class 0. ``key_outside``: a bar
    of shades at the right. Raises ValueError where ``what`` is neither.
    """
    if what not in SHADES:
        raise ValueError(f'what must be "probability" or "entropy", got {what!r}')
    ax = axes_or_new(ax, 4.6, 4.0)
    values = m.probs if what == "probability" else entropy(m.probs)
    ax.pcolormesh(m.first, m.second, values, cmap=SHADES[what], vmin=0, vmax=LARGEST[what], shading="gouraud", rasterized=True)
    if what == "probability":
        for draw in m.draws:
            if np.nanmin(draw) < 0.5 < np.nanmax(draw):
                border = ax.contour(m.first, m.second, draw, levels=[0.5], colors=[colour], linewidths=0.9)
                border.set_path_effects([withStroke(linewidth=1.8, foreground="white", alpha=0.6)])
    for label, marker in ((1, "P"), (0, "o")):
        here = np.round(m.support_y) == label
        ax.plot(*m.support_x[here].T, marker, markerfacecolor="white", markeredgecolor=INK, **POINT)
    ax.set(xlim=(m.first[0], m.first[-1]), ylim=(m.second[0], m.second[-1]), aspect="equal")
    if key_outside:
        _bar(ax, [ax], what)
    return dress(ax, x=x, y=y)


def map_grid(
    exact: Sequence[MapLike],
    rows: Mapping[str, Sequence[MapLike]],
    *,
    x: str = "",
    y: str = "",
    columns: int = 5,
    look: Mapping[str, Look] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Axes]:
    """Small multiples of `probability_map`: for each task a row of probabilities and below it one of entropies; exact first.

    ``exact``, ``rows`` by learner: the same tasks. ``notes``: a few words by learner, over its panel of the first task.
    More than ``columns`` panels of a task go on in rows below. Returns the panels, row by row. Raises ValueError where
    tasks are missing.
    """
    if not exact or any(len(kept) != len(exact) for kept in rows.values()):
        raise ValueError(f"every learner needs the same tasks, at least one; got {len(exact)}, {[len(kept) for kept in rows.values()]}")
    look, notes = looks(rows) if look is None else look, notes or {}
    named: dict[str, Sequence[MapLike]] = {"": exact} | dict(rows)
    deep = -(-len(named) // columns)
    wide = -(-len(named) // deep)
    side = min(1.9, 7.6 / wide)  # of one square panel; bars, labels and titles come on top
    flat = new_grid(2 * len(exact) * deep * wide, cell=(side + 0.9 / wide, side + 0.27), columns=wide, sharex=True, sharey=True)
    figure = flat[0].figure
    assert isinstance(figure, Figure)
    figure.set_layout_engine("compressed")  # no white between panels of fixed shape
    drawn = []
    for i, task in enumerate(exact):
        for block in range(deep):
            chosen = list(named.items())[block * wide : (block + 1) * wide]
            for k, kind in enumerate(KINDS):
                start = ((i * deep + block) * 2 + k) * wide
                row = flat[start : start + wide]
                for spare in row[len(chosen) :]:
                    spare.set_axis_off()
                for ax, (name, kept) in zip(row, chosen, strict=False):
                    mine = look[name] if name else EXACT
                    probability_map(kept[i], what=kind, colour=mine.colour, key_outside=False, ax=ax)
                    if k:
                        ax.set_title(f"mean {np.mean(entropy(kept[i].probs)):.2f}", loc="left", fontsize=8.5, color=GREY, pad=3)
                    elif i == 0 or deep > 1:
                        name_panel(ax, name or "exact", mine, note=notes.get(name, " ") if i == 0 else "")
                drawn += row[: len(chosen)]
                if block == 0:
                    _bar(row[0], row, kind)
                    row[0].set_ylabel("" if k else literal(task.name), color=GREY, fontsize=8.5)
    share_labels(flat, x=x, y=y)
    return drawn


def entropy(probs: Array) -> Array:
    """Entropy of a class with P(y = 1) = ``probs``, in nats; ln 2 at ½."""
    p = np.clip(np.asarray(probs, dtype=float), 1e-12, 1 - 1e-12)
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


def _bar(ax: Axes, axes: Sequence[Axes], what: What) -> None:
    figure = ax.figure
    bar = figure.colorbar(ScalarMappable(Normalize(0, LARGEST[what]), SHADES[what]), ax=list(axes), fraction=0.05, aspect=18, pad=0.02)
    bar.set_ticks([0, 0.5, 1] if what == "probability" else [0, 0.3, 0.6])
    bar.set_label(LABELS[what], fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=8, color=GREY, labelcolor=INK, width=0.6, length=3)
    bar.outline.set_visible(False)
