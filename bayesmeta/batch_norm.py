"""Batch norm (Ioffe & Szegedy 2015) with a stated policy: whose mean m and variance v it is that γ (x − m) / √(v + ε) + β has.

    "task"      of the set at hand: one task's real points, whatever set the network is shown. Of a query set these are the query points'
                own, so that a prediction hangs on the points it is made together with (transductive), as in MAML's experiments
    "running"   of the training tasks: a moving average that training renews after each step; a constant within a step, so that nothing
                leaks from one point to another
    "per_step"  the same for each inner step on its own, as MAML++ has it (Antoniou, Edwards & Storkey 2019, section 4): at step k < K by
                what training tasks' points had at φ_k, and everywhere else, where predictions are made, by what they had at φ_K. Steps
                beyond the K of training go by the latter, too. A learner without inner steps has one row, which is "running"
    "none"      no batch norm: the layer is left out

Padding is no part of any of them. γ and β stay what they were, the network's own parameters, of which "per_step" has one each: MAML++'s γ
and β of their own for each step are not here. Running means and variances are θ's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .inner_loop import step_now

POLICIES = ("task", "running", "per_step", "none")
RUNNING = ("running", "per_step")
MOMENTUM = 0.1  # the share of a step's tasks in the moving average, torch's default
Moments = tuple[Tensor, Tensor]


class Seen(NamedTuple):
    """What a layer had of several sets: ``mean``, ``variance``, each ``(n, C)``, and how many points each set has, ``points (n,)``."""

    mean: Tensor
    variance: Tensor
    points: Tensor


Notes = dict[int, list[Seen]]  # of each row of the statistics, what every layer had


class TaskBatchNorm(nn.Module):
    """A batch norm of one task's points ``(N, C, *)``, in place of ``layer``; see the module's docstring for ``policy``.

    ``mask``, ``running_mean`` and ``running_var`` are handed in at each call (`BatchNorms.handed`).
    """

    mask: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: Any, policy: str) -> None:
        super().__init__()
        self.policy, self.eps, self.num_features = policy, layer.eps, layer.num_features
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mask", torch.ones(1, dtype=torch.bool), persistent=False)
        if policy in RUNNING:
            for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((self.num_features,), value), persistent=False)
        self.seen: list[Moments] | None = None  # means and variances of what comes by, where someone asks for them

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *)``, normalised."""
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x  # moments need more digits
        here = (-1, *(1,) * (x.dim() - 2))
        if self.seen is not None or self.policy == "task":
            mean, variance = self._moments(x, here)
            if self.seen is not None:
                self.seen.append((mean.detach(), variance.detach()))
        if self.policy in RUNNING:
            mean, variance = self.running_mean, self.running_var
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        out = (x - mean.view(here)) * scale.view(here)
        return out if self.bias is None else out + self.bias.view(here)

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, as `nn.BatchNorm2d` starts."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _moments(self, x: Tensor, here: tuple[int, ...]) -> Moments:
        """Mean and variance of the real points, each ``(C,)``; 0 and 1 without any. ``here``: the shape of either beside ``x``."""
        real = self.mask.expand(len(x))
        count = real.sum()
        share = (real.to(x) / count.clamp(min=1))[:, None]  # not 1/N in torch's default dtype
        mean = (share * _each(x)).sum(0)
        variance = (share * _each((x - mean.view(here)).square())).sum(0)
        return mean, torch.where(count > 0, variance, 1.0)


