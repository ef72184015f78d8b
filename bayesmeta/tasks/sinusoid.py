"""Sine curves: the regression families of MAML, BMAML and PACOH."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Normal

from bayesmeta.episodes import Episode
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import Prior, Size, check_prior, check_request, check_size, choose_tasks, draw, draw_curve


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Sinusoid:
    """y = A sin(ω x − φ) + b x + c + noise, x uniform.

    The sign of the phase is that of Finn's public code. It matters where φ is not uniform over a whole period: over
    U[0, π], sin(x − φ) and sin(x + φ) are different sets of curves.

    ==================== ====== ==============================================================================
    argument             symbol
    ==================== ====== ==============================================================================
    amplitude            A      bounds ``(low, high)`` of a uniform, or a scalar `torch.distributions.Distribution`
    phase                φ      the same, in radians
    frequency            ω      the same, in radians per unit of x
    slope, offset        b, c   the same; default 0
    x_range                     bounds of the inputs
    noise                       standard deviation of the noise on y
    noise_per_amplitude         added to it for each unit of A: sd = noise + noise_per_amplitude · A
    noise_free_query            True: query targets are the curve itself
    num_support, num_query      points a task, or ``(low, high)``: a random number for each task, padded to ``high``
    num_tasks                   None: endless. Else the family is a fixed set of so many tasks, drawn by ``seed``
    fixed_points                True: of a fixed set, the points and their noise are drawn once too, by ``seed``
    dtype                       of the episodes; default torch's
    ==================== ====== ==============================================================================

    To vary one argument of a published setting: ``dataclasses.replace(Sinusoid.maml(), noise=0.1)``.
    Raises ValueError where an argument is out of its range.
    """

    target_scale: ClassVar[float] = 1.0

    amplitude: Prior = (0.1, 5.0)
    phase: Prior = (0.0, math.pi)
    frequency: Prior = (1.0, 1.0)
    slope: Prior = (0.0, 0.0)
    offset: Prior = (0.0, 0.0)
    x_range: tuple[float, float] = (-5.0, 5.0)
    noise: float = 0.0
    noise_per_amplitude: float = 0.0
    noise_free_query: bool = False
    num_support: Size = 10
    num_query: Size = 10
    num_tasks: int | None = None
    fixed_points: bool = False
    seed: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("amplitude", "phase", "frequency", "slope", "offset", "x_range"):
            check_prior(name, getattr(self, name))
        check_size("num_support", self.num_support)
        check_size("num_query", self.num_query)
        if self.noise < 0 or self.noise_per_amplitude < 0:
            raise ValueError(
                f"expected noise >= 0, got noise={self.noise}, noise_per_amplitude={self.noise_per_amplitude}"
            )
        if self.num_tasks is not None and self.num_tasks < 1:
            raise ValueError(f"num_tasks: expected None (endless) or at least 1, got {self.num_tasks}")
        if self.fixed_points and self.num_tasks is None:
            raise ValueError("fixed_points: an endless family has no fixed points; give num_tasks")

    @classmethod
    def maml(cls, *, num_support: Size = 10, num_query: Size = 10) -> Sinusoid:
        """Finn et al. 2017, section 5.1: A ~ U[0.1, 5], φ ~ U[0, π], ω = 1, x ~ U[−5, 5], no noise."""
        return cls(num_support=num_support, num_query=num_query)

    @classmethod
    def bmaml(
        cls,
        *,
        num_tasks: int | None = 100,
        num_support: int = 5,
        num_query: int | None = None,
        noise_free_query: bool = False,
        seed: int = 0,
    ) -> Sinusoid:
        """Kim et al. 2018, section 5.1: A ~ U[0.1, 5], φ ~ U[0, 2π], ω ~ U[0.5, 2], noise sd 0.01 A, x ~ U[−5, 5].

        ``num_tasks`` of 100 or 1000 is the paper's fixed training set, points and noise included; None is endless.
        ``num_query`` is ``num_support`` by default, as in the authors' code. The paper tests on other tasks (another
        ``seed``) with noise-free targets.
        """
        return cls(
            phase=(0.0, 2 * math.pi),
            frequency=(0.5, 2.0),
            noise_per_amplitude=0.01,
            noise_free_query=noise_free_query,
            num_support=num_support,
            num_query=num_support if num_query is None else num_query,
            num_tasks=num_tasks,
            fixed_points=num_tasks is not None,
            seed=seed,
        )

    @classmethod
    def pacoh(
        cls, *, num_tasks: int | None = 20, num_support: Size = 3, num_query: Size = 2, seed: int = 0
    ) -> Sinusoid:
        """Rothfuss et al. 2021: y = b x + A sin(1.5 (x − s)) + c + noise, x ~ U[−5, 5].

        A ~ U[0.7, 1.3], s ~ N(0, 0.1²), b ~ N(0.5, 0.2²), c ~ N(5, 0.1²), noise sd 0.1; so φ = 1.5 s. The paper trains
        on 20 fixed tasks of 5 points in all, here 3 to see and 2 to ask. To test: ``num_tasks=None``, larger sets.
        """
        return cls(
            amplitude=(0.7, 1.3),
            phase=Normal(0.0, 0.15),
            frequency=(1.5, 1.5),
            slope=Normal(0.5, 0.2),
            offset=Normal(5.0, 0.1),
            noise=0.1,
            num_support=num_support,
            num_query=num_query,
            num_tasks=num_tasks,
            fixed_points=num_tasks is not None,
            seed=seed,
        )

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Tasks with x ``(T, N, 1)`` and y ``(T, N)``, zeros in the padding; of a fixed set none twice."""
        check_request(num_tasks, generator)
        with rng(generator):
            if self.num_tasks is None:
                return self._draw_episode(self._draw_tasks(num_tasks))
            return self._fixed_episode(choose_tasks(self.num_tasks, num_tasks))

    def episodes(self, *, generator: torch.Generator) -> Episode:
        """Every task of a fixed set once, in its order. Raises ValueError where the family is endless."""
        if self.num_tasks is None:
            raise ValueError("episodes: this family is endless; use sample, or give num_tasks")
        check_request(self.num_tasks, generator)
        with rng(generator):
            return self._fixed_episode(torch.arange(self.num_tasks))

    def sample_tasks(self, num_tasks: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """``amplitude, phase, frequency, slope, offset``, each ``(T,)``: the tasks of `sample`."""
        check_request(num_tasks, generator)
        with rng(generator):
            if self.num_tasks is None:
                return self._draw_tasks(num_tasks)
            return _select(self._fixed[0], choose_tasks(self.num_tasks, num_tasks))

    def evaluate(self, tasks: dict[str, Tensor], x: Tensor) -> Tensor:
        """The noise-free curves ``(T, N)`` at ``x (T, N, 1)``, or at ``x (N, 1)`` shared by all tasks."""
        t = {name: value[:, None] for name, value in tasks.items()}
        x = x[..., 0]
        return t["amplitude"] * torch.sin(t["frequency"] * x - t["phase"]) + t["slope"] * x + t["offset"]

    def _draw_tasks(self, num_tasks: int) -> dict[str, Tensor]:
        names = ("amplitude", "phase", "frequency", "slope", "offset")
        return {name: draw(getattr(self, name), num_tasks, self.dtype) for name in names}

    def _draw_episode(self, tasks: dict[str, Tensor]) -> Episode:
        noise = self.noise + self.noise_per_amplitude * tasks["amplitude"].abs()
        asked = torch.zeros_like(noise) if self.noise_free_query else noise

        def curve(x: Tensor) -> Tensor:
            return self.evaluate(tasks, x)

        support = draw_curve(curve, self.num_support, x_range=self.x_range, noise=noise, dtype=self.dtype)
        query = draw_curve(curve, self.num_query, x_range=self.x_range, noise=asked, dtype=self.dtype)
        return Episode(support, query)

    def _fixed_episode(self, index: Tensor) -> Episode:
        tasks, points = self._fixed
        return points.select(index) if points is not None else self._draw_episode(_select(tasks, index))

    @cached_property
    def _fixed(self) -> tuple[dict[str, Tensor], Episode | None]:
        """The tasks of a fixed set, and their points where these are fixed too."""
        assert self.num_tasks is not None
        with rng(torch.Generator().manual_seed(self.seed)):
            tasks = self._draw_tasks(self.num_tasks)
            return tasks, self._draw_episode(tasks) if self.fixed_points else None


def _select(tasks: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {name: value[index] for name, value in tasks.items()}
