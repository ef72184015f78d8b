"""Sine curves and straight lines, mixed: a few points leave open which of the two a task is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesmeta.episodes import Episode
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import Prior, Size, check_prior, check_request, check_size, draw, draw_curve


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SineOrLine:
    """Each task, with probability ½ each: y = A sin(x − φ) + noise, or y = b x + c + noise.

    The defaults are those of PLATIPUS (Finn, Xu and Levine 2018) and LEO (Rusu et al. 2019): A ~ U[0.1, 5],
    φ ~ U[0, π], b, c ~ U[−3, 3], x ~ U[−5, 5], noise sd 0.3, 5 shots. Arguments, and the sign of φ, as in `Sinusoid`.

    Raises ValueError where an argument is out of its range.
    """

    num_tasks: ClassVar[None] = None
    target_scale: ClassVar[float] = 1.0

    amplitude: Prior = (0.1, 5.0)
    phase: Prior = (0.0, math.pi)
    slope: Prior = (-3.0, 3.0)
    intercept: Prior = (-3.0, 3.0)
    x_range: tuple[float, float] = (-5.0, 5.0)
    noise: float = 0.3
    noise_free_query: bool = False
    num_support: Size = 5
    num_query: Size = 10
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("amplitude", "phase", "slope", "intercept", "x_range"):
            check_prior(name, getattr(self, name))
        check_size("num_support", self.num_support)
        check_size("num_query", self.num_query)
        if self.noise < 0:
            raise ValueError(f"noise: expected >= 0, got {self.noise}")

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """New tasks with x ``(T, N, 1)`` and y ``(T, N)``; zeros in the padding."""
        check_request(num_tasks, generator)
        with rng(generator):
            tasks = self._draw_tasks(num_tasks)
            noise = torch.full((num_tasks,), self.noise, dtype=self.dtype)
            asked = torch.zeros_like(noise) if self.noise_free_query else noise

            def curve(x: Tensor) -> Tensor:
                return self.evaluate(tasks, x)

            support = draw_curve(curve, self.num_support, x_range=self.x_range, noise=noise, dtype=self.dtype)
            query = draw_curve(curve, self.num_query, x_range=self.x_range, noise=asked, dtype=self.dtype)
            return Episode(support, query)

    def sample_tasks(self, num_tasks: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """``is_line`` (bool) and ``amplitude, phase, slope, intercept``, each ``(T,)``: the tasks of `sample`.

        The same generator state gives the same tasks. A line's amplitude and phase, and a sine's slope and intercept,
        are drawn but not used.
        """
        check_request(num_tasks, generator)
        with rng(generator):
            return self._draw_tasks(num_tasks)

    def evaluate(self, tasks: dict[str, Tensor], x: Tensor) -> Tensor:
        """The noise-free curves ``(T, N)`` at ``x (T, N, 1)``, or at ``x (N, 1)`` shared by all tasks."""
        t = {name: value[:, None] for name, value in tasks.items()}
        x = x[..., 0]
        line = t["slope"] * x + t["intercept"]
        return torch.where(t["is_line"], line, t["amplitude"] * torch.sin(x - t["phase"]))

    def _draw_tasks(self, num_tasks: int) -> dict[str, Tensor]:
        names = ("amplitude", "phase", "slope", "intercept")
        return {
            "is_line": torch.rand(num_tasks) < 0.5,
            **{name: draw(getattr(self, name), num_tasks, self.dtype) for name in names},
        }
