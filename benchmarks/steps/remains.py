"""What is left of a compiled step's time: products of matrices, the other kernels, the optimiser, and Python round the graph."""

import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile

from . import ours
from .workloads import Workload

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "product", "_linear_pointwise", "convolution", "convolution_backward", "mkldnn_convolution")
ROUNDS = 200


def remains(w: Workload) -> dict[str, float]:
    """Ms a step by part. The optimiser's is the difference to a graph without it; kernels are what is left of the graph."""
    run, step = ours.training(w, True)
    whole, graph, products = _measured(run, step)
    bare, step = ours.training(w, True, with_adam=False)
    without = _measured(bare, step)[1]
    optimiser = max(0.0, graph - without)
    return {
        "step": whole, "matrix products": products, "other kernels": graph - products - optimiser, "optimiser": optimiser,
        "Python": whole - graph,
    }  # fmt: skip


def _measured(run: ours._Run, step: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of the whole step, of the graph alone, and the products' part of that."""
    for _ in range(5):
        step()
    compiler = run.gradient.compiler
    (traced,) = compiler.graphs.values()
    inside: list[float] = []
    call = traced.run

    def timed(*inputs: torch.Tensor) -> object:
        start = perf_counter()
        found = call(*inputs)
        inside.append(1000 * (perf_counter() - start))
        return found

    traced.run = timed  # type: ignore[assignment]
    whole = []
    for _ in range(ROUNDS):
        start = perf_counter()
        step()
        whole.append(1000 * (perf_counter() - start))
    traced.run = call
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(20):
            step()
    events = [e for e in recorded.key_averages() if e.key.split("::")[-1] in PRODUCTS]
    return statistics.median(whole), statistics.median(inside), sum(e.self_cpu_time_total for e in events) / 20_000
