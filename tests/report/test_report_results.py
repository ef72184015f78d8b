import numpy as np
import pytest
import torch

from bayesmeta.report import Bands, Curves, LearnerResult, Report, joined

ENDS = dict.fromkeys(("mean", "lower50", "upper50", "lower90", "upper90"), np.zeros(4))


def test_arrays_become_float64_and_read_only():
    curves = Curves(grid=torch.arange(4), **ENDS, draws=np.zeros((3, 4), dtype=np.float32))
    assert curves.grid.dtype == curves.draws.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        curves.mean[0] = 1


def test_parts_are_joined_by_what_they_are():
    """Scores behind each other; seconds and counts add up, gradients are per task, extremes stay extremes, words the first's."""
    parts = [
        LearnerResult(
            metrics={"nll": np.arange(n)}, pit=np.full((n, 2), n), sites={"level": np.full(n, 1.0)}, seconds=n, gradient_evaluations=g,
            diagnostics={"divergences": 2.0, "max_r_hat": 1.0 + n, "min_effective_draws": 10.0 * n, "theta": "NUTS"},
        )
        for n, g in ((1, 6.0), (3, 2.0))
    ]  # fmt: skip
    one = joined(parts)
    assert one.metrics["nll"].tolist() == [0, 0, 1, 2] and one.pit[:, 0].tolist() == [1, 3, 3, 3] and len(one.sites["level"]) == 4
    assert one.seconds == 4 and one.gradient_evaluations == 3.0
    assert one.diagnostics == {"divergences": 4.0, "max_r_hat": 4.0, "min_effective_draws": 10.0, "theta": "NUTS"}
    assert joined(parts[:1]) is parts[0]


def test_the_callers_arrays_stay_writable_and_apart():
    mine = np.zeros(4)
    curves = Curves(grid=mine, **ENDS)
    mine[0] = 7
    assert curves.grid[0] == 0


def test_no_draws_are_no_draws_of_any_shape():
    assert Curves(grid=np.zeros(4), **ENDS).draws.shape == (0, 4)
    assert Curves(grid=np.zeros(4), **ENDS, draws=np.empty((0, 4))).draws.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": np.zeros((2, 5))}, r"Curves\.draws has G = 5, but Curves\.grid has G = 4"),
        ({"mean": np.zeros((4, 1))}, r"Curves\.mean must have shape \(G,\), got \(4, 1\)"),
    ],
)
def test_wrong_shapes_of_curves(change, message):
    with pytest.raises(ValueError, match=message):
        Curves(**{"grid": np.zeros(4), **ENDS} | change)


def test_points_of_a_task_come_in_pairs():
    curves = Curves(grid=np.zeros(4), **ENDS)
    with pytest.raises(ValueError, match=r"Bands\.support_y has n = 3, but Bands\.support_x has n = 2"):
        sets = {"support_x": [1, 2], "support_y": [1, 2, 3], "query_x": [], "query_y": []}
        Bands(task=0, name="", before=curves, after=curves, **sets)


def test_settings_are_numbers_or_text():
    settings = {"a": np.float32(0.5), "b": None, "c": (1, 2), "d": True, "e": np.int64(3)}
    result = LearnerResult(metrics={"nll": [1.0]}, settings=settings)
    assert result.settings == {"a": 0.5, "b": "None", "c": "(1, 2)", "d": True, "e": 3}
    assert [type(v) for v in result.settings.values()] == [float, str, str, bool, int]


def test_one_value_a_task():
    with pytest.raises(ValueError, match=r"metrics\['nll'\].*\(T,\).*\(2, 3\)"):
        LearnerResult(metrics={"nll": np.zeros((2, 3))})


def test_probabilities_need_labels():
    with pytest.raises(ValueError, match="go together"):
        LearnerResult(metrics={}, probs=np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match=r"labels has N = 4, but LearnerResult\.probs has N = 2"):
        LearnerResult(metrics={}, probs=np.ones((1, 2, 3)), labels=np.ones((1, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"results": {}}, "at least one learner"),
        ({"support_sizes": []}, "T > 0"),
        ({"query_sizes": [1, 2]}, r"\(8,\) and \(2,\)"),
        ({"query_sizes": np.zeros(8)}, "no task has a query point"),
        ({"task_names": ("a", "b")}, "8 tasks, got 2"),
        ({"histories": {"NUTS": {"loss": [1]}}}, r"history of NUTS needs .* got \['loss'\]"),
        ({"histories": {"NUTS": {"loss": [1], "step": [1, 2]}}}, "NUTS.*2 and 1"),
    ],
)
def test_what_makes_no_report(parts, change, message):
    with pytest.raises(ValueError, match=message):
        Report(**parts | change)


def test_learners_must_have_met_the_same_tasks(parts):
    parts["results"]["odd"] = LearnerResult(metrics={"nll": np.zeros(7)})
    with pytest.raises(ValueError, match=r"odd: metrics\['nll'\] has 7 tasks, the report has 8"):
        Report(**parts)


def test_names_of_tasks_are_made_up_where_none_are_given(report):
    assert report.task_names[:2] == ("task 1", "task 2") and len(report.task_names) == 8


def test_repr_is_short(report):
    assert repr(report) == "Report('Radon & <co>', 8 tasks, learners: NoPooling, NUTS, CompletePooling, <b>x)"
