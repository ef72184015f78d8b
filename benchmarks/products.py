"""Microseconds of products of float32 matrices in a compiled graph, against torch's own (MKL) and oneDNN's. One thread.

    OMP_NUM_THREADS=1 python benchmarks/products.py

Compiled calls have a few microseconds of Python round them, as torch's have.
"""

import datetime
import platform
import statistics
import time
from collections.abc import Callable

import torch

from bayesmeta.backends import inductor
from bayesmeta.graphs import trace

SHAPES = [(250, 10, 40, 40), (250, 40, 10, 40), (25, 10, 1761, 10), (1, 1360, 64, 64), (1, 512, 512, 512)]  # pairs, rows, of a sum, columns


def microseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(200):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, medians of 200 calls, one thread")
    for pairs, rows, inner, columns in SHAPES:
        a, b = torch.randn(pairs, rows, inner), torch.randn(pairs, inner, columns)
        if pairs == 1:
            a, b = a[0], b[0]
        ours = inductor(trace(lambda a, b: [a @ b], [a, b]), [a, b])
        found = {"here": microseconds(lambda: ours(a, b)), "torch": microseconds(lambda: a @ b)}  # noqa: B023
        if pairs == 1:
            turned = b.t()
            found["oneDNN"] = microseconds(lambda: torch.ops.mkldnn._linear_pointwise(a, turned, None, "none", [], ""))  # noqa: B023
        print(f"{pairs:>4} x {rows} x {inner} x {columns}:  " + "   ".join(f"{name} {us:.0f} us" for name, us in found.items()))


if __name__ == "__main__":
    main()
