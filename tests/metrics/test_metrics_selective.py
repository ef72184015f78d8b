"""AUROC against sklearn, risk and coverage against every order of the points written out."""

import itertools
import math

import numpy as np
import pytest
import torch

from bayesmeta.metrics import auroc, bootstrap_statistic, risk_coverage, risk_coverage_area

CASES = 200


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def chance(*shape, share=0.7, seed=0):
    return torch.rand(*shape, generator=generator(seed)) < share


def answers_of(case, *, points=20):
    """Confidences, often equal where ``case`` is even, and answers that are right more often where they are high."""
    confidence = torch.rand(3, points, generator=generator(case), dtype=torch.float64)
    if case % 2 == 0:
        confidence = (confidence * 5).ceil() / 5
    correct = torch.rand(3, points, generator=generator(1000 + case), dtype=torch.float64) < confidence
    return confidence, correct, chance(3, points, seed=2000 + case)


def test_auroc_is_that_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    for case in range(CASES):
        inside, outside = normal(3, 1 + case % 20, seed=case) + case % 3, normal(1 + case % 30, seed=1000 + case)
        if case % 2 == 0:
            inside, outside = inside.round(), outside.round()  # ties
        labels = np.repeat([1, 0], [inside.numel(), outside.numel()])
        expected = metrics.roc_auc_score(labels, torch.cat([inside.flatten(), outside]).numpy())
        assert auroc(inside, outside).item() == pytest.approx(expected, abs=1e-9)


def test_auroc_at_its_ends_and_in_the_middle():
    low, high = normal(50).sigmoid(), normal(40, seed=1).sigmoid() + 1
    assert auroc(high, low).item() == 1 and auroc(low, high).item() == 0
    assert auroc(torch.ones(5), torch.ones(3)).item() == 0.5
    assert auroc(torch.tensor([math.inf]), torch.tensor([-math.inf, 0.0])).item() == 1
    assert auroc(low, high).item() == 1 - auroc(-low, -high).item()


def test_auroc_of_two_normals():
    area = auroc(normal(100_000) + 1, normal(100_000, seed=1))
    assert area.item() == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.005)  # Φ(1 / √2)


def test_auroc_masks():
    for case in range(20):
        inside, outside = normal(3, 8, seed=case), normal(3, 5, seed=1000 + case)
        mask_in, mask_out = chance(3, 8, seed=case), chance(3, 5, seed=1000 + case)
        expected = auroc(inside[mask_in], outside[mask_out])
        for fill in (1e6, -1e6, math.nan, math.inf):
            padded = torch.where(mask_in, inside, fill), torch.where(mask_out, outside, fill)
            assert torch.equal(auroc(*padded, mask_in=mask_in, mask_out=mask_out), expected)


@pytest.mark.parametrize("place", [0, 1])
def test_auroc_of_nothing_or_of_nan_is_nan(place):
    scores = [normal(4), normal(4, seed=1) - 9]
    assert auroc(*scores) == 1
    scores[place][2] = math.nan
    assert auroc(*scores).isnan()
    scores[place] = torch.empty(0, dtype=torch.float64)
    assert auroc(*scores).isnan()


def test_auroc_keeps_its_type_and_takes_slices():
    probs = torch.rand(6, 4, generator=generator(0))
    area = auroc(probs[:, 0], probs[:, 1])  # not contiguous
    assert area.dtype == torch.float32 and torch.equal(area, auroc(probs[:, 0].clone(), probs[:, 1].clone()))


def test_risk_and_coverage_by_a_loop():
    for case in range(1, 2 * CASES, 2):  # no ties
        confidence, correct, mask = answers_of(case)
        ranked = sorted(zip(confidence[mask].tolist(), correct[mask].tolist(), strict=True), reverse=True)
        risks = [sum(not right for _, right in ranked[:k]) / k for k in range(1, len(ranked) + 1)]
        coverage, risk = risk_coverage(confidence, correct, mask)
        np.testing.assert_allclose(coverage, np.arange(1, len(ranked) + 1) / len(ranked), rtol=0, atol=1e-12)
        np.testing.assert_allclose(risk, risks, rtol=0, atol=1e-12)
        assert risk_coverage_area(confidence, correct, mask).item() == pytest.approx(np.mean(risks), abs=1e-12)


