"""How training went: the loss of every step, its running median, and the validation loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bayesmeta.plots.style import INK, PALETTE, Array, axes_or_new, dress, finite_limits, legend, tint

VALIDATION: dict[str, Any] = {"color": INK, "marker": "o", "markersize": 3.0, "linestyle": "--", "linewidth": 0.9}
PALE = 0.3


def running_median(values: Array, window: int, *, most: int = 500) -> tuple[Array, Array]:
    """Median of the ``window`` values round each place (fewer at the ends), NaN left out; (K,) -> places (M,), (M,).

    ``most``: beyond so many values the places are spread evenly from first to last, as fine as a line can show.
    """
    values, half = np.asarray(values, dtype=float), window // 2
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), most)).round().astype(int))
    medians = np.full(len(places), np.nan)
    for i, place in enumerate(places):
        near = values[max(0, place - half) : place + half + 1]
        near = near[~np.isnan(near)]
        if near.size:
            medians[i] = np.median(near)
    return places, medians


def loss_curve(
    step: Array,
    loss: Array,
    *,
    validation_step: Array | None = None,
    validation: Array | None = None,
    window: int | None = None,
    colour: str = PALETTE[0],
    y: str = "meta-loss",
    key_outside: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Loss against step: every value pale, the running median bold, validation as dots on a dashed line.

    ``step``, ``loss`` (K,); ``validation_step``, ``validation`` (V,), both or neither. ``window``: values of the
    median, default a fiftieth of all (at 1 there is no pale line). A loss that is not finite leaves a gap. The y axis
    holds the lowest 98% of the losses and all of validation: a few wild steps may leave it at the top. Raises
    ValueError where shapes differ.
    """
    step, loss = np.asarray(step, dtype=float), np.asarray(loss, dtype=float)
    if step.shape != loss.shape or step.ndim != 1:
        raise ValueError(f"step and loss must have one shape (K,), got {step.shape} and {loss.shape}")
    checks, held_out = (np.asarray([] if v is None else v, dtype=float) for v in (validation_step, validation))
    if checks.shape != held_out.shape:
        shapes = f"{checks.shape} and {held_out.shape}"
        raise ValueError(f"validation_step and validation must have one shape (V,), got {shapes}")
    ax = axes_or_new(ax, 5.8, 3.0)
    loss = np.where(np.isfinite(loss), loss, np.nan)
    window = max(1, len(loss) // 50) if window is None else window
    if window > 1:
        ax.plot(step, loss, color=tint(colour, PALE), linewidth=0.6, zorder=1)
    places, medians = running_median(loss, window)
    ax.plot(step[places], medians, color=colour, linewidth=1.6, zorder=2)
    if held_out.size:
        ax.plot(checks, held_out, zorder=3, **VALIDATION)
    seen = loss[np.isfinite(loss)]
    if seen.size:
        ax.set_ylim(*finite_limits([float(seen.min()), float(np.quantile(seen, 0.98))], held_out))
    if key_outside:
        legend(ax, loss_key(colour, validation=held_out.size > 0))
    return dress(ax, x="step", y=y, grid="y")


def loss_key(colour: str, *, validation: bool = True) -> dict[str, Any]:
    """Samples for a legend: which line is which."""
    entries = {
        "running median": Line2D([], [], color=colour, linewidth=1.6),
        "each step": Line2D([], [], color=tint(colour, PALE), linewidth=1.0),
    }
    return entries | {"validation": Line2D([], [], **VALIDATION)} if validation else entries
