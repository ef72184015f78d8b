"""What tracing and compiling a step take, told beforehand: constants that were measured, and a mark beside what the compiler keeps on disk.

Seconds are of the processor (`clock`): beside other work a step takes longer, and so does compiling it, which decides nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.fx import GraphModule

from .graphs import Run
from .saved_graphs import Saved, cache_folder, identity

# Set by what MAML, BMAML, ABML, radon's MAML, a network of convolutions and the amortized learner took on one machine
# (`python -m benchmarks.steps` tells first steps); good to a factor of about two
TRACE_STEPS, TRACE_SECONDS = 60, 2.5  # tracing takes as long as so many eager steps; of steps whose time is arithmetic so many seconds
TRACE_SECONDS_A_NODE = 0.0008
COMPILE_SECONDS, COMPILE_SECONDS_A_NODE = 3.0, 0.011  # of each graph
LOAD_SECONDS, LOAD_SECONDS_A_NODE = 2.0, 0.001  # where the compiler has all on disk: of its own code once, and of all graphs
SAVED_SECONDS = 0.01  # of each graph, where all are kept as libraries
AS_LIBRARIES, COMPILER = "as libraries", "by the compiler"


def clock(on_gpu: bool) -> Callable[[], float]:
    """Seconds of this thread on the processor; where it waits for a GPU, seconds that pass."""
    return time.perf_counter if on_gpu else time.thread_time


def tracing(eager: float) -> float:
    """Seconds to trace a step which takes ``eager`` seconds so far."""
    return min(TRACE_STEPS * eager, TRACE_SECONDS)


def compiling(graphs: Sequence[GraphModule], traced_in: float) -> float:
    """Seconds to compile ``graphs``, or to load them where that has been done before; ``traced_in``: what tracing them has taken."""
    sizes = [len(graph.graph.nodes) for graph in graphs]
    pace = traced_in / (TRACE_SECONDS_A_NODE * sum(sizes))  # of this machine, to the one that the constants are of
    on_disk = how_on_disk(graphs)
    if on_disk == AS_LIBRARIES:
        seconds = SAVED_SECONDS * len(sizes)
    elif on_disk is not None:
        seconds = LOAD_SECONDS + LOAD_SECONDS_A_NODE * sum(sizes)
    else:
        seconds = COMPILE_SECONDS * len(sizes) + COMPILE_SECONDS_A_NODE * sum(sizes)
    return min(max(pace, 0.5), 2.0) * seconds


def how_on_disk(graphs: Sequence[GraphModule]) -> str | None:
    """How they are kept since they were compiled, in the same circumstances (`identity`): AS_LIBRARIES, by the COMPILER; None: not."""
    try:
        return _mark(graphs).read_text()
    except OSError:
        return None


def note_on_disk(graphs: Sequence[GraphModule], runs: Sequence[Run]) -> None:
    """Leaves the mark that `how_on_disk` looks for, beside what they run as; nothing where the folder cannot be written to."""
    with contextlib.suppress(OSError):
        mark = _mark(graphs)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(AS_LIBRARIES if all(isinstance(run, Saved) for run in runs) else COMPILER)


def _mark(graphs: Sequence[GraphModule]) -> Path:
    return cache_folder() / hashlib.sha256(" ".join(map(identity, graphs)).encode()).hexdigest()
