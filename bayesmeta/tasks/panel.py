"""Real grouped data (repeated measurements of counties, schools, people): each group is a task."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any, Literal, TypedDict, Unpack, final

import numpy as np
import torch
from torch import Tensor

from bayesmeta.episodes import Episode, Points
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import check_request, check_size, choose_tasks
from bayesmeta.tasks.grouped_rows import by_group, within
from bayesmeta.tasks.scaling import Scaling, Standardizer, standardizer_of
from bayesmeta.tasks.splits import SPLITS, by_fractions, checked_fractions, index_of
from bayesmeta.tasks.tables import Rows, did_you_mean, read_csv, read_frame, rows_of_arrays, rows_of_table


class PanelOptions(TypedDict, total=False):
    """Options of every panel, however it is made; their meanings stand with `Panel`."""

    standardize: bool
    num_support: float | tuple[int, int]
    min_query: int
    max_query: int | None
    fractions: tuple[float, float, float]
    seed: int
    target_type: Literal["float", "int"]
    dtype: torch.dtype | None


@final
class Panel:
    """A finite family whose tasks are the groups of a table: `from_csv`, `from_frame`, `from_arrays`, `radon` make one.

    An episode's x is ``(T, N, F)`` with the features in the order they were named, its y ``(T, N)``. Each call draws
    a new split of a group's rows into support and query. Groups keep the order of their first row.

    ================= ===============================================================================================
    option
    ================= ===============================================================================================
    num_support=5     rows in the support set: a number; ``(low, high)``, drawn anew for each task; or a fraction of
                      the group's rows below 1 (a float, rounded down). A group too short for it gets fewer, down to
                      none, so that ``min_query`` rows are left
    min_query=1       rows kept for the query set wherever a group has them
    max_query=None    rows in the query set at most; None: all that are not in the support
    fractions         of the groups in the splits "train", "val", "test"; default ``(0.6, 0.2, 0.2)``
    seed=0            draws which group lands in which split
    standardize=False True: features and target get mean 0 and sd 1 over the rows of the *training* groups (in
                      population form; a constant column gets sd 1). Counts (``target_type="int"``) and a log
                      exposure stay as they are. ``scaling`` turns values to and fro
    target_type       "float" (default) or "int": y is int64, for labels and counts
    dtype             of x, and of y where it is "float"; default torch's
    ================= ===============================================================================================

    Rows that lack a feature, the target or the exposure are left out, and counted: ``num_rows_missing``, `summary`.

    ``scaling``: how x and y were standardised (by nothing, where they were not). ``feature_names``, ``target_name``.
    Raises ValueError where an option is out of its range, or where data and options do not fit.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        standardize: bool = False,
        num_support: float | tuple[int, int] = 5,
        min_query: int = 1,
        max_query: int | None = None,
        fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
        seed: int = 0,
        target_type: Literal["float", "int"] = "float",
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(num_support, float):
            check_size("num_support", num_support)
        elif not 0 <= num_support < 1:
            raise ValueError(f"num_support: expected a fraction in [0, 1) or a whole number of rows, got {num_support}")
        if min_query < 1 or (max_query is not None and max_query < min_query):
            raise ValueError(f"expected 1 <= min_query <= max_query, got min_query={min_query}, max_query={max_query}")
        checked_fractions(fractions)
        if target_type not in ("float", "int"):
            raise ValueError(f"target_type: expected 'float' or 'int', got {target_type!r}")
        self.source, self.group_label = rows.source, rows.group_label
        self.feature_names, self.target_name = rows.feature_names, rows.target_name
        self.num_support, self.min_query, self.max_query, self.fractions = num_support, min_query, max_query, fractions
        self.part: str | None = None

        complete = ~(np.isnan(rows.x).any(1) | np.isnan(rows.y))
        if target_type == "int" and (complete & (rows.y != np.round(rows.y))).any():
            row = int((complete & (rows.y != np.round(rows.y))).argmax())
            raise ValueError(
                f"{rows.where(row)}, column {rows.target_name!r}: expected a whole number, got {rows.y[row]}"
            )
        groups = by_group(rows, complete)
        x, y = groups.x, groups.y
        self._split_of = by_fractions(len(groups.counts), fractions, seed)
        training = groups.mask & (self._split_of == 0)[:, None]
        if not isinstance(standardize, bool):
            raise TypeError(f"standardize: expected True or False, got {standardize!r} (counts and classes are never scaled)")
        if standardize and not training.any():
            raise ValueError(f"standardize: no groups to train on among {len(groups.counts)} at fractions={fractions}")
        x_scale = standardizer_of(
            x[training], [standardize] * (x.shape[2] - rows.has_exposure) + [False] * rows.has_exposure
        )
        y_scale = standardizer_of(y[training][:, None], [standardize and target_type == "float"])
        dtype = dtype or torch.get_default_dtype()
        self._groups = replace(
            groups,
            x=x_scale.forward(x).to(dtype),
            y=y_scale.forward(y[..., None])[..., 0].to(dtype if target_type == "float" else torch.int64),
        )
        self.scaling = Scaling(
            Standardizer(x_scale.mean.to(dtype), x_scale.sd.to(dtype)),
            Standardizer(y_scale.mean[0].to(dtype), y_scale.sd[0].to(dtype)),
        )

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        group: str | Sequence[str],
        features: Sequence[str],
        target: str,
        group_name: str | None = None,
        exposure: str | None = None,
        missing: Mapping[str, float | Collection[float]] | None = None,
        **options: Unpack[PanelOptions],
    ) -> Panel:
        """From a comma-separated file in UTF-8: a header line, one row a measurement; an empty cell, NA, NaN: missing.

        ``group``: the column that says which group a row belongs to, or several columns that say it together.
        ``features``, ``target``: columns of numbers. ``group_name``: a column with the groups' names (that of a
        group's first row counts), where ``group`` holds codes. ``exposure``: a column whose *logarithm* becomes the
        last feature, for the offset of a Poisson model. ``missing``: numbers that stand for a missing value, by
        column: ``{"floor": 9}``. ``options``: see `Panel`.

        Raises ValueError naming file, line and column where a cell is no number, a row is too short or too long, a
        group has no name or an exposure is not above 0; and the nearest name where there is no such column.
        """
        table = read_csv(path)
        rows = rows_of_table(
            table,
            group=group,
            features=features,
            target=target,
            group_name=group_name,
            exposure=exposure,
            missing=missing,
        )
        return cls(rows, **options)

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        group: str | Sequence[str],
        features: Sequence[str],
        target: str,
        group_name: str | None = None,
        exposure: str | None = None,
        missing: Mapping[str, float | Collection[float]] | None = None,
        **options: Unpack[PanelOptions],
    ) -> Panel:
        """From a data frame, anything with ``columns`` and ``frame[column]`` array-likes; the rest as `from_csv`."""
        table = read_frame(frame)
        rows = rows_of_table(
            table,
            group=group,
            features=features,
            target=target,
            group_name=group_name,
            exposure=exposure,
            missing=missing,
        )
        return cls(rows, **options)

    @classmethod
    def from_arrays(
        cls,
        group: Any,
        x: Any,
        y: Any,
        *,
        exposure: Any = None,
        feature_names: Sequence[str] | None = None,
        target_name: str = "y",
        **options: Unpack[PanelOptions],
    ) -> Panel:
        """From arrays with one entry a row.

        ``group (R,)``, ``x (R,)`` or ``(R, F)``, ``y (R,)``, ``exposure (R,)``, the last as in `from_csv`. NaN is
        missing. Features are called ``x0, x1, ...`` where ``feature_names`` does not say. ``options``: see `Panel`.
        """
        return cls(
            rows_of_arrays(group, x, y, exposure=exposure, feature_names=feature_names, target_name=target_name),
            **options,
        )

    @classmethod
    def radon(cls, **options: Unpack[PanelOptions]) -> Panel:
        """Packaged: log radon (log pCi/L) in 919 homes of 85 Minnesota counties by floor (0 basement, 1 first floor).

        Source: US EPA State Residential Radon Survey, as in Gelman and Hill (2006), chapter 12; ``options``: `Panel`.
        """
        with resources.as_file(resources.files("bayesmeta.tasks") / "data" / "radon_mn.csv") as path:
            return cls.from_csv(
                path,
                group="county_fips",
                group_name="county",
                features=["floor"],
                target="log_radon",
                missing={"floor": 9},
                **options,
            )

    @property
    def num_tasks(self) -> int:
        """Number of groups with at least one complete row."""
        return len(self._groups.counts)

    @property
    def num_rows(self) -> int:
        """Number of complete rows."""
        return int(self._groups.counts.sum())

    @property
    def num_rows_missing(self) -> int:
        """Rows left out because a value was missing. Those of a group without any complete row belong to no split."""
        return int(self._groups.num_missing.sum()) + sum(self._groups.left_out)

    @property
    def num_groups_missing(self) -> int:
        """Groups left out because none of their rows was complete; they belong to no split."""
        return len(self._groups.left_out)

    @property
    def num_short(self) -> int:
        """Groups with too few rows for the full support (of ``(low, high)``: for ``high``), whose support is cut."""
        wanted = self._wanted(self._groups.counts)[1]
        return int((wanted > self._most(self._groups.counts)).sum())

    @property
    def target_scale(self) -> float:
        """One unit of y in original units: the target's training sd where it is standardised, else 1."""
        return float(self.scaling.y.sd)

    def task_names(self) -> list[str]:
        """The groups' names, in the order of `episodes`; where two are the same, the group's key is added."""
        return list(self._groups.names)

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """All rows of one group, x ``(n, F)`` and y ``(n,)``, in the episodes' units and the table's order."""
        groups = self._groups
        if name not in groups.names:
            raise ValueError(f"no group {name!r}{did_you_mean(name, groups.names)}")
        task = groups.names.index(name)
        count = int(groups.counts[task])
        return groups.x[task, :count], groups.y[task, :count]

    def split(self, name: str) -> Panel:
        """The panel of the groups in one split, "train", "val" (or "validation") or "test"; the scaling stays the same.

        Raises ValueError where there is no such split, where it has no groups, or where this is a split already.
        """
        name = SPLITS[index_of(name)]
        if self.part is not None:
            raise ValueError(f"split: this panel is the {self.part!r} split already")
        index = (self._split_of == SPLITS.index(name)).nonzero()[:, 0]
        if len(index) == 0:
            raise ValueError(
                f"split: {name!r} has no groups: {self.num_tasks} are too few for fractions={self.fractions}"
            )
        part = copy.copy(self)
        part.part = name
        part._groups, part._split_of = self._groups.select(index), self._split_of[index]
        return part

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Random groups, each at most once while they last (then with replacement), newly split into support and query.

        Zeros in the padding; its width depends on the panel and its options only, not on the draw.
        """
        check_request(num_tasks, generator)
        with rng(generator):
            return self._episode(choose_tasks(self.num_tasks, num_tasks))

    def episodes(self, *, generator: torch.Generator) -> Episode:
        """Every group once, in the order of `task_names`; the generator draws the split into support and query."""
        check_request(self.num_tasks, generator)
        with rng(generator):
            return self._episode(torch.arange(self.num_tasks))

    def summary(self) -> str:
        """What the panel holds, as text to read: groups, rows, short groups, rows left out, splits."""
        counts = self._groups.counts.double()
        if self.part is None:
            sizes = torch.bincount(self._split_of, minlength=3).tolist()
            splits = ", ".join(f"{name} {size}" for name, size in zip(SPLITS, sizes, strict=True)) + " groups"
        else:
            splits = f"this is {self.part!r}"
        lines = {
            "target": f"{self.target_name}, one unit of y = {self.target_scale:.4g}",
            "features": ", ".join(self.feature_names) or "none",
            "rows a group": f"min {int(counts.min())}, median {counts.quantile(0.5):g}, max {int(counts.max())}",
            "short groups": f"{self.num_short} of {self.num_tasks}, too short for num_support={self.num_support} with "
            f"min_query={self.min_query}: their support is cut",
            "missing": f"{self.num_rows_missing} rows with a missing value left out, "
            f"{self.num_groups_missing} groups with no other",
            "splits": splits,
        }
        head = f"{os.path.basename(self.source)}: {self.num_tasks} groups by {self.group_label}, {self.num_rows} rows"
        return "\n".join([head, *(f"  {key:<13} {text}" for key, text in lines.items())])

    def __repr__(self) -> str:
        part = "" if self.part is None else f", split {self.part!r}"
        size = f"{self.num_tasks} groups by {self.group_label}, {self.num_rows} rows"
        return f"Panel({size}, target {self.target_name!r}{part})"

    def _wanted(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and largest support that ``num_support`` asks for in groups of these sizes, ``(T,)`` each."""
        if isinstance(self.num_support, float):
            wanted = (counts * self.num_support + 1e-9).long()  # 0.29 × 100 is 28.999...
            return wanted, wanted
        low, high = self.num_support if isinstance(self.num_support, tuple) else (self.num_support, self.num_support)
        return torch.full_like(counts, low), torch.full_like(counts, high)

    def _most(self, counts: Tensor) -> Tensor:
        """The largest support that leaves ``min_query`` rows, ``(T,)``."""
        return (counts - self.min_query).clamp(min=0)

    def _episode(self, tasks: Tensor) -> Episode:
        every = self._groups.counts
        most = self._most(every)
        low, high = (torch.minimum(wanted, most) for wanted in self._wanted(every))
        support_width, query_width = int(high.max()), int((every - low).max())
        if self.max_query is not None:
            query_width = min(query_width, self.max_query)

        counts = every[tasks]
        low, high = self._wanted(counts)
        drawn = low + (torch.rand(len(tasks)) * (high - low + 1)).long()  # one of low .. high
        sizes = torch.minimum(drawn, most[tasks])
        # a random order of each group's rows, those of the padding last
        longest = self._groups.x.shape[1]
        order = torch.rand(len(tasks), longest).masked_fill(~within(counts, longest), 2.0).argsort(1)
        return Episode(
            self._points(tasks, order, torch.zeros_like(sizes), sizes, support_width),
            self._points(tasks, order, sizes, counts - sizes, query_width),
        )

    def _points(self, tasks: Tensor, order: Tensor, start: Tensor, sizes: Tensor, width: int) -> Points:
        """The rows ``start .. start + sizes`` of each task in the given order, at most ``width``."""
        mask = within(sizes, width)
        place = (start[:, None] + torch.arange(width)).clamp(max=order.shape[1] - 1)
        row = order.gather(1, place)
        x, y = self._groups.x[tasks[:, None], row], self._groups.y[tasks[:, None], row]
        return Points(x.masked_fill(~mask[..., None], 0), y.masked_fill(~mask, 0), mask)
