"""Microseconds of products of float32 matrices and of convolutions in a compiled graph, against torch's own (MKL, oneDNN). One thread.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py

Compiled calls have a few microseconds of Python round them, as torch's have.
"""

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bayesmeta.backends import inductor
from bayesmeta.graphs import trace

aten = torch.ops.aten
SHAPES = [(250, 10, 40, 40), (250, 40, 10, 40), (25, 10, 1761, 10), (1, 1360, 64, 64), (1, 512, 512, 512)]  # pairs, rows, of a sum, columns
IMAGES = [  # how many, channels, side, stride
    (75, 64, 14, 2), (75, 64, 7, 2), (75, 64, 4, 2), (5, 64, 14, 2), (5, 64, 7, 2), (5, 64, 4, 2), (25, 32, 21, 1),
]  # fmt: skip


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
    for n, channels, side, stride in IMAGES:
        convolutions(n, channels, side, stride)


def convolutions(n: int, channels: int, side: int, stride: int) -> None:
    """Of 3 × 3 weights, images with their channels last: forward, and the gradients in the images and in the weights."""
    x = torch.randn(n, channels, side, side).to(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last) / channels
    y = conv2d(x, w, None, stride, 1)

    def forward(x: Tensor, w: Tensor, y: Tensor) -> list[Tensor]:
        return [conv2d(x, w, None, stride, 1)]

    def gradient(x: Tensor, w: Tensor, y: Tensor, wanted: list[bool]) -> list[Tensor]:
        found = aten.convolution_backward(y, x, w, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, wanted)
        return [part for part in found if part is not None]

    in_images, in_weights = partial(gradient, wanted=[True, False, False]), partial(gradient, wanted=[False, True, False])
    words = []
    for name, function in {"forward": forward, "in images": in_images, "in weights": in_weights}.items():
        ours = inductor(trace(function, [x, w, y]), [x, w, y])
        here, torchs = microseconds(lambda: ours(x, w, y)), microseconds(lambda: function(x, w, y))  # noqa: B023
        words.append(f"{name} here {here:.0f} us   torch {torchs:.0f} us")
    print(f"{n:>4} images of {channels} x {side} x {side}, stride {stride}:  " + "   ".join(words))


if __name__ == "__main__":
    main()
