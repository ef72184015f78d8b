"""What is left of a compiled step's time: products of matrices and convolutions, other kernels, the optimiser, Python round the graph."""

import math
import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from bayesmeta.backends import inductor
from bayesmeta.graphs import trace
from bayesmeta.rewriting import rewritten
from bayesmeta.sweep import Sweep

from . import ours
from .workloads import Workload

PRODUCTS = (
    "mm", "bmm", "addmm", "baddbmm", "product", "_linear_pointwise", "convolution", "convolution_backward", "mkldnn_convolution",
    "convolution_images", "convolution_weights",
)  # fmt: skip
ROUNDS, SECONDS = 200, 10.0  # at most
A_TENSOR = object()  # stands for one among arguments


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
    with torch.no_grad():
        operands = _Operands(rewritten(traced.module))
        operands.run(*seen[-1])
        return statistics.median(whole), graph, _products_ms(operands.found) * chunks


class _Operands(torch.fx.Interpreter):
    """Runs a graph, and notes what its products are of. One with a single row or column is fused into kernels."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found = list[tuple[Callable[..., object], list[torch.Tensor], list[object]]]()

    def run_node(self, n: torch.fx.Node) -> object:
        args, _ = self.fetch_args_kwargs_from_env(n)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        matrices = [a for a in tensors if a.dim() > 1]
        if str(n.target).split(".")[-2:][0] in PRODUCTS and min(min(m.shape[-2:]) for m in matrices) > 1:
            self.found.append((n.target, tensors, [A_TENSOR if isinstance(a, torch.Tensor) else a for a in args]))
        return super().run_node(n)


def _products_ms(found: list[tuple[Callable[..., object], list[torch.Tensor], list[object]]]) -> float:
    """Ms of the products alone, compiled as one graph, less those of a graph of the same inputs with none."""

    def all_of_them(*given: torch.Tensor) -> list[object]:
        rest, results = iter(given), []
        for function, _, args in found:
            made = function(*(next(rest) if a is A_TENSOR else a for a in args))
            results += [r for r in made if r is not None] if isinstance(made, tuple | list) else [made]
        return results

    given = [tensor for _, tensors, _ in found for tensor in tensors]
    if not given:
        return 0.0
    times = []
    for function in (all_of_them, lambda *given: [given[0].sum()]):
        run = inductor(trace(function, given), given)
        run(*given)
        rounds = list[float]()
        for _ in range(ROUNDS):
            start = perf_counter()
            run(*given)
            rounds.append(1000 * (perf_counter() - start))
            if sum(rounds) > 1000 * SECONDS:
                break
        times.append(statistics.median(rounds))
    return max(0.0, times[0] - times[1])
