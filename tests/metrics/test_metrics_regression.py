"""CRPS, RMSE and intervals against scoringrules, scipy and closed forms."""

import math

import pytest
import scipy.stats
import torch

from bayesmeta.metrics import crps, crps_normal, interval_coverage, interval_width, rmse, task_mean

CASES = 200


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def everywhere(values):
    return torch.ones(values.shape, dtype=torch.bool)


@pytest.mark.parametrize(("fair", "estimator"), [(False, "qd"), (False, "nrg"), (True, "fair")])
def test_crps_is_that_of_scoringrules(fair, estimator):
    oracle = pytest.importorskip("scoringrules")
    for case in range(CASES):
        draws, tasks, points = 2 + case % 40, 1 + case % 3, 1 + case % 5
        samples = 3 * normal(draws, tasks, points, seed=case) + case % 7
        if case % 4 == 0:
            samples = samples.round()  # ties, as counts have
        y = 3 * normal(tasks, points, seed=1000 + case)
        expected = oracle.crps_ensemble(y.numpy(), samples.numpy(), m_axis=0, estimator=estimator, backend="numpy")
        torch.testing.assert_close(crps(samples, y, fair=fair), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_crps_normal_is_that_of_scoringrules():
    oracle = pytest.importorskip("scoringrules")
    for case in range(CASES):
        mean, y = 2 * normal(2, 3, seed=case), 2 * normal(2, 3, seed=1000 + case)
        sd = normal(2, 3, seed=2000 + case).exp()
        expected = oracle.crps_normal(y.numpy(), mean.numpy(), sd.numpy(), backend="numpy")
        torch.testing.assert_close(crps_normal(mean, sd, y), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_crps_normal_is_its_integral():
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    for mean, sd, y in [(0.0, 1.0, 0.0), (1.0, 2.0, -3.0), (-2.0, 0.3, 1.0)]:
        cdf = torch.from_numpy(scipy.stats.norm.cdf(x.numpy(), mean, sd))
        expected = torch.trapezoid((cdf - (x >= y).double()) ** 2, x)
        got = crps_normal(*(torch.tensor(v, dtype=torch.float64) for v in (mean, sd, y)))
        assert got.item() == pytest.approx(expected.item(), abs=1e-4)


def test_crps_normal_without_spread_is_the_absolute_error():
    y = torch.tensor([1.0, -2.5])
    assert torch.equal(crps_normal(torch.zeros(2), torch.zeros(2), y), y.abs())
    assert crps_normal(y, torch.zeros(2), y).tolist() == [0.0, 0.0]


def test_crps_normal_of_a_negative_sd_is_nan():
    sd = torch.tensor([-1.0, 1.0, torch.nan])
    assert crps_normal(torch.zeros(3), sd, torch.zeros(3)).isnan().tolist() == [True, False, True]


def test_fair_crps_is_unbiased_at_few_draws_and_the_other_is_not():
    mean, sd, y = 0.5, 2.0, torch.full((1, 200_000), 1.0, dtype=torch.float64)
    samples = mean + sd * normal(3, 1, 200_000)
    exact = crps_normal(torch.tensor(mean), torch.tensor(sd), torch.tensor(1.0)).item()
    assert crps(samples, y).mean().item() == pytest.approx(exact, abs=0.01)
    bias = sd / math.sqrt(math.pi) / 3  # ½ E|X − X'| / S
    assert crps(samples, y, fair=False).mean().item() == pytest.approx(exact + bias, abs=0.01)


def test_crps_in_single_precision_far_from_zero():
    samples, y = normal(100, 2, 5).float() + 1e5, normal(2, 5, seed=1).float() + 1e5
    torch.testing.assert_close(crps(samples, y), crps(samples.double(), y.double()).float(), rtol=1e-5, atol=1e-5)


def test_crps_of_one_draw_is_the_absolute_error():
    samples, y = normal(1, 2, 3), normal(2, 3, seed=1)
    assert torch.equal(crps(samples, y, fair=False), (samples[0] - y).abs())


def test_crps_errors():
    y = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"expected at least 2 samples \(S, T, N\) of y \(2, 3\), got \(1, 2, 3\)"):
        crps(torch.zeros(1, 2, 3), y)
    with pytest.raises(ValueError, match=r"expected at least 1 samples \(S, T, N\) of y \(2, 3\), got \(0, 2, 3\)"):
        crps(torch.zeros(0, 2, 3), y, fair=False)
    with pytest.raises(ValueError, match=r"of y \(2, 3\), got \(5, 3, 2\)"):
        crps(torch.zeros(5, 3, 2), y)


def test_rmse_by_hand():
    mean = torch.tensor([[1.0, 2.0, 9.0], [0.0, 0.0, 0.0]])
    y = torch.tensor([[4.0, -2.0, 0.0], [2.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(rmse(mean, y, mask), torch.tensor([math.sqrt(12.5), 2.0]))


def test_coverage_and_width_of_the_intervals_of_scipy():
    for case in range(CASES):
        level = (0.05 + case % 10) / 10
        mean, sd = normal(3, 8, seed=case), normal(3, 8, seed=1000 + case).exp()
        y = mean + sd * normal(3, 8, seed=2000 + case)
        mask = torch.rand(3, 8, generator=seeded(case)) < 0.8
        lower, upper = (torch.from_numpy(end) for end in scipy.stats.norm.interval(level, mean.numpy(), sd.numpy()))
        inside = 2 * torch.from_numpy(scipy.stats.norm.cdf(((y - mean).abs() / sd).numpy())) - 1 <= level
        width = 2 * scipy.stats.norm.ppf((1 + level) / 2) * sd
        for task in range(3):
            points = mask[task]
            if not points.any():
                continue
            assert interval_coverage(lower, upper, y, mask)[task] == pytest.approx(inside[task, points].double().mean().item(), abs=1e-12)
            assert interval_width(lower, upper, mask)[task] == pytest.approx(width[task, points].mean().item(), abs=1e-6)


def test_both_ends_belong_to_an_interval():
    y = torch.tensor([[0.0, 1.0, -0.1, 1.1]])
    assert interval_coverage(torch.zeros(1, 4), torch.ones(1, 4), y, everywhere(y)).item() == 0.5


def test_coverage_of_a_normal_predictive_is_nominal():
    y = normal(1, 100_000)
    end = scipy.stats.norm.ppf(0.95)
    covered = interval_coverage(torch.full_like(y, -end), torch.full_like(y, end), y, everywhere(y))
    assert covered.item() == pytest.approx(0.9, abs=0.005)


def test_counts_as_targets_in_integers():
    samples, y = torch.poisson(torch.full((50, 1, 4), 3.0), generator=seeded()), torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(crps(samples, y), crps(samples, y.float()))


def test_a_score_per_point_has_a_gradient_that_stays_out_of_the_padding():
    values = normal(2, 3).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    task_mean(values, mask)[0].backward()
    assert torch.equal(values.grad, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64))
