import numpy as np
import pytest

from bayesmeta.plots import loss_curve, running_median

STEP = np.arange(200.0)
LOSS = 1 + np.exp(-STEP / 30) + np.random.default_rng(0).normal(0, 0.05, 200)


def test_running_median_is_a_median_of_neighbours():
    values = np.array([5.0, 1, 9, np.nan, 3, 100])
    assert np.array_equal(running_median(values, 3), [range(6), [3, 5, 5, 6, 51.5, 51.5]])
    assert np.array_equal(running_median(values, 1)[1], values, equal_nan=True)


def test_a_long_history_has_its_median_at_evenly_spread_steps():
    values = np.random.default_rng(0).normal(size=10_000)
    places, medians = running_median(values, 101, most=50)
    assert len(places) == 50 and places[0] == 0 and places[-1] == 9_999
    assert medians[7] == np.median(values[places[7] - 50 : places[7] + 51])


def test_the_numbers_drawn_are_the_numbers():
    ax = loss_curve(STEP, LOSS, validation_step=STEP[::50], validation=LOSS[::50], window=5)
    pale, bold, dots = ax.lines
    assert np.array_equal(pale.get_xydata(), np.stack([STEP, LOSS], 1))
    assert np.array_equal(bold.get_ydata(), running_median(LOSS, 5)[1])
    assert np.array_equal(dots.get_xydata(), np.stack([STEP[::50], LOSS[::50]], 1))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["running median", "each step", "validation"]


def test_what_is_not_finite_leaves_a_gap():
    loss = LOSS.copy()
    loss[[3, 50]] = np.nan, np.inf
    pale = loss_curve(STEP, loss).lines[0].get_ydata()
    assert np.isnan(pale[[3, 50]]).all() and np.isfinite(np.delete(pale, [3, 50])).all()


def test_a_few_wild_steps_do_not_flatten_the_rest():
    loss = LOSS.copy()
    loss[0] = 1e9
    low, high = loss_curve(STEP, loss).get_ylim()
    assert low < LOSS.min() and 1.5 < high < 3


def test_validation_is_always_in_view():
    assert loss_curve(STEP, LOSS, validation_step=[0], validation=[50.0]).get_ylim()[1] > 50


def test_one_step_nothing_finite_and_nothing_at_all_can_be_drawn():
    for step, loss in (([1], [2.0]), ([1, 2], [np.nan, np.nan]), ([], [])):
        loss_curve(step, loss).figure.draw_without_rendering()


def test_different_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"\(200,\) and \(199,\)"):
        loss_curve(STEP, LOSS[:-1])
    with pytest.raises(ValueError, match=r"validation.*\(2,\) and \(0,\)"):
        loss_curve(STEP, LOSS, validation_step=[1, 2])
