"""A report as CSV and as strict JSON, and back: nothing is lost, NaN is null, infinities are words."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bayesmeta.report.evidence import Evidence
from bayesmeta.report.numbers import Row
from bayesmeta.report.results import Bands, Curves, Explanation, LearnerResult, ProbabilityMap

FORMAT, VERSION = "bayesmeta report", 1
INFINITE = {"Infinity": np.inf, "-Infinity": -np.inf}


def csv_text(rows: list[Row]) -> str:
    """Rows of `summary` as CSV with a header; what is not a number stays empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["learner", "metric", "estimate", "lower", "upper", "tasks"])
    for row in rows:
        ends = ["" if np.isnan(row[key]) else repr(float(row[key])) for key in ("estimate", "lower", "upper")]
        writer.writerow([row["learner"], row["metric"], *ends, row["tasks"]])
    return out.getvalue()


def json_text(report: Evidence) -> str:
    """Every field of a report as strict JSON; floats in full, so that reading gives the same bits."""
    content = {"format": FORMAT, "version": VERSION} | encode(report)
    return json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n"


def json_content(path: Path) -> dict[str, Any]:
    """What `json_text` wrote, still as JSON. Raises ValueError where it is something else, OSError where no file is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path} is not a report of bayesmeta: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f'{path} is not a report of bayesmeta: expected JSON with "format": "{FORMAT}"')
    if (version := content.pop("version", None)) != VERSION:
        raise ValueError(f"{path} is a report of version {version!r}; this bayesmeta reads version {VERSION}")
    return content


def decode(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of a report from `json_content`; any error of Python's where they are not what they should be."""
    maps = {"exact_maps": _maps(content["exact_maps"])} if "exact_maps" in content else {}  # older files have none
    return content | maps | {"results": {name: _result(result) for name, result in content["results"].items()}}


def encode(value: Any) -> Any:
    """``value`` in what JSON knows: dataclasses and mappings as objects, arrays as lists."""
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, np.ndarray):
        if np.isfinite(value).all():
            return value.tolist()
        words = value.astype(object)
        words[np.isnan(value)] = None
        for word, infinite in INFINITE.items():
            words[value == infinite] = word
        return words.tolist()
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _scalar(value: Any) -> Any:
    if isinstance(value, str):
        return INFINITE.get(value, value)
    return np.nan if value is None else value


def _result(content: dict[str, Any]) -> LearnerResult:
    scalars = {key: _scalar(content[key]) for key in ("seconds", "gradient_evaluations")}
    words = {key: {k: _scalar(v) for k, v in content[key].items()} for key in ("diagnostics", "settings")}
    bands = tuple(_bands(band) for band in content["bands"])
    return LearnerResult(**content | scalars | words | {"bands": bands, "maps": _maps(content.get("maps", ()))})


def _bands(content: dict[str, Any]) -> Bands:
    explanations = [Explanation(**one | {"probability": _scalar(one["probability"])}) for one in content.get("explanations", ())]
    curves = {when: Curves(**content[when]) for when in ("before", "after")}
    return Bands(**content | curves | {"explanations": tuple(explanations)})


def _maps(content: Iterable[dict[str, Any]]) -> tuple[ProbabilityMap, ...]:
    return tuple(ProbabilityMap(**one) for one in content)
