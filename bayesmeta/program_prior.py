"""p(φ | θ) of a program that is no independent Normal, as a distribution in packed space."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .episodes import Points
from .handlers import Ancestral
from .program_module import AbstractProgramModule


class ProgramPrior(dist.TorchDistribution):
    """p(φ | θ) of a program in packed space, batch ``(T,)``, event ``(D,)``: its log density and its draws run the program."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, model: AbstractProgramModule, points: Points, mean: Tensor, sd: Tensor) -> None:
        self.model, self.points = model, points
        self._mean, self._sd = mean, sd
        super().__init__(mean.shape[:1], mean.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(T, D)``, as `HierarchicalModel.initial`."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """``(T, D)``."""
        return self._sd**2

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, T, D)``, site after site."""
        with torch.no_grad():
            ancestral = Ancestral(torch.Size(sample_shape))
            self.model._run(ancestral, self.points, sites_only=True)
            return torch.cat(ancestral.packed, -1).to(self._mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*S, T, D)`` to ``(*S, T)``, the Jacobian of the packing included."""
        return self.model.log_parts(value, self.points)[0]
