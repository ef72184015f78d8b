"""The amortized learner's ELBO of S ∪ Q (`bayesmeta.learners.bayesian_black_box`) written out in plain torch, for any tasks in front."""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus

FLOOR = 1e-6  # of q's variance, in prior variances
UNIT = math.log(math.e - 1)


def task_loss(theta: dict[str, Tensor], noise: Tensor, x: Tensor, y: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
    """−ELBO, ``(*T,)``: ``noise (*T, 2)``, x ``(*T, N, 1)``, y ``(*T, N)``."""
    return minus_elbo(theta, noise, torch.cat([x[..., 0], qx[..., 0]], -1), torch.cat([y, qy], -1))


def minus_elbo(theta: dict[str, Tensor], noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
    centre, spread, residual = theta["model.params.mean"], theta["model.params.sd"].exp(), theta["model.params.noise"]
    loc, sd = posterior(theta, centre, spread, x, y)
    phi = loc + noise * sd
    mean = phi[..., :1] + phi[..., 1:] * x
    log_likelihood = -0.5 * ((y - mean) / residual.exp()).square() - residual - 0.5 * math.log(2 * math.pi)
    ratio = (sd / spread).square()
    kl = 0.5 * (ratio + ((loc - centre) / spread).square() - 1 - ratio.log())
    return kl.sum(-1) - log_likelihood.sum(-1)


def posterior(theta: dict[str, Tensor], centre: Tensor, spread: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of q(φ | points), ``(*T, 2)``."""
    own = torch.stack([x, y], -1)
    f = torch.cat([own, torch.stack([x * x, x * y, y * y], -1)], -1)
    mean = torch.cat([_mlp(theta, "encoder.each", f), f], -1).mean(-2)
    count = torch.full_like(mean[..., :1], math.log1p(x.shape[-1]))
    e = _mlp(theta, "encoder.out", torch.cat([mean, count], -1))
    gated = (theta["factors.gate"] * e)[..., None, :].expand(*x.shape, -1)
    b, t = (
        linear(v, theta[f"factors.linear.{name}.weight"], theta[f"factors.linear.{name}.bias"])
        + _mlp(theta, f"factors.network.{name}", torch.cat([v, gated], -1))
        for name, v in (("b", own[..., :1]), ("t", own))
    )
    precision = b.mT @ b + torch.eye(2, device=b.device)
    u = torch.cholesky_solve(b.mT @ t, torch.linalg.cholesky(precision))[..., 0]
    r = softplus(_mlp(theta, "head.network", e) + UNIT)
    return centre + spread * u, spread * (FLOOR + (1 - FLOOR) * r.square() / (1 + b.square().sum(-2))).sqrt()


def _mlp(theta: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    for layer in (0, 2):
        value = silu(linear(value, theta[f"{name}.{layer}.weight"], theta[f"{name}.{layer}.bias"]))
    return linear(value, theta[f"{name}.4.weight"], theta[f"{name}.4.bias"])
