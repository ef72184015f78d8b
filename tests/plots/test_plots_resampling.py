import numpy as np
import pytest
import torch

from bayesmeta.metrics import bootstrap_interval
from bayesmeta.plots import resampling
from bayesmeta.plots.resampling import percentile_band, resampled_shares


def test_means_get_the_very_intervals_of_metrics():
    values = np.random.default_rng(0).normal(size=(40, 3))
    lower, upper = percentile_band(resampled_shares(values, np.ones_like(values), seed=7))
    for k in range(3):
        interval = bootstrap_interval(torch.as_tensor(values[:, k]), seed=7)
        assert (lower[k], upper[k]) == pytest.approx((interval.lower, interval.upper), abs=1e-12)


def test_shares_are_pooled_over_points():
    hits, points = np.array([[9.0], [0.0]]), np.array([[9.0], [1.0]])
    shares = resampled_shares(hits, points, resamples=200)
    assert set(np.round(shares.ravel(), 6)) == {1.0, 0.9, 0.0}  # (9 + 9)/18, (9 + 0)/10, 0/2


def test_blocks_change_nothing(monkeypatch):
    values = np.random.default_rng(1).random((30, 4))
    whole = resampled_shares(values, np.ones_like(values), resamples=100)
    monkeypatch.setattr(resampling, "BLOCK", 64)
    np.testing.assert_allclose(resampled_shares(values, np.ones_like(values), resamples=100), whole, rtol=1e-14)


def test_a_column_without_points_has_no_band():
    hits, points = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    lower, upper = percentile_band(resampled_shares(hits, points, resamples=50))
    assert np.isnan([lower[1], upper[1]]).all() and (lower[0], upper[0]) == (0, 1)


@pytest.mark.parametrize("level", [0, 1, -0.5, 95])
def test_a_level_is_between_0_and_1(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        percentile_band(np.zeros((3, 1)), level=level)
