"""All the pictures of a report's page, each with how to read it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayesmeta import plots
from bayesmeta.plots.bands import bands_key
from bayesmeta.plots.style import GREY, house_settings, legend, name_panel, new_grid
from bayesmeta.plots.training import loss_key
from bayesmeta.report.against import LABELS, all_of, finds_all
from bayesmeta.report.evidence import Evidence
from bayesmeta.report.figures import (
    bands_of,
    explained_of,
    history_of,
    looks_of,
    maps_of,
    metric_axes,
    pits_of,
    pooling_roles,
    probs_of,
    shared_sites,
    shrinkage_axes,
)
from bayesmeta.report.measures import HEADLINE
from bayesmeta.report.numbers import Row, by_learner

DPI = 192  # twice a screen's, and fine enough for print
MOST_TASKS, MOST_MAPS = 3, 2  # ambiguous tasks in a picture
MOST_SITES = 6  # shrinkage pictures on a page

SCORES = """
A dot is a mean over tasks, its line the 95% interval when tasks are drawn anew. Overlapping lines do not mean that
two learners are equal: all met the same tasks, so look at the paired differences in the table. A dashed line is the
nominal coverage; a score far outside the others' range is an arrow with its value.
"""
CALIBRATION = """
For each nominal level, the share of query targets that fell inside the central predictive interval, as a mean over
tasks: each task counts alike, as in the table. On the diagonal, intervals hold what they promise. Below it, too many
targets fall outside: the learner is overconfident. Above it, intervals are wider than need be: underconfident. The
band is 95%, by drawing tasks anew; grey lines are the other learners.
"""
PIT = """
Histogram of the probability integral transform, F(y), points of all tasks together. Flat is calibrated. A U means
overconfident (targets in both tails), a hump underconfident, a slope biased: rising to the right, predictions are too
low. Of a calibrated learner, 95% of bars end in the grey band, points taken as independent; a number on a bar is the
height of one that was cut.
"""
RELIABILITY = """
Query points sorted into 15 bins by the probability of the likeliest class, points of all tasks together; each dot is
a bin's accuracy, its area grows with the bin's points, its line is a 95% interval by drawing tasks anew. Below the
diagonal the learner is surer than it is right: overconfident. The grey bars count the points; ECE is the mean
distance from the diagonal, weighted by them.
"""
BANDS = """
One row a learner. Left, what it predicts before it has seen anything of a task; then, tasks after their n support
points (filled). Query points (hollow) were not seen: about half should lie in the dark band and nine in ten in the
pale one. Thin lines are draws of the mean: where they fan out, the learner knows that it does not know. Where all
draws are one line, it has a single answer, right or wrong.
"""
EXPLANATIONS = """
A few of the ambiguous tasks. The support points (filled) leave open which of the dashed curves the task is: next to
the task, how likely each is given those points. Thin lines are draws of a learner's own curve after it has seen the
points. Who knows that it does not know has draws near every dashed curve; a single answer is near one of them at best,
and near none where it is a compromise. Under a learner's name: in how many of all ambiguous tasks it finds them all.
"""
MAPS = """
For each task, above, the probability of class 1 over both inputs, below, the entropy of the class, with its mean over
the map: left what is exactly so given the support points (crosses: class 1), then what each learner says. A thin line
is the border that one draw of a learner sees: a learner that knows what the points leave open has many different ones.
Under its name: of the labels that all tasks leave open, the share that its draws give.
"""
SHRINKAGE = """
Each task's {site}: hollow where the task stands alone, filled where {partial} puts it, which lets tasks learn from
each other. The dashed line is the one value that all tasks share under complete pooling. Tasks with few points should
be drawn far towards the others, tasks with many hardly at all.
"""
TRAINING = """
Meta-loss of each step (pale), its running median (bold), validation (dots). Objectives differ between learners, so
only shapes can be compared, not heights: still falling at the end means stopped too early, validation rising means
overfitting to the training tasks.
"""


class Picture(NamedTuple):
    """A finished picture: file name without ending, heading, how to read it, PNG bytes, width in CSS pixels."""

    name: str
    title: str
    caption: str
    png: bytes
    width: int


Parts = tuple[str, str, str, Axes]


def pictures(report: Evidence, rows: list[Row]) -> list[Picture]:
    """Every picture that the report has the data for, in reading order; ``rows`` of `summary`."""
    with house_settings():
        return [_finished(*parts) for draw in EVERY for parts in draw(report, rows)]


def _scores(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    have = {row["metric"] for row in rows}
    metrics = [metric for metric in HEADLINE if metric in have]
    if "coverage50" in have and "coverage90" in have:
        metrics.insert(metrics.index("coverage90"), "coverage50")
    if metrics:
        axes = new_grid(len(metrics), cell=(2.35, 0.7 + 0.22 * len(report.results)), columns=3, sharey=True)
        for ax, metric in zip(axes, metrics, strict=True):
            metric_axes(report, rows, metric, ax, numbers=False)
        yield "metrics", "Scores", SCORES, axes[0]


def _calibration(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    if pits := pits_of(report):
        ninety = np.array([0.9])
        shares = {name: plots.coverage(pit, levels=ninety, resamples=2).observed[0] for name, pit in pits.items()}
        notes = {name: f"90% holds {100 * share:.0f}%" for name, share in shares.items()}
        axes = plots.calibration_grid(pits, seed=report.seed, look=looks_of(report), notes=notes)
        yield "calibration", "Calibration: are the intervals as wide as they should be?", CALIBRATION, axes[0]


def _pit(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    if pits := pits_of(report):
        axes = plots.pit_grid(pits, look=looks_of(report))
        yield "pit", "Where targets fell in their predictive distributions", PIT, axes[0]


def _reliability(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    ece = {name: numbers[0] for (name, metric), numbers in by_learner(rows).items() if metric == "ece"}
    # A NaN among the probabilities has no place in a bin; the remarks under the table name such a learner.
    have = {name: pair for name, pair in probs_of(report).items() if np.isfinite(ece[name])}
    if have:
        probs, labels = ({name: pair[i] for name, pair in have.items()} for i in (0, 1))
        notes = {name: f"ECE {ece[name]:.3f}" for name in have}
        axes = plots.reliability_grid(probs, labels, seed=report.seed, look=looks_of(report), notes=notes)
        yield "reliability", "Reliability: is it right as often as it says?", RELIABILITY, axes[0]


def _bands(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    have = bands_of(report)
    if len({len(bands) for bands in have.values()}) == 1:
        axes = plots.bands_grid(have, x=report.feature, y=report.target, look=looks_of(report))
        legend(axes[0][-1], bands_key(GREY))
        yield "bands", "Predictions before and after a few points", BANDS, axes[0][0]


def _explanations(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    have = {name: bands[:MOST_TASKS] for name, bands in explained_of(report).items()}
    if have and len({len(bands) for bands in have.values()}) == 1:
        many = all_of(report).split()[0]
        notes = {name: f"{many} in {share:.0%}" for name, share in finds_all(report).items()}
        options: dict[str, Any] = {"x": report.feature, "y": report.target, "look": looks_of(report), "notes": notes}
        axes = plots.explained_grid(have, **options)
        wide = max(axes, key=lambda ax: ax.get_position().x1)
        legend(wide, plots.explained_key(GREY))
        yield "explanations", f"Ambiguous tasks: who sees {all_of(report)}?", EXPLANATIONS, axes[0]


def _maps(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    have, exact = maps_of(report), report.exact_maps[:MOST_MAPS]
    if exact and all(len(maps) == len(report.exact_maps) for maps in have.values()):
        labels = {name: estimate for (name, metric), (estimate, _, _) in by_learner(rows).items() if metric == LABELS}
        notes = {name: f"{share:.0%} of labels" for name, share in labels.items() if np.isfinite(share)}
        shown = {name: maps[:MOST_MAPS] for name, maps in have.items()}
        axes = plots.map_grid(exact, shown, x="first input", y="second input", look=looks_of(report), notes=notes)
        yield "maps", "What a few labels leave open: probability and entropy over both inputs", MAPS, axes[0]


def _shrinkage(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    roles = pooling_roles(report)
    if all(name in report.results for name in roles):
        for i, site in enumerate(shared_sites(report, roles)[:MOST_SITES], start=1):
            name = f"shrinkage-{i}-{re.sub(r'[^A-Za-z0-9]+', '-', site)[:40]}".rstrip("-")
            caption = SHRINKAGE.format(site=site, partial=roles[1])
            yield name, f"Shrinkage of {site}", caption, shrinkage_axes(report, None, site=site)


def _training(report: Evidence, rows: list[Row]) -> Iterator[Parts]:
    if names := list(report.histories):
        look, axes = looks_of(report), new_grid(len(names), cell=(3.4, 2.0), columns=2)
        for ax, name in zip(axes, names, strict=True):
            plots.loss_curve(**history_of(report, name), colour=look[name].colour, y="", key_outside=False, ax=ax)
            name_panel(ax, name, look[name])
        legend(axes[min(len(names), 2) - 1], loss_key(GREY))
        yield "loss", "Training", TRAINING, axes[0]


EVERY = (_scores, _explanations, _maps, _calibration, _pit, _reliability, _bands, _shrinkage, _training)


def _finished(name: str, title: str, caption: str, ax: Axes) -> Picture:
    figure, out = ax.figure, io.BytesIO()
    assert isinstance(figure, Figure)
    # No version in the file: the same report gives the same bytes.
    figure.savefig(out, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.04, metadata={"Software": None})
    png = out.getvalue()
    width = int.from_bytes(png[16:20], "big")  # a PNG's own header says so
    return Picture(name, title, " ".join(caption.split()), png, width * 96 // DPI)
