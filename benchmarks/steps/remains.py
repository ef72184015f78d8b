"""What is left of a compiled step's time: products of matrices, the other kernels, the optimiser, and Python round the graph."""

import math
import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from bayesmeta.rewriting import rewritten
from bayesmeta.sweep import Sweep

from . import ours
from .workloads import Workload

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "product", "_linear_pointwise", "convolution", "convolution_backward", "mkldnn_convolution")
ROUNDS, SECONDS = 200, 10.0  # at most


def remains(w: Workload) -> dict[str, float]:
    """Ms a step by part. The optimiser's is the difference to a graph without it; kernels are what is left of the graph.

    A sweep over inner steps, several graphs with Python between them, is not taken apart.
    """
    run, step = ours.training(w, True)
    whole, graph, products = _measured(run, step)
    if math.isnan(products):
        return {"step": whole, "swept graphs": graph, "Python": whole - graph}
    bare, step = ours.training(w, True, with_adam=False)
    without = _measured(bare, step)[1]
    optimiser = max(0.0, graph - without)
    return {
        "step": whole, "matrix products": products, "other kernels": graph - products - optimiser, "optimiser": optimiser,
        "Python": whole - graph,
    }  # fmt: skip


def _measured(run: ours.TrainingRun, step: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of the whole step, of its graph, chunk after chunk, and the products' part of that, NaN of a sweep."""
    for _ in range(5):  # the first one compiles
        step()
    start = perf_counter()
    step()
    rounds = max(5, min(ROUNDS, int(SECONDS / (perf_counter() - start))))
    compiler = run.gradient.compiler
    (traced,) = compiler.graphs.values()
    inside, seen = list[float](), list[tuple[torch.Tensor, ...]]()
    call = traced.run

    def timed(*inputs: torch.Tensor) -> object:
        start = perf_counter()
        found = call(*inputs)
        inside.append(1000 * (perf_counter() - start))
        seen[:] = [inputs]
        return found

    traced.run = timed  # type: ignore[assignment]
    whole = []
    for _ in range(rounds):
        start = perf_counter()
        step()
        whole.append(1000 * (perf_counter() - start))
    traced.run = call
    chunks = len(inside) // rounds
    graph = statistics.median(sum(inside[i * chunks : (i + 1) * chunks]) for i in range(rounds))
    if isinstance(traced.module, Sweep):
        return statistics.median(whole), graph, math.nan
    products = _Products(rewritten(traced.module))
    with torch.no_grad():
        products.run(*seen[-1])
    return statistics.median(whole), graph, products.ms * chunks


class _Products(torch.fx.Interpreter):
    """Runs a graph, and times its products one by one: calls from C++ leave no record. A single row or column is fused into kernels."""

    ms = 0.0

    def run_node(self, n: torch.fx.Node) -> object:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]
        if str(n.target).split(".")[-2:][0] in PRODUCTS and min(min(m.shape[-2:]) for m in matrices) > 1:
            times = []
            for _ in range(15):
                start = perf_counter()
                n.target(*args, **kwargs)
                times.append(1000 * (perf_counter() - start))
            self.ms += statistics.median(times)
        return super().run_node(n)