class BatchNorms(nn.Module):
    """All batch norms of ``module``: what they are handed at a call, and their running statistics.

    ``one_task``: runs the module on one task, ``phi (D,)``, ``x (N, *I)``, ``mask (N,)``, with what `handed` gives. The statistics of all
    layers, one behind the other, are ``(C,)`` under "running" and ``(K + 1, C)`` under "per_step".
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, module: nn.Module, one_task: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        found = {name: part for name, part in module.named_modules() if isinstance(part, TaskBatchNorm)}
        self.names, self.layers, self.one_task = list(found), tuple(found.values()), one_task  # a tuple: not modules of this one
        self.sizes = [layer.num_features for layer in self.layers]
        self.policy = self.layers[0].policy if self.layers else None
        self.notes: Notes | None = None  # what comes by, while someone asks for it (`noting`)
        if self.have_running:
            shape = (1, sum(self.sizes)) if self.policy == "per_step" else (sum(self.sizes),)
            self.register_buffer("mean", torch.zeros(shape))
            self.register_buffer("variance", torch.ones(shape))

    @property
    def have_running(self) -> bool:
        """Whether there are running statistics, which training has to renew."""
        return self.policy in RUNNING

    @property
    def steps(self) -> int:
        """K, how many inner steps have statistics of their own."""
        return len(self.mean) - 1 if self.policy == "per_step" else 0

    def make_room(self, steps: int) -> None:
        """Under "per_step": statistics for K = ``steps`` inner steps and for what comes after; further ones begin as the last.

        Raises ValueError where another learner on this model has more steps: those in between would not be renewed.
        """
        if self.policy != "per_step" or not steps:
            return
        if steps < self.steps:
            raise ValueError(
                f"batch_norm='per_step': this model has statistics of {self.steps} inner steps, another learner's, and this one takes "
                f"{steps}: give it a model of its own"
            )
        self.mean, self.variance = (torch.cat([v, v[-1:].expand(steps - self.steps, -1)]) for v in (self.mean, self.variance))

    def handed(self, mask: Tensor) -> dict[str, Tensor]:
        """The layers' buffers by name, for `torch.func.functional_call`; ``mask (N,)``: which points are real."""
        found = {f"{name}.mask": mask for name in self.names}
        if self.policy in RUNNING:
            layers = (self._row(v).split(self.sizes) for v in (self.mean, self.variance))
            for name, mean, variance in zip(self.names, *layers, strict=True):
                found |= {f"{name}.running_mean": mean, f"{name}.running_var": variance}
        return found

    def _row(self, statistics: Tensor) -> Tensor:
        """What holds at the inner step that runs, ``(C,)``."""
        k = step_now()
        if self.policy == "running":
            return statistics
        if isinstance(k, Tensor):
            return statistics.index_select(0, k.clamp(max=self.steps).view(1))[0]
        return statistics[self.steps if k is None else min(k, self.steps)]

    @torch.no_grad()
    def renew(self, phi: Tensor, x: Tensor, mask: Tensor) -> None:
        """After a step of training: running statistics move by `MOMENTUM` towards those of its tasks' points.

        ``phi (T, D)``, ``x (T, N, *I)``, ``mask (T, N)``. Raises ValueError where each inner step has its own.
        """
        if self.steps:
            raise ValueError("batch_norm='per_step': the statistics of inner steps are renewed by the learner that takes them")

        def run() -> None:  # vmap knows no convolutions of images with channels last
            for task in zip(phi, x, mask, strict=True):
                self.one_task(*task)

        self._move(0, self._watched(run, mask.sum(1))[1])

    @contextmanager
    def noting(self) -> Iterator[Notes]:
        """Inside, what the layers are shown by the network's first run at each inner step below K, and by its first outside of a loop."""
        self.notes = {}
        try:
            yield self.notes
        finally:
            self.notes = None

    def noted(self, run: Callable[[], Tensor], points: Tensor) -> Tensor:
        """``run()``, noted; it goes through sets of ``points (n,)`` one after the other."""
        assert self.notes is not None
        k = step_now()
        assert not isinstance(k, Tensor)
        row = self.steps if k is None else k
        if row in self.notes or (k is not None and k >= self.steps):
            return run()
        out, self.notes[row] = self._watched(run, points)
        return out

    @torch.no_grad()
    def renew_steps(self, notes: Sequence[Notes]) -> None:
        """As `renew`, each inner step's by what was noted there; ``notes``: of one or more parts of the tasks."""
        for row in range(self.steps + 1):
            parts = [part[row] for part in notes if row in part]
            self._move(row, [Seen(*map(torch.cat, zip(*of_layer, strict=True))) for of_layer in zip(*parts, strict=True)])

    def _watched(self, run: Callable[[], Any], points: Tensor) -> tuple[Any, list[Seen]]:
        for layer in self.layers:
            layer.seen = []
        try:
            out = run()
            return out, [_last_seen(layer.seen or [], points) for layer in self.layers]
        finally:
            for layer in self.layers:
                layer.seen = None

    def _move(self, row: int, layers: Sequence[Seen]) -> None:
        """Sets whose φ has diverged count for nothing; without any others the statistics stay."""
        for of_statistics, which in ((self.mean, 0), (self.variance, 1)):
            old = of_statistics[row] if self.policy == "per_step" else of_statistics
            for layer, values in zip(layers, old.split(self.sizes), strict=False):
                fine = (layer.mean + layer.variance).isfinite().all(1)
                mean, variance, points = (v[fine] for v in layer)
                if bool(points.sum() > 0):
                    values.lerp_(pooled((mean, variance), points)[which].to(values), MOMENTUM)

    def reset_parameters(self) -> None:
        """Mean 0 and variance 1, as `nn.BatchNorm2d` starts."""
        if self.policy in RUNNING:
            self.mean.zero_()
            self.variance.fill_(1.0)


def with_policy(module: nn.Module, policy: str | None) -> nn.Module:
    """``module`` with `TaskBatchNorm`, or nothing, in place of its batch norms; itself where ``policy`` is None.

    Changes ``module``. Raises ValueError for an unknown policy.
    """
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"batch_norm: expected one of {', '.join(map(repr, POLICIES))} or None, got {policy!r}")
    if policy is None:
        return module
    for name, part in module.named_children():
        setattr(module, name, with_policy(part, policy))
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module
    return nn.Identity() if policy == "none" else TaskBatchNorm(module, policy)


def pooled(of_tasks: Moments, points: Tensor) -> Moments:
    """Mean and variance ``(C,)`` over the points of all tasks, from each task's own ``(T, C)`` and its number of points ``(T,)``."""
    mean, variance = of_tasks
    share = (points.to(mean) / points.sum().clamp(min=1))[:, None]
    overall = (share * mean).sum(0)
    return overall, (share * (variance + (mean - overall).square())).sum(0)


def _last_seen(seen: list[Moments], points: Tensor) -> Seen:
    """Of each set what the layer had the last time, where it comes by several times; ``(0, C)`` where it never does."""
    times = len(seen) // len(points)
    kept = seen[times - 1 :: times] if times else []
    if not kept:
        return Seen(points.new_zeros(0, 1).float(), points.new_zeros(0, 1).float(), points[:0])
    return Seen(torch.stack([mean for mean, _ in kept]), torch.stack([variance for _, variance in kept]), points)


def _each(x: Tensor) -> Tensor:
    """The mean within each point and channel, ``(N, C, *)`` to ``(N, C)``."""
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x
