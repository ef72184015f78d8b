from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from bayesmeta.plots import explained_draws, explained_grid, explained_key, looks
from bayesmeta.plots.explanations import explained_limits, name_places

GRID = np.linspace(-5, 5, 41)
SINE, LINE = 3 * np.sin(GRID), 0.5 * GRID


def task(draws, name="task 4"):
    explanations = [
        SimpleNamespace(name="sine", probability=0.4, curve=SINE),
        SimpleNamespace(name="line$", probability=0.6, curve=LINE),
    ]
    after = SimpleNamespace(grid=GRID, draws=np.asarray(draws, dtype=float))
    points = {"support_x": np.array([0.0, 3.0]), "support_y": np.array([0.0, 1.0])}
    return SimpleNamespace(name=name, after=after, explanations=explanations, **points)


def test_draws_below_explanations_below_points():
    one = task([GRID, -GRID, GRID**2])
    ax = explained_draws(one.after, one.explanations, support=([0.0], [1.0]), num_draws=2, colour="#123456", ax=Figure().subplots())
    first, second, sine, line, points = ax.lines
    assert [np.array_equal(a.get_ydata(), b) for a, b in ((first, GRID), (second, -GRID), (sine, SINE), (line, LINE))] == [True] * 4
    assert first.get_color() == "#123456" and sine.is_dashed() and not first.is_dashed()
    assert first.get_zorder() < sine.get_zorder() < points.get_zorder() and list(points.get_ydata()) == [1.0]
    assert [text.get_text() for text in ax.texts] == ["sine", r"line\$"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(explained_key("red"))


def test_names_stand_where_the_curves_part_and_on_the_far_side():
    high, low = name_places([np.array([0, 0, 0, 0, 0, 2.0, 0]), np.zeros(7)])
    assert high == (5, True) and low == (5, False)
    assert name_places([SINE]) == [(20, True)]


def test_limits_hold_explanations_and_no_wild_draw():
    low, high = explained_limits([task([1e6 * GRID]), task([GRID])])
    assert low < -3 and high > 3 and high - low < 4 * 6
    calm = explained_limits([task([GRID / 2])])
    assert calm[0] > low and calm[1] < high
    assert np.isfinite(explained_limits([task(np.full((2, 41), np.nan))])).all()


def test_a_row_a_task_and_a_panel_a_learner():
    rows = {"a": [task([GRID]), task([SINE], "task 9")], "b": [task([LINE]), task([SINE, LINE], "task 9")]}
    axes = explained_grid(rows, x="dose", y="reply", notes={"a": "both in 12%"})
    assert len(axes) == 4 and len({id(ax.figure) for ax in axes}) == 1
    for ax, draws in zip(axes, ([GRID], [LINE], [SINE], [SINE, LINE]), strict=True):
        assert all(np.array_equal(line.get_ydata(), draw) for line, draw in zip(ax.lines, draws, strict=False))
        assert len(ax.lines) == len(draws) + 3
    assert [ax.get_title("left") for ax in axes] == ["a", "b", "", ""]
    assert axes[0].get_ylabel() == "task 4\nsine 40%, line\\$ 60%" and axes[2].get_ylabel().startswith("task 9")
    assert axes[0].get_ylim() == axes[1].get_ylim() and axes[2].get_ylim() == axes[3].get_ylim()
    words = [[text.get_text() for text in ax.texts] for ax in axes]
    assert set(words[0]) == {"sine", r"line\$", "both in 12%"} and words[1] == [] and "both in 12%" not in words[2]
    assert axes[0].figure.get_supxlabel() == "dose" and axes[0].figure.get_supylabel() == "reply"
    assert axes[0].lines[0].get_color() == looks(rows)["a"].colour


def test_many_learners_go_on_in_another_row():
    axes = explained_grid({str(i): [task([GRID]), task([GRID])] for i in range(7)})
    assert len(axes) == 14 and [ax.get_title("left") for ax in axes] == 2 * [str(i) for i in range(7)]
    rows = [ax.get_subplotspec().rowspan.start for ax in axes]
    assert rows == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 3
    axes[0].figure.draw_without_rendering()


@pytest.mark.parametrize("rows", [{"a": [], "b": []}, {"a": [1], "b": [1, 2]}, {}])
def test_the_same_tasks_of_every_learner(rows):
    with pytest.raises(ValueError, match="every learner needs the same tasks, at least one"):
        explained_grid(rows)
