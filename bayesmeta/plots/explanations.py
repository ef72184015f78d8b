"""Ambiguous tasks: the curves that explain the few points there are, and those that a learner thinks of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bayesmeta.plots.bands import SEEN, Points
from bayesmeta.plots.shapes import CurvesLike, ExplainedLike, ExplanationLike
from bayesmeta.plots.style import (
    GREY,
    INK,
    PALETTE,
    Array,
    Look,
    axes_or_new,
    dress,
    finite_limits,
    halo,
    legend,
    literal,
    looks,
    name_panel,
    new_grid,
    share_labels,
)

DRAW: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.55, "solid_capstyle": "round"}
EXPLANATION: dict[str, Any] = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 2))}


def explained_draws(
    curves: CurvesLike,
    explanations: Sequence[ExplanationLike],
    *,
    support: Points | None = None,
    num_draws: int = 20,
    colour: str = PALETTE[0],
    names: bool = True,
    x: str = "",
    y: str = "",
    key_outside: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """The curves that explain a task, dashed, over ``num_draws`` draws of a learner's own: does it think of them all?

    ``curves``: as `bayesmeta.report.Curves`, draws (S, G); ``explanations``: as `bayesmeta.report.Explanation`, on the
    same grid, named in the picture unless ``names`` is False. ``support``: inputs and targets (n,). ``key_outside``: a
    legend at the right. What is not finite is left out.
    """
    ax = axes_or_new(ax, 6.4, 3.6)
    for draw in curves.draws[:num_draws]:
        ax.plot(curves.grid, draw, color=colour, zorder=2, **DRAW)
    for one in explanations:
        ax.plot(curves.grid, one.curve, zorder=3, **EXPLANATION)
    if support is not None:
        ax.plot(support[0], support[1], "o", zorder=5, **SEEN)
    ax.set_xlim(float(np.min(curves.grid)), float(np.max(curves.grid)))
    if names:
        for one, (place, above) in zip(explanations, name_places([e.curve for e in explanations]), strict=True):
            where: dict[str, Any] = {"xytext": (0, 4 if above else -4), "textcoords": "offset points", "zorder": 6}
            words: dict[str, Any] = {"fontsize": 8, "color": INK, "style": "italic", "path_effects": halo(), "ha": "center"}
            point = (float(curves.grid[place]), float(one.curve[place]))
            ax.annotate(literal(one.name), point, va="bottom" if above else "top", **where, **words)
    if key_outside:
        legend(ax, explained_key(colour))
    return dress(ax, x=x, y=y)


def explained_key(colour: str, *, draw: str = "a draw") -> dict[str, Any]:
    """Samples for a legend: which line is a learner's, and which is the truth's."""
    return {
        draw: Line2D([], [], color=colour, **DRAW | {"linewidth": 1.2}),
        "explanation": Line2D([], [], **EXPLANATION),
        "support: seen": Line2D([], [], marker="o", linestyle="", **SEEN),
    }


def explained_grid(
    rows: Mapping[str, Sequence[ExplainedLike]],
    *,
    x: str = "",
    y: str = "",
    columns: int = 5,
    look: Mapping[str, Look] | None = None,
    notes: Mapping[str, str] | None = None,
    num_draws: int = 20,
) -> list[Axes]:
    """Small multiples of `explained_draws`: a row a task (more rows where there are many learners), a panel a learner.

    ``rows``: the same tasks for each learner; ``notes``: a few words by learner, over its panel of the first task. Each
    task has its own limits of y, the same for all learners. Returns the panels, task by task. Raises ValueError where
    tasks are missing.
    """
    tasks = {len(kept) for kept in rows.values()}
    if len(tasks) != 1 or tasks == {0}:
        raise ValueError(f"every learner needs the same tasks, at least one; got {[len(kept) for kept in rows.values()]}")
    look, notes, (count,) = looks(rows) if look is None else look, notes or {}, tasks
    deep = -(-len(rows) // columns)  # rows of a task
    wide = -(-len(rows) // deep)
    flat = new_grid(count * deep * wide, cell=(min(2.4, 8.8 / wide), 1.4), columns=wide, sharex=True)
    panels = []
    for i in range(count):
        mine = flat[i * deep * wide : (i + 1) * deep * wide]
        for spare in mine[len(rows) :]:
            spare.set_axis_off()
        limits = explained_limits([kept[i] for kept in rows.values()])
        for j, (ax, (name, kept)) in enumerate(zip(mine, rows.items(), strict=False)):
            task, first = kept[i], j == 0
            support = (task.support_x, task.support_y)
            options: dict[str, Any] = {"colour": look[name].colour, "num_draws": num_draws, "names": first, "key_outside": False}
            ax.xaxis.set_major_locator(MaxNLocator(3))  # a narrow panel: more numbers would run into each other
            explained_draws(task.after, task.explanations, support=support, ax=ax, **options)
            ax.set_ylim(*limits)
            if i == 0 or deep > 1:
                name_panel(ax, name, look[name], note=notes.get(name, "") if i == 0 else "")
            if j % wide:
                ax.tick_params(labelleft=False)
            if first:
                likely = ", ".join(f"{one.name} {one.probability:.0%}" for one in task.explanations)
                ax.set_ylabel(literal(f"{task.name}\n{likely}"), color=GREY, fontsize=8.5)
        panels += mine[: len(rows)]
    share_labels(flat, x=x, y=y)
    return panels


def explained_limits(tasks: Iterable[ExplainedLike]) -> tuple[float, float]:
    """Limits of y round the points and explanations of a task, and learners' draws as far as they stay within reach of those."""
    tasks = list(tasks)
    low, high = finite_limits(tasks[0].support_y, *(one.curve for one in tasks[0].explanations))
    draws = np.concatenate([task.after.draws.ravel() for task in tasks])
    reach = 0.35 * (high - low)
    return finite_limits([low, high], np.clip(draws[np.isfinite(draws)], low - reach, high + reach), margin=0.02)


def name_places(curves: Sequence[Array]) -> list[tuple[int, bool]]:
    """Where along the grid each curve's name stands, and whether above it: where it is furthest from the others, on the far side."""
    places = []
    for i, curve in enumerate(curves):
        others = [other for j, other in enumerate(curves) if j != i]
        if not others:
            places.append((len(curve) // 2, True))
            continue
        gaps = np.stack([curve - other for other in others])
        inner = slice(len(curve) // 5, len(curve) - len(curve) // 5)  # a name at the edge would be cut
        place = inner.start + int(np.nanargmax(np.abs(gaps).min(0)[inner]))
        places.append((place, bool(gaps[:, place].mean() > 0)))
    return places
