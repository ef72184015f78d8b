"""Accuracy, Brier score and calibration of classes against sklearn, torchmetrics and loops written out."""

import numpy as np
import pytest
import torch

from bayesmeta.metrics import (
    accuracy,
    adaptive_calibration_error,
    brier,
    debiased_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_curve,
)

CASES = 200


def case_of(seed, *, tasks=3, points=20, classes=5):
    """Probabilities, labels that agree with them more often than not, and a mask; probabilities are exact in single precision."""
    generator = torch.Generator().manual_seed(seed)
    logits = (1 + seed % 4) * torch.randn(tasks, points, classes, generator=generator)
    probs = logits.softmax(-1).double()
    any_class = torch.randint(classes, (tasks, points), generator=generator)
    y = torch.where(torch.rand(tasks, points, generator=generator) < 0.6, probs.argmax(-1), any_class)
    mask = torch.rand(tasks, points, generator=generator) < 0.8
    mask[:, 0] = True
    return probs, y, mask


def gaps_in_a_loop(probs, y, mask, bins):
    """Share of points and gap of each bin (edge, edge], in numpy."""
    confidence, top = probs[mask].max(-1)
    confidence, right = confidence.numpy(), (top == y[mask]).numpy()
    found = []
    for low, high in zip(np.linspace(0, 1, bins + 1)[:-1], np.linspace(0, 1, bins + 1)[1:], strict=True):
        inside = (low < confidence) & (confidence <= high)
        if inside.any():
            found.append((inside.mean(), abs(right[inside].mean() - confidence[inside].mean())))
    return found


@pytest.mark.parametrize("norm", ["l1", "max"])
def test_ece_and_mce_are_those_of_torchmetrics(norm):
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.classification import multiclass_calibration_error

    ours = {"l1": expected_calibration_error, "max": maximum_calibration_error}[norm]
    for case in range(CASES):
        classes = 2 + case % 6
        probs, y, mask = case_of(case, classes=classes)
        expected = multiclass_calibration_error(probs[mask], y[mask], num_classes=classes, n_bins=15, norm=norm)
        assert ours(probs, y, mask).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_ece_and_mce_by_a_loop(bins):
    for case in range(CASES):
        probs, y, mask = case_of(case)
        gaps = gaps_in_a_loop(probs, y, mask, bins)
        assert expected_calibration_error(probs, y, mask, bins=bins).item() == pytest.approx(sum(s * g for s, g in gaps), abs=1e-12)
        assert maximum_calibration_error(probs, y, mask, bins=bins).item() == pytest.approx(max(g for _, g in gaps), abs=1e-12)


def test_adaptive_ece_has_bins_of_equal_numbers_of_points():
    for case in range(CASES):
        probs, y, _ = case_of(case, tasks=3, points=25)
        mask = torch.ones_like(y, dtype=torch.bool)
        confidence, top = (part.flatten().numpy() for part in probs.max(-1))
        order = np.argsort(confidence)
        parts = np.array_split(order, 15)
        right = top == y.flatten().numpy()
        expected = sum(len(part) / 75 * abs(right[part].mean() - confidence[part].mean()) for part in parts)
        assert adaptive_calibration_error(probs, y, mask).item() == pytest.approx(expected, abs=1e-9)
        assert torch.equal(adaptive_calibration_error(probs, y, mask), expected_calibration_error(probs, y, mask, equal_mass=True))
        r = reliability_curve(probs, y, mask, equal_mass=True)
        assert r.counts.tolist() == [5] * 15
        assert r.edges[0] == confidence.min() and r.edges[-1] == confidence.max()


def test_equal_confidences_share_an_adaptive_bin_so_that_order_does_not_matter():
    probs = torch.tensor([0.8, 0.2], dtype=torch.float64).expand(1, 20, 2)
    mask = torch.ones(1, 20, dtype=torch.bool)
    for y in (torch.tensor([[0] * 16 + [1] * 4]), torch.tensor([[1] * 4 + [0] * 16])):
        assert expected_calibration_error(probs, y, mask, equal_mass=True).item() == pytest.approx(0, abs=1e-12)
        assert reliability_curve(probs, y, mask, equal_mass=True).counts.sum() == 20


