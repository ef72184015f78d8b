"""Calibration of a predictive for a real target, from its probability integral transform (PIT), F(y).

Of a calibrated predictive the PIT is uniform. Arguments: ``pit (T, N)``, ``mask (T, N)``; points are pooled over tasks. A PIT of NaN
or inf among them says that there was no prediction: such a point counts in every denominator and in no share. A ValueError says
which shape or number is wrong.
"""

from __future__ import annotations

import scipy.stats
import torch
from torch import Tensor

from .intervals import check_mask


def randomized_pit(cdf_below: Tensor, cdf_at: Tensor, u: Tensor) -> Tensor:
    """F(y−) + u (F(y) − F(y−)), ``u`` uniform: uniform for a calibrated predictive of counts too (Czado et al. 2009, section 2)."""
    return cdf_below + u * (cdf_at - cdf_below)


def calibration_curve(pit: Tensor, mask: Tensor, *, levels: Tensor) -> Tensor:
    """Share of points with F(y) ≤ level, for each of ``levels (L,)`` (Kuleshov et al. 2018, eq. 8): ``(L,)``; level itself is ideal."""
    return _share_up_to(levels, _pooled(pit, mask))


def central_coverage_curve(pit: Tensor, mask: Tensor, *, levels: Tensor) -> Tensor:
    """Share of points inside the central interval of each of ``levels (L,)``: ``(L,)``. Below the level is overconfident."""
    return _share_up_to(levels, 2 * (_pooled(pit, mask) - 0.5).abs())


def calibration_error(pit: Tensor, mask: Tensor, *, num_levels: int = 20) -> Tensor:
    """Mean squared gap between `calibration_curve` and the level, over equally spaced levels inside (0, 1); ``()``, 0 is ideal.

    The calibration error of Kuleshov et al. 2018, eq. 9, with equal weights that sum to 1 (theirs sum to the number of levels). NaN where
    there is no point, or a point without a prediction: left out of the shares, it could make up for others that are too high.
    """
    if num_levels < 1:
        raise ValueError(f"num_levels: expected at least 1, got {num_levels}")
    levels = torch.arange(1, num_levels + 1, dtype=pit.dtype, device=pit.device) / (num_levels + 1)
    error = ((calibration_curve(pit, mask, levels=levels) - levels) ** 2).mean()
    return torch.where(pit[mask].isfinite().all(), error, torch.nan)


def pit_histogram(pit: Tensor, mask: Tensor, *, bins: int = 10) -> tuple[Tensor, Tensor]:
    """Heights ``(bins,)`` of the PIT's histogram, 1 where it is uniform, and its edges ``(bins + 1,)``; heights NaN without points.

    Bins are closed below, the last one at both ends.
    """
    _check_bins(bins)
    real = _pooled(pit, mask)
    edges = torch.linspace(0, 1, bins + 1, dtype=pit.dtype, device=pit.device)
    which = torch.bucketize(real[real.isfinite()], edges[1:-1], right=True)
    return torch.bincount(which, minlength=bins).to(pit.dtype) * bins / len(real), edges


def pit_band(num_points: int, bins: int, *, level: float = 0.95) -> tuple[float, float]:
    """Lower and upper height within which one bar stays with probability ``level`` or more under uniformity (binomial quantiles)."""
    if num_points < 1:
        raise ValueError(f"num_points: expected at least 1, got {num_points}")
    _check_bins(bins)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    low, high = scipy.stats.binom.interval(level, num_points, 1 / bins)
    return float(low) * bins / num_points, float(high) * bins / num_points


def _pooled(pit: Tensor, mask: Tensor) -> Tensor:
    check_mask(pit, mask)
    return pit[mask]


def _share_up_to(levels: Tensor, values: Tensor) -> Tensor:
    return (values[:, None] <= levels.to(values)).to(values.dtype).mean(0)  # NaN ≤ level is False; the mean of nothing is NaN


def _check_bins(bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
