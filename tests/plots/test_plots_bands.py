from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bayesmeta.plots import bands_grid, predictive_bands
from bayesmeta.plots.bands import BAND50, BAND90, band_limits, discrete_values
from bayesmeta.plots.style import PALETTE, tint


def curves(grid, mean=None, sd=1.0, draws=3):
    grid = np.asarray(grid, dtype=float)
    mean = np.sin(grid) if mean is None else np.broadcast_to(mean, grid.shape).astype(float)
    ends = {"lower50": -0.7, "upper50": 0.7, "lower90": -1.6, "upper90": 1.6}
    return SimpleNamespace(
        grid=grid,
        mean=mean,
        draws=np.stack([mean + i for i in range(draws)]),
        **{k: mean + s * sd for k, s in ends.items()},
    )


def band(grid, xs, ys, name="task", n=2, **options):
    xs, ys = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    c = curves(grid, **options)
    return SimpleNamespace(
        name=name, before=c, after=c, support_x=xs[:n], support_y=ys[:n], query_x=xs[n:], query_y=ys[n:]
    )


SMOOTH, FLOOR = np.linspace(-2, 2, 30), [0.0, 1.0]


def lines_with(ax, marker):
    return [line for line in ax.lines if line.get_marker() == marker]


def test_bands_mean_and_draws_are_the_numbers():
    c = curves(SMOOTH)
    ax = predictive_bands(c, num_draws=2)
    for collection, lower, upper in zip(ax.collections, (c.lower90, c.lower50), (c.upper90, c.upper50), strict=True):
        heights = collection.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (lower.min(), upper.max())
    assert [np.array_equal(line.get_ydata(), want) for line, want in zip(ax.lines, [*c.draws[:2], c.mean], strict=True)]
    assert len(ax.lines) == 3 and np.array_equal(ax.lines[-1].get_ydata(), c.mean)
    assert [to_hex(one.get_facecolor()[0]) for one in ax.collections] == [tint(PALETTE[0], s) for s in (BAND90, BAND50)]


def test_support_is_filled_and_query_hollow_at_their_places():
    seen, unseen = (np.array([0.1, 0.5]), np.array([1.0, 2.0])), (np.array([-1.0]), np.array([3.0]))
    ax = predictive_bands(curves(SMOOTH), support=seen, query=unseen, ax=Figure().subplots())
    query, support = lines_with(ax, "o")
    assert np.array_equal(support.get_xydata(), np.stack(seen, 1)) and support.get_markerfacecolor() != "white"
    assert np.array_equal(query.get_xydata(), np.stack(unseen, 1)) and query.get_markerfacecolor() == "white"


def test_two_values_are_bars_with_points_spread_over_them():
    c = curves(FLOOR, mean=[1.5, 0.8])
    ax = predictive_bands(c, support=(np.zeros(30), np.zeros(30)))
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches]
    wide = [(x, c.lower90[i], c.upper90[i]) for i, x in enumerate(FLOOR)]
    narrow = [(x, c.lower50[i], c.upper50[i]) for i, x in enumerate(FLOOR)]
    np.testing.assert_allclose(bars, wide + narrow)
    tints = [tint(PALETTE[0], strength) for strength in (BAND90, BAND90, BAND50, BAND50)]
    assert [to_hex(bar.get_facecolor()) for bar in ax.patches] == tints
    (points,) = lines_with(ax, "o")
    x = points.get_xdata()
    assert len(set(x)) == 30 and np.abs(x).max() < 0.4 * 0.5  # apart, and well inside the bar
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1"]
    assert ax.get_ylim()[0] < c.lower90.min() and ax.get_ylim()[1] > c.upper90.max()


def test_a_dense_grid_is_read_at_the_values_of_a_discrete_input():
    c = curves(np.linspace(0, 1, 50), mean=np.linspace(3, 5, 50))
    ax = predictive_bands(c, values=np.array(FLOOR))
    assert [bar.get_y() for bar in ax.patches[:2]] == pytest.approx([3 - 1.6, 5 - 1.6])


def test_a_learner_without_prediction_says_so():
    ax = predictive_bands(curves(SMOOTH, mean=np.nan))
    assert [text.get_text() for text in ax.texts] == ["no prediction"] and not ax.lines
    ax.figure.draw_without_rendering()


def test_discrete_inputs_are_judged_by_all_tasks_together():
    dense = np.linspace(0, 1, 40)
    both = [band(dense, [0, 0, 0, 0], [1, 2, 3, 4]), band(dense, [1, 0, 1, 1], [1, 2, 3, 4])]
    assert np.array_equal(discrete_values(both), FLOOR)
    assert discrete_values(both[:1]) is None  # one value alone: nothing to stand side by side
    assert discrete_values([band(dense, [0, 1], [1, 2])]) is None  # two points share few values by chance
    assert discrete_values([band(dense, np.linspace(0, 1, 30), np.zeros(30))]) is None
    assert np.array_equal(discrete_values([band(FLOOR, [0], [1])]), FLOOR)


def test_limits_show_all_points_and_no_endless_band():
    low, high = band_limits([band(SMOOTH, [0, 1, 2], [-3, 0, 3]), band(SMOOTH, [0], [0], sd=1000)])
    assert low < -3 and high > 3 and high - low < 6 * 3
    low, high = band_limits([band(SMOOTH, [0], [np.nan], sd=2)])
    assert np.isfinite([low, high]).all()


def test_grid_has_a_row_a_learner_and_before_stands_first():
    rows = {"a": [band(SMOOTH, [0, 1, 2], [1, 2, 3], name="A$")], "b": [band(SMOOTH, [0, 1, 2], [1, 2, 3])]}
    before = rows["a"][0].before = curves(SMOOTH, mean=0.5)
    axes = bands_grid(rows, x="dose", y="reply")
    assert [len(row) for row in axes] == [2, 2]
    assert axes[0][0].get_title("left") == "before any data" and axes[0][1].get_title("left") == r"A\$, n = 2"
    assert [row[0].get_ylabel() for row in axes] == ["a", "b"]
    assert not lines_with(axes[0][0], "o") and len(lines_with(axes[0][1], "o")) == 2
    assert len({ax.get_ylim() for row in axes for ax in row}) == 1
    assert np.array_equal(axes[0][0].lines[-1].get_ydata(), before.mean)
    assert np.array_equal(axes[0][1].lines[-3].get_ydata(), rows["a"][0].after.mean)  # under query and support
    assert axes[0][0].figure.get_supxlabel() == "dose" and axes[0][0].figure.get_supylabel() == "reply"


def test_grid_needs_the_same_tasks_of_every_learner():
    one = band(SMOOTH, [0, 1], [1, 2])
    with pytest.raises(ValueError, match=r"'a': 1, 'b': 2"):
        bands_grid({"a": [one], "b": [one, one]})
    with pytest.raises(ValueError, match="at least one"):
        bands_grid({"a": []})
