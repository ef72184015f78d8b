"""Intervals by resampling tasks: the resamples written out, scipy's bootstrap, coverage, pairing, what is not a number."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from bayesmeta.metrics import Interval, bootstrap_interval, bootstrap_statistic, paired_difference, task_mean

CASES = 200


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(values):
    return values.mean()


def resampled_means(values, *, resamples, seed):
    """The resamples written out: all indices in one draw, one mean after the other."""
    index = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    return np.array([values.numpy()[i].mean() for i in index.numpy()])


def assert_nan(interval):
    assert all(math.isnan(number) for number in interval) and not interval.excludes_zero


def test_interval_is_that_of_resamples_written_out():
    for case in range(CASES):
        values, level = normal(1 + case % 50, seed=case) + 1, (0.5, 0.9, 0.95)[case % 3]
        means = resampled_means(values, resamples=100, seed=case)
        expected = [values.mean(), *np.quantile(means, [(1 - level) / 2, (1 + level) / 2])]
        got = bootstrap_interval(values, level=level, resamples=100, seed=case)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        looped = bootstrap_statistic(mean, values, level=level, resamples=100, seed=case)
        np.testing.assert_allclose(got, looped, rtol=0, atol=1e-12)


def test_resamples_drawn_in_several_blocks_are_the_same():
    values = normal(1000)
    expected = np.quantile(resampled_means(values, resamples=2000, seed=3), [0.025, 0.975])
    np.testing.assert_allclose(bootstrap_interval(values, seed=3)[1:], expected, rtol=0, atol=1e-12)


def test_interval_is_that_of_scipy_up_to_the_luck_of_resampling():
    for case in range(3):
        values = normal(30, seed=case).exp()
        theirs = scipy.stats.bootstrap((values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=case).confidence_interval
        ours = bootstrap_interval(values, resamples=20_000)
        width = theirs.high - theirs.low
        assert ours.lower == pytest.approx(theirs.low, abs=0.03 * width) and ours.upper == pytest.approx(theirs.high, abs=0.03 * width)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_covers_the_truth_about_as_often_as_it_says(level):
    covered = 0
    for case in range(400):
        found = bootstrap_interval(normal(50, seed=case) + 3, level=level, resamples=400)
        covered += found.lower <= 3 <= found.upper
    assert covered / 400 == pytest.approx(level - 0.01, abs=0.05 if level == 0.5 else 0.03)


def test_same_seed_same_interval_and_the_global_stream_stays():
    values = normal(40)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = bootstrap_interval(values), bootstrap_statistic(mean, values, resamples=50), paired_difference(values, values.flip(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert first == (
        bootstrap_interval(values), bootstrap_statistic(mean, values, resamples=50), paired_difference(values, values.flip(0)),
    )  # fmt: skip
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_paired_is_narrower_than_unpaired_where_tasks_differ_more_than_learners():
    difficulty = 3 * normal(100)
    a, b = difficulty + 0.3 * normal(100, seed=1) + 0.2, difficulty + 0.3 * normal(100, seed=2)
    paired = paired_difference(a, b)
    alone = bootstrap_interval(a), bootstrap_interval(b)
    unpaired = math.hypot(*(each.upper - each.lower for each in alone))
    assert paired.upper - paired.lower < unpaired / 5
    assert paired.excludes_zero and alone[0].lower < alone[1].upper
    assert paired.estimate == pytest.approx((a - b).mean().item(), abs=1e-12)
    assert paired == bootstrap_interval(a - b)


def test_tasks_of_several_arrays_are_drawn_together():
    a = normal(20) ** 2 + 1
    ratio = bootstrap_statistic(lambda x, y: y.sum() / x.sum(), a, 2 * a, resamples=50)
    np.testing.assert_allclose(ratio, 2, rtol=0, atol=1e-12)
    apart = bootstrap_statistic(lambda x, y: y.sum() / x.sum(), a, 2 * a.flip(0), resamples=50)
    assert apart.lower < 2 - 0.01 and apart.upper > 2 + 0.01


def test_a_statistic_of_pooled_points():
    values, mask = normal(15, 6), torch.rand(15, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    index = torch.randint(15, (80, 15), generator=torch.Generator().manual_seed(4))
    expected = np.quantile([values[i][mask[i]].std().item() for i in index], [0.05, 0.95])
    got = bootstrap_statistic(lambda v, m: v[m].std(), values, mask, level=0.9, resamples=80, seed=4)
    assert got.estimate == pytest.approx(values[mask].std().item(), abs=1e-12)
    np.testing.assert_allclose(got[1:], expected, rtol=0, atol=1e-12)


def test_tasks_without_points_are_left_out():
    values = normal(30)
    holed = torch.cat([values[:10], torch.tensor([torch.nan]), values[10:], torch.tensor([torch.nan])])
    assert bootstrap_interval(holed) == bootstrap_interval(values)
    other = normal(32, seed=1)
    other[3] = torch.nan
    both = ~(holed.isnan() | other.isnan())
    assert both.sum() == 29
    assert paired_difference(holed, other) == bootstrap_interval((holed - other)[both])


def test_nothing_to_average_is_nan():
    nothing = torch.full((3,), torch.nan)
    assert_nan(bootstrap_interval(nothing))
    assert_nan(bootstrap_interval(torch.empty(0)))
    assert_nan(paired_difference(torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 1.0])))
    assert_nan(bootstrap_statistic(mean, torch.empty(0, 3)))


def test_a_statistic_that_is_nan_is_not_rescued_by_resamples_that_miss_the_task():
    values = torch.tensor([1.0, 2.0, torch.nan])
    assert_nan(bootstrap_statistic(mean, values))


def test_resamples_without_a_value_are_left_out():
    values = normal(20)
    values += 0.2 - values.mean()
    logs = torch.from_numpy(resampled_means(values, resamples=200, seed=1)).log()  # NaN where a resample's mean is negative
    assert 10 < logs.isnan().sum() < 100
    found = bootstrap_statistic(lambda v: v.mean().log(), values, resamples=200, seed=1)
    np.testing.assert_allclose(found, [math.log(0.2), *np.nanquantile(logs, [0.025, 0.975])], rtol=0, atol=1e-12)


def test_an_infinitely_bad_task_shows():
    values = torch.cat([normal(9), torch.tensor([torch.inf])])
    found = bootstrap_interval(values)
    assert found.estimate == found.upper == math.inf and math.isfinite(found.lower)
    other = normal(10, seed=1)
    assert paired_difference(other, values).estimate == paired_difference(other, values).lower == -math.inf
    assert_nan(paired_difference(values, values.roll(0)))
    assert bootstrap_interval(torch.full((4,), torch.inf)) == (math.inf, math.inf, math.inf)


def test_one_task_has_no_spread():
    assert bootstrap_interval(torch.tensor([2.5])) == (2.5, 2.5, 2.5)


def test_numbers_as_a_report_holds_them():
    values = normal(20)
    array = values.numpy().copy()
    array.flags.writeable = False
    assert bootstrap_interval(array) == bootstrap_interval(values.tolist()) == bootstrap_interval(values)
    assert paired_difference(array, values).estimate == 0
    assert bootstrap_interval(values.clone().requires_grad_()) == bootstrap_interval(values)
    assert bootstrap_statistic(mean, values.clone().requires_grad_(), resamples=5) == bootstrap_statistic(mean, values, resamples=5)


def test_means_of_single_precision_are_taken_in_double():
    values = torch.tensor([2.0**24, 1.0, 1.0, 1.0])
    assert bootstrap_interval(values).estimate == (2**24 + 3) / 4


@pytest.mark.parametrize(("ends", "outside"), [
    ((1.0, 2.0), True), ((-2.0, -1.0), True), ((-1.0, 1.0), False), ((0.0, 1.0), False), ((-1.0, 0.0), False),
    ((math.nan, math.nan), False),
])  # fmt: skip
def test_excludes_zero(ends, outside):
    assert Interval(0.5, *ends).excludes_zero is outside


def test_task_mean_by_a_loop():
    for case in range(CASES):
        values = normal(4, 6, seed=case)
        mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(case)) < 0.5
        for task, got in enumerate(task_mean(values, mask)):
            real = values[task, mask[task]].tolist()
            expected = sum(real) / len(real) if real else math.nan
            assert got.item() == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("call", [
    bootstrap_interval, lambda v, **kw: paired_difference(v, v, **kw), lambda v, **kw: bootstrap_statistic(mean, v, **kw),
])  # fmt: skip
def test_errors_of_numbers(call):
    for level in (0.0, 1.0, -0.1, 95):
        with pytest.raises(ValueError, match=f"level: expected a number between 0 and 1, got {level}"):
            call(normal(5), level=level)
    with pytest.raises(ValueError, match="resamples: expected at least 1, got 0"):
        call(normal(5), resamples=0)


def test_errors_of_shapes():
    values = normal(5)
    with pytest.raises(ValueError, match=r"expected one value a task \(T,\), got shape \(5, 2\)"):
        bootstrap_interval(normal(5, 2))
    with pytest.raises(ValueError, match=r"expected one value a task \(T,\), got shape \(1, 5\)"):
        paired_difference(values[None], values[None])
    with pytest.raises(ValueError, match=r"expected values of the same tasks, got shapes \(5,\) and \(4,\)"):
        paired_difference(values, values[1:])
    with pytest.raises(ValueError, match=r"expected one or more arrays of the same tasks, got lengths \[5, 4\]"):
        bootstrap_statistic(mean, values, values[1:])
    with pytest.raises(ValueError, match=r"expected one or more arrays of the same tasks, got lengths \[\]"):
        bootstrap_statistic(mean)
    with pytest.raises(ValueError, match=r"expected values and a bool mask of one shape, got \(2, 3\) and torch.bool \(2, 1\)"):
        task_mean(torch.zeros(2, 3), torch.ones(2, 1).bool())
    with pytest.raises(ValueError, match=r"got \(2, 3\) and torch.float32 \(2, 3\)"):
        task_mean(torch.zeros(2, 3), torch.ones(2, 3))
