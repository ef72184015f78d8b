"""Scores against the truth in a report: of which tasks, in words, in pictures, and in files old and new."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_report_page import read
from test_report_serial import same, strict

from bayesmeta import metrics
from bayesmeta.report import Bands, Curves, Explanation, ProbabilityMap, Report
from bayesmeta.report.against import findings, finds_all, meanings


def row_of(rows, learner, metric):
    (row,) = [row for row in rows if row["learner"] == learner and row["metric"] == metric]
    return row


def test_a_mean_over_ambiguous_tasks_with_its_interval(ambiguous):
    report = Report(**ambiguous)
    for name, result in report.results.items():
        row, values = row_of(report.summary(), name, "mode_coverage"), torch.tensor(result.metrics["mode_coverage"])
        expected = metrics.bootstrap_statistic(lambda v: v.nanmean(), values, seed=report.seed, resamples=2000)
        assert (row["estimate"], row["lower"], row["upper"]) == pytest.approx(tuple(expected), abs=1e-12)
        assert row["tasks"] == 4 and row_of(report.summary(), name, "nll")["tasks"] == 8
    (gap,) = report.paired("mode_coverage", "MAML")
    assert gap["estimate"] == pytest.approx((0.5 + 1.0 + 0.0 + 0.5) / 4)
    assert "no finite score" not in report.table()


def test_nan_at_an_ambiguous_task_is_a_failure(ambiguous):
    result = ambiguous["results"]["NUTS"]
    values = result.metrics["mode_coverage"].copy()
    values[2] = np.nan
    ambiguous["results"]["NUTS"] = replace(result, metrics=dict(result.metrics) | {"mode_coverage": values})
    report = Report(**ambiguous)
    assert np.isnan(row_of(report.summary(), "NUTS", "mode_coverage")["estimate"])
    assert "NUTS gave no finite score on 1 of 8 tasks." in report.table()


def test_what_they_mean_is_said(ambiguous):
    report = Report(**ambiguous)
    said = meanings(report, report.summary())
    assert said == [
        "Gap to exact: NLL minus that of the exact predictive, which nobody can beat, in nats a point.",
        "Mode coverage: in the 4 of 8 tasks whose support leaves sine and line open, each at least 20% likely, the share of them that the "
        "learner's draws are near to; one answer finds one.",
    ]
    lines = report.table().splitlines()
    assert all(sentence in lines for sentence in said) and "mode coverage" in lines[2] and "gap to exact" in lines[2]
    report.table().encode("cp1252")


def test_who_finds_both_is_said(ambiguous):
    report = Report(**ambiguous)
    assert finds_all(report) == {"NUTS": 0.75, "MAML": 0.0}
    gap, both = findings(report, report.summary())
    assert both == (
        "4 of 8 tasks leave both explanations open (sine, line). The share of them in which draws find both: NUTS 75%, MAML 0%."
    )
    estimate = row_of(report.summary(), "NUTS", "nll_gap")["estimate"]
    assert gap.startswith(f"The exact predictive is the best that can be: NUTS comes nearest, {estimate:.2g} nats a point from it")
    for result in ambiguous["results"].values():
        del result.metrics["mode_coverage"]
    nobody = Report(**ambiguous | {"scored_tasks": {}})
    assert findings(nobody, nobody.summary())[-1] == "No task leaves both explanations open (sine, line)."


def test_a_report_without_a_truth_says_nothing_of_it(report, classification):
    for plain in (report, classification):
        assert meanings(plain, plain.summary()) == findings(plain, plain.summary()) == [] and finds_all(plain) == {}


def test_the_page_has_the_numbers_and_the_picture(ambiguous, tmp_path):
    reader = read(Report(**ambiguous).to_html(tmp_path / "report.html").read_text(encoding="utf-8"))
    text = " ".join(reader.text)
    assert "higher is better, at best 1, 4 tasks" in text and "lower is better, at best 0" in text
    assert "The share of them in which draws find both: NUTS 75%, MAML 0%." in text and "Mode coverage: in the 4 of 8 tasks" in text
    titles = [image["alt"] for image in reader.images]
    assert titles[1] == "Ambiguous tasks: who sees both explanations?"


def test_the_page_of_two_classes_has_maps(circles, tmp_path):
    reader = read(Report(**circles).to_html(tmp_path / "report.html").read_text(encoding="utf-8"))
    assert any(image["alt"].startswith("What a few labels leave open") for image in reader.images)
    text = " ".join(reader.text)
    assert "Of the labels that a support set leaves open, draws give this share: MAML 50%, ProtoNet 25%." in text
    meaning = "Label coverage: of the labels that the support leaves open, at least 10% likely, the share that the learner's draws give."
    assert meaning in text


def test_one_picture_at_a_time(ambiguous, circles):
    report = Report(**ambiguous)
    ax = report.plot("explanation", Figure().subplots(), learner="MAML", task=1)
    band = report.results["MAML"].bands[1]
    drawn = [line.get_ydata() for line in ax.lines]
    for expected in (*band.after.draws, *(one.curve for one in band.explanations), band.support_y):
        assert any(np.array_equal(expected, line) for line in drawn)
    assert ax.get_title("left") == "MAML" and ax.get_xlabel() == "floor"
    maps = Report(**circles)
    assert maps.plot("map").get_title("left") == "exact" and maps.plot("map", learner="MAML", what="entropy").get_title("left") == "MAML"
    for broken, kind, options, message in (
        (maps, "explanation", {}, "no learner in this report has draws for an ambiguous task"),
        (report, "map", {}, "no learner in this report has probability maps"),
        (report, "explanation", {"task": 2}, "task must be from 0 to 1"),
        (maps, "map", {"task": 2}, "task must be from 0 to 1"),
        (maps, "map", {"learner": "Maml"}, "did you mean 'MAML'"),
        (maps, "map", {"what": "sd"}, "'sd'"),
    ):
        with pytest.raises(ValueError, match=message):
            broken.plot(kind, **options)


def test_there_and_back(ambiguous, circles, tmp_path):
    for parts in (ambiguous, circles):
        report = Report(**parts)
        path = report.to_json(tmp_path / "metrics.json")
        again = Report.from_json(path)
        assert same(report, again) and again.table() == report.table()
        strict(path.read_text())
    assert again.exact_maps[0].draws.shape == (0, 4, 6)


def test_a_report_from_before_reads_as_one_without(report, tmp_path):
    path = report.to_json(tmp_path / "metrics.json")
    content = json.loads(path.read_text())
    for name in ("scored_tasks", "explanation_names", "exact_maps"):
        del content[name]
    for result in content["results"].values():
        del result["maps"]
        for band in result["bands"]:
            del band["explanations"]
    path.write_text(json.dumps(content))
    assert same(report, Report.from_json(path))


def test_csv_says_of_how_many_tasks(ambiguous, tmp_path):
    with open(Report(**ambiguous).to_csv(tmp_path / "metrics.csv"), newline="") as file:
        tasks = {(row["learner"], row["metric"]): row["tasks"] for row in csv.DictReader(file)}
    assert tasks["NUTS", "mode_coverage"] == "4" and tasks["MAML", "nll"] == tasks["MAML", "seconds"] == "8"


def test_what_makes_no_report(ambiguous):
    which = ambiguous["scored_tasks"]["mode_coverage"][:7]
    with pytest.raises(ValueError, match=r"scored_tasks\['mode_coverage'\] must have shape \(T,\) = \(8,\), got \(7,\)"):
        Report(**ambiguous | {"scored_tasks": {"mode_coverage": which}})
    ends = dict.fromkeys(("mean", "lower50", "upper50", "lower90", "upper90"), np.zeros(4))
    curves = Curves(grid=np.arange(4.0), **ends)
    points = {"support_x": [], "support_y": [], "query_x": [], "query_y": []}
    with pytest.raises(ValueError, match=r"Bands\.explanations\['sine'\]\.curve has shape \(5,\), and Bands\.after\.grid \(4,\)"):
        wrong = Explanation(name="sine", probability=0.5, curve=np.zeros(5))
        Bands(task=0, name="", before=curves, after=curves, explanations=(wrong,), **points)
    with pytest.raises(ValueError, match=r"ProbabilityMap\.probs has H = 5, but ProbabilityMap\.second has H = 4"):
        empty = {"support_x": [], "support_y": []}
        ProbabilityMap(task=0, name="", first=np.zeros(6), second=np.zeros(4), probs=np.zeros((5, 6)), **empty)
