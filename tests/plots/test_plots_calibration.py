import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from bayesmeta import metrics
from bayesmeta.plots import calibration_curve, calibration_grid, coverage, pit_grid, pit_heights, pit_histogram
from bayesmeta.plots.style import looks

RNG = np.random.default_rng(0)
RAGGED = RNG.random((12, 8))
RAGGED[3, 5:] = RAGGED[7, 2:] = np.nan
EDGES = np.where(RNG.random((12, 8)) < 0.5, 0.05, 0.95) * np.ones((12, 8))  # every target far out in a tail


def curve_of(ax, index=1):  # line 0 is the diagonal
    return ax.lines[index].get_xdata(), ax.lines[index].get_ydata()


@pytest.mark.parametrize(("kind", "oracle"), [("central", "central_coverage_curve"), ("quantile", "calibration_curve")])
def test_coverage_is_that_of_metrics(kind, oracle):
    pit = torch.as_tensor(RAGGED)
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)
    tasks = [getattr(metrics, oracle)(task[None], ~task[None].isnan(), levels=levels) for task in pit]
    np.testing.assert_allclose(coverage(RAGGED, kind=kind).observed, torch.stack(tasks).mean(0), atol=1e-15)


def test_a_task_with_many_points_counts_as_much_as_any_other():
    few, many = np.full((1, 100), np.nan), np.full((1, 100), 0.5)
    few[0, :2] = 0.99
    assert coverage(np.concatenate([few, many]), levels=np.array([0.5])).observed == pytest.approx(0.5)


def test_the_band_resamples_tasks_not_points():
    alike = np.repeat(RNG.random((30, 1)), 200, axis=1)  # one number a task: the points say nothing more
    band = coverage(alike, levels=np.array([0.5]))
    by_task = torch.as_tensor((np.abs(alike[:, 0] - 0.5) <= 0.25).astype(float))
    interval = metrics.bootstrap_interval(by_task)
    assert (band.lower[0], band.upper[0]) == pytest.approx((interval.lower, interval.upper), abs=1e-12)


def test_the_numbers_drawn_are_the_numbers():
    ax, numbers = calibration_curve({"a": RAGGED, "b": EDGES}), coverage(EDGES)
    x, y = curve_of(ax, 2)
    assert np.array_equal(x, numbers.levels) and np.array_equal(y, numbers.observed)
    band = ax.collections[1].get_paths()[0].vertices
    assert {*numbers.lower.round(12), *numbers.upper.round(12)} <= set(band[:, 1].round(12))


def test_overconfidence_lies_below_the_diagonal_and_the_corner_says_so():
    ax = calibration_curve(EDGES, ax=Figure().subplots())
    x, y = curve_of(ax)
    assert (y[1:-4] < x[1:-4]).all()
    words = {text.get_text(): text.get_position() for text in ax.texts}
    assert words["overconfident"][0] > 0.5 > words["overconfident"][1]
    assert words["underconfident"][0] < 0.5 < words["underconfident"][1]


def test_a_point_without_prediction_is_covered_by_nothing():
    failed = RAGGED.copy()
    failed[0, 0] = np.inf
    assert coverage(failed).observed[-1] == pytest.approx((11 + 7 / 8) / 12)  # one of the 8 points of one of 12 tasks


def test_nan_is_padding_and_no_point():
    padded = np.concatenate([RAGGED, np.full((12, 3), np.nan)], axis=1)
    assert np.array_equal(coverage(padded).observed, coverage(RAGGED).observed)


def test_colours_follow_the_look_that_is_given():
    look = looks("xyz")
    ax = calibration_curve({"z": RAGGED}, look=look)
    assert ax.lines[1].get_color() == look["z"].colour


def test_grid_names_every_learner_and_shows_the_others_in_grey():
    axes = calibration_grid({"a": RAGGED, "$b$": EDGES}, notes={"a": "a note"})
    assert [ax.get_title("left") for ax in axes] == ["a", r"\$b\$"]
    assert [len(ax.lines) for ax in axes] == [3, 3]
    assert np.array_equal(axes[0].lines[0].get_ydata(), coverage(EDGES).observed)
    assert "a note" in [text.get_text() for text in axes[0].texts]


def test_wrong_kind_or_no_point_is_an_error():
    with pytest.raises(ValueError, match=r"central.*quantile.*'middle'"):
        coverage(RAGGED, kind="middle")
    with pytest.raises(ValueError, match="no point"):
        coverage(np.full((2, 3), np.nan))


def test_histogram_heights_and_band_are_those_of_metrics():
    numbers = pit_heights(RAGGED, bins=5)
    pit = torch.as_tensor(RAGGED)
    expected, edges = metrics.pit_histogram(pit, ~pit.isnan(), bins=5)
    assert np.array_equal(numbers.heights, expected) and np.array_equal(numbers.edges, edges)
    assert (numbers.lower, numbers.upper) == metrics.pit_band(numbers.points, 5)
    ax = pit_histogram(RAGGED, bins=5)
    assert [bar.get_height() for bar in ax.patches[:5]] == pytest.approx(list(numbers.heights))


def test_failed_points_stand_in_no_bar_but_in_the_total():
    assert pit_heights(np.array([0.5, 0.5, 0.5, np.inf]), bins=2).heights.sum() == pytest.approx(2 * 3 / 4)


def test_bars_over_the_ceiling_tell_their_height():
    ax = pit_histogram(EDGES, bins=10, ceiling=3)
    tall = [f"{h:.1f}" for h in pit_heights(EDGES).heights if h > 3]
    assert tall and [text.get_text() for text in ax.texts] == tall
    assert ax.get_ylim() == (0, 3)


def test_histograms_of_a_grid_share_one_scale():
    axes = pit_grid({"a": RAGGED, "b": EDGES})
    assert axes[0].get_ylim() == axes[1].get_ylim() == (0, 4)


def test_histogram_without_points_or_bins_is_an_error():
    with pytest.raises(ValueError, match="no point"):
        pit_heights(np.full(3, np.nan))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        pit_heights(RAGGED, bins=1)
