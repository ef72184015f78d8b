import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from bayesmeta.plots import coverage, looks
from bayesmeta.report import LearnerResult, Report

KINDS = ("metric", "calibration", "pit", "bands", "shrinkage", "loss")


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_axes_come_back_and_nothing_else_changes(report, kind):
    ax, settings = Figure().subplots(), dict(matplotlib.rcParams)
    assert report.plot(kind, ax) is ax and ax.has_data()
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == settings


def test_reliability_is_for_classification(classification):
    ax = Figure().subplots()
    assert classification.plot("reliability", ax=ax, learner="ProtoNet") is ax
    assert ax.get_title("left") == "ProtoNet"


@pytest.mark.parametrize(
    ("typed", "meant"), [("calibraton", "calibration"), ("bandz", "bands"), ("shrink", "shrinkage")]
)
def test_an_unknown_kind_is_answered_with_the_nearest(report, typed, meant):
    with pytest.raises(ValueError, match=f"unknown kind of plot '{typed}'; did you mean '{meant}'"):
        report.plot(typed)


def test_a_kind_like_none_is_answered_with_all(report):
    with pytest.raises(ValueError, match="known are 'metric', 'calibration', 'pit'"):
        report.plot("zzz")


def test_the_numbers_drawn_are_the_reports(report):
    lines = report.plot("calibration").lines[1:]
    for line, result in zip(lines, report.results.values(), strict=True):
        assert np.array_equal(line.get_ydata(), coverage(result.pit).observed)
    dots = report.plot("metric", metric="rmse").lines[1::2]
    means = [result.metrics["rmse"].mean() for result in report.results.values()]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx(means)
    filled = report.plot("shrinkage", site="effect").lines[-1]
    assert np.array_equal(filled.get_ydata(), report.results["NUTS"].sites["effect"])
    nominal = report.plot("metric", metric="coverage90").lines[0]
    assert list(nominal.get_xdata()) == [0.9, 0.9]


def test_a_learner_has_one_colour_everywhere(report):
    colour = looks(report.results)["NUTS"].colour
    assert report.plot("calibration", learners=["NUTS"]).lines[1].get_color() == colour
    assert report.plot("shrinkage").lines[-1].get_color() == colour
    assert report.plot("loss").lines[0].get_color() == colour
    assert report.plot("metric").lines[3].get_color() == colour


def test_bands_of_a_task_before_and_after(report):
    after = report.plot("bands", learner="NUTS", task=1)
    before = report.plot("bands", learner="NUTS", task=1, when="before")
    assert len(after.get_legend().get_texts()) == 1 + len(before.get_legend().get_texts())  # no support before
    assert after.get_ylim() == before.get_ylim()
    mean = report.results["NUTS"].bands[1].after.mean
    assert [bar.get_y() for bar in after.patches[:2]] == pytest.approx(list(mean - 1.6))
    mean = report.results["NUTS"].bands[1].before.mean
    assert [bar.get_y() for bar in before.patches[:2]] == pytest.approx(list(mean - 1.6))
    for options, message in (({"task": 2}, "from 0 to 1.*got 2"), ({"when": "now"}, "'now'")):
        with pytest.raises(ValueError, match=message):
            report.plot("bands", **options)


def test_a_missing_learner_is_named_and_can_be_replaced(report, parts):
    with pytest.raises(ValueError, match=r"needs 'ABML', which is not among NoPooling, NUTS.*by partial="):
        report.plot("shrinkage", partial="ABML")
    parts["results"].pop("NoPooling")
    lesser = Report(**parts)
    with pytest.raises(ValueError, match=r"needs 'NoPooling'.*by no_pooling="):
        lesser.plot("shrinkage")
    lesser.plot("shrinkage", no_pooling="<b>x")


def test_what_a_report_lacks_is_said(report, classification):
    bare = Report(results={"a": LearnerResult(metrics={"nll": [1.0]})}, support_sizes=[1], query_sizes=[1])
    for kind, message in (
        ("calibration", "PIT"),
        ("pit", "PIT"),
        ("reliability", "class probabilities"),
        ("bands", "bands"),
        ("loss", "histories="),
    ):
        with pytest.raises(ValueError, match=message):
            bare.plot(kind)
    with pytest.raises(ValueError, match=r"no scalar task-level site 'lvl'.*'level'"):
        report.plot("shrinkage", site="lvl")
    with pytest.raises(ValueError, match="scalar task-level site that all"):
        roles = {"no_pooling": "MAML", "partial": "MAML", "complete": "ProtoNet"}
        classification.plot("shrinkage", **roles)
    with pytest.raises(ValueError, match="no training history of 'MAML'"):
        report.plot("loss", learner="MAML")
    with pytest.raises(ValueError, match=r"no learner has a metric 'nlll'.*'nll'"):
        report.plot("metric", metric="nlll")
