"""Sine curves and straight lines, mixed: a few points leave open which of the two a task is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from bayesmeta.episodes import Episode, Points
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import Prior, Size, check_prior, check_request, check_size, draw, draw_curve

PARAMETERS = ("amplitude", "phase", "slope", "intercept")
PANEL = 16  # Gauss-Legendre nodes over four standard deviations of the likelihood: exact to rounding
INNER = 48  # over the whole of it
BLOCK = 2**22  # numbers held at once


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SineOrLine:
    """Each task, with probability ½ each: y = A sin(x − φ) + noise, or y = b x + c + noise.

    The defaults are those of PLATIPUS (Finn, Xu and Levine 2018) and LEO (Rusu et al. 2019): A ~ U[0.1, 5],
    φ ~ U[0, π], b, c ~ U[−3, 3], x ~ U[−5, 5], noise sd 0.3, 5 shots. Arguments, and the sign of φ, as in `Sinusoid`.

    Either hypothesis has two parameters with uniform priors and Gaussian noise, so what a support set says of them, and of which it is,
    is known: `probability_of_line`, `explanations`, `log_evidence`, by quadrature over both parameters in float64. Of tasks with 5 points
    about 2% leave both open (each at least 20% likely), with 3 points 9%, with 2 points 25%.

    Raises ValueError where an argument is out of its range.
    """

    num_tasks: ClassVar[None] = None
    target_scale: ClassVar[float] = 1.0
    explanation_names: ClassVar[tuple[str, ...]] = ("sine", "line")

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
        for name in (*PARAMETERS, "x_range"):
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

    def probability_of_line(self, support: Points) -> Tensor:
        """p(line | S_i), ``(T,)``, in the dtype of ``support.x``; ½ without points.

        Raises ValueError where the noise is 0 or a prior is not uniform.
        """
        (sine, _), (line, _) = self._hypotheses(support)
        return torch.sigmoid(line - sine).to(support.x)

    def probabilities_of_explanations(self, support: Points) -> Tensor:
        """p(sine | S_i) and p(line | S_i), ``(2, T)``, as `explanations` has them; NaN where the noise is 0 or a prior is not uniform."""
        if self.noise == 0 or not all(isinstance(getattr(self, name), tuple) for name in PARAMETERS):
            return support.x.new_full((2, support.num_tasks), torch.nan)
        line = self.probability_of_line(support)
        return torch.stack([1 - line, line])

    def log_evidence(self, points: Points) -> Tensor:
        """log p(y_i | x_i) of each task, parameters and hypothesis integrated out, ``(T,)``; 0 without points. Raises as above."""
        (sine, _), (line, _) = self._hypotheses(points)
        return (torch.logaddexp(sine, line) - math.log(2)).to(points.x)

    def explanations(self, support: Points, x: Tensor) -> Tensor:
        """The curves E[f(x) | S_i, sine] and E[f(x) | S_i, line], ``(2, T, N)``, at ``x (T, N, 1)`` or ``(N, 1)``. Raises as above.

        What the mixture of both is made of: a mean over the two would be a curve that is neither.
        """
        (_, sine), (_, line) = self._hypotheses(support)
        x = x[..., 0].to(torch.float64)
        curves = torch.stack(
            [sine[:, :1] * torch.sin(x) + sine[:, 1:] * torch.cos(x), line[:, :1] * x + line[:, 1:]]
        )
        return curves.to(support.x)

    def _hypotheses(self, points: Points) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """For sine and line: log p(y | x, hypothesis) ``(T,)`` and the posterior means of two coefficients ``(T, 2)``.

        A sine is A cos φ · sin x − A sin φ · cos x, a line b · x + c · 1.
        """
        if points.y is None:
            raise ValueError("points.y: expected targets, got None")
        if self.noise == 0:
            raise ValueError("noise: the probability of a line given noise-free points is 0 or 1; expected noise > 0, got 0")
        for name in PARAMETERS:
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name}: the exact answer is known for uniform priors (low, high), got {getattr(self, name)}")
        mask = points.mask
        x = torch.where(mask, points.x[..., 0], 0).to(torch.float64)
        y = torch.where(mask, points.y, 0).to(torch.float64)
        count, reach = max(int(points.counts.max()), 1), float(x.abs().amax()) if x.numel() else 0.0
        tallest = max(abs(self.amplitude[0]), abs(self.amplitude[1]))  # type: ignore[index]
        # the smallest standard deviation that the likelihood can have in the phase, and in the slope
        phase, phase_weight = _panels(self.phase, self.noise / (math.sqrt(count) * max(tallest, 1e-12)))  # type: ignore[arg-type]
        slope, slope_weight = _panels(self.slope, self.noise / (math.sqrt(count) * max(reach, 1e-12)))  # type: ignore[arg-type]
        rows = max(1, BLOCK // (max(len(phase), len(slope)) * max(INNER, mask.shape[1])))
        parts = []
        for start in range(0, len(mask), rows):  # blocks bound the memory
            here = slice(start, start + rows)
            xs, ys, real = x[here, None], y[here, None], mask[here, None].to(x)
            wave = torch.sin(xs - phase[:, None]) * real  # (T, M, N)
            log_sine, amplitude, w = self._inner(ys.expand_as(wave), wave, phase_weight, self.amplitude)  # type: ignore[arg-type]
            sine = torch.stack([(w * amplitude * phase.cos()).sum(-1), -(w * amplitude * phase.sin()).sum(-1)], -1)
            residual = (ys - slope[:, None] * xs) * real
            log_line, intercept, w = self._inner(residual, real.expand_as(residual), slope_weight, self.intercept)  # type: ignore[arg-type]
            line = torch.stack([(w * slope).sum(-1), (w * intercept).sum(-1)], -1)
            parts.append((log_sine, sine, log_line, line))
        log_sine, sine, log_line, line = (torch.cat(part) for part in zip(*parts, strict=True))
        constant = points.counts.double() * math.log(self.noise * math.sqrt(2 * math.pi))
        return (log_sine - constant, sine), (log_line - constant, line)

    def _inner(
        self, residual: Tensor, basis: Tensor, log_weight: Tensor, prior: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Integrates v ~ U(prior) out of ½‖residual − v · basis‖² / σ², both ``(T, M, N)``, for each of M nodes of the outer parameter.

        Gives the log integral ``(T,)``, E[v | node] ``(T, M)`` and the posterior weights of the nodes ``(T, M)``.
        """
        low, high = prior
        p, h, rr = (v.sum(-1) / self.noise**2 for v in (basis.square(), basis * residual, residual.square()))
        # where in [low, high] the likelihood of v is, until it has fallen by e^-40 from its largest value there
        sd = p.clamp(min=1e-30).rsqrt()
        centre = torch.where(p > 0, h / p.clamp(min=1e-30), 0.0)
        nearest = centre.clamp(low, high)
        away = (centre - nearest).abs()
        width = 80 * sd.square() / (away + (away.square() + 80 * sd.square()).sqrt())
        left, right = (nearest - width).clamp(min=low), (nearest + width).clamp(max=high)
        nodes, weights = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(INNER))
        v = left[..., None] + (right - left)[..., None] * (nodes + 1) / 2
        log_like = -0.5 * (rr[..., None] - 2 * h[..., None] * v + p[..., None] * v.square()) + (weights / 2).log()
        log_v = log_like.logsumexp(-1)
        mean = (torch.softmax(log_like, -1) * v).sum(-1)
        share = ((right - left) / (high - low)).log() if high > low else torch.zeros_like(log_v)
        log_node = log_v + share + log_weight
        return log_node.logsumexp(-1), mean, torch.softmax(log_node, -1)

    def _draw_tasks(self, num_tasks: int) -> dict[str, Tensor]:
        return {
            "is_line": torch.rand(num_tasks) < 0.5,
            **{name: draw(getattr(self, name), num_tasks, self.dtype) for name in PARAMETERS},
        }


def _panels(bounds: tuple[float, float], sd: float) -> tuple[Tensor, Tensor]:
    """Nodes and log weights of the mean over ``bounds`` of a function no narrower than a normal curve of ``sd``, ``(M,)`` each.

    Towards both ends panels shrink by halves: where no value fits well, what there is of the function is piled up there.
    """
    low, high = bounds
    count = max(1, math.ceil((high - low) / (4 * sd)))
    ends = 0.5 ** torch.arange(10, 0, -1, dtype=torch.float64) / count
    even = torch.arange(count + 1, dtype=torch.float64) / count
    edges = torch.cat([even, ends, 1 - ends]).unique()  # sorted
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(PANEL))
    start, width = edges[:-1, None], edges.diff()[:, None]
    return (low + (high - low) * (start + width * (nodes + 1) / 2)).flatten(), (width * weights / 2).log().flatten()
