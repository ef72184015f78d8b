"""A step's loss and gradients, and how far one way of taking it is from another: what holds a graph to the eager step.

Of what Python took from the data behind a graph's back a disturbed copy of them tells. Where results differ by more than rounding,
parameters a few last digits away tell whether that is rounding all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .episodes import Episode, Points
from .graphs import gap

Losses = Callable[[Episode], tuple[Tensor, Tensor]]

SMALL = 0.05  # a gradient of that share of the largest's size, or less, is held to eager as if it were that size: it may be rounding alone
NUDGES, NUDGE = 8, 4.0  # how many eager results, at parameters so many units of their last digit away, tell what rounding can do


class Update(NamedTuple):
    """The optimiser's step that a graph has taken, of which ``loss`` is the loss.

    ``new``: parameters and the optimiser's state after it, where it is still to be held to the optimiser's own; empty where the graph has
    put them in their places.
    """

    loss: float
    new: list[Tensor]


class Gradients(NamedTuple):
    """A step's losses ``(T,)``, their mean with θ's share ``()``, and its gradient for each trained parameter (None: not reached).

    ``update``: the optimiser's step along it, where the graph holds that too; once it is trusted, gradients are not told (an empty list).
    """

    losses: Tensor
    loss: Tensor
    gradients: list[Tensor | None]
    update: Update | None = None


def gradients_of(losses: Losses, parameters: Sequence[Tensor], total: int, episode: Episode) -> Gradients:
    """Eager: mean of the tasks' losses + θ's own / ``total``, and its gradient."""
    with torch.enable_grad():
        values, rest = losses(episode)
        loss = values.mean() + rest / total
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return Gradients(values.detach(), loss.detach(), [None if g is None else g.detach() for g in gradients])


def disturbed(episode: Episode, full: tuple[bool, ...] = (False, False)) -> Episode:
    """The same tasks and points in another order, and of every second task one point fewer, where it has several and is not ``full``."""

    def other(points: Points, full: bool) -> Points:
        x, y, mask = (None if v is None else v.roll(1, 0).flip(1) for v in points)
        assert x is not None and mask is not None
        several = (mask.sum(1) > (points.num_points if full else 1)) & (torch.arange(len(mask), device=mask.device) % 2 == 0)
        return Points(x, y, mask & ~(several[:, None] & (mask.cumsum(1) == 1)))

    return Episode(*(other(points, whole) for points, whole in zip(episode, full, strict=True)))


def difference(found: Gradients, wanted: Gradients, least: float = SMALL) -> float:
    """The largest gap between two steps' losses or gradients, as a share of the size of the tensor it is in.

    That size is at least ``least`` times the largest gradient's: one that is 0 but for rounding tells nothing.
    """
    pairs = [(found.losses, wanted.losses), (found.loss, wanted.loss)]
    gradients = list(zip(found.gradients, wanted.gradients, strict=True))
    if any((a is None) != (b is None) for a, b in gradients):
        return math.inf
    here = [(a, b) for a, b in gradients if a is not None and b is not None]
    floor = least * max((b.abs().max().item() for _, b in here if b.numel()), default=0.0)
    gaps = [gap(a, b, 0.0) for a, b in pairs] + [gap(a, b, floor) for a, b in here if b.numel()]
    return max(gaps, key=lambda one: math.inf if math.isnan(one) else one)


def is_unsteady(taken: Callable[[], Gradients], parameters: Sequence[Tensor], wanted: Gradients, near: float, far: float) -> bool:
    """Whether the result of ``taken``, which is ``wanted``, moves half as ``far`` or more when parameters move in their last digits.

    So it does at a kink: second derivatives hang on which side of 0 a rectified unit is, and one may be within rounding of it.
    """
    here, generator = [p.detach().clone() for p in parameters], torch.Generator().manual_seed(0)

    def put(values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)

    try:
        for _ in range(NUDGES if math.isfinite(far) else 0):
            signs = [2.0 * torch.randint(0, 2, v.shape, generator=generator).to(v) - 1 for v in here]
            put([v * (1 + NUDGE * torch.finfo(v.dtype).eps * sign) for v, sign in zip(here, signs, strict=True)])
            if 2 * difference(taken(), wanted, max(SMALL, near)) >= far:
                return True
        return False
    finally:
        put(here)
