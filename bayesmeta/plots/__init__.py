"""Pictures of an evaluation: plain arrays in, matplotlib axes out; nothing is ever shown or left in pyplot."""

from bayesmeta.plots.bands import bands_grid, bands_key, predictive_bands
from bayesmeta.plots.calibration import (
    Coverage,
    Heights,
    calibration_curve,
    calibration_grid,
    coverage,
    pit_grid,
    pit_heights,
    pit_histogram,
)
from bayesmeta.plots.confidence import Reliability, reliability, reliability_diagram, reliability_grid
from bayesmeta.plots.explanations import explained_draws, explained_grid, explained_key
from bayesmeta.plots.intervals import metric_intervals
from bayesmeta.plots.maps import map_grid, probability_map
from bayesmeta.plots.shift import confidence_under_shift, severity_curves
from bayesmeta.plots.shrinkage import shrinkage
from bayesmeta.plots.style import Look, looks, new_figure
from bayesmeta.plots.training import loss_curve, running_median

__all__ = [
    "Coverage",
    "Heights",
    "Look",
    "Reliability",
    "bands_grid",
    "bands_key",
    "calibration_curve",
    "calibration_grid",
    "confidence_under_shift",
    "coverage",
    "explained_draws",
    "explained_grid",
    "explained_key",
    "looks",
    "loss_curve",
    "map_grid",
    "metric_intervals",
    "new_figure",
    "pit_grid",
    "pit_heights",
    "pit_histogram",
    "predictive_bands",
    "probability_map",
    "reliability",
    "reliability_diagram",
    "reliability_grid",
    "running_median",
    "severity_curves",
    "shrinkage",
]
