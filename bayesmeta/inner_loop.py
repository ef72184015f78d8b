"""A learner's inner loop, v ← step(v, α_k) K times, which a reader of its loss may take apart: what is before it, one step, what is after.

A learner calls `repeat` in the middle of its loss and reads as in the paper. `before`, `once` and `after` run the same code with another
idea of what the loop does: it ends the run with what it was to start from, or with what one step makes of given values, or it takes given
values as its result. So every piece is a function of θ, the data and the values alone.
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
Result = TypeVar("Result")


class NotOneLoop(RuntimeError):
    """The function has no inner loop to take out, or several."""


class _Left(BaseException):  # no Exception: a learner's own ``except`` is not for it
    def __init__(self, result: Any) -> None:
        self.result = result


_instead: ContextVar[Callable[[Step, Values, Sizes], Values] | None] = ContextVar("instead", default=None)


def repeat(step: Step, start: Values, sizes: Sizes, *, whole: bool = False) -> Values:
    """``step(values, size)`` for each of ``sizes``, from ``start``. ``whole``: nobody may take this loop apart."""
    instead = None if whole else _instead.get()
    if instead is not None:
        return instead(step, start, sizes)
    for size in sizes:
        start = step(start, size)
    return start


def before(function: Callable[[], Any]) -> tuple[Values, Sizes]:
    """Runs ``function`` up to its first loop: where that starts, and its step sizes."""
    return _left(function, lambda step, start, sizes: (start, sizes))


def once(function: Callable[[], Any], values: Values, size: Tensor | float | None = None) -> Values:
    """What one step of ``function``'s first loop makes of ``values``; its own first ``size`` where that is None."""
    return _left(function, lambda step, start, sizes: step(values, sizes[0] if size is None else size))


def after(function: Callable[[], Result], values: Values) -> Result:
    """``function`` with ``values`` for the result of its only loop."""
    loops = 0

    def skip(step: Step, start: Values, sizes: Sizes) -> Values:
        nonlocal loops
        loops += 1
        return values

    with _looping(skip):
        result = function()
    if loops != 1:
        raise NotOneLoop(f"it has {loops} inner loops")
    return result


def _left(function: Callable[[], Any], result: Callable[[Step, Values, Sizes], Any]) -> Any:
    def leave(step: Step, start: Values, sizes: Sizes) -> Values:
        with _looping(None):  # a loop inside of a step is a part of it
            raise _Left(result(step, start, sizes))

    try:
        with _looping(leave):
            function()
    except _Left as left:
        return left.result
    raise NotOneLoop("it has no inner loop")


@contextmanager
def _looping(instead: Callable[[Step, Values, Sizes], Values] | None) -> Iterator[None]:
    token = _instead.set(instead)
    try:
        yield
    finally:
        _instead.reset(token)
