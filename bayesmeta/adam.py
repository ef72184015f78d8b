"""The step of `torch.optim.Adam` as operations on tensors, so that a compiled training step can hold it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as hooks_of_all

ODD = ("amsgrad", "maximize", "weight_decay", "differentiable", "capturable", "decoupled_weight_decay")  # settings that must be off
STATE = ("step", "exp_avg", "exp_avg_sq")  # of a parameter, in torch.optim.Adam
LONGEST = 1e30  # a step of a parameter in the graph; with it no parameter overflows that is finite


class AdamStep:
    """Kingma & Ba (2015), algorithm 1, on the state of ``optimiser``, after clipping the gradient's norm to ``clip``.

        m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²      θ ← θ − lr m / (1 − β₁ᵗ) / ( √(v / (1 − β₂ᵗ)) + ε )

    g, m and v are one vector each for all parameters; what the optimiser has as each parameter's own m and v are views of them.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None) -> None:
        self.optimiser, self.parameters, self.clip = optimiser, list(parameters), clip
        self.sizes = [p.numel() for p in self.parameters]
        group = optimiser.param_groups[0]
        self.betas, self.eps = group["betas"], group["eps"]
        self._names = [name for name in group if name not in ("params", "lr", "initial_lr")]
        self._assumed = [group[name] for name in self._names]
        self.whole = False  # whether every parameter has a state, with the same number of steps, as `inputs` last found it
        double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        self._counts = torch.float64 if double else torch.float32  # the type of numbers of steps: torch.optim's, which a graph relies on
        self._rate: tuple[float, Tensor] | None = None  # the learning rate, and it on the parameters' device
        self._state: list[Tensor] = []  # the number of steps, once a parameter, m, and v
        self._views: list[Tensor] = []  # of those, as the optimiser has them
        self.settings = (*self.betas, self.eps, clip, str(self._counts))  # what a graph takes as given

    def applies(self) -> bool:
        """Whether the optimiser still has the settings, but for its rate, that it had at first, and moves all parameters alike."""
        groups = self.optimiser.param_groups
        return len(groups) == 1 and [*map(groups[0].get, self._names)] == self._assumed and (self.whole or not self._views)

    @classmethod
    def of(cls, optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None) -> AdamStep | None:
        """None where ``optimiser`` is anything but a plain Adam over ``parameters`` of one type, contiguous, and nothing else."""
        group = optimiser.param_groups[0]
        plain = type(optimiser) is torch.optim.Adam and len(optimiser.param_groups) == 1
        plain = plain and all(a is b for a, b in zip(group["params"], parameters, strict=False)) and len(group["params"]) == len(parameters)
        plain = plain and len({(p.dtype, p.device) for p in parameters}) == 1 and all(p.is_contiguous() for p in parameters)
        hooks: list[Any] = [getattr(optimiser, name, None) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")]
        hooks += [getattr(hooks_of_all, name, None) for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")]
        if not plain or any(group.get(name) for name in ODD) or any(hooks) or isinstance(group["lr"], Tensor):
            return None
        return cls(optimiser, parameters, clip) if all(isinstance(beta, float) for beta in group["betas"]) else None

    def inputs(self) -> list[Tensor]:
        """The learning rate ``()``, the number of steps taken, once a parameter ``(P,)``, m and v ``(D,)``.

        The last three are the optimiser's state itself where it is `whole`; but for numbers that it counts on another device.
        """
        like = self.parameters[0]
        rate = float(self.optimiser.param_groups[0]["lr"])
        if self._rate is None or self._rate[0] != rate:
            self._rate = rate, like.new_tensor(rate, dtype=_exact(like))
        state = [self.optimiser.state.get(p) for p in self.parameters]
        if all(state):
            found = [s[name] for s in state if s for name in STATE]
            if not (len(found) == len(self._views) and all(map(operator.is_, found, self._views))):
                self._put_together([s for s in state if s])
            taken, *moments = self._state
        else:
            self.whole, self._views = False, []
            none = torch.zeros((), dtype=self._counts, device=like.device)
            taken = torch.stack([s["step"].to(none) if s else none for s in state])
            moments = [
                _flat([s[name] if s else torch.zeros_like(p) for s, p in zip(state, self.parameters, strict=True)])
                for name in STATE[1:]
            ]
        return [self._rate[1], taken if taken.device == like.device else taken.to(like.device), *moments]

    @torch.no_grad()
    def _put_together(self, state: Sequence[dict[str, Tensor]]) -> None:
        """Makes what the optimiser knows of each parameter views of one vector."""
        moments = [_flat([s[name] for s in state]) for name in STATE[1:]]
        taken, *_ = self._state = [torch.stack([s["step"] for s in state]).to(self._counts), *moments]
        self._views = []
        for i, own in enumerate(zip(*(v.split(self.sizes) for v in moments), strict=True)):
            views = [taken[i], *(v.view_as(self.parameters[i]) for v in own)]
            state[i].update(zip(STATE, views, strict=True))
            self._views += views
        self.whole = bool((taken == taken[0]).all())

    def __call__(
        self, values: Sequence[Tensor], gradient: Tensor, norm: Tensor, fine: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Whether the step is ``fine``, and each θ, the number of steps, m and v after it, or as they were.

        ``gradient (D,)`` and its norm, ``inputs`` as above.
        """
        rate, taken, m, v = inputs
        number = taken[0].to(_exact(m)) + 1  # all are the same where it counts
        one, two = self.betas
        if self.clip is not None:  # as torch.nn.utils.clip_grad_norm_ does
            gradient = gradient * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        mean = m + (1 - one) * (gradient - m)
        square = two * v + (1 - two) * gradient * gradient
        size, root = rate / (1 - one**number), (1 - two**number).sqrt()
        step = size * mean / (square.sqrt() / root + self.eps)
        fine = fine & (step.abs().amax() <= LONGEST)
        moved = [p - part.view(p.shape) for p, part in zip(values, step.split(self.sizes), strict=True)]
        new = zip([*moved, taken + 1, mean, square], [*values, taken, m, v], strict=True)
        return fine, [torch.where(fine, after, before) for after, before in new]

    def took(self) -> None:
        """Says that a graph has put a step where `inputs` stood: of numbers of steps on another device that was a copy."""
        if self._state[0].device != self.parameters[0].device:
            self._state[0] += 1

    def moved(self) -> None:
        """Says that the optimiser has taken a step of its own, maybe of some parameters only."""
        self._views = []

    def agrees(self, new: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
        """Whether ``new`` (each θ, the number of steps, m, v) is what the optimiser's own step has just made of θ ``before``.

        To half of the digits: of θ's move, as far as θ's own digits tell it.
        """
        state = [_flat([self.optimiser.state[p][name] for p in self.parameters]) for name in STATE]
        start = [*before, *(torch.zeros_like(v) for v in state)]
        for found, wanted, was in zip(new, [*self.parameters, *state], start, strict=True):
            if wanted.numel():
                eps = torch.finfo(found.dtype).eps
                allowed = eps**0.5 * (wanted - was).abs().max() + 2 * eps * wanted.abs().max()
                if not bool((found - wanted.to(found)).abs().max() <= allowed):
                    return False
        return True


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([v.detach().reshape(-1) for v in values])


def _exact(like: Tensor) -> torch.dtype:
    """A type that can tell numbers of steps apart: at least single precision."""
    return torch.promote_types(like.dtype, torch.float32)
