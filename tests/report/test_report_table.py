import re

import numpy as np
import pytest

from bayesmeta.report import LearnerResult, Report


def blocks(text):
    """Lines of the two tables: name -> cells split at wide gaps."""
    found = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        rules = [i for i, line in enumerate(lines) if line and set(line) == {"-"}]
        if rules:
            rows = [re.split(r"\s{2,}", line.strip()) for line in lines[rules[0] + 1 :]]
            found.append({row[0]: row[1:] for row in rows})
    return found


def test_every_learner_has_its_estimate_and_half_width(report):
    scores, _ = blocks(report.table())
    assert list(scores) == list(report.results)
    for row in report.summary():
        if row["metric"] == "nll":
            estimate, half = re.match(r"(\S+) ± ([0-9.]+)", scores[row["learner"]][0]).groups()
            assert float(estimate) == pytest.approx(row["estimate"], abs=0.006)
            assert float(half) == pytest.approx((row["upper"] - row["lower"]) / 2, abs=0.006)


def test_the_best_of_a_column_is_marked_and_no_other(report):
    scores, _ = blocks(report.table())
    best = min(report.results, key=lambda name: report.results[name].metrics["nll"].mean())
    assert [name for name, cells in scores.items() if "*" in cells[0]] == [best]


def test_higher_is_better_where_it_is(classification):
    scores, _ = blocks(classification.table())
    best = max(classification.results, key=lambda name: classification.results[name].metrics["accuracy"].mean())
    assert [name for name, cells in scores.items() if "*" in cells[1]] == [best]


def test_coverage_is_marked_where_its_interval_excludes_the_nominal_level(parts):
    values = {"sharp": 0.5, "fine": 0.9, "wide": 1.0}
    rng = np.random.default_rng(0)
    results = {
        name: LearnerResult(metrics={"nll": rng.random(8), "coverage90": centre + 0.02 * rng.normal(size=8)})
        for name, centre in values.items()
    }
    text = Report(**parts | {"results": results, "histories": {}}).table()
    assert [name for name, cells in blocks(text)[0].items() if "!" in cells[1]] == ["sharp", "wide"]
    assert "! the interval of the coverage excludes its nominal level." in text


def test_differences_are_marked_where_the_interval_excludes_zero(report):
    _, gaps = blocks(report.table(reference="NUTS"))
    rows = {row["learner"]: row for row in report.paired("nll", "NUTS")}
    assert list(gaps) == list(rows)
    for name, row in rows.items():
        assert ("†" in gaps[name][0]) == row["excludes_zero"]
        shown = [float(number) for number in re.findall(r"[+-][0-9.]+", gaps[name][0])]
        assert shown == pytest.approx([row["estimate"], row["lower"], row["upper"]], abs=0.006)
    assert {True, False} == {row["excludes_zero"] for row in rows.values()}  # else the marks would be no test


def test_it_says_what_its_signs_mean(report):
    text = report.table()
    assert "± is a 95% interval by resampling tasks" in text
    assert "Difference from NoPooling, the best in NLL, on the same tasks, with its 95% interval" in text
    assert "Difference from NUTS, on the same tasks" in report.table(reference="NUTS")
    assert "Query targets are <noisy>." in text and "8 tasks" in text
    assert "12.5 s" in text and "7,400" in text


def test_numbers_are_aligned(report):
    for block in report.table().split("\n\n"):
        lines = block.splitlines()
        rules = [i for i, line in enumerate(lines) if line and set(line) == {"-"}]
        if rules:
            plus = [[m.start() for m in re.finditer(r"[±\[,\]]", line)] for line in lines[rules[0] + 1 :]]
            assert plus and all(places == plus[0] for places in plus)
            assert all(len(line) <= len(lines[rules[0]]) for line in lines[rules[0] :])


def test_it_can_be_printed_on_any_terminal(report, classification):
    for text in (report.table(), classification.table()):
        text.encode("cp1252")


def test_few_tasks_are_said_to_be_few(report):
    assert "With 8 tasks to resample, intervals are too narrow or missing." in report.table()


def test_one_learner_has_no_rival():
    report = Report(results={"a": LearnerResult(metrics={"nll": [2.0, 3.0]})}, support_sizes=[3, 3], query_sizes=[4, 4])
    assert "Difference" not in report.table() and "2.5" in report.table()
    assert "2.5 ± 0.5*" not in report.table()


def test_an_unknown_reference_is_answered_with_the_nearest(report):
    with pytest.raises(ValueError, match="did you mean 'NoPooling'"):
        report.table(reference="no-pooling")
