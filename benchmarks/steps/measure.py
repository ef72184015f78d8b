"""Time and memory of steps."""

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

SLOW = 5.0


def interleaved(
    steps: dict[str, Callable[[], float]], repeats: int, *, batch_ms: float = 30.0, most_seconds: float = 60.0
) -> dict[str, list[float]]:  # fmt: skip
    """Ms a step: ``repeats`` rounds, in each of which every contender takes about ``batch_ms`` worth of steps, at least one.

    Fewer rounds, but at least 3, where they would take longer than ``most_seconds`` together; one where a step takes `SLOW` seconds.
    """
    guess = {name: _timed(step, 1) for name, step in steps.items()}
    number = {name: max(1, round(batch_ms / ms)) for name, ms in guess.items()}
    slow = {name: [ms] for name, ms in guess.items() if ms > 1000 * SLOW}
    times: dict[str, list[float]] = {name: [] for name in steps if name not in slow}
    end = time.perf_counter() + most_seconds
    for done in range(repeats):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, own in times.items():
            own.append(_timed(steps[name], number[name]))
    return times | slow


def _timed(step: Callable[[], float], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        step()
    return 1000 * (time.perf_counter() - start) / number


def ratio(times: dict[str, list[float]], of: str, to: str) -> float:
    """Median over rounds of one contender's time to another's in the same round; of medians where one took a single round."""
    if len(times[of]) != len(times[to]):
        return statistics.median(times[of]) / statistics.median(times[to])
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def one_arena() -> None:
    """Makes the C library's allocator keep all threads' memory in one place, the only one from which `working_memory` can give it back."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def working_memory(step: Callable[[], float]) -> float:
    """MiB that the process grows by during a step, over what it keeps between steps; NaN where Linux does not tell.

    What the allocator holds in reserve is given back first, so that what a step takes anew shows.
    """
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
        step()
        return max(0.0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return math.nan


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
