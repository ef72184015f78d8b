"""One number a learner with its interval: dots and lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bayesmeta.plots.formats import decimals, number
from bayesmeta.plots.style import GREY, INK, Look, axes_or_new, dress, finite_limits, literal, looks, shade

Estimate = tuple[float, float, float]


def metric_intervals(
    estimates: Mapping[str, Estimate],
    *,
    label: str = "",
    reference: float | None = None,
    look: Mapping[str, Look] | None = None,
    numbers: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """A dot at each learner's estimate and a line over its interval, first learner on top.

    ``estimates``: (estimate, lower, upper) by learner, in any unit; ``label`` names it. ``reference``: a value to
    compare with (nominal coverage, zero difference), a thin dashed line. ``numbers``: written at the right. A learner
    far outside the others' range is an arrow at the edge with its value; one whose estimate is not finite keeps its
    row, which says so.
    """
    ax = axes_or_new(ax, 5.2, 0.8 + 0.3 * len(estimates))
    look = looks(estimates) if look is None else look
    if reference is not None:
        ax.axvline(reference, color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    small: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8.5, "color": GREY}
    places = decimals([e for e, _, _ in estimates.values()], [(high - low) / 2 for _, low, high in estimates.values()])

    def show(value: float) -> str:
        return number(value, places)

    low, high = _window(estimates.values(), reference)
    for row, (name, (estimate, lower, upper)) in enumerate(estimates.items()):
        colour, marker, _ = look[name]
        if not np.isfinite(estimate):
            ax.annotate("not a number" if np.isnan(estimate) else f"{estimate}", (0.02, row), **small)
            continue
        if low <= estimate <= high:
            dot: dict[str, Any] = {"color": colour, "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.7}
            ax.plot([lower, upper], [row, row], color=colour, linewidth=2.0, solid_capstyle="round", zorder=2)
            ax.plot(estimate, row, marker, zorder=3, **dot)
        else:
            side, words = (1, f"{show(estimate)} →") if estimate > high else (0, f"← {show(estimate)}")
            ends = {"ha": "right" if side else "left", "color": shade(colour)}
            ax.annotate(words, (side, row), **small | ends)
        if numbers:
            ax.annotate(
                f"{show(estimate)}  [{show(lower)}, {show(upper)}]", (1.03, row), annotation_clip=False, **small
            )
    ax.set_xlim(low, high)
    ax.set_yticks(range(len(estimates)), [literal(name, 40, lines=1) for name in estimates])
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    dress(ax, x=label, grid="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
    return ax


def _window(estimates: Iterable[Estimate], reference: float | None) -> tuple[float, float]:
    """Limits of x round all intervals but those of learners far from the rest, who would flatten the picture."""
    finite = np.array([e for e in estimates if np.isfinite(e[0])]).reshape(-1, 3)
    middle = np.median(finite[:, 0]) if len(finite) else 0.0
    away = np.abs(finite[:, 0] - middle)
    # Intervals count too: what lies within reach of a usual interval is not far.
    halves = np.nan_to_num(finite[:, 2] - finite[:, 1]) / 2
    near = away <= 6 * (np.median(away) + np.median(halves)) if len(finite) else away > 0
    return finite_limits(finite[near].ravel(), [] if reference is None else [reference])
