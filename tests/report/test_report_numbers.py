from dataclasses import replace

import numpy as np
import pytest
import torch

from bayesmeta import metrics
from bayesmeta.report import LearnerResult, Report


def row_of(rows, learner, metric="nll"):
    (row,) = [row for row in rows if row["learner"] == learner and row["metric"] == metric]
    return row


def ends(row):
    return row["estimate"], row["lower"], row["upper"]


def with_metric(parts, learner, name, values):
    result = parts["results"][learner]
    parts["results"][learner] = replace(result, metrics=result.metrics | {name: values})
    return Report(**parts)


@pytest.mark.parametrize("metric", ["nll", "rmse", "coverage90", "width50"])
def test_metrics_are_means_over_tasks_with_the_bootstrap_interval(report, metric):
    for name, result in report.results.items():
        expected = metrics.bootstrap_interval(torch.as_tensor(result.metrics[metric].copy()), seed=report.seed)
        assert ends(row_of(report.summary(), name, metric)) == pytest.approx(tuple(expected), abs=1e-12)


def test_every_learner_has_every_number(report):
    rows = report.summary()
    order = ["nll", "rmse", "crps", "coverage50", "coverage90", "width50", "width90"]
    order += ["calibration_error", "seconds", "gradient_evaluations"]
    assert [(r["learner"], r["metric"]) for r in rows] == [
        (name, metric) for name in report.results for metric in order
    ]
    assert row_of(rows, "NUTS", "seconds")["estimate"] == 12.5
    assert np.isnan(row_of(rows, "NUTS", "seconds")["lower"])


def test_rows_are_the_callers_to_change(report):
    report.summary()[0]["estimate"] = -99
    assert report.summary()[0]["estimate"] != -99


def test_calibration_error_is_that_of_metrics(report):
    for name, result in report.results.items():
        pit = torch.as_tensor(result.pit.copy())
        estimate, lower, upper = ends(row_of(report.summary(), name, "calibration_error"))
        levels = torch.arange(1, 21, dtype=pit.dtype) / 21
        curves = torch.stack([metrics.calibration_curve(t[None], ~t[None].isnan(), levels=levels) for t in pit])
        error = lambda curves, levels=levels: ((curves.mean(0) - levels) ** 2).mean()  # noqa: E731
        assert estimate == pytest.approx(float(error(curves)), abs=1e-15)
        expected = metrics.bootstrap_statistic(error, curves, seed=report.seed, resamples=2000)
        assert (lower, upper) == pytest.approx((expected.lower, expected.upper), abs=1e-12)


def test_ece_is_that_of_metrics(classification):
    for name, result in classification.results.items():
        probs, y = torch.as_tensor(result.probs.copy()), torch.as_tensor(result.labels.copy())
        estimate, lower, upper = ends(row_of(classification.summary(), name, "ece"))
        assert estimate == pytest.approx(float(metrics.expected_calibration_error(probs, y, y >= 0)), abs=1e-15)
        assert 0 < lower < upper < 1


def test_nan_never_scores_as_good(parts):
    values = np.full(8, -100.0)
    values[3] = np.nan
    report = with_metric(parts, "NUTS", "nll", values)
    assert np.isnan(ends(row_of(report.summary(), "NUTS"))).all()
    assert report.paired()[0]["reference"] == "NoPooling"
    assert (
        np.isnan(row_of(report.paired(), "NUTS")["estimate"]) and not row_of(report.paired(), "NUTS")["excludes_zero"]
    )
    assert "NUTS gave no finite score on 1 of 8 tasks." in report.table()


def test_an_infinite_score_is_infinitely_bad(parts):
    values = np.full(8, -100.0)
    values[3] = np.inf
    report = with_metric(parts, "NUTS", "nll", values)
    assert row_of(report.summary(), "NUTS")["estimate"] == np.inf
    assert report.paired()[0]["reference"] == "NoPooling"
    assert "NUTS gave no finite score on 1 of 8 tasks." in report.table()


def test_a_task_without_query_points_counts_for_nobody(parts):
    parts["query_sizes"] = np.array([5, 5, 4, 5, 3, 5, 5, 0])
    for name, result in parts["results"].items():
        values, pit = {k: v.copy() for k, v in result.metrics.items()}, result.pit.copy()
        pit[7] = np.nan
        for one in values.values():
            one[7] = np.nan
        parts["results"][name] = replace(result, metrics=values, pit=pit)
    report = Report(**parts)
    own = report.results["NUTS"].metrics["nll"][:7]
    assert row_of(report.summary(), "NUTS")["estimate"] == pytest.approx(own.mean())
    assert "no finite score" not in report.table()


def test_a_pit_that_is_missing_at_a_query_point_is_covered_by_nothing(parts):
    pit = parts["results"]["NUTS"].pit.copy()
    pit[4, 1] = np.nan  # task 4 has 3 query points: a failure, not padding
    parts["results"]["NUTS"] = replace(parts["results"]["NUTS"], pit=pit)
    whole = Report(**parts).plot("calibration", learners=["NUTS"]).lines[1].get_ydata()
    assert whole[-1] == pytest.approx((7 + 2 / 3) / 8)


def test_one_task_has_no_interval():
    report = Report(results={"a": LearnerResult(metrics={"nll": [2.0]})}, support_sizes=[3], query_sizes=[4])
    estimate, *interval = ends(row_of(report.summary(), "a"))
    assert estimate == 2.0 and np.isnan(interval).all()


def test_paired_differences_are_those_of_metrics(report):
    reference = report.results["NUTS"].metrics["crps"].copy()
    rows = report.paired("crps", reference="NUTS")
    assert [row["learner"] for row in rows] == ["NoPooling", "CompletePooling", "<b>x"]
    for row in rows:
        own = torch.as_tensor(report.results[row["learner"]].metrics["crps"].copy())
        expected = metrics.paired_difference(own, torch.as_tensor(reference), seed=report.seed)
        assert ends(row) == pytest.approx(tuple(expected), abs=1e-12)
        assert row["excludes_zero"] == expected.excludes_zero and row["reference"] == "NUTS"


def test_the_reference_is_the_best_in_nll(report):
    means = {name: result.metrics["nll"].mean() for name, result in report.results.items()}
    assert {row["reference"] for row in report.paired("rmse")} == {min(means, key=means.get)}


def test_unknown_names_are_answered_with_the_nearest(report):
    with pytest.raises(ValueError, match=r"no learner 'Nuts'.*did you mean 'NUTS'"):
        report.paired(reference="Nuts")
    with pytest.raises(ValueError, match=r"'rsme'.*did you mean 'rmse'"):
        report.paired("rsme")
