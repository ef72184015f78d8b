"""Metrics: pure functions of tensors. Axes: ``T`` tasks, ``N`` points (padded, with a mask), ``S`` draws, ``C`` classes."""

from .calibration import calibration_curve, calibration_error, central_coverage_curve, pit_band, pit_histogram, randomized_pit
from .classification import Reliability, accuracy, brier, expected_calibration_error, maximum_calibration_error, reliability_curve
from .intervals import Interval, bootstrap_interval, bootstrap_statistic, paired_difference, task_mean
from .posterior import gaussian_kl, gaussian_wasserstein2, sd_ratio
from .regression import crps, crps_normal, interval_coverage, interval_width, rmse

__all__ = [
    "Interval",
    "Reliability",
    "accuracy",
    "bootstrap_interval",
    "bootstrap_statistic",
    "brier",
    "calibration_curve",
    "calibration_error",
    "central_coverage_curve",
    "crps",
    "crps_normal",
    "expected_calibration_error",
    "gaussian_kl",
    "gaussian_wasserstein2",
    "interval_coverage",
    "interval_width",
    "maximum_calibration_error",
    "paired_difference",
    "pit_band",
    "pit_histogram",
    "randomized_pit",
    "reliability_curve",
    "rmse",
    "sd_ratio",
    "task_mean",
]
