"""Points and episodes: padded, masked batches of tasks.

Axes: ``T`` tasks, ``N`` points, ``I`` the shape of one input, ``O`` the shape of one output.
Tasks with unequal numbers of points are padded to the longest; ``mask`` says which points are real.
Whatever stands in the padding is never looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Beyond this size float32 sums of squares overflow, and a loss turns infinite without an exception.
LARGEST_TARGET = 1e15


def as_tensor(value: Any) -> Tensor:
    """A tensor of ``value`` (tensor, array, nested list); float64 arrays of data become the default float type."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"expected an array of numbers; ragged lists go to Points.from_tasks ({error})") from None
    if array.dtype.kind not in "biuf":
        kind = "an array of Python objects" if array.dtype == object else str(array.dtype)
        raise TypeError(f"expected numbers, got {kind} (ragged lists go to Points.from_tasks)")
    # a copy: torch warns of arrays that must not be written to, and does not know the other byte order
    tensor = torch.as_tensor(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


class Points(NamedTuple):
    """Observed points of ``T`` tasks, padded to ``N`` points each.

    ``x``: inputs ``(T, N, *I)``. ``y``: targets ``(T, N)`` or ``(T, N, *O)``, or None where they are to be
    predicted. ``mask``: ``(T, N)`` bool, True where a point is real. `Points.of` fills in and checks the mask.
    """

    x: Tensor
    y: Tensor | None
    mask: Tensor

    @property
    def num_tasks(self) -> int:
        """``T``."""
        return self.mask.shape[0]

    @property
    def num_points(self) -> int:
        """``N``, the padded number of points; `counts` has each task's own."""
        return self.mask.shape[1]

    @property
    def counts(self) -> Tensor:
        """Number of real points of each task, ``(T,)``."""
        return self.mask.sum(-1)

    @classmethod
    def of(cls, x: Any, y: Any = None, mask: Any = None) -> Points:
        """Points from tensors, arrays or nested lists; every point is real where no ``mask`` is given.

        Raises ValueError where the shapes of ``x``, ``y`` and ``mask`` do not agree on ``(T, N)``.
        """
        x = as_tensor(x)
        if x.dim() < 2:
            raise ValueError(f"x: expected shape (T, N, *I) with at least 2 axes, got {tuple(x.shape)}")
        y = None if y is None else as_tensor(y)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else as_tensor(mask)
        points = cls(x, y, mask)
        points.check_shapes()
        return points

    @classmethod
    def from_tasks(cls, tasks: Sequence[tuple[Any, Any]]) -> Points:
        """Ragged tasks, a list of ``(x, y)`` with ``x (N_i, *I)`` and ``y (N_i,)`` or ``(N_i, *O)``, padded to one batch."""
        if len(tasks) == 0:
            raise ValueError("expected at least one task, got an empty list")
        xs, ys = zip(*((as_tensor(x), as_tensor(y)) for x, y in tasks), strict=True)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if x.dim() < 1 or y.dim() < 1 or len(x) != len(y):
                raise ValueError(f"task {i}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; expected equal first axes")
        return cls(_pad(xs, "x"), _pad(ys, "y"), _mask_of([len(x) for x in xs], xs[0].device))

    def to_tasks(self) -> list[tuple[Tensor, Tensor | None]]:
        """The tasks one by one, without their padding: the inverse of `from_tasks`."""
        return [
            (self.x[i, keep], None if self.y is None else self.y[i, keep]) for i, keep in enumerate(self.mask)
        ]

    def select(self, tasks: Any) -> Points:
        """The chosen tasks (an integer, a slice, a list, an index tensor or a boolean one), in that order, the task axis kept."""
        index = tasks if isinstance(tasks, slice) else torch.atleast_1d(torch.as_tensor(tasks))
        return Points(self.x[index], None if self.y is None else self.y[index], self.mask[index])

    def union(self, other: Points) -> Points:
        """``self`` and ``other`` behind each other along the point axis (same tasks)."""
        if self.num_tasks != other.num_tasks:
            raise ValueError(f"expected the same tasks, got {self.num_tasks} and {other.num_tasks}")
        if (self.y is None) != (other.y is None):
            raise ValueError("one of the two sets has no y: a union needs y in both or in neither")
        y = None if self.y is None or other.y is None else torch.cat([self.y, other.y], 1)
        return Points(torch.cat([self.x, other.x], 1), y, torch.cat([self.mask, other.mask], 1))

    def to(self, *args: Any, **kwargs: Any) -> Points:
        """As `torch.Tensor.to`; a dtype changes only floating-point tensors."""
        return Points(_to(self.x, *args, **kwargs), None if self.y is None else _to(self.y, *args, **kwargs),
                      self.mask.to(self.mask.device if (d := _device(*args, **kwargs)) is None else d))

    def filled(self) -> Points:
        """The same points with every padded entry replaced by a real one, so that no NaN can leak from the padding.

        A padded ``x`` or ``y`` takes the value of the first real point of its own task, else of the first task
        that has one, else 0 (``x``) and 1 (``y``). A set without columns gets one padded column.
        """
        if self.num_points == 0:
            self = Points(*(None if v is None else v.new_zeros(v.shape[0], 1, *v.shape[2:]) for v in self))  # type: ignore[arg-type]
        x = _fill(self.x, self.mask, 0.0)
        y = None if self.y is None else _fill(self.y, self.mask, 1.0)
        return Points(x, y, self.mask)

    def check_shapes(self) -> None:
        """Raises ValueError where ``x``, ``y`` and ``mask`` do not agree on ``(T, N)``."""
        if self.mask.dtype != torch.bool or self.mask.dim() != 2:
            raise ValueError(f"mask: expected bool of shape (T, N), got {self.mask.dtype} of shape {tuple(self.mask.shape)}")
        for name, value in (("x", self.x), ("y", self.y)):
            if value is not None and value.shape[:2] != self.mask.shape:
                raise ValueError(f"{name}: expected shape (T, N, ...) = {tuple(self.mask.shape)} + ..., got {tuple(value.shape)}")

    def check(self, role: str = "points") -> None:
        """Raises ValueError naming the task and the argument where a real point is not usable.

        Real points must be finite, and targets at most `LARGEST_TARGET` in size (a larger one overflows the
        loss silently). ``role`` (say ``"support"``) stands in the message.
        """
        self.check_shapes()
        if self.num_tasks == 0:
            raise ValueError(f"{role}: expected at least one task, got none")
        for name, value in (("x", self.x), ("y", self.y)):
            if value is None or not value.is_floating_point():
                continue
            bad = ~value.isfinite() if name == "x" else ~(value.abs() <= LARGEST_TARGET)
            bad = bad.flatten(2).any(-1) if value.dim() > 2 else bad
            bad = bad & self.mask
            if bad.any():
                task, point = (int(i) for i in bad.nonzero()[0])
                wanted = "a finite number" if name == "x" else f"a finite number of size at most {LARGEST_TARGET:g}"
                got = value[task, point].tolist()
                raise ValueError(f"{role}.{name}: task {task}, point {point}: expected {wanted}, got {got}")


class Episode(NamedTuple):
    """A batch of ``T`` tasks, each split into a support set (seen) and a query set (asked)."""

    support: Points
    query: Points

    @property
    def num_tasks(self) -> int:
        """``T``."""
        return self.support.num_tasks

    def union(self) -> Points:
        """All points of each task, D_i = S_i ∪ Q_i, support first."""
        return self.support.union(self.query)

    def select(self, tasks: Any) -> Episode:
        """The chosen tasks, in that order (see `Points.select`)."""
        return Episode(self.support.select(tasks), self.query.select(tasks))

    def to(self, *args: Any, **kwargs: Any) -> Episode:
        """As `Points.to`, for both sets."""
        return Episode(self.support.to(*args, **kwargs), self.query.to(*args, **kwargs))

    def check(self) -> None:
        """Raises ValueError where a set is not usable (see `Points.check`) or the two are not of the same tasks."""
        if self.support.num_tasks != self.query.num_tasks:
            raise ValueError(f"support has {self.support.num_tasks} tasks, query {self.query.num_tasks}: expected the same")
        self.support.check("support")
        self.query.check("query")

    @classmethod
    def from_tasks(cls, support: Sequence[tuple[Any, Any]], query: Sequence[tuple[Any, Any]]) -> Episode:
        """Ragged lists of ``(x, y)``, one entry a task, padded (see `Points.from_tasks`)."""
        if len(support) != len(query):
            raise ValueError(f"support has {len(support)} tasks, query {len(query)}: expected the same")
        return cls(Points.from_tasks(support), Points.from_tasks(query))

    @classmethod
    def from_dict(cls, batch: Mapping[str, tuple[Any, Any]]) -> Episode:
        """From ``{'train': (x, y), 'test': (x, y)}``, the form of Torchmeta's batches."""
        missing = {"train", "test"} - set(batch)
        if missing:
            raise ValueError(f"expected the keys 'train' and 'test', got {sorted(batch)}")
        return cls(Points.of(*batch["train"]), Points.of(*batch["test"]))

    def to_dict(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """To ``{'train': (x, y), 'test': (x, y)}``. Raises ValueError where points are padded: that form has no mask."""
        self._check_full("to_dict")
        return {"train": self.support[:2], "test": self.query[:2]}

    @classmethod
    def from_tuple(cls, batch: Sequence[Any]) -> Episode:
        """From ``(xc, yc, xt, yt)``, the context and target sets of neural processes."""
        if len(batch) != 4:
            raise ValueError(f"expected (xc, yc, xt, yt), got {len(batch)} entries")
        xc, yc, xt, yt = batch
        return cls(Points.of(xc, yc), Points.of(xt, yt))

    def to_tuple(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """To ``(xc, yc, xt, yt)``. Raises ValueError where points are padded: that form has no mask."""
        self._check_full("to_tuple")
        return (*self.support[:2], *self.query[:2])

    def _check_full(self, what: str) -> None:
        if not bool(self.support.mask.all() and self.query.mask.all()):
            raise ValueError(
                f"{what}: this episode has padded points and that form has no mask; use support.to_tasks() and query.to_tasks()"
            )


def _pad(values: Sequence[Tensor], name: str) -> Tensor:
    kind = functools.reduce(torch.promote_types, (v.dtype for v in values))
    values = [v.to(kind) for v in values]
    shapes = {tuple(v.shape[1:]) for v in values}
    if len(shapes) > 1:
        raise ValueError(f"{name}: expected the same shape of one point in every task, got {sorted(shapes)}")
    if all(len(v) == 0 for v in values):
        return values[0].new_zeros(len(values), 0, *values[0].shape[1:])
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)


def _mask_of(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]


def _fill(value: Tensor, mask: Tensor, default: float) -> Tensor:
    tasks, points = mask.shape
    trail = (1,) * (value.dim() - 2)
    has = mask.any(1)
    own = value[torch.arange(tasks, device=mask.device), mask.long().argmax(1)]  # each task's first real point
    donor = own.index_select(0, has.long().argmax()[None])[0]  # the first real point of any task; an index in a tensor can be traced
    donor = torch.where(has.any(), donor, torch.full_like(donor, default))
    own = torch.where(has.view(tasks, *trail), own, donor)
    return torch.where(mask.view(tasks, points, *trail), value, own[:, None])


def _to(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if value.is_floating_point():
        return value.to(*args, **kwargs)
    device = _device(*args, **kwargs)
    return value if device is None else value.to(device)


def _device(*args: Any, **kwargs: Any) -> torch.device | None:
    # torch's own reading of the arguments of `.to`
    return torch._C._nn._parse_to(*args, **kwargs)[0]