def test_risk_of_equal_confidences_is_the_mean_over_their_orders():
    confidence = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.7, 0.2], dtype=torch.float64)
    correct = torch.tensor([True, False, True, True, False, False])
    risks = []
    for order in itertools.permutations(range(1, 5)):
        wrong = (~correct[[0, *order, 5]]).double()
        risks.append(wrong.cumsum(0) / torch.arange(1, 7))
    torch.testing.assert_close(risk_coverage(confidence, correct).risk, torch.stack(risks).mean(0), rtol=0, atol=1e-12)


def test_order_of_the_points_does_not_matter():
    for case in range(0, 40, 2):  # ties
        confidence, correct, _ = answers_of(case)
        order = torch.randperm(60, generator=generator(case))
        shuffled = confidence.flatten()[order], correct.flatten()[order]
        torch.testing.assert_close(risk_coverage(*shuffled), risk_coverage(confidence, correct), rtol=0, atol=1e-12)


def test_area_ranks_confidences():
    correct = chance(1000, share=0.8)
    knows = correct + 0.1 * torch.rand(1000, generator=generator(1))
    share = 1 - correct.double().mean().item()
    best = share + (1 - share) * math.log(1 - share)  # of a large sample (Geifman et al. 2019)
    assert risk_coverage_area(knows, correct).item() == pytest.approx(best, abs=2e-3)
    assert risk_coverage_area(torch.full((1000,), 0.5, dtype=torch.float64), correct).item() == pytest.approx(share, abs=1e-12)
    assert risk_coverage_area(-knows, correct) > share + 0.1


def test_risk_masks():
    for case in range(20):
        confidence, correct, mask = answers_of(case)
        expected = risk_coverage(confidence[mask], correct[mask])
        for fill in (1e6, -1e6, math.nan, math.inf):
            got = risk_coverage(torch.where(mask, confidence, fill), torch.where(mask, correct, case % 3 == 0), mask)
            assert torch.equal(got.risk, expected.risk) and torch.equal(got.coverage, expected.coverage)


def test_risk_of_nan_or_nothing_is_nan():
    confidence, correct, mask = answers_of(1)
    assert risk_coverage_area(confidence, correct, mask).isfinite()
    confidence[mask.nonzero()[0][0], mask.nonzero()[0][1]] = math.nan
    assert risk_coverage(confidence, correct, mask).risk.isnan().all()
    assert risk_coverage_area(confidence, correct, mask).isnan()
    nothing = risk_coverage(confidence, correct, torch.zeros_like(mask))
    assert nothing.risk.shape == nothing.coverage.shape == (0,)
    assert risk_coverage_area(confidence, correct, torch.zeros_like(mask)).isnan()


def test_intervals_over_tasks():
    confidence, correct, mask = answers_of(1)
    area = bootstrap_statistic(risk_coverage_area, confidence, correct, mask, resamples=50)
    assert area.lower < area.estimate < area.upper
    assert area.estimate == risk_coverage_area(confidence, correct, mask).item()


def test_errors():
    scores, mask = normal(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected floating-point scores, got torch.int64"):
        auroc(scores, scores.long())
    with pytest.raises(ValueError, match=r"expected values and a bool mask of one shape, got \(2, 3\) and torch.bool \(3, 2\)"):
        auroc(scores, scores, mask_in=mask.T)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and torch.int64 \(2, 3\)"):
        auroc(scores, scores, mask_out=mask.long())
    with pytest.raises(ValueError, match=r"confidence and correct: expected one shape and bool, got \(2, 3\) and torch.bool \(3, 2\)"):
        risk_coverage(scores, mask.T)
    with pytest.raises(ValueError, match=r"confidence and correct: .*, got \(2, 3\) and torch.float32 \(2, 3\)"):
        risk_coverage_area(scores, mask.float())
    with pytest.raises(ValueError, match=r"expected floating-point scores, got torch.bool"):
        risk_coverage(mask, mask)
    with pytest.raises(ValueError, match=r"expected values and a bool mask of one shape"):
        risk_coverage(scores, mask, mask.T)
