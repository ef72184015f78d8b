"""Intervals by drawing whole tasks anew: of every mean in a table, or every point of a curve, at once.

Points of one task share its parameters and so its luck; resampling points would claim too much. The resamples are
those of `bayesmeta.metrics.bootstrap_interval` at the same seed, as one matrix product instead of a loop.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from bayesmeta.plots.style import Array

RESAMPLES = 2000
BLOCK = 1 << 20  # entries turned into floats at a time


def resampled_shares(sums: Array, counts: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Σ sums / Σ counts over the tasks of each resample; both (T, L) -> (B, L), NaN where nothing counts.

    For a mean over tasks: ``sums`` the values, ``counts`` ones. For a share of pooled points: hits and points.
    """
    times = _times_drawn(len(sums), resamples, seed)
    both = np.concatenate([sums, counts], axis=1)
    totals = np.concatenate([block @ both for block in np.array_split(times, 1 + times.size // BLOCK)])
    above, below = np.split(totals, 2, axis=1)
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)


@lru_cache(maxsize=1)  # one table asks for the same resamples of the same tasks again and again
def _times_drawn(tasks: int, resamples: int, seed: int) -> Array:
    """How often each resample holds each task, (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    times = np.empty((resamples, tasks), dtype=np.int16)
    for row in times:
        row[:] = np.bincount(torch.randint(tasks, (tasks,), generator=generator).numpy(), minlength=tasks)
    times.flags.writeable = False
    return times


def percentile_band(values: Array, *, level: float = 0.95) -> tuple[Array, Array]:
    """Lower and upper end (L,) of the central ``level`` of ``values`` (B, L), NaN left out; NaN where all are."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    bare = np.isnan(values).all(axis=0)
    band = np.nanquantile(np.where(bare, 0.0, values), [(1 - level) / 2, (1 + level) / 2], axis=0)
    lower, upper = np.where(bare, np.nan, band)
    return lower, upper
