"""Circles in the plane: a point is of class 1 where it lies inside. One or few positives leave open which circle it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from bayesmeta.episodes import Episode, Points
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import Size, check_prior, check_request, check_size, draw, draw_mask

CENTRES, RADII = 64, 64  # quadrature nodes along each axis of the centre, and along the radius
BLOCK = 2**22  # numbers held at once


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Circles:
    """y = 1 where ‖x − c‖ ≤ r, else 0: c ~ U[centre]², r ~ U[radius], all points in the square x_range².

    =========================== ==================================================================================
    argument
    =========================== ==================================================================================
    centre, radius              bounds ``(low, high)`` of uniforms; the centre within ``x_range``
    x_range                     bounds of both inputs
    num_positive, num_negative  support points a task of each class, or ``(low, high)``: a random number for each task
    num_query                   the same for the query set, of both classes
    balanced_query              True: a query point is inside with probability ½. False: uniform over the square
    dtype                       of the episodes; default torch's
    =========================== ==================================================================================

    A point of a given class is uniform over the part of the square that is of that class. The defaults are those of PLATIPUS (Finn, Xu
    and Levine 2018): c ~ U[0, 5]², r ~ U[0.1, 2], one positive. Labels are floats without noise, as `Bernoulli` and `Categorical(2)`
    both take them.

    Raises ValueError where an argument is out of its range, or a circle could cover the whole square.
    """

    num_tasks: ClassVar[None] = None
    target_scale: ClassVar[float] = 1.0

    centre: tuple[float, float] = (0.0, 5.0)
    radius: tuple[float, float] = (0.1, 2.0)
    x_range: tuple[float, float] = (0.0, 5.0)
    num_positive: Size = 1
    num_negative: Size = 0
    num_query: Size = 20
    balanced_query: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("centre", "radius", "x_range"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name}: expected bounds (low, high), got {getattr(self, name)}")
            check_prior(name, getattr(self, name))
        for name in ("num_positive", "num_negative", "num_query"):
            check_size(name, getattr(self, name))
        low, high = self.x_range
        if not (low <= self.centre[0] and self.centre[1] <= high):
            raise ValueError(f"centre: expected bounds within x_range = {self.x_range}, got {self.centre}")
        if not 0 < self.radius[0] < self.radius[1]:
            raise ValueError(f"radius: expected 0 < low < high, got {self.radius}")
        if not math.pi * self.radius[1] ** 2 < (high - low) ** 2:
            raise ValueError(f"radius: a circle of radius {self.radius[1]} could cover the square of side {high - low}")

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """New tasks with x ``(T, N, 2)`` and y ``(T, N)`` of 0 and 1; zeros in the padding. The support's positives stand first."""
        check_request(num_tasks, generator)
        with rng(generator):
            tasks = self._draw_tasks(num_tasks)
            positive, negative, query = (draw_mask(size, num_tasks) for size in (self.num_positive, self.num_negative, self.num_query))
            support = torch.cat([positive, negative], 1)
            wanted = (torch.arange(support.shape[1]) < positive.shape[1]).expand(support.shape)
            if self.balanced_query:
                asked = self._draw_points(tasks, torch.rand(query.shape) < 0.5)
            else:
                low, high = self.x_range
                asked = low + (high - low) * torch.rand(*query.shape, 2, dtype=self.dtype)
            return Episode(
                self._labelled(tasks, self._draw_points(tasks, wanted), support), self._labelled(tasks, asked, query)
            )

    def sample_tasks(self, num_tasks: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """``centre (T, 2)`` and ``radius (T,)``: the circles of `sample` from the same generator state."""
        check_request(num_tasks, generator)
        with rng(generator):
            return self._draw_tasks(num_tasks)

    def evaluate(self, tasks: dict[str, Tensor], x: Tensor) -> Tensor:
        """1 inside and 0 outside, ``(T, N)``, at ``x (T, N, 2)``, or at ``x (N, 2)`` shared by all tasks."""
        return self._inside(tasks, x).to(tasks["radius"])

    def exact_predictive(self, support: Points, x: Tensor) -> Bernoulli:
        """p(y = 1 | x, S_i) at every query point ``x (T, N, 2)``, batch ``(T, N)``, in the dtype of ``support.x``.

        What the best learner of this family says: circles weighed by how likely they make the support (a positive is uniform over
        its circle, so a small circle that holds it is likelier than a large one) and, with balanced queries, the question. By quadrature
        over centres, to about 0.002. NaN where no circle of the quadrature fits the support.
        """
        if support.y is None:
            raise ValueError("support.y: expected targets, got None")
        rows = max(1, BLOCK // (CENTRES**2 * max(RADII, x.shape[1])))
        blocks = [slice(s, s + rows) for s in range(0, support.num_tasks, rows)]
        probs = torch.cat([self._inside_given(support.select(b), x[b].double()) for b in blocks])
        return Bernoulli(probs=probs.to(support.x), validate_args=False)  # which would refuse the NaN of one task

    def _inside_given(self, support: Points, x: Tensor) -> Tensor:
        centres = self._grid[0]
        positive = support.mask & (support.y > 0.5)  # type: ignore[operator]
        negative = support.mask & ~positive
        there = torch.where(support.mask[..., None], support.x, 0).double()
        distance = (there[:, :, None] - centres).norm(dim=-1)  # (T, N, G)
        edge = distance.new_full((len(distance), 1, len(centres)), torch.inf)
        # given its centre a circle fits where its radius is between the furthest positive and the nearest negative
        low = torch.cat([torch.where(positive[..., None], distance, -torch.inf), -edge], 1).amax(1, keepdim=True).clamp(*self.radius)
        high = torch.cat([torch.where(negative[..., None], distance, torch.inf), edge], 1).amin(1, keepdim=True).clamp(*self.radius)
        high = torch.maximum(high, low)
        asked = torch.maximum(torch.minimum((x[:, :, None] - centres).norm(dim=-1), high), low)
        n, m = positive.sum(1), negative.sum(1)
        if self.balanced_query:  # being asked is then one more point of the class
            (log_inside,), (log_outside,) = self._log_mass(n + 1, m, asked, high), self._log_mass(n, m + 1, low, asked)
        else:
            log_outside, log_inside = self._log_mass(n, m, low, asked, high)
        return torch.sigmoid(log_inside - log_outside)

    def _log_mass(self, n: Tensor, m: Tensor, *limits: Tensor) -> list[Tensor]:
        """log Σ_centres ∫ A⁻ⁿ (S − A)⁻ᵐ dr from each limit to the next, A the circle's area in the square S; ``(T, N)`` each.

        Limits ``(T, N or 1, G)``, rising.
        """
        _, log_area, log_rest = self._grid
        step = math.log(self.radius[1] / self.radius[0]) / (RADII - 1)
        log_r = math.log(self.radius[0]) + step * torch.arange(RADII, dtype=torch.float64)
        # dr = r d log r; between nodes the integrand is a power of r, so its logarithm is linear
        f = log_r - n[:, None, None] * log_area - m[:, None, None] * log_rest  # (T, G, K)
        largest = f.amax((1, 2), keepdim=True)
        f = f - largest
        start, slope = f[..., :-1], f.diff(dim=-1)
        whole = start.exp() * _mean_exp(slope)
        before = whole.cumsum(-1) - whole

        def up_to(r: Tensor) -> Tensor:
            place = ((r.log() - log_r[0]) / step).clamp(0, RADII - 1)
            cell = place.floor().long().clamp(max=RADII - 2)
            part = place - cell
            s, d, b = (v[:, None].expand(*cell.shape, -1).gather(-1, cell[..., None])[..., 0] for v in (start, slope, before))
            return b + s.exp() * part * _mean_exp(d * part)

        mass = [(b - a).clamp(min=0).sum(-1) for a, b in pairwise([up_to(r) for r in limits])]
        return [value.log() + largest[:, 0] for value in mass]

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centres ``(G, 2)``; log of the area inside the square, and of the rest of the square, for every radius ``(G, K)``."""
        low, high = self.x_range
        axis = self.centre[0] + (self.centre[1] - self.centre[0]) * (torch.arange(CENTRES, dtype=torch.float64) + 0.5) / CENTRES
        centres = torch.cartesian_prod(axis, axis)
        r = torch.logspace(math.log10(self.radius[0]), math.log10(self.radius[1]), RADII, dtype=torch.float64)
        left, right = (centres - low).mT[..., None], (high - centres).mT[..., None]  # (2, G, 1)
        area = sum(_quarter(a, b, r) for a in (left[0], right[0]) for b in (left[1], right[1]))
        assert isinstance(area, Tensor)
        return centres, area.log(), ((high - low) ** 2 - area).log()

    def _draw_tasks(self, num_tasks: int) -> dict[str, Tensor]:
        centre = draw(self.centre, 2 * num_tasks, self.dtype).view(num_tasks, 2)
        return {"centre": centre, "radius": draw(self.radius, num_tasks, self.dtype)}

    def _draw_points(self, tasks: dict[str, Tensor], wanted: Tensor) -> Tensor:
        """x ``(T, N, 2)``, uniform over what is inside where ``wanted (T, N)``, outside elsewhere: drawn anew until they are."""
        low, high = self.x_range
        c, r = tasks["centre"][:, None], tasks["radius"][:, None, None]
        box = wanted[..., None]  # a point inside is in the circle's box, of which it then fills more than ¾
        first, last = torch.where(box, (c - r).clamp(min=low), low), torch.where(box, (c + r).clamp(max=high), high)
        x = torch.full((*wanted.shape, 2), torch.nan, dtype=r.dtype)
        wrong = torch.ones_like(wanted)
        while bool(wrong.any()):
            x = torch.where(wrong[..., None], first + (last - first) * torch.rand(x.shape, dtype=r.dtype), x)
            wrong = self._inside(tasks, x) != wanted
        return x

    def _labelled(self, tasks: dict[str, Tensor], x: Tensor, mask: Tensor) -> Points:
        return Points(x.masked_fill(~mask[..., None], 0), self.evaluate(tasks, x).masked_fill(~mask, 0), mask)

    def _inside(self, tasks: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x - tasks["centre"][:, None]).square().sum(-1) <= tasks["radius"][:, None].square()


def _mean_exp(d: Tensor) -> Tensor:
    """∫_0^1 exp(d t) dt."""
    small = d.abs() < 1e-8
    return torch.where(small, 1 + d / 2, torch.expm1(d) / torch.where(small, 1.0, d))


def _quarter(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Area of the quarter disc of radius ``r`` about the corner of a rectangle with sides ``a`` and ``b``, cut off by the rectangle."""
    first, last = (r.square() - b.square()).clamp(min=0).sqrt(), torch.minimum(a, r)

    def under_arc(u: Tensor) -> Tensor:
        return 0.5 * (u * (r.square() - u.square()).clamp(min=0).sqrt() + r.square() * torch.asin((u / r).clamp(max=1)))

    return torch.where(first >= last, last * b, b * first + under_arc(last) - under_arc(first))
