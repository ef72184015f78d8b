"""The step of `torch.optim.Adam` as operations on tensors, so that a compiled training step can hold it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STATE = ("step", "exp_avg", "exp_avg_sq")  # of a parameter, in torch.optim.Adam


class AdamStep:
    """Kingma & Ba (2015), algorithm 1, on the state of ``optimiser``, after clipping the gradient's norm to ``clip``.

        m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²      θ ← θ − lr m / (1 − β₁ᵗ) / ( √(v / (1 − β₂ᵗ)) + ε )
    """

    def __init__(self, optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None) -> None:
        self.optimiser, self.parameters, self.clip = optimiser, list(parameters), clip
        self._places = [p.detach() for p in self.parameters]  # where they stand, without a gradient's record of what is put there
        self.betas, self.eps = optimiser.defaults["betas"], optimiser.defaults["eps"]
        self._rate: tuple[float, Tensor] | None = None  # the learning rate, and it on the parameters' device
        self._moments: list[list[Tensor]] = []  # the optimiser's m and v of all parameters, as the last `inputs` found them
        self._taken = torch.zeros(0)  # the number of steps, once a parameter; `_views`: each parameter's own, as the optimiser has it
        self._views: list[Tensor] = []

    @property
    def settings(self) -> tuple[object, ...]:
        """What a graph takes as given: β₁, β₂, ε, and the norm clipped to."""
        return (*self.betas, self.eps, self.clip)

    @classmethod
    def of(cls, optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None) -> AdamStep | None:
        """None where ``optimiser`` is anything but a plain Adam over ``parameters`` and nothing else."""
        group = optimiser.param_groups[0]
        plain = type(optimiser) is torch.optim.Adam and len(optimiser.param_groups) == 1
        plain = plain and all(a is b for a, b in zip(group["params"], parameters, strict=False)) and len(group["params"]) == len(parameters)
        odd = ("amsgrad", "maximize", "weight_decay", "differentiable", "capturable", "decoupled_weight_decay")
        hooks: list[Any] = [getattr(optimiser, name, None) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")]
        if not plain or any(group.get(name) for name in odd) or any(hooks) or isinstance(group["lr"], Tensor):
            return None
        same = all(isinstance(beta, float) for beta in group["betas"]) and group["betas"] == optimiser.defaults["betas"]
        return cls(optimiser, parameters, clip) if same and group["eps"] == optimiser.defaults["eps"] else None

    def inputs(self) -> list[Tensor]:
        """How many steps were taken, the learning rate, and m and v of each parameter, as they stand; nothing waits for a GPU."""
        like = self.parameters[0]
        rate = float(self.optimiser.param_groups[0]["lr"])
        if self._rate is None or self._rate[0] != rate:
            self._rate = rate, like.new_tensor(rate)
        state = [self.optimiser.state.get(p) for p in self.parameters]
        if all(state):
            numbers, *self._moments = [[s[name] for s in state if s] for name in STATE]
            if not (len(numbers) == len(self._views) and all(map(operator.is_, numbers, self._views))):
                # in one place: to add 1 to each on its own takes as long as a short graph
                self._taken = torch.stack(numbers)
                self._views = [self._taken[i] for i in range(len(numbers))]
                for s, view in zip(state, self._views, strict=True):
                    s["step"] = view  # type: ignore[index]
            return [self._views[0].to(like), self._rate[1], *self._moments[0], *self._moments[1]]
        taken = [s["step"].to(like) for s in state[:1] if s] or [like.new_zeros(())]
        moments = [s[name] if s else torch.zeros_like(p) for name in STATE[1:] for s, p in zip(state, self.parameters, strict=True)]
        return [*taken, self._rate[1], *moments]

    def __call__(self, values: Sequence[Tensor], gradients: Sequence[Tensor], norm: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """θ, m and v after the step, each for all parameters, from θ, its gradient, the gradient's norm and `inputs`."""
        taken, rate, *moments = inputs
        number = taken + 1
        (one, two), count = self.betas, len(values)
        if self.clip is not None:  # as torch.nn.utils.clip_grad_norm_ does
            gradients = [g * (self.clip / (norm + 1e-6)).clamp(max=1.0) for g in gradients]
        means = [m + (1 - one) * (g - m) for m, g in zip(moments[:count], gradients, strict=True)]
        squares = [two * v + (1 - two) * g * g for v, g in zip(moments[count:], gradients, strict=True)]
        size, root = rate / (1 - one**number), (1 - two**number).sqrt()
        moved = [p - size * m / (v.sqrt() / root + self.eps) for p, m, v in zip(values, means, squares, strict=True)]
        return [*moved, *means, *squares]

    def take(self, new: list[Tensor]) -> None:
        """Puts what a step gave into the parameters and the optimiser's state, which existed when `inputs` were asked for."""
        torch._foreach_copy_([*self._places, *self._moments[0], *self._moments[1]], new)
        self._taken += 1

    def agrees(self, new: Sequence[Tensor]) -> bool:
        """Whether ``new`` is what the optimiser's own step has just made, to half of the digits."""
        moments = [self.optimiser.state[p][name] for name in STATE[1:] for p in self.parameters]
        pairs = [(found, wanted) for found, wanted in zip(new, [*self.parameters, *moments], strict=True) if wanted.numel()]
        return all(bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** 0.5 * b.abs().max()) for a, b in pairs)
