"""A learner's inner loop, v ← step(v, α_k) K times, which a reader of its loss may take apart: what is before it, one step, what is after.

A learner calls `repeat` in the middle of its loss and reads as in the paper. `before`, `once` and `after` run the same code with another
idea of what the loop does: it ends the run with what it was to start from, or with what one step makes of given values, or it takes given
values as its result. So every piece is a function of θ, the data, the values and the step's number alone.

While step k runs, `step_now` is k: per-step batch norm looks at it (`bayesmeta.batch_norm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

Values = tuple[Tensor, ...]
Sizes = Sequence[Tensor | float]
Step = Callable[[Values, Any], Values]
Number = int | Tensor  # of a step; a tensor ``()`` where one graph serves all steps
Numbered = Callable[[Values, Any, Number], Values]
Result = TypeVar("Result")


class NotOneLoop(RuntimeError):
    """The function has no inner loop to take out, or several."""


class _Left(BaseException):  # no Exception: a learner's own ``except`` is not for it
    def __init__(self, result: Any) -> None:
        self.result = result


_instead: ContextVar[Callable[[Numbered, Values, Sizes], Values] | None] = ContextVar("instead", default=None)
_now: ContextVar[Number | None] = ContextVar("now", default=None)


def repeat(step: Step, start: Values, sizes: Sizes, *, whole: bool = False, first: int = 0) -> Values:
    """``step(values, size)`` for each of ``sizes``, from ``start``. ``whole``: nobody may take this loop apart.

    ``first``: the first step's number, where other steps have led to ``start``.
    """

    def numbered(values: Values, size: Any, k: Number) -> Values:
        token = _now.set(first + k if first else k)
        try:
            return step(values, size)
        finally:
            _now.reset(token)

    instead = None if whole else _instead.get()
    if instead is not None:
        return instead(numbered, start, sizes)
    for k, size in enumerate(sizes):
        start = numbered(start, size, k)
    return start


def step_now() -> Number | None:
    """The number k of the step that runs; None outside of a loop."""
    return _now.get()


def before(function: Callable[[], Any]) -> tuple[Values, Sizes]:
    """Runs ``function`` up to its first loop: where that starts, and its step sizes."""
    return _left(function, lambda step, start, sizes: (start, sizes))


def once(function: Callable[[], Any], values: Values, size: Tensor | float | None = None, *, k: Number = 0) -> Values:
    """What step ``k`` of ``function``'s first loop makes of ``values``; its own first ``size`` where that is None."""
    return _left(function, lambda step, start, sizes: step(values, sizes[0] if size is None else size, k))


def after(function: Callable[[], Result], values: Values) -> Result:
    """``function`` with ``values`` for the result of its only loop."""
    loops = 0

    def skip(step: Numbered, start: Values, sizes: Sizes) -> Values:
        nonlocal loops
        loops += 1
        return values

    with _looping(skip):
        result = function()
    if loops != 1:
        raise NotOneLoop(f"it has {loops} inner loops")
    return result


def _left(function: Callable[[], Any], result: Callable[[Numbered, Values, Sizes], Any]) -> Any:
    def leave(step: Numbered, start: Values, sizes: Sizes) -> Values:
        with _looping(None):  # a loop inside of a step is a part of it
            raise _Left(result(step, start, sizes))

    try:
        with _looping(leave):
            function()
    except _Left as left:
        return left.result
    raise NotOneLoop("it has no inner loop")


@contextmanager
def _looping(instead: Callable[[Numbered, Values, Sizes], Values] | None) -> Iterator[None]:
    token = _instead.set(instead)
    try:
        yield
    finally:
        _instead.reset(token)
