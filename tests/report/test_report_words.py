import numpy as np
import pytest

from bayesmeta.plots.formats import decimals, number
from bayesmeta.report.measures import in_order, measure
from bayesmeta.report.words import amount, duration, nearest, per_task, several


@pytest.mark.parametrize(
    ("halves", "places"), [([0.12, 0.2], 2), ([0.012], 3), ([12.0], 0), ([np.nan], 2), ([1e-16], 2), ([1e-9], 2)]
)
def test_two_digits_of_the_half_width(halves, places):
    assert decimals([1.5] * len(halves), halves) == places


def test_numbers_stay_readable():
    assert number(1.23456, 2) == "1.23" and number(1.2e9, 2) == "1.2e+09"
    assert number(np.nan, 2) == "nan" and number(-np.inf, 2) == "-inf"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0123, "12.3 ms"), (7.5, "7.5 s"), (200, "3 min"), (9000, "2.5 h"), (np.nan, "-")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_amounts_and_lists():
    assert [amount(v) for v in (5, 7400.4, 2.5, np.nan)] == ["5", "7,400", "2.5", "-"]
    assert several(["a"]) == "a" and several(["a", "b", "c"]) == "a, b and c"
    assert per_task(np.array([5, 5])) == "5 a task" and per_task(np.array([1, 4, 9])) == "1 to 9 a task, median 4"


def test_nearest_or_all():
    assert nearest("calib", ["calibration", "pit"]) == "; did you mean 'calibration'?"
    assert nearest("zzz", ["a", "b"]) == "; known are 'a', 'b'"


def test_measures_know_their_goal():
    assert measure("nll").better == -1 and measure("accuracy").better == 1
    assert measure("coverage95").nominal == 0.95 and measure("coverage95").label == "95% coverage"
    assert measure("width90").better == 0 and measure("width90").nominal is None
    assert measure("something").label == "something"
    assert in_order({"zeta", "width90", "coverage90", "crps", "nll"}) == [
        "nll",
        "crps",
        "coverage90",
        "width90",
        "zeta",
    ]
