"""The complete rows of a table by group, padded into one tensor; what lacks a value is left out and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from bayesmeta.tasks.tables import Rows


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class GroupedRows:
    """``G`` groups in the order of their first row, each with its complete rows in the table's order.

    ================= =============== ============================================================================
    field             shape
    ================= =============== ============================================================================
    names             G               the groups' names as shown; where two are the same, the group's key is added
    x                 (G, N, F)       what stands in the padding means nothing
    y                 (G, N)          in the same way
    counts            (G,)            complete rows of each group
    num_missing       (G,)            its rows that lack a value
    left_out                          sizes of the groups without any complete row, which are not among the G
    ================= =============== ============================================================================
    """

    names: list[str]
    x: Tensor
    y: Tensor
    counts: Tensor
    num_missing: Tensor
    left_out: list[int]

    @property
    def mask(self) -> Tensor:
        """Which rows are no padding, ``(G, N)`` bool."""
        return within(self.counts, self.x.shape[1])

    def select(self, groups: Tensor) -> GroupedRows:
        """Only these groups, in that order, as wide as the largest of them; the groups left out belong to none."""
        counts = self.counts[groups]
        longest = int(counts.max())
        return GroupedRows(
            names=[self.names[i] for i in groups.tolist()], x=self.x[groups, :longest], y=self.y[groups, :longest],
            counts=counts, num_missing=self.num_missing[groups], left_out=[],
        )  # fmt: skip


def by_group(rows: Rows, complete: np.ndarray) -> GroupedRows:
    """The rows that are ``complete (R,)``, in float64. Raises ValueError where none is."""
    found: dict[str, int] = {}
    codes = np.array([found.setdefault(key, len(found)) for key in rows.group])
    keys = list(found)
    first = {code: row for row, code in reversed(list(enumerate(codes.tolist())))}
    names = [rows.name[first[code]] or key for code, key in enumerate(keys)]
    times = Counter(names)
    names = [name if times[name] == 1 else f"{name} ({key})" for name, key in zip(names, keys, strict=True)]

    counts = np.bincount(codes[complete], minlength=len(keys))
    missing = np.bincount(codes[~complete], minlength=len(keys))
    left = np.flatnonzero(counts)
    if len(left) == 0:
        raise ValueError(f"{rows.source}: expected complete rows, but every row lacks a value")
    new = np.full(len(keys), -1)
    new[left] = np.arange(len(left))

    order = np.flatnonzero(complete)
    order = order[np.argsort(codes[order], kind="stable")]
    task = new[codes[order]]
    counts = counts[left]
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[task]
    x = np.zeros((len(left), counts.max(), rows.x.shape[1]))
    y = np.zeros((len(left), counts.max()))
    x[task, place], y[task, place] = rows.x[order], rows.y[order]
    return GroupedRows(
        names=[names[code] for code in left], x=torch.from_numpy(x), y=torch.from_numpy(y), counts=torch.from_numpy(counts),
        num_missing=torch.from_numpy(missing[left]), left_out=missing[new < 0].tolist(),
    )  # fmt: skip


def within(counts: Tensor, width: int) -> Tensor:
    """The mask ``(T, width)`` of so many real entries in each row, the padding last."""
    return torch.arange(width) < counts[:, None]
