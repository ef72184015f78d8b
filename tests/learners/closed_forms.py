"""The linear-Gaussian model worked out with plain matrices, one task at a time, from unpadded data."""

import torch
from torch.distributions import MultivariateNormal


def theta(model):
    """Mean, prior precision and noise variance of `linear_program`."""
    p = model.params
    return p["mean"], torch.diag(p["sd"].exp() ** -2), p["noise"].exp() ** 2


def design(points, task):
    """X and y of one task, unpadded."""
    return points.x[task][points.mask[task]], points.y[task][points.mask[task]]


def posterior(model, points, task):
    """Exact posterior mean and precision."""
    mean, prior_precision, variance = theta(model)
    x, y = design(points, task)
    precision = prior_precision + x.T @ x / variance
    return torch.linalg.solve(precision, prior_precision @ mean + x.T @ y / variance), precision


def log_evidence(model, points, task):
    """log N(y; X m, X Λ⁻¹ Xᵀ + σ² I); 0 without points."""
    mean, prior_precision, variance = theta(model)
    x, y = design(points, task)
    if len(y) == 0:
        return torch.zeros(())
    covariance = x @ torch.linalg.inv(prior_precision) @ x.T + variance * torch.eye(len(y))
    return MultivariateNormal(x @ mean, covariance).log_prob(y)


def maml(model, points, task, steps, alpha):
    """φ_K = A^K θ + Σ_k A^k α Xᵀy/(Nσ²), A = I − αH, H = XᵀX/(Nσ²); returns φ_K, A^K = dφ_K/dθ, and H."""
    mean, _, variance = theta(model)
    x, y = design(points, task)
    n = max(len(y), 1)
    h = x.T @ x / (n * variance)
    phi = mean
    for _ in range(steps):
        phi = phi - alpha * (h @ phi - x.T @ y / (n * variance))
    return phi, torch.linalg.matrix_power(torch.eye(len(mean)) - alpha * h, steps), h
