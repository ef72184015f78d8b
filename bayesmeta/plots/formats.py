"""Numbers as text: as many decimals as their intervals deserve."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def decimals(estimates: Iterable[float], half_widths: Iterable[float]) -> int:
    """Decimals for a column of numbers: two digits of the typical half-width, else three digits of the numbers."""
    estimates, half_widths = list(estimates), list(half_widths)
    # What rounding leaves of an interval round equal values is no half-width.
    halves = [h for h, e in zip(half_widths, estimates, strict=True) if np.isfinite(h) and h > 1e-9 * abs(e)]
    if halves:
        return int(np.clip(1 - np.floor(np.log10(np.median(halves))), 0, 6))
    sizes = [abs(e) for e in estimates if np.isfinite(e) and e != 0]
    return int(np.clip(2 - np.floor(np.log10(np.median(sizes))), 0, 6)) if sizes else 2


def number(value: float, places: int) -> str:
    """``value`` with so many decimals; large ones in short form, what is no number as "nan" or "inf"."""
    if not np.isfinite(value):
        return str(float(value))
    return f"{value:.{places}f}" if abs(value) < 1e5 else f"{value:.3g}"
