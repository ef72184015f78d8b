"""A compiled graph of few numbers takes its memory in one piece; what it gave stays."""

import math

import torch
from torch._inductor.utils import run_and_get_code

from bayesmeta import graphs
from bayesmeta.graphs import inductor, trace


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
    """One large piece goes back to the system after each call, and does not stay in the processor's cache."""
    x, w = torch.randn(7, 6), torch.randn(6, 4)
    graph = trace(several, [x, w])
    used = sum(v.nbytes for v in (several(x, w)[0], *several(x, w)[2:])) + 7 * 6 * 4 * 2  # and z before and after
    assert used < graphs._memory(graph) < 10 * used
    for node in list(graph.graph.nodes)[:4]:
        node.meta.clear()
    assert graphs._memory(graph) == math.inf
    for little, pools in ((graphs.LITTLE, 1), (0, 0)):
        graph = trace(several, [x, w])
        monkeypatch.setattr(graphs, "LITTLE", little)
        with torch.no_grad():
            _, (code,) = run_and_get_code(lambda graph=graph: inductor(graph, [x, w])(x, w))
        assert ("pool0_handle" in code) == bool(pools)
