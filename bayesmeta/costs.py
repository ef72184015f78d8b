"""What tracing and compiling a step take, told beforehand: constants that were measured, and a mark beside what the compiler keeps on disk.

Seconds are of the processor (`clock`): beside other work a step takes longer, and so does compiling it, which decides nothing.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.fx import GraphModule

# Set by what MAML, BMAML, ABML, radon's MAML, a network of convolutions and the amortized learner took on one machine
# (`python -m benchmarks.steps` tells first steps); good to a factor of about two
TRACE_STEPS, TRACE_SECONDS = 60, 2.5  # tracing takes as long as so many eager steps; of steps whose time is arithmetic so many seconds
TRACE_SECONDS_A_NODE = 0.0008
COMPILE_SECONDS, COMPILE_SECONDS_A_NODE = 3.0, 0.011  # of each graph
LOAD_SECONDS, LOAD_SECONDS_A_NODE = 2.0, 0.001  # where all is on disk: of the compiler's own code once, and of all graphs


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
    if is_on_disk(graphs):
        seconds = LOAD_SECONDS + LOAD_SECONDS_A_NODE * sum(sizes)
    else:
        seconds = COMPILE_SECONDS * len(sizes) + COMPILE_SECONDS_A_NODE * sum(sizes)
    return min(max(pace, 0.5), 2.0) * seconds


def is_on_disk(graphs: Sequence[GraphModule]) -> bool:
    """Whether they were compiled before, by this version of torch and for as many threads, and the compiler's cache is still there."""
    return _mark(graphs).exists()


def note_on_disk(graphs: Sequence[GraphModule]) -> None:
    """Leaves the mark that `is_on_disk` looks for; nothing where the folder cannot be written to."""
    with contextlib.suppress(OSError):
        mark = _mark(graphs)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mark(graphs: Sequence[GraphModule]) -> Path:
    facts = [torch.__version__, str(torch.get_num_threads())]
    for graph in graphs:
        inputs = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
        facts += [graph.code, *(f"{v.shape} {v.dtype} {v.device}" for v in inputs if v is not None)]
    # where the compiler keeps things; to ask it takes the seconds in which it is imported
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return Path(folder) / "bayesmeta" / hashlib.sha256("\n".join(facts).encode()).hexdigest()
