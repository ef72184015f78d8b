"""A compiled graph of few numbers takes its memory in one piece; what it gave stays; freed memory stays with the process."""

import ctypes
import math
import subprocess
import sys

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from bayesmeta import backends
from bayesmeta.backends import inductor
from bayesmeta.graphs import trace

pytestmark = pytest.mark.usefixtures("compiled_anew")


def several(x, w):
    y = torch.relu(x @ w)
    z = (y @ w.mT).softmax(-1)
    return [y, z.sum(0), (z * x) @ w, w.mT]


def test_results_stay_as_they_are_through_the_next_call():
    torch.manual_seed(0)
    x, w = torch.randn(7, 5), torch.randn(5, 4)
    graph = trace(several, [x, w])
    with torch.no_grad():
        run = inductor(graph, [x, w])
        first = run(x, w)
        kept = [v.clone() for v in first]
        second = run(x + 1, w)
    for one, same, other, wanted in zip(first, kept, second, several(x + 1, w), strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(other, wanted)
    torch.testing.assert_close(list(first), several(x, w))


def test_a_graph_of_many_numbers_takes_them_piece_by_piece(monkeypatch):
    """One large piece goes back to the system after each call."""
    x, w = torch.randn(7, 6), torch.randn(6, 4)
    for little, large, pools in ((backends.LITTLE, backends.LARGE, 1), (0, backends.LARGE, 0), (backends.LITTLE, 0, 0)):
        graph = trace(several, [x, w])
        monkeypatch.setattr(backends, "LITTLE", little)
        monkeypatch.setattr(backends, "LARGE", large)
        with torch.no_grad():
            _, (code,) = run_and_get_code(lambda graph=graph: inductor(graph, [x, w])(x, w))
        assert ("pool0_handle" in code) == bool(pools)


def test_memory_is_what_is_there_at_once():
    x = torch.randn(5, 200)
    graph = trace(lambda x: [x.sin().view(-1).cos().exp().view(10, -1).tanh()], [x])
    assert backends._memory(graph) == 2 * x.nbytes  # of a chain one that is read and one that is written
    graph = trace(lambda x: [x.sin(), x.cos()[:2], x.exp().sum()], [x])
    assert backends._memory(graph) == 3 * x.nbytes + 4  # results stay, and what a result is a part of
    graph = trace(lambda x: [x.sin().sum(), x.cos().sum(), x.exp().sum()], [x])
    assert backends._memory(graph) == x.nbytes + 3 * 4
    for node in list(graph.graph.nodes)[:4]:
        node.meta.clear()
    assert backends._memory(graph) == math.inf


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not GNU's C library")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_stays_with_the_process(kept):
    """Thirty arrays of 4 MiB, taken and given back again and again: their 30,000 pages are faulted in once, or each time."""
    script = f"""
import ctypes, resource, torch
from bayesmeta.backends import keep_freed_memory

ctypes.CDLL(None).mallopt(-3, 2**17)  # as the library starts; it may change that by itself
if {kept}:
    keep_freed_memory()

def take():
    return [torch.ones(2**20) for _ in range(30)]

for _ in range(3):
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=600, check=True)
    assert (int(done.stdout) < 1000) is kept, done.stdout
