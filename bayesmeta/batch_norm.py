"""Batch norm (Ioffe & Szegedy 2015) with a stated policy: whose mean m and variance v it is that γ (x − m) / √(v + ε) + β has.

    "task"      of the set at hand: one task's real points, whatever set the network is shown. Of a query set these are the query points'
                own, so that a prediction hangs on the points it is made together with (transductive), as in MAML's experiments
    "running"   of the training tasks: a moving average that training renews after each step; a constant within a step, so that nothing
                leaks from one point to another
    "none"      no batch norm: the layer is left out

Padding is no part of any of them. γ and β stay what they were, the network's own parameters; running means and variances are θ's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

POLICIES = ("task", "running", "none")
MOMENTUM = 0.1  # the share of a step's tasks in the moving average, torch's default
Moments = tuple[Tensor, Tensor]


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
        if policy == "running":
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
                self.seen.append((mean, variance))
        if self.policy == "running":
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
        share = (real / count.clamp(min=1)).to(x)[:, None]
        mean = (share * _each(x)).sum(0)
        variance = (share * _each((x - mean.view(here)).square())).sum(0)
        return mean, torch.where(count > 0, variance, 1.0)


class BatchNorms(nn.Module):
    """All batch norms of ``module``: what they are handed at a call, and their running statistics.

    ``one_task``: runs the module on one task, ``phi (D,)``, ``x (N, *I)``, ``mask (N,)``, with what `handed` gives.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, module: nn.Module, one_task: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        found = {name: part for name, part in module.named_modules() if isinstance(part, TaskBatchNorm)}
        self.names, self.layers, self.one_task = list(found), tuple(found.values()), one_task  # a tuple: not modules of this one
        self.sizes = [layer.num_features for layer in self.layers]
        self.policy = self.layers[0].policy if self.layers else None
        if self.policy == "running":
            self.register_buffer("mean", torch.zeros(sum(self.sizes)))
            self.register_buffer("variance", torch.ones(sum(self.sizes)))

    def handed(self, mask: Tensor) -> dict[str, Tensor]:
        """The layers' buffers by name, for `torch.func.functional_call`; ``mask (N,)``: which points are real."""
        found = {f"{name}.mask": mask for name in self.names}
        if self.policy == "running":
            for name, mean, variance in zip(self.names, self.mean.split(self.sizes), self.variance.split(self.sizes), strict=True):
                found |= {f"{name}.running_mean": mean, f"{name}.running_var": variance}
        return found

    @torch.no_grad()
    def renew(self, phi: Tensor, x: Tensor, mask: Tensor) -> None:
        """After a step of training: running statistics move by `MOMENTUM` towards those of its tasks' points.

        ``phi (T, D)``, ``x (T, N, *I)``, ``mask (T, N)``.
        """

        def moments(phi: Tensor, x: Tensor, mask: Tensor) -> list[Moments]:
            for layer in self.layers:
                layer.seen = []
            try:
                self.one_task(phi, x, mask)
                return [seen[-1] for layer in self.layers if (seen := layer.seen)]
            finally:
                for layer in self.layers:
                    layer.seen = None

        tasks = [moments(*task) for task in zip(phi, x, mask, strict=True)]  # vmap knows no convolutions of images with channels last
        layers = [(torch.stack([m for m, _ in of_tasks]), torch.stack([v for _, v in of_tasks])) for of_tasks in zip(*tasks, strict=True)]
        found = [pooled(of_layer, mask.sum(1)) for of_layer in layers]
        for old, new in ((self.mean, [m for m, _ in found]), (self.variance, [v for _, v in found])):
            old.lerp_(torch.cat(new).to(old), MOMENTUM)

    def reset_parameters(self) -> None:
        """Mean 0 and variance 1, as `nn.BatchNorm2d` starts."""
        if self.policy == "running":
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
    share = (points / points.sum().clamp(min=1)).to(mean)[:, None]
    overall = (share * mean).sum(0)
    return overall, (share * (variance + (mean - overall).square())).sum(0)


def _each(x: Tensor) -> Tensor:
    """The mean within each point and channel, ``(N, C, *)`` to ``(N, C)``."""
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x
