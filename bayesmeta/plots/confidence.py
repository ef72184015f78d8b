"""Reliability of a classifier: is it right as often as it says? Its numbers as data: `reliability`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from bayesmeta.plots.resampling import RESAMPLES, percentile_band, resampled_shares
from bayesmeta.plots.style import (
    FAINT,
    GREY,
    TICKS,
    Array,
    Look,
    axes_or_new,
    dress,
    looks,
    name_panel,
    new_grid,
    share_labels,
)

AXES = ("confidence (largest probability)", "accuracy")


class Reliability(NamedTuple):
    """Accuracy by confidence in equal bins, (B,) each but ``edges`` (B + 1,); NaN in a bin without points."""

    edges: Array
    confidence: Array
    accuracy: Array
    lower: Array
    upper: Array
    counts: Array


def reliability(
    probs: Array, labels: Array, *, bins: int = 15, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Reliability:
    """Mean confidence and accuracy of the likeliest class in bins of confidence, with a bootstrap band over tasks.

    ``probs`` (T, N, C), ``labels`` (T, N) with -1 where there is no point. Bins are closed above: (0.8, 0.9].
    Raises ValueError on other shapes, NaN at a point, or where there is no point.
    """
    probs, labels = np.asarray(probs, dtype=float), np.asarray(labels)
    if probs.ndim != 3 or probs.shape[:2] != labels.shape:
        raise ValueError(f"expected probs (T, N, C) and labels (T, N), got {probs.shape} and {labels.shape}")
    hits, sums, counts = reliability_counts(probs, labels, bins=bins)
    total = counts.sum(0)
    if total.sum() == 0:
        raise ValueError("there is no point: labels are -1 throughout")
    band = percentile_band(resampled_shares(hits, counts, resamples=resamples, seed=seed), level=level)
    per_point = np.where(total > 0, 1 / np.maximum(total, 1), np.nan)
    return Reliability(np.linspace(0, 1, bins + 1), sums.sum(0) * per_point, hits.sum(0) * per_point, *band, total)


def reliability_counts(probs: Array, labels: Array, *, bins: int) -> tuple[Array, Array, Array]:
    """Right answers, summed confidence and points of each task in each bin, (T, B) each; arguments as `reliability`."""
    known, confidence = labels >= 0, probs.max(-1)
    if np.isnan(confidence[known]).any():
        raise ValueError("probs must be numbers, got NaN at a point")
    right, edges = probs.argmax(-1) == labels, np.linspace(0, 1, bins + 1)
    place = np.where(known, np.searchsorted(edges[1:-1], confidence, side="left"), -1)
    members = [place == b for b in range(bins)]
    hits, counts = ([part.sum(1).astype(float) for part in parts] for parts in ([m & right for m in members], members))
    sums = [np.where(member, confidence, 0.0).sum(1) for member in members]
    return np.stack(hits, 1), np.stack(sums, 1), np.stack(counts, 1)


def reliability_diagram(
    probs: Array,
    labels: Array,
    *,
    bins: int = 15,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    look: Look | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against confidence with a bootstrap band over tasks, and below it how many points each bin has.

    ``probs`` (T, N, C), ``labels`` (T, N), -1 where there is no point. A dot's area grows with its bin's points; dots
    below the diagonal: surer than right. Numbers: `reliability`. Raises ValueError as it does.
    """
    ax = axes_or_new(ax, 4.6, 4.4)
    colour, marker, dash = looks([""])[""] if look is None else look
    r = reliability(probs, labels, bins=bins, level=level, resamples=resamples, seed=seed)
    share = r.counts / r.counts.sum()
    # The counts stand under the dots on the same axis of confidence: the fullest bin a fifth of the height.
    bars = 0.2 * share / share.max()
    ax.bar(r.edges[:-1], bars, 1 / bins, align="edge", color=FAINT, edgecolor="white", linewidth=0.8, zorder=1)
    most = int(np.argmax(r.counts))
    middle = float(r.edges[most] + r.edges[most + 1]) / 2
    edge = 0.97 if middle > 0.9 else middle  # the last bin's number would leave the axes
    side = "right" if middle > 0.9 else "center"
    ax.text(edge, 0.21, f"{int(r.counts[most]):,} points", ha=side, va="bottom", fontsize=7.5, color=GREY, zorder=2)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, zorder=2)
    full = share > 0.01  # a line through bins of a few points would show their noise
    ax.plot(r.confidence[full], r.accuracy[full], color=colour, linestyle=dash, linewidth=1.2, zorder=3)
    some = r.counts > 0
    ax.vlines(r.confidence[some], r.lower[some], r.upper[some], color=colour, linewidth=1.4, alpha=0.4, zorder=3)
    areas = 8 + 60 * share[some] / share.max()
    ax.scatter(
        r.confidence[some], r.accuracy[some], areas, color=colour, marker=marker, linewidths=0, zorder=4, clip_on=False
    )
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=TICKS, yticks=TICKS, aspect="equal")
    return dress(ax, x=AXES[0], y=AXES[1], grid="both")


def reliability_grid(
    probs: Mapping[str, Array],
    labels: Mapping[str, Array],
    *,
    bins: int = 15,
    seed: int = 0,
    columns: int = 3,
    look: Mapping[str, Look] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Axes]:
    """Small multiples of `reliability_diagram`, a panel a learner; ``probs``, ``labels``, ``notes`` by learner."""
    look = looks(probs) if look is None else look
    axes = new_grid(len(probs), cell=(2.35, 2.55), columns=columns, sharex=True, sharey=True)
    for ax, name in zip(axes, probs, strict=True):
        reliability_diagram(probs[name], labels[name], bins=bins, seed=seed, look=look[name], ax=ax)
        name_panel(ax, name, look[name], note=(notes or {}).get(name, ""))
        ax.set(xlabel="", ylabel="")
    share_labels(axes, x=AXES[0], y=AXES[1])
    return axes
