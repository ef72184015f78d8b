"""Operations of our own for float32 tensors on a CPU, whose C++ TorchInductor compiles with the rest of a graph."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

log = logging.getLogger(__name__)
LEFT = "products of matrices and convolutions are left to torch: %s"
PARALLEL = 500_000  # multiplications from which threads share them
SOURCES = ("products.h", "convolutions.h", "kernels.py", "products.py", "convolutions.py", "divisions.py")


class Call(NamedTuple):
    """What is compiled for an operation: a call of a function of ``headers``.

    ``inputs``: in memory; ``size`` and ``strides``: of the result, None where one number stands after the other. ``multiplications``: how
    many there are. ``call``: is given the addresses of inputs and result and how many threads share them.
    """

    headers: Sequence[str]
    inputs: Sequence[Any]
    size: Sequence[Any]
    strides: Sequence[int] | None
    multiplications: int
    call: Callable[[Sequence[str], str, int], str]


@functools.cache
def version() -> str:
    """Changes with what is written here: the compiler's disk cache has to keep what was made of it apart."""
    files = [importlib.resources.files(__package__).joinpath(name) for name in SOURCES]
    return "kernels " + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def can_be_written() -> bool:
    """Whether TorchInductor can be told how an operation of ours is done."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on itself
            # not before it is needed, for it takes long; the first one first, for the others import each other
            from torch._inductor import compile_fx, ir, scheduler  # noqa: F401
            from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel  # noqa: F401
            from torch._inductor.cpu_vec_isa import pick_vec_isa
            from torch._inductor.lowering import register_lowering  # noqa: F401
            from torch._inductor.utils import Placeholder, parallel_num_threads  # noqa: F401
    except ImportError as error:  # no part of torch's interface
        log.info(LEFT, error)
        return False
    if not hasattr(scheduler, "_is_epilogue_fusion_enabled"):  # in older versions it was put in unasked
        log.info(LEFT, "its compiler cannot be kept from fusing them with what comes after")
        return False
    if not pick_vec_isa():
        log.info(LEFT, "the compiler writes no vector instructions for this processor")
        return False
    return True


def write(operation: Any, of: Callable[..., Call]) -> None:
    """Tells TorchInductor how ``operation`` is done; ``of``: of its arguments.

    To be told before a graph with the operation is compiled: the compiler remembers how it did one that it was told nothing of.
    """
    from torch._inductor import ir
    from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
    from torch._inductor.lowering import register_lowering
    from torch._inductor.utils import Placeholder, parallel_num_threads

    class Code:
        """The C++ of one call."""

        def __init__(self, inputs: list[Any], headers: str, threads: int, call: Callable[[Sequence[str], str, int], str]) -> None:
            self.inputs, self.headers, self.threads, self.call = inputs, headers, threads, call

        def render(self, kernel: Any, result: Any) -> str:
            names = [f"input{i}" for i in range(len(self.inputs))]
            definition = kernel.def_kernel(inputs=dict(zip(names, self.inputs, strict=True)), outputs={"result": result})
            *given, made = (f"&{kernel.index(v, [0] * len(v.get_size()))}" for v in (*self.inputs, result))
            call = self.call(given, made, self.threads)
            return f'#include <torch/csrc/inductor/cpp_prefix.h>\n{self.headers}\nextern "C" {definition} {{\n    {call}\n}}\n'

    def lower(*args: Any) -> Any:
        headers, inputs, size, strides, multiplications, call = of(*args)
        text = "\n".join(importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8") for name in headers)
        threads = parallel_num_threads() if multiplications >= PARALLEL else 1
        code: Any = Code(ir.InputsKernel.unwrap_storage(inputs), text, threads, call)

        def kernel_and_code(result: Any, *_: Any, epilogue_nodes: Any = (), **__: Any) -> tuple[Any, Callable[[], str]]:
            if epilogue_nodes:
                raise RuntimeError("TorchInductor fused an operation of ours with what comes after it, which would be lost")
            kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=parallel_num_threads())
            return kernel, functools.partial(kernel.render, code, result=result)

        like = inputs[0]
        layout = ir.FixedLayout(like.get_device(), like.get_dtype(), list(size), None if strides is None else list(strides))
        buffer = ir.CppTemplateBuffer(layout, inputs, kernel_and_code, code, None)
        buffer.allow_epilogue_fusion = False
        return ir.TensorBox.create(buffer)

    register_lowering(operation, type_promotion_kind=None)(lower)
