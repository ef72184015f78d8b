"""One contract for all metrics: padding changes nothing, a task without points is NaN, NaN at a point never scores as good."""

import math

import pytest
import torch

from bayesmeta import metrics
from bayesmeta.metrics import bootstrap_interval, crps, crps_normal, randomized_pit, task_mean

T, N, C, S = 6, 9, 4, 12
LEVELS = torch.linspace(0.05, 0.95, 19)

# What a metric does, as a function of one tensor of predictions and one of targets
REGRESSION = {
    "rmse": lambda p, y, mask: metrics.rmse(p[0], y, mask),
    "crps": lambda p, y, mask: task_mean(crps(p, y), mask),
    "crps of an ensemble": lambda p, y, mask: task_mean(crps(p, y, fair=False), mask),
    "crps_normal": lambda p, y, mask: task_mean(crps_normal(p[0], p[1].exp(), y), mask),
    "interval_coverage": lambda p, y, mask: metrics.interval_coverage(p.amin(0), p.amax(0), y, mask),
    "interval_width": lambda p, y, mask: metrics.interval_width(p.amin(0), p.amax(0), mask),
}
CLASSES = {
    "accuracy": metrics.accuracy,
    "brier": metrics.brier,
}
POOLED_CLASSES = {
    "expected_calibration_error": metrics.expected_calibration_error,
    "adaptive": metrics.adaptive_calibration_error,
    "debiased": lambda p, y, mask: metrics.debiased_calibration_error(p, y, mask, bins=4),
    "debiased and squared": lambda p, y, mask: metrics.debiased_calibration_error(p, y, mask, bins=4, squared=True),
    "auroc": lambda p, y, mask: metrics.auroc(p[..., 0], p[:3, :, 1], mask_in=mask, mask_out=mask[:3]),
    "risk_coverage_area": lambda p, y, mask: metrics.risk_coverage_area(p.amax(-1), p.argmax(-1) == y, mask),
    "maximum_calibration_error": metrics.maximum_calibration_error,
    "reliability_curve": lambda p, y, mask: torch.cat(metrics.reliability_curve(p, y, mask)),
    "adaptive reliability_curve": lambda p, y, mask: torch.cat(metrics.reliability_curve(p, y, mask, equal_mass=True)),
}
PIT = {
    "calibration_curve": lambda p, y, mask: metrics.calibration_curve(pit(p, y), mask, levels=LEVELS),
    "central_coverage_curve": lambda p, y, mask: metrics.central_coverage_curve(pit(p, y), mask, levels=LEVELS),
    "calibration_error": lambda p, y, mask: metrics.calibration_error(pit(p, y), mask),
    "pit_histogram": lambda p, y, mask: metrics.pit_histogram(pit(p, y), mask)[0],
}
PER_TASK = REGRESSION | CLASSES
EVERY = PER_TASK | POOLED_CLASSES | PIT


def pit(p, y):
    broken = p.isnan().any(0) | y.isnan()
    below, at = ((p < y).to(p).mean(0), (p <= y).to(p).mean(0))
    return torch.where(broken, torch.nan, randomized_pit(below, at, torch.full_like(at, 0.5)))


