"""Rows for a `Panel`, out of CSV files, data frames and arrays, checked cell by cell; every complaint says where."""

from __future__ import annotations

import csv
import difflib
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

# How a missing number is written, in any case: nothing, R's and pandas' marks, and str(None).
MISSING = {"", "na", "nan", "none", "<na>", "nat"}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question for an error message about a name that is not among ``names``; empty where none is near."""
    folded = {str(n).lower(): n for n in names}
    near = difflib.get_close_matches(str(name).lower(), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


@dataclass(frozen=True)
class Rows:
    """Rows of grouped data: what a `Panel` is made of.

    ``group``: each row's group, ``R`` keys; ``name``: the group's name as shown, ``R`` entries. ``x (R, F)`` and
    ``y (R,)``: float64, NaN where missing. With ``has_exposure`` the last column of x is the log of an exposure.
    ``lines``: the line of each row in the file ``source``; None where the source is no file.
    """

    source: str
    group: Sequence[str]
    name: Sequence[str]
    x: np.ndarray
    y: np.ndarray
    group_label: str
    feature_names: tuple[str, ...]
    target_name: str
    has_exposure: bool = False
    lines: Sequence[int] | None = None

    def where(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.source}, " + (f"row {row}" if self.lines is None else f"line {self.lines[row]}")


@dataclass(frozen=True)
class Table:
    """Columns of cells by name, not yet read as numbers. ``lines`` as in `Rows`."""

    source: str
    columns: Mapping[str, Any]
    lines: Sequence[int] | None = None

    def where(self, row: int, column: str) -> str:
        """Where a cell stands, for messages."""
        return (
            f"{self.source}, "
            + (f"row {row}" if self.lines is None else f"line {self.lines[row]}")
            + f", column {column!r}"
        )

    def column(self, name: str) -> Any:
        """The cells of a column. Raises ValueError, with the nearest name, where there is none of that name."""
        if name in self.columns:
            return self.columns[name]
        columns = ", ".join(map(str, self.columns))
        raise ValueError(f"{self.source}: no column {name!r}{did_you_mean(name, self.columns)} (columns: {columns})")

    def numbers(self, name: str, missing: Collection[float] = ()) -> np.ndarray:
        """A column as float64 ``(R,)``, NaN where it is missing; values in ``missing`` stand for missing too.

        Raises ValueError where a cell holds text or an infinite number.
        """
        cells = np.asarray(self.column(name))
        if cells.ndim != 1:
            raise ValueError(f"{self.source}: column {name!r}: expected one axis, got shape {cells.shape}")
        if cells.dtype.kind in "biuf":
            values = cells.astype(np.float64)
        else:
            values = np.array(
                [self._number(cell, row, name) for row, cell in enumerate(cells.tolist())], dtype=np.float64
            )
        if np.isinf(values).any():
            row = int(np.isinf(values).argmax())
            raise ValueError(f"{self.where(row, name)}: expected a finite number, got {values[row]}")
        return np.where(np.isin(values, list(missing)), np.nan, values)

    def labels(self, names: Sequence[str]) -> list[str]:
        """Columns read as text and joined by a blank, one entry a row. Raises ValueError where a cell is empty."""
        columns = [[str(cell).strip() for cell in np.asarray(self.column(name)).tolist()] for name in names]
        for name, cells in zip(names, columns, strict=True):
            for row, cell in enumerate(cells):
                if cell.lower() in {"", "nan", "none", "<na>"}:
                    raise ValueError(f"{self.where(row, name)}: expected the name of a group, got {cell!r}")
        return [" ".join(cells) for cells in zip(*columns, strict=True)]

    def _number(self, cell: Any, row: int, name: str) -> float:
        text = str(cell).strip()
        if text.lower() in MISSING:
            return math.nan
        try:
            return float(text)
        except ValueError:
            hint = "a column of text must be encoded as numbers, such as 0 and 1"
            raise ValueError(f"{self.where(row, name)}: expected a number, got {text!r} ({hint})") from None


def read_csv(path: str | os.PathLike[str]) -> Table:
    """A comma-separated file with a header line, UTF-8. Blank lines are passed over.

    Raises ValueError, naming file and line, where the file is empty, has no rows, repeats a column, is not UTF-8, or
    has a row of another length than the header; FileNotFoundError where there is no such file.
    """
    source = str(path)
    rows: list[list[str]] = []
    lines: list[int] = []
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise ValueError(f"{source}, line 1: expected a header line of column names, got an empty line or file")
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise ValueError(
                    f"{source}, line 1: these columns appear more than once: {', '.join(map(repr, repeated))}"
                )
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(f"{source}, line {reader.line_num}: expected {len(header)} cells, got {len(row)}")
                rows.append(row)
                lines.append(reader.line_num)
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: expected text in UTF-8: {error}") from error
        except csv.Error as error:
            raise ValueError(f"{source}, line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{source}: expected rows below the header, got none")
    return Table(source, dict(zip(header, zip(*rows, strict=True), strict=True)), lines)


def read_frame(frame: Any) -> Table:
    """Anything with ``columns`` and ``frame[column]`` array-likes, such as a pandas or polars frame."""
    if not hasattr(frame, "columns"):
        raise TypeError(f"frame: expected an object with columns, such as a data frame, got {type(frame).__name__}")
    table = Table("frame", {name: frame[name] for name in frame.columns})
    if not table.columns or not len(next(iter(table.columns.values()))):
        raise ValueError("frame: expected columns and rows, got none")
    return table


def rows_of_table(
    table: Table,
    *,
    group: str | Sequence[str],
    features: Sequence[str],
    target: str,
    group_name: str | None = None,
    exposure: str | None = None,
    missing: Mapping[str, float | Collection[float]] | None = None,
) -> Rows:
    """The columns of a table that a panel uses (arguments: `Panel.from_csv`)."""
    if isinstance(features, str):
        raise TypeError(f"features: expected a list of column names, got the text {features!r}")
    codes = {
        name: set(np.atleast_1d(np.asarray(list(code) if isinstance(code, Collection) else code)).tolist())
        for name, code in (missing or {}).items()
    }
    for name in codes:
        table.column(name)  # a mistyped name would be passed over in silence
    keys = table.labels([group] if isinstance(group, str) else list(group))
    columns = [table.numbers(name, codes.get(name, ())) for name in features]
    names = tuple(features)
    if exposure is not None:
        columns.append(_log_exposure(table, exposure, codes.get(exposure, ())))
        names += (f"log({exposure})",)
    return Rows(
        source=table.source,
        group=keys,
        name=keys
        if group_name is None
        else [str(cell).strip() for cell in np.asarray(table.column(group_name)).tolist()],
        x=np.stack(columns, 1) if columns else np.empty((len(keys), 0)),
        y=table.numbers(target, codes.get(target, ())),
        group_label=group if isinstance(group, str) else ", ".join(group),
        feature_names=names,
        target_name=target,
        has_exposure=exposure is not None,
        lines=table.lines,
    )


def rows_of_arrays(
    group: Any,
    x: Any,
    y: Any,
    *,
    exposure: Any = None,
    feature_names: Sequence[str] | None = None,
    target_name: str = "y",
    group_label: str = "group",
) -> Rows:
    """One entry a row in each array (arguments: `Panel.from_arrays`)."""
    group, x, y = _array(group), _array(x), _array(y)
    x = x[:, None] if x.ndim == 1 else x
    if group.ndim != 1 or x.ndim != 2 or y.ndim != 1 or not len(group) == len(x) == len(y):
        raise ValueError(f"expected group (R,), x (R,) or (R, F) and y (R,), got {group.shape}, {x.shape}, {y.shape}")
    if len(group) == 0:
        raise ValueError("arrays: expected rows, got none")
    names = tuple(feature_names) if feature_names is not None else tuple(f"x{i}" for i in range(x.shape[1]))
    if len(names) != x.shape[1]:
        raise ValueError(f"feature_names: expected {x.shape[1]} names, got {len(names)}")
    columns = {group_label: group, target_name: y, **dict(zip(names, x.T, strict=True))}
    if exposure is not None:
        columns["exposure"] = _array(exposure)
        if columns["exposure"].shape != y.shape:
            raise ValueError(f"exposure: expected shape {y.shape}, got {columns['exposure'].shape}")
    if len(columns) != 2 + len(names) + (exposure is not None):
        raise ValueError(f"expected different names for the columns, got {(group_label, target_name, *names)}")
    return rows_of_table(
        Table("arrays", columns),
        group=group_label,
        features=names,
        target=target_name,
        exposure=None if exposure is None else "exposure",
    )


def _log_exposure(table: Table, name: str, missing: Collection[float]) -> np.ndarray:
    values = table.numbers(name, missing)
    if (values <= 0).any():
        row = int((values <= 0).argmax())
        raise ValueError(f"{table.where(row, name)}: expected an exposure above 0, got {values[row]:g}")
    return np.log(values)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