def test_reliability_by_hand():
    top = torch.tensor([[0.5, 0.6, 0.75, 1.0]])
    probs, y = torch.stack([top, 1 - top], -1), torch.tensor([[0, 1, 0, 0]])
    r = reliability_curve(probs, y, torch.tensor([[True, True, True, True]]), bins=4)
    assert torch.equal(r.edges, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert r.counts.tolist() == [0, 1, 2, 1]  # closed above: 0.5 is in (0.25, 0.5]
    torch.testing.assert_close(r.confidence, torch.tensor([torch.nan, 0.5, 0.675, 1.0]), equal_nan=True)
    torch.testing.assert_close(r.accuracy, torch.tensor([torch.nan, 1.0, 0.5, 1.0]), equal_nan=True)


def test_a_confidence_over_1_by_rounding_is_in_the_last_bin():
    probs = torch.tensor([[[1.0 + 1e-7, 0.0]]])
    assert reliability_curve(probs, torch.zeros(1, 1).long(), torch.ones(1, 1).bool()).counts[-1] == 1


def test_means_of_a_bin_do_not_drift_in_single_precision():
    points = 300_000
    probs = torch.tensor([0.9, 0.1]).expand(1, points, 2)
    y = (torch.arange(points) % 10 == 0).long()[None]
    ece = expected_calibration_error(probs, y, torch.ones(1, points, dtype=torch.bool))
    assert ece.dtype == torch.float32 and ece < 1e-6


def test_ece_is_small_for_a_calibrated_classifier_and_large_for_a_sure_one():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(10, 5000, 4, generator=generator)
    y = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(10, 5000)
    mask = torch.ones_like(y, dtype=torch.bool)
    for equal_mass in (False, True):
        assert expected_calibration_error(logits.softmax(-1), y, mask, equal_mass=equal_mass) < 0.01
        assert expected_calibration_error((3 * logits).softmax(-1), y, mask, equal_mass=equal_mass) > 0.1


def test_brier_is_twice_that_of_sklearn_for_two_classes():
    metrics = pytest.importorskip("sklearn.metrics")
    for case in range(CASES):
        probs, y, mask = case_of(case, classes=2)
        for task, ours in enumerate(brier(probs, y, mask)):
            real = mask[task]
            expected = metrics.brier_score_loss(y[task, real].numpy(), probs[task, real, 1].numpy(), pos_label=1)
            assert ours.item() == pytest.approx(2 * expected, abs=1e-6)


def test_brier_of_several_classes_by_a_loop():
    for case in range(CASES):
        probs, y, mask = case_of(case)
        for task, ours in enumerate(brier(probs, y, mask)):
            points = [probs[task, n].clone() for n in range(20) if mask[task, n]]
            for p, label in zip(points, y[task, mask[task]], strict=True):
                p[label] -= 1
            assert ours.item() == pytest.approx(float(np.mean([(p**2).sum() for p in points])), abs=1e-12)


def test_brier_is_0_where_sure_and_right_and_2_where_sure_and_wrong():
    probs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    assert torch.equal(brier(probs, torch.zeros(2, 2).long(), torch.ones(2, 2).bool()), torch.tensor([0.0, 2.0]))


def test_accuracy_is_that_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    for case in range(CASES):
        probs, y, mask = case_of(case)
        for task, ours in enumerate(accuracy(probs, y, mask)):
            real = mask[task]
            assert ours.item() == pytest.approx(metrics.accuracy_score(y[task, real].numpy(), probs[task, real].argmax(-1).numpy()))


def test_labels_of_other_integer_types():
    probs, y, mask = case_of(0)
    assert torch.equal(brier(probs, y.int(), mask), brier(probs, y, mask))


LEVELS = torch.tensor([0.55, 0.65, 0.75, 0.85, 0.95], dtype=torch.float64)


def discrete_case(truth, points, seed):
    """One task of two classes: so many points at each of five confidences, right with the probability ``truth``."""
    top = LEVELS.repeat_interleave(points)[None]
    right = torch.rand(1, 5 * points, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < truth.repeat_interleave(points)
    return torch.stack([top, 1 - top], -1), (~right).long(), torch.ones_like(right)


def test_debiased_error_by_a_loop():
    below_zero = 0
    for case in range(CASES):
        probs, y, mask = case_of(case)
        confidence, top = (part[mask].numpy() for part in probs.max(-1))
        right = (top == y[mask].numpy()).astype(float)
        parts = [(np.ceil(confidence * 15) == b + 1) for b in range(15)]
        found = [(p.sum(), right[p].mean() - confidence[p].mean(), right[p].var(ddof=1)) for p in parts if p.sum() > 1]
        expected = sum(n * (gap**2 - var / n) for n, gap, var in found) / sum(n for n, *_ in found)
        got = debiased_calibration_error(probs, y, mask, equal_mass=False, squared=True)
        assert got.item() == pytest.approx(expected, abs=1e-9)
        root = debiased_calibration_error(probs, y, mask, equal_mass=False)
        assert root.item() == pytest.approx(max(expected, 0) ** 0.5, abs=1e-6)
        below_zero += expected < 0
    assert 0 < below_zero < CASES  # both sides of the root were seen


def test_debiased_error_has_bins_of_equal_numbers_of_points_if_not_told_otherwise():
    for case in range(CASES):
        probs, y, _ = case_of(case, tasks=3, points=25)
        confidence, top = (part.flatten().numpy() for part in probs.max(-1))
        right = (top == y.flatten().numpy()).astype(float)
        parts = np.array_split(np.argsort(confidence), 15)  # 5 points each
        expected = np.mean([(right[p].mean() - confidence[p].mean()) ** 2 - right[p].var(ddof=1) / 5 for p in parts])
        got = debiased_calibration_error(probs, y, torch.ones_like(y, dtype=torch.bool), squared=True)
        assert got.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, -0.3, 0.04])
