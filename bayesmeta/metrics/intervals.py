"""Means over points and tasks, with intervals by resampling tasks.

The task is the unit: points of one task are not independent, tasks are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**14  # indices drawn at once: bounds the memory, not the outcome


class Interval(NamedTuple):
    """An estimate and its interval."""

    estimate: float
    lower: float
    upper: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside; False where an end is NaN."""
        return self.lower > 0 or self.upper < 0


def check_mask(values: Tensor, mask: Tensor) -> None:
    """Raises ValueError where ``mask`` is not bool or not of the shape of ``values``."""
    if values.shape != mask.shape or mask.dtype != torch.bool:
        got = f"{tuple(values.shape)} and {mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"expected values and a bool mask of one shape, got {got}")


def task_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values (T, N)`` over each task's points where ``mask (T, N)`` is True, ``(T,)``; NaN for a task without any."""
    check_mask(values, mask)
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)  # 0 / 0 is NaN: a task without points has no mean


def bootstrap_interval(values: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of ``values (T,)`` over tasks and its percentile bootstrap interval (Efron & Tibshirani 1993, section 13.3).

    NaN stands for a task without points: it is left out, and the interval is NaN throughout where none is left. A task that was
    scored as infinitely bad is inf, and makes the mean so.
    """
    values = _one_a_task(values)
    return _bootstrap_mean(values[~values.isnan()], level, resamples, seed)


def paired_difference(a: Tensor, b: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of ``a − b`` over the same tasks, each ``(T,)``, with its bootstrap interval: what two learners differ by.

    A task that is NaN in either is left out. NaN throughout where ∞ − ∞ is among the differences.
    """
    a, b = _one_a_task(a), _one_a_task(b)
    if a.shape != b.shape:
        raise ValueError(f"expected values of the same tasks, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    both = ~(a.isnan() | b.isnan())
    return _bootstrap_mean(a[both] - b[both], level, resamples, seed)


@torch.no_grad()
def bootstrap_statistic(
    statistic: Callable[..., Tensor], *arrays: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """``statistic(*arrays)``, a scalar, and its percentile bootstrap interval: tasks, the first axis of every array, are drawn together.

    Resamples where the statistic is NaN are left out; where it is NaN on the data themselves, so is the interval.
    """
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) != 1:
        raise ValueError(f"expected one or more arrays of the same tasks, got lengths {lengths}")

    def of_tasks(index: Tensor) -> Tensor:
        return torch.tensor([float(statistic(*(_drawn(array, i) for array in arrays))) for i in index], dtype=torch.float64)

    return _percentile_interval(of_tasks, lengths[0], level, resamples, seed)


def _one_a_task(values: Tensor) -> Tensor:
    # A report holds its numbers as read-only arrays, which torch.as_tensor would warn about: what is no tensor is copied.
    values = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    if values.dim() != 1:
        raise ValueError(f"expected one value a task (T,), got shape {tuple(values.shape)}")
    return values.detach().to("cpu", torch.float64)


def _bootstrap_mean(values: Tensor, level: float, resamples: int, seed: int) -> Interval:
    def of_tasks(index: Tensor) -> Tensor:
        return _drawn(values, index.flatten()).view(index.shape).mean(-1)

    return _percentile_interval(of_tasks, len(values), level, resamples, seed)


def _drawn(array: Tensor, index: Tensor) -> Tensor:
    return array.index_select(0, index.to(array.device))  # array[index] wakes every thread for a few numbers: slow on a busy machine


def _percentile_interval(of_tasks: Callable[[Tensor], Tensor], tasks: int, level: float, resamples: int, seed: int) -> Interval:
    """``of_tasks`` maps the tasks of some resamples, indices ``(B, T)``, to one number each, ``(B,)``."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    estimate = float(of_tasks(torch.arange(tasks)[None])) if tasks else math.nan
    if math.isnan(estimate):  # resamples that happen to miss what is broken would hide it
        return Interval(math.nan, math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, BLOCK // tasks)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    values = torch.cat([of_tasks(torch.randint(tasks, (size, tasks), generator=generator)) for size in sizes])
    low, high = (1 - level) / 2, (1 + level) / 2
    ends = torch.nanquantile(values, torch.tensor([low, high], dtype=torch.float64))
    outward = torch.stack([torch.nanquantile(values, q, interpolation=kind) for q, kind in ((low, "lower"), (high, "higher"))])
    lower, upper = torch.where(ends.isnan(), outward, ends).tolist()  # NaN: from interpolating between infinite means
    return Interval(estimate, lower, upper)
