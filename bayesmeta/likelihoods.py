"""Likelihoods: a network's output to the distribution of one point's y. Their learned parameters are θ's.

Every likelihood maps ``output (*S, T, N, O)`` to a distribution with batch ``(*S, T, N)``; with one number a point the last
axis is dropped, so that y is ``(T, N)``.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Gaussian(nn.Module):
    """y ~ Normal(output, noise), the noise learned and shared by all tasks and points.

    ``noise``: sd at the start (in units of y). ``learn``: False keeps it there.
    """

    def __init__(self, noise: float = 1.0, *, learn: bool = True) -> None:
        super().__init__()
        self.log_noise = _log_parameter("noise", noise, learn)

    @property
    def noise(self) -> Tensor:
        """sd of the noise, ``()``."""
        return self.log_noise.exp()

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        """``(*S, T, N, O)`` to a Normal with batch ``(*S, T, N)``, event ``(O,)`` where O > 1."""
        return _scalar_or_vector(dist.Normal(_squeezed(output), self.noise), output)


class HeteroscedasticGaussian(nn.Module):
    """y ~ Normal(mean, sd), both put out by the network: 2 numbers for each output, means first, sd through softplus.

    ``floor``: the smallest sd, in units of y.
    """

    def __init__(self, *, floor: float = 1e-3) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        """``(*S, T, N, 2 O)`` to a Normal with batch ``(*S, T, N)``."""
        if output.shape[-1] % 2:
            raise ValueError(f"HeteroscedasticGaussian: the network must put out 2 numbers for each target, got {output.shape[-1]}")
        mean, raw = output.chunk(2, -1)
        return _scalar_or_vector(dist.Normal(_squeezed(mean), self.floor + softplus(_squeezed(raw))), mean)


class StudentT(nn.Module):
    """y ~ StudentT(df, output, scale): heavy tails, so that an outlier does not drag a task along.

    ``scale`` and ``df`` at the start; both learned, or kept with ``learn=False``; df stays above 1.
    """

    def __init__(self, scale: float = 1.0, df: float = 4.0, *, learn: bool = True) -> None:
        super().__init__()
        if not df > 1:
            raise ValueError(f"StudentT: df must be above 1, got {df}")
        self.log_scale = _log_parameter("scale", scale, learn)
        self.log_df_above_1 = _log_parameter("df - 1", df - 1, learn)

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        """``(*S, T, N, O)`` to a StudentT with batch ``(*S, T, N)``."""
        df = 1 + self.log_df_above_1.exp()
        return _scalar_or_vector(dist.StudentT(df, _squeezed(output), self.log_scale.exp()), output)


class Bernoulli(nn.Module):
    """y ∈ {0, 1} with log-odds ``output``."""

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        """``(*S, T, N, 1)`` to a Bernoulli with batch ``(*S, T, N)``."""
        return dist.Bernoulli(logits=_one(output, "Bernoulli"))


class Categorical(nn.Module):
    """y ∈ {0, …, C − 1} with logits ``output``. ``num_classes``: C."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"Categorical: expected at least 2 classes, got {num_classes}")
        self.num_classes = num_classes

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        """``(*S, T, N, C)`` to a Categorical with batch ``(*S, T, N)``."""
        if output.shape[-1] != self.num_classes:
            raise ValueError(f"Categorical: the network puts out {output.shape[-1]} logits, expected {self.num_classes}")
        return dist.Categorical(logits=output)


class Poisson(nn.Module):
    """Counts y ~ Poisson(exposure · exp(output)).

    ``exposure``: True takes the last input column as log exposure (not shown to the network).
    """

    def __init__(self, *, exposure: bool = False) -> None:
        super().__init__()
        self.exposure = exposure

    def forward(self, output: Tensor, log_exposure: Tensor | float = 0.0) -> dist.TorchDistribution:
        """``(*S, T, N, 1)`` and log exposure ``(T, N)`` to a Poisson with batch ``(*S, T, N)``."""
        return dist.Poisson(_bounded_exp(_one(output, "Poisson") + log_exposure))


class NegativeBinomial(nn.Module):
    """Counts with mean m = exposure · exp(output) and variance m + m² / concentration: overdispersed Poisson.

    ``concentration`` at the start; learned unless ``learn=False``. ``exposure`` as in `Poisson`.
    """

    def __init__(self, concentration: float = 1.0, *, exposure: bool = False, learn: bool = True) -> None:
        super().__init__()
        self.exposure = exposure
        self.log_concentration = _log_parameter("concentration", concentration, learn)

    def forward(self, output: Tensor, log_exposure: Tensor | float = 0.0) -> dist.TorchDistribution:
        """``(*S, T, N, 1)`` and log exposure ``(T, N)`` to a negative binomial with batch ``(*S, T, N)``."""
        logits = _one(output, "NegativeBinomial") + log_exposure - self.log_concentration
        return dist.NegativeBinomial(self.log_concentration.exp(), logits=logits)


def point_divergence(here: Any, there: Any) -> Tensor:
    """KL(here ‖ there) of the distributions of one point's y. Raises ValueError where their family has none in closed form."""
    try:
        return torch.distributions.kl_divergence(here, there)
    except NotImplementedError as error:
        raise ValueError(
            f"the likelihood {type(here).__name__} has no Kullback–Leibler divergence in closed form, so no Gauss–Newton curvature: "
            "take hessian='exact'"
        ) from error


def _log_parameter(name: str, value: float, learn: bool) -> nn.Parameter:
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return nn.Parameter(torch.tensor(math.log(value)), requires_grad=learn)


def _squeezed(output: Tensor) -> Tensor:
    return output[..., 0] if output.shape[-1] == 1 else output


def _scalar_or_vector(fn: dist.TorchDistribution, output: Tensor) -> dist.TorchDistribution:
    return fn if output.shape[-1] == 1 else fn.to_event(1)


def _one(output: Tensor, name: str) -> Tensor:
    if output.shape[-1] != 1:
        raise ValueError(f"{name}: the network must put out one number a point, got {output.shape[-1]}")
    return output[..., 0]


def _bounded_exp(value: Tensor) -> Tensor:
    # exp(30) is 1e13 counts: beyond any data, and the gradient of an overflow is NaN
    return value.clamp(max=30.0).exp()
