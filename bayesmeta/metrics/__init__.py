"""Metrics: pure functions of tensors. Axes: ``T`` tasks, ``N`` points (padded, with a mask), ``S`` draws, ``C`` classes.

Where ``mask`` is False nothing matters, NaN included. One value a task, ``(T,)``, is the unit: NaN for a task without points, which
`bootstrap_interval` and `paired_difference` leave out. At a real point NaN makes a score NaN, or counts as a miss; never as a hit.
"""

from .ambiguity import ModeCoverage, label_coverage, mode_coverage
from .calibration import calibration_curve, calibration_error, central_coverage_curve, pit_band, pit_histogram, randomized_pit
from .classification import (
    Reliability,
    accuracy,
    adaptive_calibration_error,
    brier,
    debiased_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_curve,
)
from .intervals import Interval, bootstrap_interval, bootstrap_statistic, paired_difference, task_mean
from .posterior import gaussian_kl, gaussian_wasserstein2, sd_ratio
from .regression import crps, crps_normal, interval_coverage, interval_width, rmse
from .selective import RiskCoverage, auroc, risk_coverage, risk_coverage_area

__all__ = [
    "Interval",
    "ModeCoverage",
    "Reliability",
    "RiskCoverage",
    "accuracy",
    "adaptive_calibration_error",
    "auroc",
    "bootstrap_interval",
    "bootstrap_statistic",
    "brier",
    "calibration_curve",
    "calibration_error",
    "central_coverage_curve",
    "crps",
    "crps_normal",
    "debiased_calibration_error",
    "expected_calibration_error",
    "gaussian_kl",
    "gaussian_wasserstein2",
    "interval_coverage",
    "interval_width",
    "label_coverage",
    "maximum_calibration_error",
    "mode_coverage",
    "paired_difference",
    "pit_band",
    "pit_histogram",
    "randomized_pit",
    "reliability_curve",
    "risk_coverage",
    "risk_coverage_area",
    "rmse",
    "sd_ratio",
    "task_mean",
]
