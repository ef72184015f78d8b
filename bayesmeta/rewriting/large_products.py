"""Large products of matrices on a CPU by oneDNN, for torch takes MKL's, which uses half of what other makers' processors can do.

Measured on an AMD EPYC: 52 µs instead of 103 for 1360 × 64 × 64. TorchInductor calls oneDNN itself for layers whose weights stand still;
the operation here, `bayesmeta::product`, has its own way to that call, which takes matrices as they stand, transposed ones too.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

log = logging.getLogger(__name__)
aten = torch.ops.aten
LARGE, LARGE_TRANSPOSED = 2_000_000, 4_000_000  # multiplications from which oneDNN's product is the faster
THIN, NARROW = 4, 32  # rows, columns and numbers in a sum that there must be at least; NARROW where the first matrix is transposed and
BROAD = 64  # the second has fewer columns than that


def _by_onednn(a: Tensor, turned: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, turned if _is_whole(turned) else turned.contiguous(), None, "none", [], "")
    return product


def _is_whole(matrix: Any) -> bool:
    """Whether its numbers stand together, in either order: oneDNN takes a hundred times as long for a part of a matrix."""
    (rows, columns), strides = matrix.size(), tuple(matrix.stride())
    return strides in ((columns, 1), (1, rows))


_library = torch.library.Library("bayesmeta", "FRAGMENT")
_library.define("product(Tensor a, Tensor turned) -> Tensor")  # A Bᵀ
_library.impl("product", _by_onednn, "CPU")
_library.impl("product", lambda a, turned: a.new_empty(len(a), len(turned)), "Meta")
PRODUCT = torch.ops.bayesmeta.product.default


def multiply_by_onednn(node: Node) -> None:
    """Puts oneDNN's product in the place of a product of two matrices, added to something or not, where that is the faster one."""
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs or not _is_large(*node.args[-2:]):
        return
    *bias, a, b = node.args
    call = node.graph.call_function
    with node.graph.inserting_before(node):
        made = call(PRODUCT, (a, call(aten.t.default, (b,))))
        if bias:
            made = call(aten.add.Tensor, (made, bias[0]))
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _is_large(a: Any, b: Any) -> bool:
    first, second = (node.meta.get("val") for node in (a, b))
    if first is None or second is None or first.dtype != torch.float32 or first.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    sizes = (*first.shape, second.shape[1])
    if first.stride()[-1] == 1:
        return min(sizes) >= THIN and math.prod(sizes) >= LARGE
    return min(sizes) >= (THIN if sizes[-1] >= BROAD else NARROW) and math.prod(sizes) >= LARGE_TRANSPOSED


@functools.cache
def has_door_in_c() -> bool:
    """Whether compiled code calls the product without Python in between; tells TorchInductor how when first asked.

    To be asked before a graph with the product is compiled: the compiler remembers how it did an operation that it was told nothing of.
    """
    try:
        from torch._inductor import ir, mkldnn_ir  # not before it is needed: it takes long to import
        from torch._inductor.lowering import register_lowering

        # no part of torch's interface: where one of them is missing, Python serves
        finished, in_storage = mkldnn_ir._create_output_node, ir.as_storage_and_layout

        class Product(mkldnn_ir.LinearUnary):
            """The call that `LinearUnary` writes, of matrices as they stand."""

        def lower(a: Any, turned: Any) -> Any:
            a, turned = ir.ExternKernel.realize_input(a), ir.ExternKernel.realize_input(turned)
            (_, layout), (_, other) = (in_storage(v, freeze=True) for v in (a, turned))
            (rows, inner), columns = layout.size, other.size[0]
            if list(other.stride) not in ([inner, 1], [1, columns]):
                turned = ir.ExternKernel.require_contiguous(turned)
            result = ir.FixedLayout(device=a.get_device(), dtype=a.get_dtype(), size=[rows, columns])
            call = Product(layout=result, inputs=[a, turned], constant_args=[None, "none", [-1], ""])
            return ir.TensorBox.create(finished(call))

        register_lowering(PRODUCT, type_promotion_kind=None)(lower)
    except (ImportError, AttributeError) as error:
        log.info("large products are called from Python: %s", error)
        return False
    return True
