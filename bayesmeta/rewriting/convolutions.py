"""Two-dimensional convolutions of float32 and their gradients on a CPU by code of our own (`convolutions.h`).

torch hands them to oneDNN, whose arithmetic is as fast, but which goes over part of what lies outside of an image too, and takes long to
begin. Measured on an AMD EPYC (`benchmarks/kernels.py`), 64 channels of 7 × 7 and weights of 3 × 3 at stride 2: 75 images in 568 µs instead
of 611, their gradient 624 instead of 1,016, the weights' 629 instead of 956; five images in 49, 52 and 53 instead of 98, 134 and 195.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from . import kernels
from .nodes import TRANSPOSES, call, is_tensor, order, shape

aten = torch.ops.aten
IMAGES, CHANNELS = 5, 16  # that there must be at least: a tile has a row for each image, and its sums are over channels
LARGE = 2**20  # numbers of images, or of weights, from which on torch's are as fast
PLAIN = [1, 1], False, [0, 0], 1  # dilation, not transposed, no output padding, one group
BOUND = (  # to where numbers stand in memory
    aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default, aten.view.dtype, aten.view_as_complex.default,
)  # fmt: skip


def _convolution(x: Tensor, w: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    return torch.conv2d(x, w, None, stride, padding)


def _images(y: Tensor, w: Tensor, size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    x = y.new_empty(len(y), w.shape[1], *size)
    return aten.convolution_backward(y, x, w, None, stride, padding, *PLAIN, [True, False, False])[0]


def _weights(x: Tensor, y: Tensor, size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    w = y.new_empty(y.shape[1], x.shape[1], *size)
    return aten.convolution_backward(y, x, w, None, stride, padding, *PLAIN, [False, True, False])[1]


_library = torch.library.Library("bayesmeta", "FRAGMENT")
for _name, _arguments, _run in (
    ("convolution", "Tensor x, Tensor w", _convolution),
    ("convolution_images", "Tensor y, Tensor w, int[] size", _images),  # the gradient in the images, of such a size, along y
    ("convolution_weights", "Tensor x, Tensor y, int[] size", _weights),
):
    _library.define(f"{_name}({_arguments}, int[] stride, int[] padding) -> Tensor")
    for _where in ("CPU", "Meta"):
        _library.impl(_name, lambda *args, _run=_run: _run(*args).contiguous(memory_format=torch.channels_last), _where)
CONVOLUTION = torch.ops.bayesmeta.convolution.default
OF_IMAGES = torch.ops.bayesmeta.convolution_images.default
OF_WEIGHTS = torch.ops.bayesmeta.convolution_weights.default
OURS = (CONVOLUTION, OF_IMAGES, OF_WEIGHTS)
# which argument is the weights, if any
CONVOLUTIONS: dict[Any, int] = {aten.convolution.default: 1, aten.convolution_backward.default: 2, CONVOLUTION: 1, OF_IMAGES: 1}


def convolve_here(graph: Graph) -> None:
    """Puts our convolutions in the place of torch's. Changes ``graph``, in which nothing may be written over in place.

    Their results have their channels last in memory; what is noted of them is what torch's would be like, for a graph's results stand so. A
    graph is left as it is in which an operation is bound to where numbers stand.
    """
    if any(graph.find_nodes(op="call_function", target=target) for target in BOUND):
        return
    for node in list(graph.nodes):
        if node.target == aten.convolution.default and not node.kwargs:
            _replace_convolution(node)
        elif node.target == aten.convolution_backward.default and not node.kwargs:
            _replace_gradients(node)
    if any(graph.find_nodes(op="call_function", target=ours) for ours in OURS):
        for node in graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default


def _replace_convolution(node: Node) -> None:
    graph, (x, w, bias, *settings, transposed, _, groups) = node.graph, node.args
    if groups != 1 or len(shape(node)) != 4:
        return
    stride, padding, dilation = map(_pair, settings)
    if not transposed and (gradient := _as_gradient(node, stride, padding, dilation)):
        last, args = gradient
        if _fits(args[0], last, args[1]):
            with graph.inserting_before(last):
                _replace(last, call(graph, OF_WEIGHTS, *args))
        return
    if dilation != [1, 1]:
        return
    with graph.inserting_before(node):
        if transposed and _fits(node, w, x):  # the gradient of a convolution, of which `node` would be the images
            made = call(graph, OF_IMAGES, x, w, [*shape(node)[2:]], stride, padding)
        elif not transposed and _fits(x, w, node):
            made = call(graph, CONVOLUTION, x, w, stride, padding)
        else:
            return
        if bias is not None:
            made = call(graph, aten.add.Tensor, made, call(graph, aten.reshape.default, bias, [1, shape(node)[1], 1, 1]))
    _replace(node, made)


def _replace(node: Node, made: Node) -> None:
    made.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(made)


def _pair(value: Any) -> list[int]:
    """For rows and columns, of one number for both or of two."""
    return [*value] * (2 // len(value))


def _as_gradient(node: Node, stride: list[int], padding: list[int], dilation: list[int]) -> tuple[Node, list[Any]] | None:
    """What is a convolution's gradient in its weights, and the arguments of ours for it.

    Where it is differentiated, torch writes it as a convolution of images and slopes turned so that channels stand for images, and takes of
    its result, turned back, as much as there is of weights.
    """
    x, y, bias = node.args[:3]
    if bias is not None or stride != [1, 1] or not (_is_turned(x) and _is_turned(y)) or len(node.users) != 1:
        return None
    (last,) = node.users
    if not _is_turned(last):
        return None
    size = [*shape(last)[2:]]
    while len(last.users) == 1:
        (user,) = last.users
        if user.target != aten.slice.Tensor or len(user.args) != 4 or user.args[1] not in (2, 3) or user.args[2] != 0:
            break
        last, size = user, [*shape(user)[2:]]
    after = _places(shape(x)[2:], size, dilation, padding)
    return (last, [x.args[0], y.args[0], size, dilation, padding]) if after == [*shape(y)[2:]] else None  # type: ignore[union-attr]


def _places(before: Sequence[int], size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """How many there are in a result, down and across, of weights of such a ``size``."""
    return [(a + 2 * p - k) // s + 1 for a, k, s, p in zip(before, size, stride, padding, strict=True)]


def _is_turned(node: Any) -> bool:
    return isinstance(node, Node) and node.target in TRANSPOSES and order(node) == [1, 0, 2, 3]


def _replace_gradients(node: Any) -> None:
    graph, (y, x, w, _, *settings, transposed, more, groups, wanted) = node.graph, node.args
    if len(shape(x)) != 4 or not _fits(x, w, y):
        return
    stride, padding, dilation = map(_pair, settings)
    if (dilation, transposed, _pair(more), groups) != PLAIN:
        return
    with graph.inserting_before(node):
        found = [
            call(graph, OF_IMAGES, y, w, [*shape(x)[2:]], stride, padding) if wanted[0] else None,
            call(graph, OF_WEIGHTS, x, y, [*shape(w)[2:]], stride, padding) if wanted[1] else None,
            call(graph, aten.sum.dim_IntList, y, [0, 2, 3]) if wanted[2] else None,
        ]
    for part in list(node.users):
        if (instead := found[part.args[1]]) is not None:
            _replace(part, instead)


def _fits(x: Any, w: Any, y: Any) -> bool:
    """Whether ours is the faster one for images ``x``, weights ``w`` and results ``y``."""
    sizes = [shape(v) for v in (x, w, y)]
    return (
        all(is_tensor(v) and v.meta["val"].dtype == torch.float32 and v.meta["val"].device.type == "cpu" for v in (x, w, y))
        and min(sizes[0][0], *sizes[0][2:], *sizes[2][2:]) > 0 and sizes[0][0] >= IMAGES and min(sizes[1][:2]) >= CHANNELS
        and max(map(math.prod, sizes)) <= LARGE and is_lowered()
    )  # fmt: skip


@functools.cache
def is_lowered() -> bool:
    """Whether TorchInductor writes our code for convolutions; tells it how when first asked."""
    if not kernels.can_be_written():
        return False
    kernels.write(CONVOLUTION, _written)
    kernels.write(OF_IMAGES, _gradient_in_images)
    kernels.write(OF_WEIGHTS, _gradient_in_weights)
    return True


def _written(x: Any, w: Any, stride: list[int], padding: list[int]) -> kernels.Call:
    (n, _, *before), (o, _, *size) = _sizes(x), _sizes(w)
    after = _places(before, size, stride, padding)
    return _call("convolution", [x, w], [n, o, *after], _sizes(x), _sizes(w), [n, o, *after], stride, padding)


def _gradient_in_images(y: Any, w: Any, size: list[int], stride: list[int], padding: list[int]) -> kernels.Call:
    x = [_sizes(y)[0], _sizes(w)[1], *size]
    return _call("convolution_images", [y, w], x, x, _sizes(w), _sizes(y), stride, padding)


def _gradient_in_weights(x: Any, y: Any, size: list[int], stride: list[int], padding: list[int]) -> kernels.Call:
    w = [_sizes(y)[1], _sizes(x)[1], *size]
    return _call("convolution_weights", [x, y], w, _sizes(x), w, _sizes(y), stride, padding)


def _call(
    name: str, inputs: list[Any], result: list[int], x: list[int], w: list[int], y: list[int], stride: list[int], padding: list[int]
) -> kernels.Call:
    from torch._inductor import ir

    grid = ", ".join(map(str, (*x[2:], *y[2:], *w[2:], *stride, *padding)))

    def call(addresses: Sequence[str], to: str, threads: int) -> str:
        return f"bayesmeta::{name}<{x[0]}, {x[1]}, {y[1]}>({{{grid}}}, {', '.join(addresses)}, {to}, {threads});"

    inputs = [ir.ExternKernel.require_exact_strides(v, _channels_last(_sizes(v))) for v in inputs]
    return kernels.Call(["products.h", "convolutions.h"], inputs, result, _channels_last(result), math.prod(y) * math.prod(w[1:]), call)


def _sizes(value: Any) -> list[int]:
    return [int(n) for n in value.get_size()]


def _channels_last(size: list[int]) -> list[int]:
    _, channels, height, width = size
    return [height * width * channels, 1, width * channels, channels]
