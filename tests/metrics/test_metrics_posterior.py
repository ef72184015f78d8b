"""Distances between Normals against scipy, torch and closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from bayesmeta.metrics import gaussian_kl, gaussian_wasserstein2, sd_ratio

CASES = 200


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(tasks, dim, *, seed):
    root = normal(tasks, dim, dim, seed=seed) / math.sqrt(dim)
    return normal(tasks, dim, seed=10_000 + seed), root @ root.mT + 0.1 * torch.eye(dim, dtype=torch.float64)


def pair(case):
    dim = 1 + case % 5
    return *gaussian(3, dim, seed=case), *gaussian(3, dim, seed=1000 + case)


def test_wasserstein_of_one_dimension():
    m1, m2, s1, s2 = (normal(50, 1, seed=seed) for seed in range(4))
    got = gaussian_wasserstein2(m1, s1.square()[..., None], m2, s2.square()[..., None])
    expected = torch.hypot(m1 - m2, s1.abs() - s2.abs())[:, 0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_wasserstein_by_the_square_roots_of_scipy():
    for case in range(CASES):
        m1, c1, m2, c2 = (part.numpy() for part in pair(case))
        for task, got in enumerate(gaussian_wasserstein2(*pair(case))):
            root = scipy.linalg.sqrtm(c2[task])
            cross = scipy.linalg.sqrtm(root @ c1[task] @ root)
            expected = math.sqrt(((m1[task] - m2[task]) ** 2).sum() + np.trace(c1[task] + c2[task] - 2 * cross).real)
            assert got.item() == pytest.approx(expected, abs=1e-6)


def test_wasserstein_is_symmetric_and_does_not_see_a_rotation():
    for case in range(CASES):
        m1, c1, m2, c2 = pair(case)
        distance = gaussian_wasserstein2(m1, c1, m2, c2)
        torch.testing.assert_close(gaussian_wasserstein2(m2, c2, m1, c1), distance, rtol=0, atol=1e-9)
        turn, _ = torch.linalg.qr(normal(m1.shape[-1], m1.shape[-1], seed=case))
        turned = gaussian_wasserstein2(m1 @ turn.mT, turn @ c1 @ turn.mT, m2 @ turn.mT, turn @ c2 @ turn.mT)
        torch.testing.assert_close(turned, distance, rtol=0, atol=1e-9)


def test_wasserstein_of_equal_normals_is_0_in_single_precision_too():
    m, c = (part.float() for part in gaussian(5, 4, seed=0))
    distance = gaussian_wasserstein2(m, c, m, c)
    assert distance.dtype == torch.float32 and distance.max() < 1e-6


def test_wasserstein_to_a_point():
    m1, c1, m2, _ = pair(3)
    expected = ((m1 - m2).square().sum(-1) + c1.diagonal(dim1=-2, dim2=-1).sum(-1)).sqrt()
    torch.testing.assert_close(gaussian_wasserstein2(m1, c1, m2, torch.zeros_like(c1)), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(gaussian_wasserstein2(m2, torch.zeros_like(c1), m1, c1), expected, rtol=0, atol=1e-9)


def test_kl_is_that_of_torch():
    for case in range(CASES):
        m1, c1, m2, c2 = pair(case)
        expected = kl_divergence(MultivariateNormal(m1, c1), MultivariateNormal(m2, c2))
        torch.testing.assert_close(gaussian_kl(m1, c1, m2, c2), expected, rtol=1e-9, atol=1e-6)


def test_kl_of_one_dimension():
    kl = gaussian_kl(*(torch.tensor(v, dtype=torch.float64) for v in ([[1.0]], [[[4.0]]], [[3.0]], [[[9.0]]])))
    assert kl.item() == pytest.approx(math.log(3 / 2) + (4 + 4) / 18 - 0.5, abs=1e-12)
    m, c, *_ = pair(3)
    torch.testing.assert_close(gaussian_kl(m, c, m, c), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("distance", [gaussian_wasserstein2, gaussian_kl])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_task_is_nan_and_the_others_are_as_they_were(place, distance, broken):
    parts = [part.clone() for part in pair(3)]
    expected = distance(*parts)
    parts[place][1] = broken
    got = distance(*parts)
    assert not got[1].isfinite() and not got[1] < math.inf
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("place", [1, 3])
def test_kl_without_a_density_is_nan(place):
    parts = [part.clone() for part in pair(3)]
    parts[place][0] = 0.0
    got = gaussian_kl(*parts)
    assert got[0].isnan() and got[1:].isfinite().all()


def test_sd_ratio():
    reference = normal(200, 3, 2)
    torch.testing.assert_close(sd_ratio(0.5 * reference + 7, reference), torch.full((3, 2), 0.5, dtype=torch.float64))
    other = normal(50, 3, 2, seed=1)
    np.testing.assert_allclose(sd_ratio(other, reference), other.numpy().std(0, ddof=1) / reference.numpy().std(0, ddof=1))
    assert not sd_ratio(torch.ones(5, 3, 2), reference).any()  # a point: as overconfident as can be


def test_sd_ratio_is_of_the_same_parameters():
    with pytest.raises(ValueError, match=r"expected draws \(S, T, D\) of the same tasks and parameters, got \(9, 3, 2\) and \(9, 3, 1\)"):
        sd_ratio(normal(9, 3, 2), normal(9, 3, 1))


def test_sd_ratio_needs_two_draws():
    with pytest.raises(ValueError, match="expected at least 2 draws of each, got 1 and 9 of the reference"):
        sd_ratio(normal(1, 3, 2), normal(9, 3, 2))
    with pytest.raises(ValueError, match="expected at least 2 draws of each, got 9 and 0 of the reference"):
        sd_ratio(normal(9, 3, 2), normal(0, 3, 2))
