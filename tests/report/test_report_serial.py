import csv
import json
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest

from bayesmeta.report import Report


def same(a, b):
    """Equal to the last bit, types and shapes included; NaN equals NaN."""
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and (a == b or (a != a and b != b))


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_report_comes_back_to_the_last_bit(report, tmp_path):
    again = Report.from_json(report.to_json(tmp_path / "metrics.json"))
    assert same(report, again)
    assert again.table() == report.table()


def test_a_classification_comes_back_too(classification, tmp_path):
    again = Report.from_json(classification.to_json(tmp_path / "metrics.json"))
    assert same(classification, again) and again.results["MAML"].labels.dtype == np.int64


def test_odd_numbers_come_back(parts, tmp_path):
    result = parts["results"]["NUTS"]
    odd = np.array([np.nan, np.inf, -np.inf, 0.1 + 0.2, 5e-324, -0.0, 1e308, 1 / 3])
    diagnostics = {"rhat": float("inf"), "ess": float("nan"), "word": "fine"}
    settings = {"scale": float("inf"), "on": True, "count": 1, "name": "x"}
    odder = replace(result, metrics={"nll": odd}, diagnostics=diagnostics, settings=settings, seconds=float("nan"))
    parts["results"]["NUTS"] = odder
    report = Report(**parts)
    again = Report.from_json(report.to_json(tmp_path / "metrics.json"))
    assert same(report, again)
    assert np.signbit(again.results["NUTS"].metrics["nll"][5])


def test_the_file_is_strict_json_with_every_task(report, tmp_path):
    content = strict(report.to_json(tmp_path / "metrics.json").read_text())
    nuts = content["results"]["NUTS"]
    assert nuts["metrics"]["nll"] == report.results["NUTS"].metrics["nll"].tolist()
    assert nuts["pit"][7][2:] == [None] * 3 and nuts["diagnostics"]["lost"] is None
    assert content["title"] == report.title and content["support_sizes"] == report.support_sizes.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a report of bayesmeta"),
        ("[]", "is not a report of bayesmeta"),
        ('{"format": "other"}', "is not a report of bayesmeta"),
        ('{"format": "bayesmeta report", "version": 99}', "version 99.*reads version 1"),
        ('{"format": "bayesmeta report", "version": 1}', "damaged"),
        ('{"format": "bayesmeta report", "version": 1, "results": {"a": {}}}', "damaged"),
        ('{"format": "bayesmeta report", "version": 1, "results": {}, "odd": 1}', "damaged"),
    ],
)
def test_another_file_is_refused_with_its_name(text, message, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"some\.json.*{message}"):
        Report.from_json(path)


def test_a_cut_file_is_refused(report, tmp_path):
    path = report.to_json(tmp_path / "metrics.json")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is not a report"):
        Report.from_json(path)


def test_csv_has_the_rows_of_summary(report, tmp_path):
    with open(report.to_csv(tmp_path / "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for row, expected in zip(rows, report.summary(), strict=True):
        assert (row["learner"], row["metric"]) == (expected["learner"], expected["metric"])
        for key in ("estimate", "lower", "upper"):
            assert (float(row[key]) if row[key] else float("nan")) == pytest.approx(expected[key], abs=0, nan_ok=True)
