"""Temperature scaling (Guo, Pleiss, Sun & Weinberger 2017, section 4.2): one number, fitted after training, that makes a classifier as sure as right.

    p_T(y | x, S_i) ∝ p(y | x, S_i)^(1/T)                               p: the wrapped learner's own predictive, draws averaged
    T = argmin 1/n Σ_i −1/N_Q Σ_j log p_T(y_j | x_j, S_i),  j ∈ Q_i     over validation tasks, whose classes are not the test's

q(φ | S_i), and with it which class is the likeliest, are the wrapped learner's. A baseline for what meta-learning says of its own
uncertainty: what one number can mend was only a matter of scale. It is fitted to the tasks it is shown, and knows nothing of a shift.

| argument | symbol | |
|---|---|---|
| adapter | | any trained learner on a model of classes; it is not copied and not changed |
| temperature | T | where it starts; `fit` sets it |
"""  # noqa: E501 - a title

from __future__ import annotations

import math
import warnings

import torch
from scipy.optimize import brentq
from torch import Tensor

from ..episodes import Episode, Points
from ..posteriors import TemperedPosterior
from ..randomness import rng
from .base import AbstractAdapter, checked_steps
from .objectives import counts

RANGE = (0.01, 100.0)  # of T
SMALLEST = -1e6  # log of the probability that stands for 0


class TemperatureScaling(AbstractAdapter):
    """A learner with its predicted probabilities at another temperature; see the module's docstring."""

    def __init__(self, adapter: AbstractAdapter, *, temperature: float = 1.0) -> None:
        if not isinstance(adapter, AbstractAdapter):
            raise TypeError(f"adapter: expected a learner, got {type(adapter).__name__}")
        super().__init__(adapter.model)
        if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        self.adapter, self.why_eager = adapter, "its predictions are another learner's"
        self._temperature: Tensor
        self.register_buffer("_temperature", torch.tensor(float(temperature), dtype=torch.float64))

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TemperedPosterior:
        """The wrapped learner's posterior, its predictions tempered."""
        return TemperedPosterior(self.adapter.adapt(support, generator=generator), self.temperature)

    def adapt_over_theta(self, support: Points, *, num_theta: int = 10, generator: torch.Generator | None = None) -> TemperedPosterior:
        """As `adapt`, averaged over draws of θ first where it has a posterior."""
        return TemperedPosterior(self.adapter.adapt_over_theta(support, num_theta=num_theta, generator=generator), self.temperature)

    def fit(self, tasks: Episode, *, num_draws: int = 100, task_chunk: int = 50, generator: torch.Generator | None = None) -> float:
        """Sets T to the one with the smallest NLL on the query sets of ``tasks``, and returns it.

        ``tasks``: validation tasks, say ``family.split("val").sample(200, generator=g)``. ``num_draws``: of φ, as for `evaluate`.
        ``task_chunk``: how many tasks are adapted to at once. RuntimeWarning where T ends at an end of 0.01 to 100: every answer is
        right, or none is better than chance; and where tasks without a prediction, whose adaptation diverged, are left out. Raises
        TypeError for anything but an Episode, ValueError where y is no class, or where no task has a query point and a prediction.
        """
        if not isinstance(tasks, Episode):
            raise TypeError(f"tasks: expected an Episode, such as family.sample(200, generator=g), got {type(tasks).__name__}")
        checked_steps("task_chunk", task_chunk, least=1)
        if tasks.query.y is None or not bool(tasks.query.mask.any()):
            raise ValueError("tasks: expected query points with targets, got none")
        query = self.adapter.prepared(tasks.query, "query")
        assert query.y is not None
        with rng(generator):
            log_probs = torch.cat([self._log_probs(tasks.select(slice(i, i + task_chunk)), num_draws) for i in
                                   range(0, tasks.num_tasks, task_chunk)]).double().clamp(min=SMALLEST)  # fmt: skip
        y = (query.y[..., 0] if query.y.dim() == 3 else query.y).long()[..., None]
        broken = (log_probs.isnan().any(-1) & query.mask).any(1)
        if bool(broken.any()):
            warnings.warn(f"TemperatureScaling: {int(broken.sum())} of {tasks.num_tasks} tasks have no prediction and are left out: their "
                          "adaptation diverged", RuntimeWarning, stacklevel=2)  # fmt: skip
        used = query.mask & ~broken[:, None]
        if not bool(used.any()):
            raise ValueError("tasks: expected one at least with a query point and a prediction, got none")
        weight = query.mask / counts(query)[:, None]

        def slope(sharpness: float) -> float:
            """d NLL / d (1/T): the NLL is convex there, so this crosses 0 once or never."""
            gap = ((sharpness * log_probs).softmax(-1) * log_probs).sum(-1) - log_probs.gather(-1, y)[..., 0]
            return float(torch.where(used, weight * gap, 0.0).sum())

        least, most = (1 / end for end in reversed(RANGE))
        if slope(least) >= 0 or slope(most) <= 0:
            best = least if slope(least) >= 0 else most
            warnings.warn(f"TemperatureScaling: the NLL of {tasks.num_tasks} tasks still falls at T = {1 / best:.3g}, the end of "
                          f"the range from {RANGE[0]:g} to {RANGE[1]:g}", RuntimeWarning, stacklevel=2)  # fmt: skip
        else:
            best = brentq(slope, least, most, xtol=1e-14)
        self._temperature.fill_(1 / best)
        return self.temperature

    @property
    def temperature(self) -> float:
        """T."""
        return float(self._temperature)

    def materialise(self, data: Points | Episode) -> None:
        """Makes the wrapped learner's parameters."""
        self.adapter.materialise(data)

    def _log_probs(self, tasks: Episode, num_draws: int) -> Tensor:
        """``(T, N, C)``, of the wrapped learner."""
        query = self.adapter.prepared(tasks.query, "query")
        posterior = self.adapter.adapt_over_theta(tasks.support)
        torch.rand(())  # the stream moves on, so that the draws of the next chunk are others
        predictive = posterior.predict(query.x, None if posterior.is_point else num_draws, mask=query.mask)
        if not predictive.is_classification:
            raise ValueError(f"TemperatureScaling: expected a model of classes, got y of {type(predictive.components[0]).__name__}")
        return predictive.log_probs()
