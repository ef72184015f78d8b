"""What tests of code of our own, compiled into graphs, share."""

import contextlib
import platform

import pytest
import torch
from torch._inductor import config

from bayesmeta.backends import inductor
from bayesmeta.rewriting import kernels


@pytest.fixture
def vectors():
    """Skips where the compiler writes no vector instructions; on processors for which it does, it must."""
    if not kernels.can_be_written():
        assert platform.machine() not in ("x86_64", "AMD64", "arm64", "aarch64"), "the compiler's parts are not where they were"
        pytest.skip("the compiler writes no vector instructions for this processor")


@contextlib.contextmanager
def on_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled_result(graph, given, *, threads, lanes):
    """What ``graph``, compiled for so many threads and for vectors of ``lanes`` bits, makes of ``given``."""
    with on_threads(threads), torch.no_grad(), config.patch({"cpp.simdlen": lanes}):
        return inductor(graph, given)(*given)