def test_debiased_error_is_unbiased_where_the_plain_one_is_not(shift):
    points, repeats, truth = 6, 800, LEVELS + shift
    cases = [discrete_case(truth, points, seed) for seed in range(repeats)]
    debiased = np.array([debiased_calibration_error(*case, bins=10, equal_mass=False, squared=True).item() for case in cases])
    curves = [reliability_curve(*case, bins=10) for case in cases]
    plain = np.array([((r.accuracy - r.confidence) ** 2)[r.counts > 0].mean().item() for r in curves])
    error = debiased.std(ddof=1) / repeats**0.5
    assert abs(debiased.mean() - shift**2) < 4 * error
    bias = (truth * (1 - truth)).mean().item() / points
    assert bias > 10 * error, "too few repeats to tell the two apart"
    assert abs(plain.mean() - shift**2 - bias) < 4 * plain.std(ddof=1) / repeats**0.5


def test_a_bin_of_one_point_is_left_out_of_the_debiased_error():
    probs, y, mask = discrete_case(LEVELS, 6, 0)
    one = torch.cat([probs, torch.tensor([[[0.99, 0.01]]])], 1), torch.cat([y, y[:, :1]], 1), torch.ones(1, 31).bool()
    with_it, without = (debiased_calibration_error(*case, bins=50, equal_mass=False, squared=True) for case in (one, (probs, y, mask)))
    assert reliability_curve(*one, bins=50).counts.tolist().count(1) == 1
    torch.testing.assert_close(with_it, without, rtol=0, atol=1e-15)


def test_without_two_points_in_a_bin_there_is_no_debiased_error():
    probs, y, mask = discrete_case(LEVELS, 1, 0)
    assert expected_calibration_error(probs, y, mask, bins=10).isfinite()
    assert debiased_calibration_error(probs, y, mask, bins=10, equal_mass=False).isnan()


def test_debiased_error_of_a_sure_and_wrong_classifier_is_1():
    probs = torch.tensor([1.0, 0.0]).expand(2, 5, 2)
    assert debiased_calibration_error(probs, torch.ones(2, 5).long(), torch.ones(2, 5).bool()).item() == 1
    assert debiased_calibration_error(probs, torch.zeros(2, 5).long(), torch.ones(2, 5).bool()).item() == 0


SCORES = [
    accuracy, brier, expected_calibration_error, adaptive_calibration_error, debiased_calibration_error, maximum_calibration_error,
    reliability_curve,
]  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
def test_errors_of_shapes_and_labels(score):
    probs, y, mask = case_of(0, tasks=2, points=3)
    with pytest.raises(ValueError, match=r"expected probs \(T, N, C\), y \(T, N\) and a bool mask \(T, N\), got \(2, 3, 5\), \(3, 2\) and"):
        score(probs, y.T, mask)
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\), \(2, 3\) and torch.bool \(3, 2\)"):
        score(probs, y, mask.T)
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\), \(2, 3\) and torch.int64 \(2, 3\)"):
        score(probs, y, mask.long())
    mask[:], y[:], y[0, 1] = True, 2, 5
    with pytest.raises(ValueError, match="y: expected labels from 0 to 4, got some from 2 to 5"):
        score(probs, y, mask)
    y[0, 1] = -1
    with pytest.raises(ValueError, match="y: expected labels from 0 to 4, got some from -1 to 2"):
        score(probs, y, mask)


@pytest.mark.parametrize("score", SCORES[2:])
def test_errors_of_bins(score):
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        score(*case_of(0), bins=0)


def test_a_diagram_has_no_place_for_nan():
    probs, y, mask = case_of(0)
    probs[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="probs: expected numbers, got NaN at a real point"):
        reliability_curve(probs, y, mask)
