"""`Report`: what `bayesmeta.evaluate` gives back, and all that one does with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from matplotlib.axes import Axes

from bayesmeta.report import figures, gallery, numbers, page, serial, table
from bayesmeta.report.files import folder_for, write_whole
from bayesmeta.report.numbers import Row
from bayesmeta.report.results import Array, LearnerResult, ProbabilityMap, floats

FilePath = str | os.PathLike[str]


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Report:
    """How several learners did on the same T held-out tasks: numbers, pictures, files.

    ================ ===== =======================================================================================
    field            shape
    ================ ===== =======================================================================================
    results                a `LearnerResult` by learner; their order is the order of rows and colours
    support_sizes    (T,)  points that each task's learner saw
    query_sizes      (T,)  points that it was asked about
    task_names       T     default "task 1", "task 2", …
    title                  heading of the table and of the page
    target, feature        what is predicted, and from what (the input that pictures run along)
    seed                   of the episodes; it also seeds the resampling of intervals
    notes                  sentences that a reader must know, shown with the table
    environment            versions, threads, commit…
    histories        (K,)  by learner: "step", "loss" (K,); may have "validation_step", "validation" (V,)
    scored_tasks     (T,)  by metric, bool: the tasks that it is of, where these are not all that have query points
    explanation_names      what may explain a task, where the family knows: those of "mode_coverage"
    exact_maps             the exact `ProbabilityMap` of the tasks in the learners' ``maps``, where it is known
    ================ ===== =======================================================================================

    Raises ValueError, naming learner and field, where results do not belong to the same tasks.
    """

    results: Mapping[str, LearnerResult]
    support_sizes: Array
    query_sizes: Array
    task_names: tuple[str, ...] = ()
    title: str = "Held-out tasks"
    target: str = "y"
    feature: str = "x"
    seed: int = 0
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    histories: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    scored_tasks: Mapping[str, Array] = field(default_factory=dict)
    explanation_names: tuple[str, ...] = ()
    exact_maps: tuple[ProbabilityMap, ...] = ()

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        keep("results", dict(self.results))
        for name in ("support_sizes", "query_sizes"):
            keep(name, np.asarray(getattr(self, name)).astype(np.int64))
        keep("task_names", tuple(self.task_names) or tuple(f"task {i + 1}" for i in range(self.support_sizes.size)))
        keep("notes", tuple(self.notes))
        keep("environment", {key: str(value) for key, value in self.environment.items()})
        keep("histories", {n: {k: floats(v) for k, v in h.items()} for n, h in self.histories.items()})
        keep("scored_tasks", {name: np.asarray(which, dtype=bool) for name, which in self.scored_tasks.items()})
        keep("explanation_names", tuple(self.explanation_names))
        keep("exact_maps", tuple(self.exact_maps))
        self._check()

    def _check(self) -> None:
        if not self.results:
            raise ValueError("a report needs the results of at least one learner, got none")
        tasks = self.support_sizes.size
        if tasks == 0 or self.support_sizes.shape != (tasks,) or self.query_sizes.shape != (tasks,):
            shapes = f"{self.support_sizes.shape} and {self.query_sizes.shape}"
            raise ValueError(f"support_sizes and query_sizes must have shape (T,) with T > 0, got {shapes}")
        if not self.query_sizes.any():
            raise ValueError("no task has a query point: there is nothing to score")
        if len(self.task_names) != tasks:
            raise ValueError(f"task_names must have one name for each of {tasks} tasks, got {len(self.task_names)}")
        for learner, result in self.results.items():
            for name, values in result.per_task().items():
                if len(values) != tasks:
                    raise ValueError(f"{learner}: {name} has {len(values)} tasks, the report has {tasks}")
        for metric, which in self.scored_tasks.items():
            if which.shape != (tasks,):
                raise ValueError(f"scored_tasks[{metric!r}] must have shape (T,) = ({tasks},), got {which.shape}")
        for learner, history in self.histories.items():
            if not {"step", "loss"} <= set(history):
                raise ValueError(f'history of {learner} needs "step" and "loss", got {sorted(history)}')
            for steps, losses in (("step", "loss"), ("validation_step", "validation")):
                sizes = [np.size(history.get(key, ())) for key in (steps, losses)]
                if sizes[0] != sizes[1]:
                    raise ValueError(f"history of {learner}: {steps} and {losses} have sizes {sizes[0]} and {sizes[1]}")

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self.support_sizes)} tasks, learners: {', '.join(self.results)})"

    @cached_property
    def _rows(self) -> list[Row]:
        return numbers.summary(self)

    def summary(self) -> list[Row]:
        """Rows ``{learner, metric, estimate, lower, upper, tasks}``: means over so many tasks, 95% intervals by resampling tasks.

        ``calibration_error`` and ``ece`` pool the points of all tasks; ``seconds`` and ``gradient_evaluations`` have no
        interval (NaN). A metric that is NaN at a task with query points is NaN as a whole.
        """
        return [dict(row) for row in self._rows]

    def paired(self, metric: str = "nll", reference: str | None = None) -> list[Row]:
        """Rows ``{learner, reference, metric, estimate, lower, upper, excludes_zero}``.

        Means of learner − reference over the same tasks, with 95% intervals by resampling tasks. ``reference``: a
        learner's name, default the best in NLL. Raises ValueError for an unknown metric or learner.
        """
        return numbers.paired(self, metric, reference)

    def table(self, *, reference: str | None = None) -> str:
        """The headline numbers as aligned text, and paired differences from ``reference`` (default the best in NLL)."""
        return table.text_table(self, self._rows, reference)

    def plot(self, kind: str, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw one picture on ``ax`` (default: a new figure, unknown to pyplot) and return its axes.

        ============= ===========================================================================================
        kind          options
        ============= ===========================================================================================
        "metric"      ``metric="nll"``
        "calibration" ``curve="central"`` or "quantile"; ``learners=`` names, default all
        "pit"         ``learner=`` default the best in NLL; ``bins=10``
        "reliability" ``learner=`` default the best in NLL; ``bins=15``; classification only
        "bands"       ``learner=`` default the best in NLL; ``task=0`` among those kept; ``when="after"`` or "before"
        "explanation" ``learner=`` default the best in NLL; ``task=0`` among the ambiguous ones kept
        "map"         ``learner=`` default the exact map; ``task=0``; ``what="probability"`` or "entropy"
        "shrinkage"   ``site=`` default the first; ``no_pooling=``, ``partial=``, ``complete=`` names of learners
        "loss"        ``learner=`` default the first that was trained
        ============= ===========================================================================================

        Raises ValueError for an unknown kind (naming the nearest), or where the report lacks what the picture needs.
        """
        return figures.plot(self, kind, ax, **options)

    def to_csv(self, path: FilePath) -> Path:
        """Write the rows of `summary`; returns the path. Raises OSError in one line where it cannot be written."""
        return write_whole(path, serial.csv_text(self._rows))

    def to_json(self, path: FilePath) -> Path:
        """Write everything that tables and pictures are made of, per-task values included; NaN is null, strict JSON."""
        return write_whole(path, serial.json_text(self))

    @classmethod
    def from_json(cls, path: FilePath) -> Report:
        """Read what `to_json` wrote. Raises ValueError where the file is something else, or of another version."""
        content = serial.json_content(Path(path))
        try:
            return cls(**serial.decode(content))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged report: {type(error).__name__} {error}") from None

    def to_html(self, path: FilePath) -> Path:
        """Write one self-contained page: tables, pictures, how to read them, settings; no script, nothing loaded."""
        return write_whole(path, page.html_page(self, self._rows, gallery.pictures(self, self._rows)))

    def save(self, folder: FilePath) -> Path:
        """Write ``report.html``, ``metrics.csv``, ``metrics.json``, ``figures/*.png`` into ``folder``, made if need be.

        Each file is written whole or not at all. Returns the folder. Raises OSError in one line where that fails.
        """
        place = folder_for(folder)
        pictures = gallery.pictures(self, self._rows)
        self.to_csv(place / "metrics.csv")
        self.to_json(place / "metrics.json")
        for picture in pictures:
            write_whole(folder_for(place / "figures") / f"{picture.name}.png", picture.png)
        write_whole(place / "report.html", page.html_page(self, self._rows, pictures))
        return place
