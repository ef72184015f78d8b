"""The report as one HTML page that needs nothing else: no script, no font, no file, no network."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from html import escape
from typing import Any

import numpy as np

from bayesmeta.plots.formats import decimals, number
from bayesmeta.plots.style import looks
from bayesmeta.report.against import meanings
from bayesmeta.report.evidence import Evidence
from bayesmeta.report.gallery import Picture
from bayesmeta.report.measures import CALIBRATION_ERROR, ECE, PROPER, measure
from bayesmeta.report.numbers import Row, best, by_learner, failures, off_nominal, paired, scored, winners
from bayesmeta.report.style import CSS
from bayesmeta.report.table import FEW_TASKS
from bayesmeta.report.verdict import verdict
from bayesmeta.report.words import amount, duration, per_task


def html_page(report: Evidence, rows: list[Row], drawn: list[Picture]) -> str:
    """The whole page; ``rows`` of `summary`, ``drawn`` of `pictures`."""
    title = escape(report.title)
    body = [
        f"<header><h1>{title}</h1>{_lead(report)}</header>",
        _section("What it shows", _bullets(verdict(report, rows))),
        _section("Scores of each learner", _scores(report, rows) + _remarks(report)),
        _section("Differences on the same tasks", _differences(report, rows)) if len(report.results) > 1 else "",
        _intervals(report, rows),
        *(_figure(picture) for picture in drawn),
        _section("Learners", _learners(report)),
        _footer(report),
    ]
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{CSS}</style>\n</head>\n"
    )
    return head + "<body>\n<main>\n" + "\n".join(part for part in body if part) + "\n</main>\n</body>\n</html>\n"


def _lead(report: Evidence) -> str:
    tasks, learners = len(report.query_sizes), len(report.results)
    who = f"{learners} learners" if learners > 1 else "One learner"
    many = f"{tasks:,} held-out tasks" if tasks > 1 else "one held-out task"
    return (
        f'<p class="lead">{who} met the same {many}. In each task a learner saw the support points '
        f"({per_task(report.support_sizes)}), adapted to them, and then gave a predictive distribution of "
        f"<em>{escape(report.target)}</em> given <em>{escape(report.feature)}</em> at the query points "
        f"({per_task(report.query_sizes)}), whose targets it had not seen. Scores compare those distributions with "
        "the targets: how near they are, and whether their uncertainty is right.</p>"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _bullets(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _scores(report: Evidence, rows: list[Row]) -> str:
    columns = [_column(report, rows, metric) for metric in _metrics(rows) if not _is_interval(metric)]
    results = report.results.items()
    times = {n: f"<td>{duration(r.seconds)}</td>" for n, r in results}
    counts = {n: f"<td>{amount(r.gradient_evaluations)}</td>" for n, r in results}
    columns += [(_heading("time", "all tasks"), times), (_heading("gradients", "per task"), counts)]
    caption = "Means over tasks; in brackets the 95% interval by resampling tasks. Bold: best of its column."
    pooled = {
        CALIBRATION_ERROR: "Calibration error is the mean squared gap of 20 quantile levels.",
        ECE: "ECE is the expected calibration error in 15 bins, all points together.",
    }
    own = (words for metric, words in pooled.items() if metric in _metrics(rows))
    caption = " ".join([caption, *own, *meanings(report, rows)])
    return _table(caption, columns, list(report.results), report)


def _intervals(report: Evidence, rows: list[Row]) -> str:
    columns = [_column(report, rows, metric) for metric in _metrics(rows) if _is_interval(metric)]
    caption = (
        "Share of query targets inside the central predictive intervals and their width, means over tasks; in brackets "
        "the 95% interval by resampling tasks. An exclamation mark: it excludes the nominal level. Narrow is good only "
        "where coverage is right."
    )
    return _section("Predictive intervals", _table(caption, columns, list(report.results), report)) if columns else ""


def _metrics(rows: list[Row]) -> list[str]:
    return [m for m in dict.fromkeys(row["metric"] for row in rows) if m not in ("seconds", "gradient_evaluations")]


def _is_interval(metric: str) -> bool:
    return metric.startswith(("coverage", "width"))


def _column(report: Evidence, rows: list[Row], metric: str) -> tuple[str, dict[str, str]]:
    numbers = by_learner(rows)
    own = {n: numbers[n, metric] for n in report.results if (n, metric) in numbers}
    bold, off = ({n for n in own if (n, metric) in those} for those in (winners(rows), off_nominal(rows)))
    what = measure(metric)
    few = f", {int(scored(report, metric).sum()):,} tasks" if metric in report.scored_tasks else ""
    return _heading(what.label, what.direction + few), _cells(own, bold, off=off)


def _differences(report: Evidence, rows: list[Row]) -> str:
    reference = best(report)
    others = [name for name in report.results if name != reference]
    columns: list[tuple[str, dict[str, str]]] = []
    for metric in [m for m in PROPER if m in report.results[reference].metrics]:
        gaps = {row["learner"]: row for row in paired(report, metric, reference)}
        own = {n: (row["estimate"], row["lower"], row["upper"]) for n, row in gaps.items()}
        clear = {n for n, row in gaps.items() if row["excludes_zero"]}
        columns.append((_heading(measure(metric).label, measure(metric).direction), _cells(own, clear, sign=True)))
    chosen = (reference, "nll") in winners(rows)
    named = f"{reference}, the best in NLL," if chosen else reference
    caption = (
        f"Learner minus {named} task by task; in brackets the 95% interval by resampling tasks. Bold: the interval "
        "excludes zero. Intervals are one at a time"
    )
    doubt = f", and {reference} was chosen on these same tasks, so gaps just clear of zero are weak evidence."
    caption += doubt if chosen else "."
    return _table(caption, columns, others, report)


def _heading(label: str, note: str) -> str:
    return f'<th scope="col">{escape(label)}<small>{escape(note)}</small></th>'


def _cells(
    own: Mapping[str, tuple[float, float, float]], bold: set[str], *, off: Collection[str] = (), sign: bool = False
) -> dict[str, str]:
    halves = [(upper - lower) / 2 for _, lower, upper in own.values()]
    places = decimals([estimate for estimate, _, _ in own.values()], halves)

    def show(value: float) -> str:
        return ("+" if sign and value > 0 else "") + number(value, places)

    cells = {}
    for name, (estimate, lower, upper) in own.items():
        ends = f"<small>[{show(lower)}, {show(upper)}]</small>" if np.isfinite(upper - lower) else ""
        value = f"<strong>{show(estimate)}</strong>" if name in bold else show(estimate)
        mark = "<b>!</b> " if name in off else ""
        cells[name] = f"<td>{mark}{value}{ends}</td>".replace("-", "\N{MINUS SIGN}")
    return cells


def _table(caption: str, columns: list[tuple[str, dict[str, str]]], names: list[str], report: Evidence) -> str:
    look = looks(report.results)
    head = "".join(heading for heading, _ in columns)
    lines = []
    for name in names:
        dot = f'<i style="background:{look[name].colour}"></i>'
        cells = "".join(cells.get(name, "<td>\N{EN DASH}</td>") for _, cells in columns)
        lines.append(f'<tr><th scope="row">{dot}{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">learner</th>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>\n"
        f'<p class="caption">{escape(caption)}</p>'
    )


def _remarks(report: Evidence) -> str:
    tasks = len(report.query_sizes)
    few = [f"With {tasks} tasks to resample, intervals are too narrow or missing."] if tasks < FEW_TASKS else []
    sentences = [*few, *failures(report), *report.notes]
    return f'<div class="notes">{_bullets(sentences)}</div>' if sentences else ""


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f"<section>\n<h2>{escape(picture.title)}</h2>\n<figure>\n"
        f'<div class="wide"><img src="data:image/png;base64,{data}" alt="{escape(picture.title)}" '
        f'style="width:{picture.width}px"></div>\n'
        f"<figcaption><b>How to read it.</b> {escape(picture.caption)}</figcaption>\n</figure>\n</section>"
    )


def _learners(report: Evidence) -> str:
    cards, look = [], looks(report.results)
    for name, result in report.results.items():
        effort = {
            "time, all tasks": duration(result.seconds),
            "gradients per task": amount(result.gradient_evaluations),
        }
        groups = [("Settings", result.settings), ("Diagnostics", result.diagnostics), ("Effort", effort)]
        lists = "".join(f"<h4>{title}</h4>{_pairs(items)}" for title, items in groups if items)
        cards.append(f'<article style="border-color:{look[name].colour}"><h3>{escape(name)}</h3>{lists}</article>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _pairs(items: Mapping[str, Any]) -> str:
    def show(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    pairs = (f"<dt>{escape(str(key))}</dt><dd>{escape(show(value))}</dd>" for key, value in items.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _footer(report: Evidence) -> str:
    facts = {"seed": report.seed, **report.environment}
    return f"<footer><h2>Environment</h2>{_pairs(facts)}</footer>"
