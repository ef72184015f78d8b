"""Images that are not as those a learner was trained on: turned, blurred, noisy, with ink and ground changed round, as far as asked.

Other shifts need no change of the images: other drawers or typefaces (`AbstractFewShot.across_sources`), alphabets or scripts held out
(``splits``), questions of no class of the episode, or of another data set (`AbstractFewShot.detection`).
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bayesmeta.episodes import Episode, Points
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import TaskFamily, check_request

Shift = Literal["rotation", "blur", "noise", "inversion"]
SHIFTS: tuple[Shift, ...] = ("rotation", "blur", "noise", "inversion")
On = Literal["query", "support", "both"]
BLUR = 0.1  # sd at severity 1, of the longer side
NOISE = 0.5


@final
@dataclass(frozen=True, eq=False)
class Shifted:
    """The tasks of another family of images, with their query, their support or both under a shift.

    =========== ======================================================================================================
    argument
    =========== ======================================================================================================
    family      whose tasks: `Omniglot`, `Glyphs`, `FewShot`, or any with x ``(T, N, C, H, W)`` in [0, 1]
    kind        "rotation": by 90 degrees · severity, clockwise or not, each image its own way. "blur": Gaussian, sd of a tenth of
                the side · severity. "noise": normal on each pixel, sd ½ · severity, then cut to [0, 1]. "inversion": a share of
                ``severity`` of the images have ink and ground changed round
    severity    0 (nothing) to 1
    on          "query" (default), "support" or "both"
    =========== ======================================================================================================

    Tasks are drawn before the shift: the same seed gives the same tasks at every severity and of every kind.
    Raises ValueError where an argument is out of its range.
    """

    family: TaskFamily
    kind: Shift
    _: KW_ONLY
    severity: float
    on: On = "query"

    def __post_init__(self) -> None:
        _check(self.kind, self.severity, self.on)

    @property
    def num_tasks(self) -> int | None:
        """Those of the family."""
        return getattr(self.family, "num_tasks", None)

    @property
    def ways(self) -> int:
        """Those of the family."""
        return self._of_family("ways")

    @property
    def target_scale(self) -> float:
        """That of the family."""
        return float(getattr(self.family, "target_scale", 1.0))

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """The family's tasks, then the shift, from one generator."""
        check_request(num_tasks, generator)
        return self._shifted(self.family.sample(num_tasks, generator=generator), generator)

    def episodes(self, *, generator: torch.Generator) -> Episode:
        """Every task of a finite family once, in the family's order."""
        return self._shifted(self._of_family("episodes")(generator=generator), generator)

    def task_names(self) -> list[str]:
        """Those of the family."""
        return self._of_family("task_names")()

    def _shifted(self, episode: Episode, generator: torch.Generator) -> Episode:
        return shifted(episode, self.kind, severity=self.severity, on=self.on, generator=generator)

    def _of_family(self, name: str) -> Any:
        if not hasattr(self.family, name):
            raise ValueError(f"{type(self.family).__name__} has no {name}")
        return getattr(self.family, name)


def shifted(episode: Episode, kind: Shift, *, severity: float, on: On = "query", generator: torch.Generator) -> Episode:
    """One episode under a shift; arguments as in `Shifted`. The padding stays as it is."""
    _check(kind, severity, on)
    with rng(generator):
        support, query = (
            _shifted_points(points, kind, severity) if on in (name, "both") else points
            for name, points in (("support", episode.support), ("query", episode.query))
        )
    return Episode(support, query)


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """``images (M, C, H, W)`` turned anticlockwise by ``degrees (M,)``, bilinear; zeros come in from outside."""
    _, _, height, width = images.shape
    angle = torch.deg2rad(degrees.to(images))
    cos, sin, ratio, none = angle.cos(), angle.sin(), height / width, torch.zeros_like(angle)
    rows = torch.stack([cos, -sin * ratio, none, sin / ratio, cos, none], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(rows, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def blurred(images: Tensor, sd: float) -> Tensor:
    """``images (M, C, H, W)`` under a Gaussian of ``sd`` pixels, cut off at 3 sd; the border is repeated outwards."""
    down, across = (_blur_matrix(size, sd).to(images) for size in images.shape[-2:])
    return down @ images @ across.T


def _blur_matrix(size: int, sd: float) -> Tensor:
    """Weights ``(size, size)`` of the old pixels of a line in each new one; at these sizes faster than a convolution."""
    reach = max(1, math.ceil(3 * sd))
    offset = torch.arange(-reach, reach + 1)
    weight = torch.exp(-0.5 * (offset.double() / sd) ** 2)
    old = (torch.arange(size)[:, None] + offset).clamp(0, size - 1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, old, (weight / weight.sum()).expand(size, -1))


def _shifted_points(points: Points, kind: Shift, severity: float) -> Points:
    if points.x.dim() != 5 or not points.x.is_floating_point():
        raise ValueError(f"x: expected images (T, N, C, H, W), got {points.x.dtype} of shape {tuple(points.x.shape)}")
    images = points.x[points.mask]
    if severity > 0 and len(images):
        images = _shifted_images(images, kind, severity)
    x = points.x.clone()
    x[points.mask] = images
    return points._replace(x=x)


def _shifted_images(images: Tensor, kind: Shift, severity: float) -> Tensor:
    if kind == "blur":
        return blurred(images, BLUR * severity * max(images.shape[-2:]))
    if kind == "noise":
        return (images + NOISE * severity * torch.randn(images.shape).to(images)).clamp(0, 1)
    chance = torch.rand(len(images)).to(images)
    if kind == "rotation":
        return rotated(images, torch.where(chance < 0.5, -90.0, 90.0) * severity)
    return torch.where((chance < severity)[:, None, None, None], 1 - images, images)


def _check(kind: str, severity: float, on: str) -> None:
    if kind not in SHIFTS:
        raise ValueError(f"kind: expected one of {SHIFTS}, got {kind!r}")
    if not 0 <= severity <= 1:
        raise ValueError(f"severity: expected a number from 0 to 1, got {severity}")
    if on not in ("query", "support", "both"):
        raise ValueError(f"on: expected 'query', 'support' or 'both', got {on!r}")
