"""TorchInductor spared what takes long and changes nothing of what it writes.

    places in memory   that are sums of multiples already are not simplified before it is seen by how much they move with a loop's number
    instructions       of vectors are not tried out with the C++ compiler; the processor says that it has them
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def short_compiling() -> Iterator[None]:
    """Within it TorchInductor compiles faster. One thread at a time."""
    from torch._inductor import config, sizevars  # not before it is needed: it takes long to import

    settings = {}
    if config.cpp.vec_isa_ok is None and sys.platform == "linux" and platform.machine() == "x86_64":
        settings["cpp.vec_isa_ok"] = True  # every compiler that takes torch's headers (C++20) knows AVX2 and AVX-512
    name, module = "simplify_index_in_vec_range", vars(sizevars)
    before = module.get(name)
    with config.patch(settings):
        if before is None:  # no part of torch's interface
            yield
            return
        module[name] = _unless_a_sum(before)
        try:
            yield
        finally:
            module[name] = before


@functools.cache
def _unless_a_sum(simplify: Any) -> Any:
    import sympy

    @functools.cache
    def simplified(index: Any, var: Any, length: int) -> Any:
        return simplify(index, var, length) if index.has(sympy.Function, sympy.Rel) else index

    return simplified
