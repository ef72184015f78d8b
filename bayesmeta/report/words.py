"""Numbers and names as words: what a table cell, a sentence or an error message says."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown ``name``: the nearest known one, or all of them."""
    same_case = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(str(name).casefold(), same_case, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {same_case[close[0]]!r}?"
    return f"; known are {', '.join(map(repr, same_case.values())) or 'none'}"


def duration(seconds: float) -> str:
    """A wall time that a reader takes in at a glance."""
    if not np.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.3g} h"


def amount(value: float) -> str:
    """A count, or a mean of counts."""
    if not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def several(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def per_task(sizes: np.ndarray) -> str:
    """How many points tasks have: the one number there is, or smallest to largest with the median."""
    low, high = int(sizes.min()), int(sizes.max())
    return f"{low} a task" if low == high else f"{low} to {high} a task, median {np.median(sizes):g}"
