from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from bayesmeta.plots import map_grid, probability_map
from bayesmeta.plots.maps import LABELS, entropy

FIRST, SECOND = np.linspace(0, 5, 6), np.linspace(-1, 1, 4)


def made(tilt=1.0, draws=0, name="task 3"):
    probs = 1 / (1 + np.exp(-tilt * (FIRST[None] - 2.2 + SECOND[:, None])))
    shifted = [1 / (1 + np.exp(-tilt * (FIRST[None] - 1.2 - 0.5 * s + SECOND[:, None]))) for s in range(draws)]
    points = {"support_x": np.array([[4.0, 0.5], [1.0, 0.0], [2.0, 0.0]]), "support_y": np.array([1.0, 0.0, 0.0])}
    return SimpleNamespace(name=name, first=FIRST, second=SECOND, probs=probs, draws=np.array(shifted).reshape(-1, 4, 6), **points)


def shades(ax):
    return next(c for c in ax.collections if type(c).__name__ == "QuadMesh")


def test_shades_are_the_probabilities_or_their_entropy():
    m = made()
    for what, values, largest in (("probability", m.probs, 1.0), ("entropy", entropy(m.probs), np.log(2))):
        ax = probability_map(m, what=what, ax=Figure().subplots())
        mesh = shades(ax)
        assert np.array_equal(mesh.get_array(), values) and mesh.get_clim() == (0, pytest.approx(largest))
        assert ax.figure.axes[1].get_ylabel() == LABELS[what]
    with pytest.raises(ValueError, match="'sd'"):
        probability_map(m, what="sd")


def test_entropy():
    p = np.array([0.0, 0.5, 1.0, 0.2])
    assert entropy(p) == pytest.approx([0, np.log(2), 0, -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))], abs=1e-10)


def test_a_border_for_each_draw_that_has_one():
    m = made(draws=3)
    m.draws[1] = 0.9  # sure everywhere: no border
    ax = probability_map(m, colour="#aa0000", ax=Figure().subplots())
    borders = [c for c in ax.collections if type(c).__name__ == "QuadContourSet"]
    assert len(borders) == 2
    vertices = borders[0].get_paths()[0].vertices
    np.testing.assert_allclose(vertices[:, 0] + vertices[:, 1], 1.2, atol=0.06)  # P = ½ on this line
    assert [c for c in probability_map(m, what="entropy").collections if type(c).__name__ == "QuadContourSet"] == []


def test_points_by_class():
    inside, outside = probability_map(made(), ax=Figure().subplots()).lines
    assert inside.get_marker() == "P" and inside.get_xydata().tolist() == [[4.0, 0.5]]
    assert outside.get_marker() == "o" and outside.get_xydata().tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_exact_first_probabilities_over_entropies():
    exact = [made(5.0), made(4.0, name="task 8")]
    rows = {"a": [made(1.0, 2), made(2.0, 2)], "b": [made(0.5), made(0.6)]}
    axes = map_grid(exact, rows, x="u", y="v", notes={"b": "80% of labels"})
    assert len(axes) == 12
    order = [made(5.0), *(kept[0] for kept in rows.values()), exact[1], *(kept[1] for kept in rows.values())]
    for k, m in enumerate(order):
        top = axes[6 * (k // 3) + k % 3]
        assert np.array_equal(shades(top).get_array(), m.probs)
        below = axes[6 * (k // 3) + 3 + k % 3]
        assert np.array_equal(shades(below).get_array(), entropy(m.probs))
        assert below.get_title("left") == f"mean {entropy(m.probs).mean():.2f}"
    assert [ax.get_title("left") for ax in axes[:3]] == ["exact", "a", "b"] and axes[6].get_title("left") == ""
    assert axes[0].get_ylabel() == "task 3" and axes[6].get_ylabel() == "task 8"
    assert [text.get_text() for text in axes[2].texts] == ["80% of labels"]
    axes[0].figure.draw_without_rendering()


def test_many_learners_go_on_in_rows_below():
    axes = map_grid([made()], {str(i): [made()] for i in range(7)}, columns=5)
    assert len(axes) == 16
    names = [ax.get_title("left") for ax in axes if not ax.get_title("left").startswith("mean")]
    assert names == ["exact", *map(str, range(7))]


def test_the_same_tasks_of_every_learner():
    with pytest.raises(ValueError, match=r"at least one; got 1, \[2\]"):
        map_grid([made()], {"a": [made(), made()]})
    with pytest.raises(ValueError, match="at least one"):
        map_grid([], {})
