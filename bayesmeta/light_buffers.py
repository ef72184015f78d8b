"""Intermediate results of a compiled graph as addresses: a tensor object is made of one only where an operation asks for it.

TorchInductor's C++ makes a tensor of every intermediate result, though most are read and written by its own fused kernels alone, which take
an address. Of a short step, in one kernel with a hundred results, making them and taking them down again is a good part.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)
ONE_AT_A_TIME = threading.RLock()
LONG = 100  # operations, from which on what calls them is hardly a part of a step
SOURCE = """
    class PlaceInPool {
     public:
      PlaceInPool(AtenTensorHandle pool, int64_t offset, int32_t dtype, int64_t dims, const int64_t* sizes, const int64_t* strides)
          : pool_(pool), offset_(offset), dtype_(dtype), dims_(dims), sizes_(sizes), strides_(strides),
            data_(static_cast<char*>(get_data_ptr_wrapper(pool)) + offset) {}
      PlaceInPool(const PlaceInPool& same) : PlaceInPool(same.pool_, same.offset_, same.dtype_, same.dims_, same.sizes_, same.strides_) {}
      PlaceInPool(PlaceInPool&&) = default;
      void* data_ptr() const { return data_; }
      AtenTensorHandle get() const {
        if (!tensor_.get()) {
          AtenTensorHandle made = nullptr;
          AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__alloc_from_pool(pool_, offset_, dtype_, dims_, sizes_, strides_, &made));
          tensor_ = RAIIAtenTensorHandle(made);
        }
        return tensor_.get();
      }
      operator AtenTensorHandle() const { return get(); }
      AtenTensorHandle release() { get(); return tensor_.release(); }
      void reset() { tensor_.reset(); }
      PlaceInPool view(int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t further) const {
        const auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_)) * further;
        return PlaceInPool(pool_, offset_ + bytes, dtype_, dims, sizes, strides);
      }

     private:
      AtenTensorHandle pool_;
      int64_t offset_;
      int32_t dtype_;
      int64_t dims_;
      const int64_t *sizes_, *strides_;
      char* data_;
      mutable RAIIAtenTensorHandle tensor_;
    };

    [[maybe_unused]] inline PlaceInPool reinterpret_tensor_wrapper(
        const PlaceInPool& place, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t further) {
      return place.view(dims, sizes, strides, further);
    }
    [[maybe_unused]] inline PlaceInPool wrap_with_raii_handle_if_needed(PlaceInPool&& place) { return std::move(place); }
    [[maybe_unused]] inline const PlaceInPool& wrap_with_raii_handle_if_needed(const PlaceInPool& place) { return place; }
    [[maybe_unused]] inline AtenTensorHandle unwrap_raii_handle_if_needed(const PlaceInPool& place) { return place.get(); }
    [[maybe_unused]] inline void* get_data_ptr_wrapper(const PlaceInPool& place) { return place.data_ptr(); }
"""


@functools.cache
def _wrapper() -> Any:
    """What writes the C++ round the kernels; None where TorchInductor has not the parts that this changes."""
    try:
        from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
        from torch._inductor.codegen.memory_planning import AllocFromPoolLine
        from torch._inductor.virtualized import V
    except ImportError as error:
        log.info("compiled graphs make tensors of all intermediate results: %s", error)
        return None

    class Wrapper(CppWrapperCpu):
        results: frozenset[tuple[Any, Any]] = frozenset()  # pools and places of the graph's: these are tensors from the start

        @staticmethod
        def create(is_subgraph: bool, subgraph_name: Any, parent_wrapper: Any, partition_signatures: Any = None) -> Any:
            return Wrapper()

        def write_header(self) -> None:
            super().write_header()
            self.header.splice(SOURCE)

        def _write_entry_point_signature(self) -> None:
            # what calls the kernels, one after the other, takes g++ long to optimise, and gains nothing by it
            if len(V.graph.operations) > LONG:
                self.prefix.writeline('__attribute__((optimize("O1")))')
            super()._write_entry_point_signature()

        def memory_plan(self) -> None:
            super().memory_plan()
            given = [line.group.allocation for line in self.lines if isinstance(line, AllocFromPoolLine) and line.group.is_output]
            self.results = frozenset((place.pool.name, place.offset) for place in given if place and place.pool)

        def make_free_by_names(self, names_to_del: list[str]) -> Any:
            # a pool stays to the end: what was made of a part of it may still be a result
            return super().make_free_by_names([name for name in names_to_del if not name.startswith("pool")])

        def codegen_alloc_from_pool(self, name: str, offset: Any, dtype: Any, shape: Any, stride: Any) -> Any:
            made, lines = super().codegen_alloc_from_pool(name, offset, dtype, shape, stride)
            if (name, offset) in self.results:
                return made, lines
            _, call = lines  # a handle, and its tensor made: aoti_torch__alloc_from_pool(arguments, &handle)
            return f"PlaceInPool({call[call.index('from_pool(') + len('from_pool(') : call.rindex(', &')]})", []

    return Wrapper


def version() -> str:
    """Changes with what is written here: the compiler's disk cache has to keep what was made of it apart. Empty where nothing is."""
    return "" if _wrapper() is None else _hash()


@functools.cache
def _hash() -> str:
    return "light buffers " + hashlib.sha256(f"{SOURCE} {LONG} {inspect.getsource(_wrapper)}".encode()).hexdigest()


@contextmanager
def light_buffers() -> Iterator[None]:
    """Within it TorchInductor writes such code for CPUs, where a graph's memory is planned and its kernels are called from C++.

    One thread at a time.
    """
    from torch._inductor.codegen import common

    with ONE_AT_A_TIME:
        common.init_backend_registration()
        codegen, wrapper = common.device_codegens["cpu"], _wrapper()
        if wrapper is None:
            yield
            return
        before, codegen.cpp_wrapper_codegen = codegen.cpp_wrapper_codegen, wrapper
        try:
            yield
        finally:
            codegen.cpp_wrapper_codegen = before