def scene(name, *, seed=0):
    """Predictions, targets and a mask with a full row, padded ones and an empty one, as ``name`` takes them."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([N, 5, 1, 0, 7, 3])
    mask = torch.arange(N) < counts[:, None]
    if name in CLASSES or name in POOLED_CLASSES:
        probs = (2 * torch.randn(T, N, C, generator=generator)).softmax(-1)
        return probs, torch.randint(C, (T, N), generator=generator), mask
    return torch.randn(S, T, N, generator=generator), torch.randn(T, N, generator=generator), mask


def padded(p, y, mask, fill):
    """The same with ``fill`` in the padding; labels, which are integers, take -100 for what is none."""
    label = fill if y.is_floating_point() else int(fill) if math.isfinite(fill) else -100
    points = mask[..., None] if p.shape[:2] == mask.shape else mask
    return torch.where(points, p, fill), torch.where(mask, y, label), mask


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("fill", [1e6, -1e6, torch.nan, torch.inf])
@pytest.mark.parametrize("name", EVERY)
def test_padding_changes_nothing_to_the_last_bit(name, fill):
    p, y, mask = scene(name)
    assert same_bits(EVERY[name](*padded(p, y, mask, fill)), EVERY[name](p, y, mask))


@pytest.mark.parametrize("name", EVERY)
def test_a_point_outside_the_padding_does_count(name):
    p, y, mask = scene(name)
    changed = []
    for task, point in (~mask).nonzero().tolist():
        more = mask.clone()
        more[task, point] = True
        changed.append(not same_bits(EVERY[name](p, y, more), EVERY[name](p, y, mask)))
    assert any(changed)


@pytest.mark.parametrize("name", PER_TASK)
def test_a_task_without_points_is_nan_and_left_out(name):
    p, y, mask = scene(name)
    score = PER_TASK[name](p, y, mask)
    assert score.shape == (T,) and score.isnan().tolist() == [False, False, False, True, False, False]
    assert bootstrap_interval(score) == bootstrap_interval(score[[0, 1, 2, 4, 5]])


@pytest.mark.parametrize("name", PER_TASK)
def test_tasks_do_not_see_each_other(name):
    p, y, mask = scene(name)
    alone = PER_TASK[name](p[1:2] if p.shape[:2] == (T, N) else p[:, 1:2], y[1:2], mask[1:2])
    torch.testing.assert_close(alone, PER_TASK[name](p, y, mask)[1:2])


@pytest.mark.parametrize("name", POOLED_CLASSES | PIT)
def test_without_any_point_there_is_no_score(name):
    p, y, mask = scene(name)
    if "curve" in name and name in POOLED_CLASSES:
        r = metrics.reliability_curve(p, y, torch.zeros_like(mask), equal_mass="adaptive" in name)
        assert r.confidence.isnan().all() and r.accuracy.isnan().all() and not r.counts.any() and r.edges.isfinite().all()
    else:
        assert EVERY[name](p, y, torch.zeros_like(mask)).isnan().all()


def broken(name):
    """A scene whose second task has NaN in its first prediction."""
    p, y, mask = scene(name)
    p[(1, 0) if p.shape[:2] == (T, N) else (slice(None), 1, 0)] = torch.nan
    return p, y, mask


@pytest.mark.parametrize("name", ["rmse", "crps", "crps of an ensemble", "crps_normal", "interval_width", "brier"])
def test_nan_at_a_point_makes_its_task_nan_and_no_other(name):
    p, y, mask = scene(name)
    expected, got = PER_TASK[name](p, y, mask), PER_TASK[name](*broken(name))
    assert got[1].isnan()
    others = [0, 2, 3, 4, 5]
    assert same_bits(got[others], expected[others])


@pytest.mark.parametrize("name", ["interval_coverage", "accuracy"])
def test_nan_at_a_point_is_a_miss(name):
    p, y, mask = broken(name)
    without = mask.clone()
    without[1, 0] = False
    hits = PER_TASK[name](p, y, without)[1] * 4  # of the task's 5 points
    assert PER_TASK[name](p, y, mask)[1] == pytest.approx(float(hits) / 5)


@pytest.mark.parametrize("name", [
    "expected_calibration_error", "adaptive", "debiased", "debiased and squared", "maximum_calibration_error", "calibration_error",
    "auroc", "risk_coverage_area",
])  # fmt: skip
def test_nan_at_a_point_makes_a_pooled_error_nan(name):
    assert EVERY[name](*scene(name)).isfinite() and EVERY[name](*broken(name)).isnan()


@pytest.mark.parametrize("label", [0, 1])
def test_nan_among_the_probabilities_is_never_right(label):
    probs = torch.tensor([[[torch.nan, 0.4], [0.4, torch.nan]]])
    assert metrics.accuracy(probs, torch.full((1, 2), label), torch.ones(1, 2).bool()).item() == 0


def test_every_public_name_is_there():
    assert sorted(metrics.__all__) == list(metrics.__all__) and all(hasattr(metrics, name) for name in metrics.__all__)
