"""PIT, coverage curves and calibration error: uniform PITs, laws in closed form, counts, bands."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from bayesmeta.metrics import calibration_curve, calibration_error, central_coverage_curve, pit_band, pit_histogram, randomized_pit

CASES = 200
LEVELS = torch.arange(1, 20, dtype=torch.float64) / 20


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everywhere(pit):
    return torch.ones(pit.shape, dtype=torch.bool)


def pit_of_normal(sd, *, points=200_000, bias=0.0):
    """PIT of standard Normal targets under a Normal predictive of another sd, and another mean."""
    y = scipy.stats.norm.ppf(uniform(1, points).numpy())
    return torch.from_numpy(scipy.stats.norm.cdf(y, bias, sd))


def test_curves_by_a_loop():
    for case in range(CASES):
        pit = uniform(3, 12, seed=case) ** (1 + case % 3)
        if case % 5 == 0:
            pit = (pit * 20).round() / 20  # on the levels themselves: ≤, not <
        mask = uniform(3, 12, seed=1000 + case) < 0.8
        real = pit[mask].tolist()
        below = [sum(p <= level for p in real) / len(real) for level in LEVELS.tolist()]
        inside = [sum(abs(p - 0.5) <= level / 2 for p in real) / len(real) for level in LEVELS.tolist()]
        np.testing.assert_allclose(calibration_curve(pit, mask, levels=LEVELS), below, rtol=0, atol=1e-12)
        np.testing.assert_allclose(central_coverage_curve(pit, mask, levels=LEVELS), inside, rtol=0, atol=1e-12)
        error = np.mean([(share - level) ** 2 for share, level in zip(below, LEVELS.tolist(), strict=True)])
        assert calibration_error(pit, mask, num_levels=19).item() == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("sd", [0.3, 1.0, 2.0])
def test_curves_of_a_normal_predictive_of_the_wrong_width(sd):
    pit = pit_of_normal(sd)
    quantiles = scipy.stats.norm.ppf(LEVELS.numpy())
    np.testing.assert_allclose(calibration_curve(pit, everywhere(pit), levels=LEVELS), scipy.stats.norm.cdf(sd * quantiles), atol=0.005)
    central = 2 * scipy.stats.norm.cdf(sd * scipy.stats.norm.ppf((1 + LEVELS.numpy()) / 2)) - 1
    np.testing.assert_allclose(central_coverage_curve(pit, everywhere(pit), levels=LEVELS), central, atol=0.005)


def test_calibration_error_is_0_for_a_uniform_pit_and_large_for_an_overconfident_one():
    error = {name: calibration_error(pit, everywhere(pit)).item() for name, pit in {
        "calibrated": pit_of_normal(1.0), "overconfident": pit_of_normal(0.3), "underconfident": pit_of_normal(3.0),
        "biased": pit_of_normal(1.0, bias=1.0), "exact": (torch.arange(210)[None] + 0.5) / 210,
    }.items()}  # fmt: skip
    assert error["exact"] < 1e-12 and error["calibrated"] < 1e-5
    assert min(error["overconfident"], error["underconfident"], error["biased"]) > 0.01


def test_calibration_error_of_a_point_mass():
    pit, levels = torch.full((2, 5), 0.5, dtype=torch.float64), np.arange(1, 21) / 21
    assert calibration_error(pit, everywhere(pit)).item() == pytest.approx(np.mean(((levels >= 0.5) - levels) ** 2), abs=1e-12)


def test_levels_take_the_type_of_the_pit():
    pit = torch.tensor([[0.1, 0.9]])
    curve = calibration_curve(pit, everywhere(pit), levels=torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert curve.dtype == torch.float32 and curve.tolist() == [0.5, 1.0]


def test_pit_of_a_continuous_predictive_is_the_cdf_whatever_u():
    cdf, u = uniform(3, 4), uniform(3, 4, seed=1)
    assert torch.equal(randomized_pit(cdf, cdf, u), cdf)


def test_randomized_pit_ends():
    below, at = uniform(3, 4), uniform(3, 4) + 0.1
    assert torch.equal(randomized_pit(below, at, torch.zeros(3, 4)), below)
    torch.testing.assert_close(randomized_pit(below, at, torch.ones(3, 4)), at, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rate", [0.3, 2.5, 20.0])
def test_randomized_pit_of_poisson_counts_is_uniform(rate):
    counts = scipy.stats.poisson.rvs(rate, size=(10, 1000), random_state=0)
    below, at = (torch.from_numpy(scipy.stats.poisson.cdf(counts - shift, rate)) for shift in (1, 0))
    pit = randomized_pit(below, at, uniform(10, 1000))
    assert scipy.stats.kstest(pit.flatten().numpy(), "uniform").pvalue > 0.001
    assert calibration_error(pit, everywhere(pit)) < 1e-3
    plain = randomized_pit(below, at, torch.ones(()))
    assert scipy.stats.kstest(plain.flatten().numpy(), "uniform").pvalue < 1e-6


def test_histogram_is_that_of_numpy():
    for case in range(CASES):
        bins = 1 + case % 20
        pit = uniform(3, 15, seed=case)
        pit[0, :2] = torch.tensor([0.0, 1.0])
        mask = uniform(3, 15, seed=1000 + case) < 0.8
        heights, edges = pit_histogram(pit, mask, bins=bins)
        expected, expected_edges = np.histogram(pit[mask].numpy(), bins=bins, range=(0, 1), density=True)
        np.testing.assert_allclose(heights, expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(edges, expected_edges, rtol=0, atol=1e-12)


def test_a_pit_on_an_edge_is_above_it():
    edges = torch.linspace(0, 1, 101, dtype=torch.float64)
    heights, _ = pit_histogram(edges[None, :-1], everywhere(edges[None, :-1]), bins=100)
    assert heights.tolist() == [1.0] * 100


def test_rounding_past_the_ends_stays_in_the_end_bins():
    pit = torch.tensor([[-1e-7, 1 + 1e-6]])
    assert pit_histogram(pit, everywhere(pit), bins=4)[0].tolist() == [2.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize(("points", "bins", "level"), [(50, 10, 0.95), (400, 20, 0.9), (7, 3, 0.5)])
def test_pit_band_holds_a_bar_as_often_as_it_says(points, bins, level):
    low, high = pit_band(points, bins, level=level)
    heights = torch.cat([pit_histogram(pit, everywhere(pit), bins=bins)[0] for pit in uniform(500, 1, points)])
    inside = ((heights >= low - 1e-9) & (heights <= high + 1e-9)).double().mean().item()
    bar = scipy.stats.binom(points, 1 / bins)
    exact = bar.cdf(round(high * points / bins)) - bar.cdf(round(low * points / bins) - 1)
    assert exact >= level and inside == pytest.approx(exact, abs=0.02)
    one = bins / points  # one point more in the bar
    outside = bar.cdf(round((low + one) * points / bins) - 1) + bar.sf(round((high - one) * points / bins))
    assert outside > 1 - level, "a band narrower at both ends would do"


def test_pit_band_tightens_round_1():
    low, high = pit_band(1_000_000, 10)
    assert 0.99 < low < 1 < high < 1.01
    assert pit_band(40, 1) == (1.0, 1.0)


def test_no_point_is_nan():
    pit = uniform(2, 3)
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert calibration_curve(pit, none, levels=LEVELS).isnan().all() and central_coverage_curve(pit, none, levels=LEVELS).isnan().all()
    assert calibration_error(pit, none).isnan() and pit_histogram(pit, none)[0].isnan().all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_point_without_a_prediction_counts_but_is_in_no_share(broken):
    pit = torch.tensor([[0.2, 0.6, broken, broken]])
    levels = torch.tensor([0.5, 1.0])
    assert calibration_curve(pit, everywhere(pit), levels=levels).tolist() == [0.25, 0.5]
    assert central_coverage_curve(pit, everywhere(pit), levels=levels).tolist() == [0.25, 0.5]
    assert pit_histogram(pit, everywhere(pit), bins=2)[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_point_without_a_prediction_cannot_mend_the_calibration_error(broken):
    biased = uniform(1, 1000) / 2  # twice the share at every level
    pit = torch.cat([biased, torch.full_like(biased, broken)])
    curve = calibration_curve(pit, everywhere(pit), levels=LEVELS[:9])
    torch.testing.assert_close(curve, LEVELS[:9], rtol=0, atol=0.03)
    assert calibration_error(pit, everywhere(pit)).isnan()


@pytest.mark.parametrize("call", [
    lambda p, m: calibration_curve(p, m, levels=LEVELS), lambda p, m: central_coverage_curve(p, m, levels=LEVELS), calibration_error,
    pit_histogram,
])  # fmt: skip
def test_errors_of_masks(call):
    pit = uniform(2, 3)
    with pytest.raises(ValueError, match=r"expected values and a bool mask of one shape, got \(2, 3\) and torch.bool \(3, 2\)"):
        call(pit, everywhere(pit).T)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and torch.int64 \(2, 3\)"):
        call(pit, everywhere(pit).long())


def test_errors_of_numbers():
    pit = uniform(2, 3)
    with pytest.raises(ValueError, match="num_levels: expected at least 1, got 0"):
        calibration_error(pit, everywhere(pit), num_levels=0)
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        pit_histogram(pit, everywhere(pit), bins=0)
    with pytest.raises(ValueError, match="bins: expected at least 1, got -1"):
        pit_band(10, -1)
    with pytest.raises(ValueError, match="num_points: expected at least 1, got 0"):
        pit_band(0, 10)
    for level in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match=f"level: expected a number between 0 and 1, got {level}"):
            pit_band(10, 10, level=level)
