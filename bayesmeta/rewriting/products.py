"""Products of float32 matrices on a CPU by code of our own (`products.h`), which TorchInductor compiles with the rest of a graph.

torch hands them to MKL, which uses less than half of what other makers' processors can do, and makes every result a tensor. Measured on an
AMD EPYC (`benchmarks/products.py`): 250 products of 10 × 40 and 40 × 40 in 52 µs instead of 128, 25 of 10 × 1761 and 1761 × 10 in 92
instead of 410, 1360 × 64 × 64 in 49 instead of 107 (oneDNN: 56).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

log = logging.getLogger(__name__)
aten = torch.ops.aten
LEAST = 4  # rows and columns of a product that there must be at least
FEW, LONG = 12, 128  # rows up to which, and numbers in a sum from which, sums are taken along vectors
PARALLEL = 500_000  # multiplications from which threads share them

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
def version() -> str:
    """Changes with what is written here: the compiler's disk cache has to keep what was made of it apart."""
    files = [importlib.resources.files(__package__).joinpath(name) for name in ("products.h", "products.py", "divisions.py")]
    return "products " + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def is_lowered() -> bool:
    """Whether TorchInductor writes our code for the product; tells it how when first asked.

    To be asked before a graph with the product is compiled: the compiler remembers how it did an operation that it was told nothing of.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on itself
            # not before it is needed, for it takes long; the first one first, for the others import each other
            from torch._inductor import compile_fx, ir, scheduler  # noqa: F401
            from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
            from torch._inductor.cpu_vec_isa import pick_vec_isa
            from torch._inductor.lowering import register_lowering
            from torch._inductor.utils import Placeholder, parallel_num_threads
    except ImportError as error:  # no part of torch's interface
        log.info("products of matrices are left to torch: %s", error)
        return False
    if not hasattr(scheduler, "_is_epilogue_fusion_enabled"):  # in older versions it was put in unasked
        log.info("products of matrices are left to torch: its compiler cannot be kept from fusing them with what comes after")
        return False
    if not pick_vec_isa():
        log.info("products of matrices are left to torch: the compiler writes no vector instructions for this processor")
        return False
    header = importlib.resources.files(__package__).joinpath("products.h").read_text(encoding="utf-8")

    class Code:
        """The C++ of one product, of however many pairs of matrices."""

        def __init__(self, inputs: list[Any]) -> None:
            self.inputs = inputs

        def render(self, kernel: Any, result: Any) -> str:
            shapes, strides = ([[int(n) for n in getattr(v, of)()] for v in self.inputs] for of in ("get_size", "get_stride"))
            (*pairs, rows, inner), columns = shapes[0], shapes[1][-1]
            definition = kernel.def_kernel(inputs=dict(zip("AB", self.inputs, strict=True)), outputs={"C": result})
            a, b, c = (f"&{kernel.index(v, [0] * len(shapes[0]))}" for v in (*self.inputs, result))
            (*a_step, a_row, a_column), (*b_step, b_row, b_column) = strides
            matrices = f"{{{a}, {a_row}, {a_column}}}, {sum(a_step)}, {{{b}, {b_row}, {b_column}}}, {sum(b_step)}"
            threads = parallel_num_threads() if math.prod(shapes[0]) * columns >= PARALLEL else 1
            side_by_side = a_column == b_row == 1 and rows <= FEW and inner >= LONG
            name = "products_of_long_sums" if side_by_side else "products"
            call = f"bayesmeta::{name}<{rows}, {columns}>({math.prod(pairs)}, {matrices}, {c}, {inner}, {threads});"
            return f'#include <torch/csrc/inductor/cpp_prefix.h>\n{header}\nextern "C" {definition} {{\n    {call}\n}}\n'

    def lower(a: Any, b: Any) -> Any:
        inputs = [ir.ExternKernel.realize_input(v) for v in (a, b)]
        for v in inputs:
            ir.as_storage_and_layout(v, freeze=True)
        code: Any = Code(ir.InputsKernel.unwrap_storage(inputs))

        def kernel_and_code(result: Any, *_: Any, epilogue_nodes: Any = (), **__: Any) -> tuple[Any, Callable[[], str]]:
            if epilogue_nodes:
                raise RuntimeError("TorchInductor fused a product with what comes after it, which would be lost")
            kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=parallel_num_threads())
            return kernel, functools.partial(kernel.render, code, result=result)

        size = [*inputs[0].get_size()[:-1], inputs[1].get_size()[-1]]
        layout = ir.FixedLayout(device=a.get_device(), dtype=a.get_dtype(), size=size)
        buffer = ir.CppTemplateBuffer(layout, inputs, kernel_and_code, code, None)
        buffer.allow_epilogue_fusion = False
        return ir.TensorBox.create(buffer)

    register_lowering(PRODUCT, type_promotion_kind=None)(lower)
    return True
