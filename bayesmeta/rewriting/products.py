"""Products of float32 matrices on a CPU by code of our own (`products.h`).

torch hands them to MKL, which uses less than half of what other makers' processors can do, and makes every result a tensor. Measured on an
AMD EPYC (`benchmarks/kernels.py`): 250 products of 10 × 40 and 40 × 40 in 52 µs instead of 128, 25 of 10 × 1761 and 1761 × 10 in 92
instead of 410, 1360 × 64 × 64 in 49 instead of 107 (oneDNN: 56).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from . import kernels

aten = torch.ops.aten
LEAST = 4  # rows and columns of a product that there must be at least
FEW, LONG = 12, 128  # rows up to which, and numbers in a sum from which, sums are taken along vectors

_library = torch.library.Library("bayesmeta", "FRAGMENT")
_library.define("product(Tensor a, Tensor b) -> Tensor")
_library.impl("product", torch.matmul, "CPU")
_library.impl("product", lambda a, b: a.new_empty(*a.shape[:-1], b.shape[-1]), "Meta")
PRODUCT = torch.ops.bayesmeta.product.default


def multiply_here(node: Node) -> None:
    """Puts our product in the place of torch's, added to something or not."""
    if node.target not in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default) or node.kwargs:
        return
    *bias, a, b = node.args
    if not _fits(a, b):
        return
    with node.graph.inserting_before(node):
        made = node.graph.call_function(PRODUCT, (a, b))
        made.meta["val"] = node.meta["val"]
        if bias:
            made = node.graph.call_function(aten.add.Tensor, (made, bias[0]))
            made.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _fits(a: Any, b: Any) -> bool:
    first, second = (node.meta.get("val") for node in (a, b))
    if first is None or second is None or first.dtype != torch.float32 or first.device.type != "cpu":
        return False
    # the compiler does those of a column and a row number by number, with what is round them
    return min(first.shape[-2], second.shape[-1]) >= LEAST and first.shape[-1] > 1 and len(first) > 0 and is_lowered()


@functools.cache
def is_lowered() -> bool:
    """Whether TorchInductor writes our code for the product; tells it how when first asked."""
    if not kernels.can_be_written():
        return False
    kernels.write(PRODUCT, _written)
    return True


def _written(a: Any, b: Any) -> kernels.Call:
    """The C++ of one product, of however many pairs of matrices."""
    from torch._inductor import ir

    inputs = [ir.ExternKernel.realize_input(v) for v in (a, b)]
    for v in inputs:
        ir.as_storage_and_layout(v, freeze=True)
    (*pairs, rows, inner), columns = map(int, inputs[0].get_size()), int(inputs[1].get_size()[-1])

    def call(addresses: Sequence[str], result: str, threads: int) -> str:
        (*a_step, a_row, a_column), (*b_step, b_row, b_column) = ([int(n) for n in v.get_stride()] for v in inputs)
        a, b = addresses
        matrices = f"{{{a}, {a_row}, {a_column}}}, {sum(a_step)}, {{{b}, {b_row}, {b_column}}}, {sum(b_step)}"
        side_by_side = a_column == b_row == 1 and rows <= FEW and inner >= LONG
        name = "products_of_long_sums" if side_by_side else "products"
        return f"bayesmeta::{name}<{rows}, {columns}>({math.prod(pairs)}, {matrices}, {result}, {inner}, {threads});"

    return kernels.Call(["products.h"], inputs, [*pairs, rows, columns], None, math.prod(pairs) * rows * inner * columns, call)
