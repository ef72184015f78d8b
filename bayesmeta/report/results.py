"""What an evaluation found, as plain numpy arrays: the only thing that plots and reports ever look at.

Axes: ``T`` tasks, ``N`` query points of the longest task, ``G`` (and ``H``) points of a grid, ``S`` draws, ``C`` classes,
``n`` and ``m`` support and query points of one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Setting = float | int | str | bool


def floats(values: Any) -> Array:
    """A float64 copy of an array, a list or a tensor on the CPU."""
    return np.asarray(values).astype(np.float64)


def settle(record: Any, /, **axes: str) -> None:
    """Make the named fields of ``record`` read-only float arrays; equal letters of ``axes`` must have equal sizes.

    ``settle(curves, grid="G", draws="SG")`` reads: ``grid`` has one axis, the last axis of ``draws`` is as long.
    Raises ValueError naming the field, what was expected and what was got.
    """
    kind = type(record).__name__
    sizes: dict[str, tuple[int, str]] = {}
    for name, letters in axes.items():
        values = floats(getattr(record, name))
        shape = f"({', '.join(letters)}{',' if len(letters) == 1 else ''})"
        if values.ndim != len(letters):
            raise ValueError(f"{kind}.{name} must have shape {shape}, got {values.shape}")
        for letter, size in zip(letters, values.shape, strict=True):
            expected, first = sizes.setdefault(letter, (size, name))
            if size != expected:
                raise ValueError(f"{kind}.{name} has {letter} = {size}, but {kind}.{first} has {letter} = {expected}")
        values.flags.writeable = False
        object.__setattr__(record, name, values)


def plain(value: Any) -> Setting:
    """``value`` as something that JSON and a reader know: a number, a bool, or else its text."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, bool | int | float | str) else str(value)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """A predictive on a grid of the first input.

    ``grid`` (G,), rising: values of the first input (few distinct ones, as a floor of 0 or 1: just those).
    ``mean``, ``lower50``, ``upper50``, ``lower90``, ``upper90`` (G,): of the target, in the target's own unit.
    ``draws`` (S, G): the mean function under some draws of the task parameters; S may be 0.
    NaN where a learner has no prediction (no pooling before any data).
    """

    grid: Array
    mean: Array
    lower50: Array
    upper50: Array
    lower90: Array
    upper90: Array
    draws: Array = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        if np.size(self.draws) == 0:  # no draws, whatever its shape
            object.__setattr__(self, "draws", np.empty((0, np.size(self.grid))))
        settle(self, grid="G", mean="G", lower50="G", upper50="G", lower90="G", upper90="G", draws="SG")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """One of the curves that a task's support set may come from, as its family knows: not a learner's.

    ``probability``: given the support set. ``curve`` (G,): on the grid of the task's `Curves`, in the target's own unit.
    """

    name: str
    probability: float
    curve: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "probability", float(self.probability))
        settle(self, curve="G")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Bands:
    """One task's predictive before and after its support set was seen, with its points (first input, target).

    ``task``: its index among the T tasks. ``support_x``, ``support_y`` (n,); ``query_x``, ``query_y`` (m,).
    ``explanations``: of an ambiguous task whose family knows them, on the grid of ``after``.
    """

    task: int
    name: str
    before: Curves
    after: Curves
    support_x: Array
    support_y: Array
    query_x: Array
    query_y: Array
    explanations: tuple[Explanation, ...] = ()

    def __post_init__(self) -> None:
        settle(self, support_x="n", support_y="n", query_x="m", query_y="m")
        object.__setattr__(self, "explanations", tuple(self.explanations))
        for one in self.explanations:
            if one.curve.shape != self.after.grid.shape:
                shapes = f"{one.curve.shape}, and Bands.after.grid {self.after.grid.shape}"
                raise ValueError(f"Bands.explanations[{one.name!r}].curve has shape {shapes}: expected the same")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ProbabilityMap:
    """P(y = 1) of a task with two inputs and two classes, after its support set was seen.

    ``task``: its index among the T tasks. ``first`` (G,), ``second`` (H,): values of both inputs. ``probs`` (H, G);
    ``draws`` (S, H, G): under some draws of the task parameters; S may be 0. ``support_x`` (n, 2), ``support_y`` (n,).
    """

    task: int
    name: str
    first: Array
    second: Array
    probs: Array
    support_x: Array
    support_y: Array
    draws: Array = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        # no draws and no points, whatever their shapes
        for name, empty in (("draws", (0, *np.shape(self.probs))), ("support_x", (0, 2))):
            if np.size(getattr(self, name)) == 0:
                object.__setattr__(self, name, np.empty(empty))
        settle(self, first="G", second="H", probs="HG", draws="SHG", support_x="nI", support_y="n")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LearnerResult:
    """What one learner did on the T held-out tasks.

    ==================== ========= ================================================================================
    field                shape
    ==================== ========= ================================================================================
    metrics              (T,) each by name: "nll", "rmse" or "accuracy", "crps" or "brier", "coverage50",
                                   "coverage90", "width50", "width90"; one value a task, NaN where it has none;
                                   against the truth, where known: "nll_gap", "mode_coverage", "label_coverage"
    pit                  (T, N)    probability integral transform of every query target, NaN where padded;
                                   None for classification
    probs                (T, N, C) predicted class probabilities; classification only
    labels               (T, N)    true classes, -1 where padded; classification only
    seconds                        wall time of adaptation and prediction, all tasks
    gradient_evaluations           of the adaptation, per task
    sites                (T,) each posterior mean of each scalar task-level site, by name
    bands                          a few tasks to draw: the same for every learner; may be empty
    maps                           the same for tasks with two inputs and two classes, those of the report's exact maps
    diagnostics                    e.g. of NUTS: divergences, largest R̂, smallest effective sample size
    settings                       the learner's arguments as used; what is no number or text becomes text
    ==================== ========= ================================================================================
    """

    metrics: Mapping[str, Array]
    pit: Array | None = None
    probs: Array | None = None
    labels: Array | None = None
    seconds: float = float("nan")
    gradient_evaluations: float = float("nan")
    sites: Mapping[str, Array] = field(default_factory=dict)
    bands: tuple[Bands, ...] = ()
    maps: tuple[ProbabilityMap, ...] = ()
    diagnostics: Mapping[str, float | str] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("metrics", "sites"):
            arrays = {key: floats(value) for key, value in getattr(self, name).items()}
            for key, value in arrays.items():
                if value.ndim != 1:
                    raise ValueError(f"{name}[{key!r}] must have one value a task, shape (T,), got shape {value.shape}")
                value.flags.writeable = False
            object.__setattr__(self, name, arrays)
        for name in ("diagnostics", "settings"):
            object.__setattr__(self, name, {key: plain(value) for key, value in getattr(self, name).items()})
        if (self.probs is None) != (self.labels is None):
            raise ValueError("probs and labels go together: one was given without the other")
        if self.pit is not None:
            settle(self, pit="TN")
        if self.probs is not None:
            settle(self, probs="TNC", labels="TN")
            assert self.labels is not None
            object.__setattr__(self, "labels", self.labels.astype(np.int64))
            self.labels.flags.writeable = False
        for name in ("bands", "maps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "seconds", float(self.seconds))
        object.__setattr__(self, "gradient_evaluations", float(self.gradient_evaluations))

    def per_task(self) -> dict[str, Array]:
        """Every field with one entry a task, by a name for messages."""
        arrays = {f"metrics[{k!r}]": v for k, v in self.metrics.items()}
        arrays |= {f"sites[{k!r}]": v for k, v in self.sites.items()}
        arrays |= {
            k: v for k, v in (("pit", self.pit), ("probs", self.probs), ("labels", self.labels)) if v is not None
        }
        return arrays


def joined(parts: Sequence[LearnerResult]) -> LearnerResult:
    """One learner's results on some tasks after the other. Seconds and gradients add up, and so do counts among the diagnostics.

    Of diagnostics that begin with "max_" or "min_" the largest or smallest is kept.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    arrays: dict[str, Any] = {name: None if getattr(first, name) is None else np.concatenate([getattr(part, name) for part in parts])
              for name in ("pit", "probs", "labels")}  # fmt: skip
    records: dict[str, Any] = {name: {key: np.concatenate([getattr(part, name)[key] for part in parts]) for key in getattr(first, name)}
               for name in ("metrics", "sites")}  # fmt: skip
    found: dict[str, list[float | str]] = {}
    for part in parts:
        for key, value in part.diagnostics.items():
            found.setdefault(key, []).append(value)
    diagnostics = {key: _summary(key, values) for key, values in found.items()}
    tasks = sum(len(next(iter(part.metrics.values()))) for part in parts)
    gradients = sum(part.gradient_evaluations * len(next(iter(part.metrics.values()))) for part in parts) / tasks
    return replace(
        first, **arrays, **records, diagnostics=diagnostics, seconds=sum(part.seconds for part in parts), gradient_evaluations=gradients,
        bands=tuple(band for part in parts for band in part.bands), maps=tuple(one for part in parts for one in part.maps),
    )  # fmt: skip


def _summary(key: str, values: list[float | str]) -> float | str:
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        return values[0]
    return max(numbers) if key.startswith("max_") else min(numbers) if key.startswith("min_") else sum(numbers)
