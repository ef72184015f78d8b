"""Time and memory of steps."""

import contextlib
import ctypes
import gc
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

SLOW = 5.0  # seconds


class Time(NamedTuple):
    """Ms a step: by the clock, and of the processor, all threads together, which other processes do not lengthen."""

    wall: float
    cpu: float


def interleaved(
    steps: dict[str, Callable[[], float]], repeats: int, *, batch_ms: float = 30.0, most_seconds: float = 60.0
) -> dict[str, list[Time]]:  # fmt: skip
    """Each contender's times: ``repeats`` rounds, in each of which every one takes about ``batch_ms`` worth of steps, at least one.

    Before that one step untimed, where it takes several: the first one pays for what the contender before left behind, a million pieces of
    memory, say, which are put together when a large one is wanted. Fewer rounds, but at least 3, where they would take longer than
    ``most_seconds`` together; one where a step takes `SLOW` seconds.
    """
    guess = {name: _guess(step) for name, step in steps.items()}
    number = {name: max(1, round(batch_ms / time.wall)) for name, time in guess.items()}
    slow = {name: [time] for name, time in guess.items() if time.wall > 1000 * SLOW}
    times: dict[str, list[Time]] = {name: [] for name in steps if name not in slow}
    end = perf_counter() + most_seconds
    for done in range(repeats):
        if done >= 3 and perf_counter() > end:
            break
        for name, own in times.items():
            if number[name] > 1:
                steps[name]()
            own.append(_timed(steps[name], number[name]))
    return times | slow


def _guess(step: Callable[[], float]) -> Time:
    first = _timed(step, 1)
    return first if first.wall > 1000 * SLOW else min(first, _timed(step, 1))


def _timed(step: Callable[[], float], number: int) -> Time:
    wall, cpu = perf_counter(), process_time()
    for _ in range(number):
        step()
    return Time(1000 * (perf_counter() - wall) / number, 1000 * (process_time() - cpu) / number)


def medians(times: list[Time]) -> Time:
    return Time(*(statistics.median(values) for values in zip(*times, strict=True)))


def ratio(times: list[Time], to: list[Time]) -> float:
    """Median over rounds of one contender's time to another's in the same round; of medians where one took a single round."""
    if len(times) != len(to):
        return medians(times).wall / medians(to).wall
    return statistics.median(a.wall / b.wall for a, b in zip(times, to, strict=True))


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
