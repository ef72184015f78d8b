import numpy as np
import pytest

from bayesmeta.plots import Look, confidence_under_shift, severity_curves

SEVERITIES = (0.0, 0.5, 1.0)


def rows(learners=("a", "b"), kinds=("blur", "noise")):
    """Accuracy 0.9 − severity / 2 and confidence 0.9 for "a", 0.1 less of both for "b"."""
    found = []
    for kind in kinds:
        for severity in reversed(SEVERITIES):  # order is no matter
            for i, learner in enumerate(learners):
                for metric, value in (("accuracy", 0.9 - severity / 2), ("confidence", 0.9), ("ece", severity / 2)):
                    estimate = value - 0.1 * i
                    found.append({
                        "shift": kind, "severity": severity, "learner": learner, "metric": metric, "estimate": estimate,
                        "lower": estimate - 0.01, "upper": estimate + 0.02,
                    })  # fmt: skip
    return found


def test_a_panel_a_shift_and_a_line_a_learner_in_order_of_severity():
    axes = severity_curves(rows(), metric="accuracy")
    assert [ax.get_title(loc="left") for ax in axes] == ["blur", "noise"]
    for ax in axes:
        assert [line.get_xdata().tolist() for line in ax.lines] == [list(SEVERITIES)] * 2
        np.testing.assert_allclose([line.get_ydata() for line in ax.lines], [[0.9, 0.65, 0.4], [0.8, 0.55, 0.3]])
        band = ax.collections[0].get_paths()[0].vertices
        np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [0.39, 0.92])


def test_a_panel_a_learner_and_a_line_a_shift():
    axes = confidence_under_shift(rows(kinds=("blur", "noise", "rotation")))
    assert [ax.get_title(loc="left") for ax in axes] == ["a", "b"]
    for i, ax in enumerate(axes):
        diagonal, *lines = ax.lines
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1] and len(lines) == 6
        for line, start in zip(lines[::2], lines[1::2], strict=True):
            np.testing.assert_allclose(line.get_xdata(), np.array([0.9, 0.65, 0.4]) - 0.1 * i)
            np.testing.assert_allclose(line.get_ydata(), 0.9 - 0.1 * i)
            assert (*start.get_xdata(), *start.get_ydata()) == (line.get_xdata()[0], line.get_ydata()[0])
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["no shift", "blur", "noise", "rotation"]


def test_chosen_learners_in_the_order_asked_for():
    assert [ax.get_title(loc="left") for ax in confidence_under_shift(rows(), learners=["b"])] == ["b"]
    assert [text.get_text() for text in severity_curves(rows(), learners=["b", "a"])[1].get_legend().get_texts()] == ["b", "a"]


@pytest.mark.parametrize(("count", "columns", "place"), [(8, 5, 3), (13, 5, 4), (3, 5, 2), (5, 5, 4)])
def test_the_legend_stands_at_the_right_of_the_first_row(count, columns, place):
    axes = confidence_under_shift(rows(learners=[f"learner {k}" for k in range(count)]), columns=columns)
    assert [k for k, ax in enumerate(axes) if ax.get_legend() is not None] == [place]
    right = max(ax.get_subplotspec().colspan.stop for ax in axes)
    assert axes[place].get_subplotspec().colspan.stop == right and axes[place].get_subplotspec().rowspan.start == 0


def test_one_name_and_some_looks_are_enough():
    mine = Look("#123456", "o", "-")
    (ax,) = confidence_under_shift(rows(), learners="b", look={"b": mine})
    assert ax.get_title(loc="left") == "b"
    assert [line.get_color() for line in severity_curves(rows(), look={"b": mine})[0].lines][1] == "#123456"


def test_bad_input_gets_a_clear_error():
    with pytest.raises(ValueError, match="learners: expected some of a, b, got 'c'"):
        severity_curves(rows(), learners=["c"])
    with pytest.raises(ValueError, match="metric: expected one of accuracy, confidence, ece, got 'nll'"):
        severity_curves(rows(), metric="nll")
    with pytest.raises(ValueError, match=r"learners: expected some of a, b, got \[\]"):
        severity_curves(rows(), learners=[])
    with pytest.raises(ValueError, match=r"rows: expected those of under_shift, got rows of \['learner', 'score'\]"):
        severity_curves([{"learner": "a", "score": "entropy"}])
    with pytest.raises(ValueError, match="rows: expected those of under_shift, got none"):
        confidence_under_shift([])
