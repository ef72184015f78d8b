import numpy as np
import pytest

from bayesmeta.plots import shrinkage
from bayesmeta.plots.shrinkage import shrinkage_positions

RNG = np.random.default_rng(0)
SIZES = np.array([1, 1, 1, 2, 2, 5, 10, 40, 100])
ALONE = RNG.normal(size=9)
PARTIAL = ALONE * SIZES / (SIZES + 3)


def drawn(ax):
    """Hollow dots, triangles up, triangles down, filled dots; the complete-pooling line."""
    line, *dots = ax.lines
    return [dot.get_xydata() for dot in dots], line.get_ydata()[0]


def test_the_numbers_drawn_are_the_numbers():
    (hollow, up, down, filled), everyone = drawn(shrinkage(ALONE, PARTIAL, 0.25, SIZES))
    assert np.array_equal(hollow[:, 1], ALONE) and np.array_equal(filled[:, 1], PARTIAL) and everyone == 0.25
    assert np.array_equal(hollow[:, 0], filled[:, 0]) and not len(up) and not len(down)


def test_a_line_joins_each_task_with_itself():
    ax = shrinkage(ALONE, PARTIAL, 0.0, SIZES)
    ends = np.array([segment[:, 1] for segment in ax.collections[0].get_segments()])
    assert np.array_equal(ends, np.stack([ALONE, PARTIAL], 1))


def test_tasks_stand_at_their_size_spread_a_little():
    x, by_size = shrinkage_positions(SIZES, ALONE)
    assert by_size and (np.abs(np.log2(x / SIZES)) <= 0.16).all()
    assert len(set(x)) == len(x)
    assert shrinkage(ALONE, PARTIAL, 0.0, SIZES).get_xscale() == "log"


def test_a_task_without_points_has_its_own_place():
    sizes = np.where(SIZES == 1, 0, SIZES)
    ax = shrinkage(ALONE, PARTIAL, 0.0, sizes)
    labels = dict(zip((tick.get_text() for tick in ax.get_xticklabels()), ax.get_xticks(), strict=True))
    assert (labels["0"] < labels["2"] < labels["10"] and "1" not in labels) or labels["0"] < labels["1"]


def test_equal_sizes_go_by_rank():
    x, by_size = shrinkage_positions(np.full(9, 5), ALONE)
    assert (
        not by_size
        and np.array_equal(np.sort(x), np.arange(1, 10))
        and np.array_equal(ALONE[np.argsort(x)], np.sort(ALONE))
    )
    assert "rank" in shrinkage(ALONE, PARTIAL, 0.0, np.full(9, 5)).get_xlabel()


def test_what_lies_far_out_becomes_a_triangle_at_the_edge():
    alone = np.concatenate([RNG.normal(size=98), [1e6, -1e6]])
    ax = shrinkage(alone, alone.clip(-2, 2), 0.0, np.arange(1, 101))
    (_, up, down, _), _ = drawn(ax)
    assert [line.get_marker() for line in ax.lines[1:]] == ["o", "^", "v", "o"]
    low, high = ax.get_ylim()
    assert high < 10 and low > -10 and (up[:, 1] == high).all() and (down[:, 1] == low).all()
    assert up[:, 0].max() / 0.99 >= 99 and "beyond the axis" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_complete_pooling_may_come_once_a_task():
    (_, everyone) = drawn(shrinkage(ALONE, PARTIAL, np.full(9, 0.5), SIZES))
    assert everyone == 0.5


def test_different_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"\(9,\), \(8,\) and \(9,\)"):
        shrinkage(ALONE, PARTIAL[:-1], 0.0, SIZES)
