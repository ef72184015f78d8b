"""A conditional flow from standard normal noise to a posterior of any shape, and the distribution that it makes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..model import HierarchicalModel
from ..randomness import rng
from .base import AbstractLazyModule, checked_steps
from .layers import mlp, near_zero, positive
from .noise import standard_noise

MOMENT_DRAWS = 512


class ConditionalFlow(AbstractLazyModule):
    """An invertible map of R^D that depends on an encoding e: standard normal noise ε to u, the identity where ``seen`` is 0.

        z = sinh((asinh ε + a(e)) / d(e))                      each number by itself: skew and tails (Jones & Pewsey 2009)
        z_B ← z_B · exp s(z_A, e) + t(z_A, e)                  couplings, every other number held (Dinh et al. 2017, eq. 7)
        u = b(e) + r(e) z,   r ≥ ``floor``

    ``context_size``: the length of e. ``couplings``: how many; with D = 1 there is nothing to couple.
    """

    def __init__(self, context_size: int, hidden: int = 64, *, couplings: int = 4, floor: float = 1e-3) -> None:
        super().__init__()
        self.context_size, self.hidden, self.floor = context_size, hidden, floor
        self.couplings = checked_steps("couplings", couplings)
        self._seed = int(torch.randint(2**62, ()))
        self.networks = nn.ModuleList()
        self.elementwise: nn.Module | None = None
        self.dim = 0

    def build(self, model: HierarchicalModel) -> None:
        """Makes the layers, once."""
        if self.elementwise is None:
            self.dim = model.dim
            with rng(torch.Generator().manual_seed(self._seed)):
                sizes = (self.dim + self.context_size, self.hidden, 2 * self.dim)
                self.networks.extend(near_zero(mlp(*sizes)) for _ in range(self.couplings if self.dim > 1 else 0))
                self.elementwise = near_zero(mlp(self.context_size, self.hidden, 4 * self.dim))
            self.to(model.initial(model.made_up_points(1, 1)))

    def forward(self, noise: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        """ε ``(*S, *B, D)`` to u, given e ``(*B, H)`` and ``seen (*B, 1)``."""
        skew, tail, shift, scale = self._elementwise(context, seen)
        z = torch.sinh((torch.asinh(noise) + skew) / tail)
        for k in range(len(self.networks)):
            s, t = self._coupling(k, z, context, seen)
            z = z * s.exp() + t
        return shift + scale * z

    def inverse(self, u: Tensor, context: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """u to ε, and log |du / dε| ``(*S, *B)``."""
        skew, tail, shift, scale = self._elementwise(context, seen)
        z = (u - shift) / scale
        log_det = scale.log().expand_as(z).sum(-1)
        for k in reversed(range(len(self.networks))):
            s, t = self._coupling(k, z, context, seen)
            z = (z - t) * (-s).exp()
            log_det = log_det + s.sum(-1)
        noise = torch.sinh(tail * torch.asinh(z) - skew)
        # d/dε of sinh((asinh ε + a) / d) is cosh(asinh z) / (d cosh(asinh ε)), and cosh(asinh z) = √(1 + z²)
        return noise, log_det + (0.5 * (torch.log1p(z.square()) - torch.log1p(noise.square())) - tail.log()).sum(-1)

    def _elementwise(self, context: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.elementwise is not None
        skew, tail, shift, scale = (seen * self.elementwise(context)).chunk(4, -1)
        return skew.tanh(), (0.5 * tail.tanh()).exp(), shift, positive(scale, self.floor)

    def _coupling(self, k: int, z: Tensor, context: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale and shift of coupling k, 0 for the numbers that it holds: the same before and after it."""
        held = (torch.arange(self.dim, device=z.device) + k) % 2 == 0
        inputs = torch.cat([torch.where(held, z, 0.0), context.expand(*z.shape[:-1], -1)], -1)
        s, t = torch.where(held.repeat(2), 0.0, seen * self.networks[k](inputs)).chunk(2, -1)
        return 2 * (s / 2).tanh(), t


class FlowNormal(dist.TorchDistribution):
    """φ = loc + scale · u, u a `ConditionalFlow` of standard normal noise given ``context (*B, H)``: batch ``(*B,)``, event ``(D,)``.

    Its mean and variance have no closed form: they are those of 512 fixed draws (antithetic, of sample variance 1).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: ConditionalFlow, context: Tensor, seen: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.flow, self.context, self.seen, self.loc, self.scale = flow, context, seen, loc, scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(*B, D)``."""
        return self._fixed_draws().mean(0)

    @property
    def variance(self) -> Tensor:
        """``(*B, D)``."""
        return self._fixed_draws().var(0, unbiased=False)

    def push(self, noise: Tensor) -> Tensor:
        """Standard normal noise ``(*S, *B, D)`` to φ."""
        return self.loc + self.scale * self.flow(noise, self.context, self.seen)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *B, D)``, differentiable."""
        return self.push(torch.randn(*sample_shape, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*S, *B, D)`` to ``(*S, *B)``."""
        noise, log_det = self.flow.inverse((value - self.loc) / self.scale, self.context, self.seen)
        density = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        return density - log_det - self.scale.log().sum(-1)

    def select(self, tasks: Tensor) -> FlowNormal:
        """The chosen tasks."""
        return FlowNormal(self.flow, *(v[tasks] for v in (self.context, self.seen, self.loc, self.scale)))

    def with_points_axis(self) -> FlowNormal:
        """The same with batch ``(*B, 1)``."""
        return FlowNormal(self.flow, *(v[..., None, :] for v in (self.context, self.seen, self.loc, self.scale)))

    def _fixed_draws(self) -> Tensor:
        with rng(torch.Generator().manual_seed(0)):
            noise = standard_noise((MOMENT_DRAWS, 1, self.loc.shape[-1]), "antithetic", like=self.loc)
        return self.push(noise.reshape(MOMENT_DRAWS, *(1,) * len(self.batch_shape), -1).expand(MOMENT_DRAWS, *self.loc.shape))
