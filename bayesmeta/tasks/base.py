"""What a family of tasks is, and the few checks and draws that the families share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesmeta.episodes import Episode, Points

# A number of points a task: the same for all, or drawn uniformly between two bounds, both included.
Size = int | tuple[int, int]
# How a task's parameter is drawn: uniformly between two bounds, or from a scalar distribution.
Prior = tuple[float, float] | Distribution


@runtime_checkable
class TaskFamily(Protocol):
    """A distribution over tasks, or a finite set of them.

    `sample` is all that training needs. What else a family may have, and others look for:

    - ``num_tasks``: ``int``, the number of tasks of a finite family, or None for an endless one (the default). A finite
      family gives each task at most once per call of `sample`, in random order, unless there are fewer than asked for.
    - ``episodes(*, generator) -> Episode``: a finite family's tasks, every one once, in a fixed order; what is random
      about them (the split into support and query) comes from the generator. Evaluation uses it.
    - ``task_names() -> list[str]``: the names of the tasks in the order of `episodes`.
    - ``target_scale``: ``float``, one unit of the family's ``y`` in original units (default 1).
    - ``exact_posterior(support)``, ``exact_predictive(support, x)``, ``log_evidence(points) -> (T,)``: the truth, where
      the family knows it.
    - ``explanations(support, x) -> (M, T, N)``: the M curves that a support set may come from, at ``x (T, N, I)``;
      ``probabilities_of_explanations(support) -> (M, T)``: how likely each is given the support, NaN where that is not
      known; ``explanation_names``: a word for each of the M. Evaluation looks whether a learner sees them all.
    - ``sample_tasks(num_tasks, *, generator) -> dict`` of ``(T, ...)`` tensors, ``evaluate(tasks, x) -> (T, N)``:
      the true task parameters and their noise-free function. The same generator state, the same tasks as `sample`.
    """

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """``num_tasks`` tasks with their support and query sets; all randomness comes from ``generator``."""
        ...


def check_request(num_tasks: int, generator: torch.Generator) -> None:
    """Raises where `TaskFamily.sample` is asked for no tasks, or without a generator."""
    if num_tasks < 1:
        raise ValueError(f"num_tasks: expected at least 1, got {num_tasks}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")


def check_size(name: str, size: Size) -> None:
    """Raises ValueError where ``size`` is neither a number of points >= 0 nor bounds (low, high), 0 <= low <= high."""
    low, high = size if isinstance(size, tuple) else (size, size)
    if not (isinstance(low, int) and isinstance(high, int) and 0 <= low <= high):
        raise ValueError(f"{name}: expected a number of points >= 0, or (low, high) with 0 <= low <= high, got {size}")


def check_prior(name: str, prior: Prior) -> None:
    """Raises ValueError where ``prior`` is neither finite bounds (low, high) nor a scalar distribution."""
    if isinstance(prior, Distribution):
        if prior.batch_shape or prior.event_shape:
            shape = tuple(prior.batch_shape + prior.event_shape)
            raise ValueError(f"{name}: expected a scalar distribution, got one of shape {shape}")
    elif not (len(prior) == 2 and -math.inf < prior[0] <= prior[1] < math.inf):
        raise ValueError(f"{name}: expected finite bounds (low, high) with low <= high, or a distribution, got {prior}")


def draw(prior: Prior, num_tasks: int, dtype: torch.dtype | None) -> Tensor:
    """One value a task, ``(T,)``, from torch's current stream."""
    if isinstance(prior, Distribution):
        return prior.sample((num_tasks,)).to(dtype or torch.get_default_dtype())
    return _uniform(prior, (num_tasks,), dtype)


def draw_mask(size: Size, num_tasks: int) -> Tensor:
    """The mask ``(T, N)`` of sets of the given size, N being the largest; torch's current stream draws random sizes."""
    if isinstance(size, int):
        return torch.ones(num_tasks, size, dtype=torch.bool)
    low, high = size
    return torch.arange(high) < torch.randint(low, high + 1, (num_tasks, 1))


def draw_curve(
    curve: Callable[[Tensor], Tensor],
    size: Size,
    *,
    x_range: tuple[float, float],
    noise: Tensor,
    dtype: torch.dtype | None,
) -> Points:
    """Points of one curve a task: x uniform in ``x_range``, y the curve plus normal noise; zeros in the padding.

    ``curve`` takes ``(T, N, 1)`` to ``(T, N)``; ``noise`` is the standard deviation of each task, ``(T,)``.
    """
    mask = draw_mask(size, len(noise))
    x = _uniform(x_range, (*mask.shape, 1), dtype)
    y = curve(x) + noise[:, None] * torch.randn(mask.shape, dtype=dtype)
    if isinstance(size, int):  # no padding
        return Points(x, y, mask)
    return Points(x.masked_fill(~mask[..., None], 0), y.masked_fill(~mask, 0), mask)


def _uniform(bounds: tuple[float, float], shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    low, high = bounds
    return torch.rand(shape, dtype=dtype).mul_(high - low).add_(low)  # in place: for short training steps this is a good part of the time


def choose_tasks(total: int, num_tasks: int) -> Tensor:
    """Indices ``(num_tasks,)`` into ``total`` tasks, in random order: none twice while they last, else drawn anew."""
    if num_tasks <= total:
        return torch.randperm(total)[:num_tasks]
    return torch.randint(total, (num_tasks,))
