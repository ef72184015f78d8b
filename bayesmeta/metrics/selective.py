"""How well a confidence tells what is known from what is not: seen from unseen, right from wrong.

Scores are of any one shape, ``(T, N)`` as a rule, with a mask of the same shape, or None where every point is real; points are
pooled. Intervals over tasks: `bootstrap_statistic`, with the masks among its arrays. A ValueError says which shape or type is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .intervals import check_mask


class RiskCoverage(NamedTuple):
    """Share of the P points that are answered, 1 / P to 1, and share of wrong answers among them, ``(P,)`` each."""

    coverage: Tensor
    risk: Tensor


def auroc(scores_in: Tensor, scores_out: Tensor, *, mask_in: Tensor | None = None, mask_out: Tensor | None = None) -> Tensor:
    """Probability that a point of ``scores_in`` is above one of ``scores_out``, where a tie counts half: ``()``, 0 to 1.

    1 tells all apart, 0.5 is chance, 0 is all the wrong way round: give confidences as they are and entropies with their sign
    turned. This is the area under the ROC curve (Hanley & McNeil 1982), from ranks, O(n log n). NaN where one side
    has no point, or a score of NaN.
    """
    inside, outside = _pooled(scores_in, mask_in), _pooled(scores_out, mask_out).sort().values
    below, up_to = (torch.searchsorted(outside, inside, right=ties) for ties in (False, True))
    area = (below + up_to).double().mean() / (2 * len(outside))
    broken = inside.isnan().any() | outside.isnan().any()  # a search finds NaN above all others
    return torch.where(broken, torch.nan, area).to(scores_in.dtype)


def risk_coverage(confidence: Tensor, correct: Tensor, mask: Tensor | None = None) -> RiskCoverage:
    """Risk of answering only the most confident points, for each number of them (Geifman & El-Yaniv 2017, section 2).

    ``correct`` is bool, of the shape of ``confidence``. Equal confidences have no order: the risk is the mean over all of theirs,
    so that no order of the points is luckier than another. Risks are NaN throughout where a confidence is.
    """
    if confidence.shape != correct.shape or correct.dtype != torch.bool:
        got = f"{tuple(confidence.shape)} and {correct.dtype} {tuple(correct.shape)}"
        raise ValueError(f"confidence and correct: expected one shape and bool, got {got}")
    sure = _pooled(confidence, mask)
    wrong = (~(correct if mask is None else correct[mask])).flatten().double()
    levels, level, counts = sure.unique(return_inverse=True, return_counts=True)  # levels ascend
    expected = torch.zeros_like(levels).index_add(0, level, wrong) / counts  # wrong answers a point, at each level
    answered = torch.arange(1, len(sure) + 1, dtype=torch.float64, device=sure.device)
    risk = expected.flip(0).repeat_interleave(counts.flip(0)).cumsum(0) / answered
    risk = torch.where(sure.isnan().any(), torch.nan, risk)
    return RiskCoverage((answered / len(sure)).to(confidence.dtype), risk.to(confidence.dtype))


def risk_coverage_area(confidence: Tensor, correct: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the risks of `risk_coverage`, ``()``, 0 to 1, lower is better: the AURC (Geifman et al. 2019, section 3).

    It is the share of wrong answers where all confidences are equal, and above it where the wrong ones are the more confident.
    NaN without points, or where a confidence is NaN.
    """
    return risk_coverage(confidence, correct, mask).risk.mean()


def _pooled(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The real scores, ``(P,)``, in double precision."""
    if not scores.is_floating_point():
        raise ValueError(f"expected floating-point scores, got {scores.dtype}")
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    check_mask(scores, mask)
    return scores[mask].double()
