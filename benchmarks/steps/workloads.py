"""What is timed: each workload's data, settings and network, the same for all contenders."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.recipes import multilayer

NOISE = 0.5**0.5  # of the sinusoids' likelihood: the NLL is then the squared error plus a constant
PRIOR_SCALE = 0.1  # of BMAML's and ABML's prior at the start: narrower ones bear no steps of the size below
DRAWS = 5  # ABML's, of φ for each inner expectation
ADAM = 1e-3


@dataclass(frozen=True)
class Workload:
    """``kind``: what is learned how. ``steps``: inner ones. ``particles``: BMAML's. ``device``: where data and parameters are.

    ``task_chunk``: tasks that the compiled step takes at a time; None: all, but convolutions one by one.
    """

    name: str
    kind: str
    tasks: int
    steps: int = 0
    particles: int = 10
    device: str = "cpu"
    task_chunk: int | None = None

    @property
    def inner_lr(self) -> float:
        return {"sinusoid": 0.01, "omniglot": 0.1, "bmaml": 1e-3, "abml": 0.1, "radon": 0.05}[self.kind]

    @property
    def is_random(self) -> bool:
        """Whether the loss is an expectation under draws."""
        return self.kind in ("abml", "elbo")


WORKLOADS = [
    *(Workload(f"W1 sinusoid MAML, {t} tasks, K = {k}", "sinusoid", t, k) for t, k in ((25, 1), (25, 5), (25, 20), (4, 1), (4, 5))),
    *(Workload(f"W2 Omniglot-shaped MAML, 16 tasks, K = {k}", "omniglot", 16, k) for k in (1, 5)),
    *(Workload(f"W3 BMAML, 10 particles, 25 tasks, K = {k}", "bmaml", 25, k) for k in (1, 5)),
    Workload("W4 ABML, 5 draws, 25 tasks, K = 5", "abml", 25, 5),
    *(Workload(f"W5 radon MAML, {t} tasks, K = 5", "radon", t, 5) for t in (85, 1000)),
    *(Workload(f"W5 radon amortized ELBO, {t} tasks", "elbo", t) for t in (85, 1000)),
]
ON_GPU = [  # in place of W2's 16 tasks, and more tasks where a CPU would take long
    *(Workload(f"W1 sinusoid MAML, {t} tasks, K = {k}", "sinusoid", t, k) for t, k in ((25, 1), (25, 5), (1000, 5))),
    *(Workload(f"W2 Omniglot-shaped MAML, 32 tasks, K = {k}", "omniglot", 32, k) for k in (1, 5)),
    *(w for w in WORKLOADS if w.name[:2] in ("W3", "W4", "W5")),
]


@dataclass
class Contender:
    """``step``: takes a training step, returns its loss. ``losses``: of the first ones. ``seconds``: of the first, with compilation."""

    step: Callable[[], float]
    losses: list[float]
    seconds: float

    @classmethod
    def of(cls, step: Callable[[], float], *, start: float | None = None) -> "Contender":
        """Takes the first steps: three, or one where that takes long. ``start``: when the making of it began."""
        start = time.perf_counter() if start is None else start
        losses = [step()]
        seconds, again = time.perf_counter() - start, time.perf_counter()
        losses.append(step())
        return cls(step, losses if time.perf_counter() - again > 5.0 else [*losses, step()], seconds)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return multilayer(1, 40, 40, 1)


def convolutions() -> nn.Module:
    """MAML's Omniglot network (Finn et al. 2017, section 5.2) with strided convolutions; batch norm by the set at hand."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        layers += [nn.Conv2d(channels, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, 5))


def episode(w: Workload) -> bm.Episode:
    return _episode(w).to(w.device)


def _episode(w: Workload) -> bm.Episode:
    generator = torch.Generator().manual_seed(0)
    if w.kind in ("radon", "elbo"):
        return counties(w.tasks, generator)
    if w.kind == "omniglot":
        return images(w.tasks, generator)
    return bm.tasks.Sinusoid.maml().sample(w.tasks, generator=generator)


def counties(tasks: int, generator: torch.Generator) -> bm.Episode:
    """Data like the radon panel's: a level and a slope for each county, 8 + 8 homes, floor 0 or 1."""
    level, effect = torch.randn(2, tasks, 1, generator=generator)
    sets = []
    for _ in range(2):
        x = torch.rand(tasks, 8, 1, generator=generator).round()
        sets += [x, 1 + level + effect * x[..., 0] + torch.randn(tasks, 8, generator=generator)]
    return bm.Episode.from_tuple(sets)


def images(tasks: int, generator: torch.Generator) -> bm.Episode:
    """5 classes, 1 image each to learn from and 15 to predict, of random pixels: what they show does not change a step's time."""
    sets = []
    for shots in (1, 15):
        y = torch.arange(5).repeat(shots)
        sets += [torch.rand(tasks, len(y), 1, 28, 28, generator=generator), y.expand(tasks, -1)]
    return bm.Episode.from_tuple(sets)
