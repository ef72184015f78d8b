"""Long sums without what is constant in them, and in two steps: the same numbers, fewer passes."""

import pytest
import torch

from bayesmeta.graphs import trace
from bayesmeta.rewriting import rewritten
from bayesmeta.rewriting.long_sums import CHUNK
from bayesmeta.rewriting.nodes import note_values, shape

SUM = torch.ops.aten.sum.dim_IntList
FACTORS = {
    "a sign": lambda x, c, n: [(-x).sum((0, 2, 3))],
    "a number": lambda x, c, n: [(x * 3.0 / 7.0).sum((0, 2, 3), keepdim=True)],
    "of each channel": lambda x, c, n: [(c * x).sum((0, 2, 3))],
    "divided by": lambda x, c, n: [(x / c).sum((-1, -4, -2), keepdim=True)],
    "of each image": lambda x, c, n: [(n * x).sum((0, 2, 3))],
    "of each image, inside one of each channel": lambda x, c, n: [((n * -x) * c).sum((0, 2, 3))],
    "all of them": lambda x, c, n: [(-((x**1.0) * 2.0 * n.clone() / c)).sum((0, 2, 3), keepdim=True)],
    "beside another use": lambda x, c, n: [(c * x).sum((0, 2, 3)), c * x],
    "twice": lambda x, c, n: [x.sum((0, 2, 3)) + (c * x).sum((0, 2, 3)), (-x).sum((0, 2, 3))],
}


def inputs(images=20, side=6):
    torch.manual_seed(0)
    shapes = (images, 3, side, side), (3, 1, 1), (images, 1, 1, 1)
    return [torch.randn(shape, dtype=torch.float64) + (len(shape) < 4) for shape in shapes]


def sums(module):
    return list(module.graph.find_nodes(op="call_function", target=SUM))


@pytest.mark.parametrize("function", FACTORS.values(), ids=FACTORS)
def test_what_is_constant_is_taken_out(function):
    values = inputs()
    graph = trace(function, values)
    fast = rewritten(graph)
    for found, wanted in zip(fast(*values), function(*values), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    note_values(fast, graph)
    x = fast.graph.find_nodes(op="placeholder")[0]
    assert {node.args[0] for node in sums(fast) if shape(node.args[0]) == values[0].shape} == {x}


def test_what_is_not_stays():
    x, c, _ = inputs()
    y = torch.randn_like(x)
    functions = (
        lambda x, y, c: [(x * y).sum((0, 2, 3))],  # both of the sum's size
        lambda x, y, c: [(c + x).sum((0, 2, 3))],
        lambda x, y, c: [(2.0 * c).sum((1,))],  # a short one
        lambda x, y, c: [(x**2.0).sum((0, 2, 3))],
        lambda x, y, c: [(c * x[:, :, :1, :1]).expand(x.shape).sum((0, 2, 3))],
        lambda x, y, c: [(x[:, :, :1, :1] * c.expand(x.shape)).sum((0, 2, 3))],  # the other factor is the large one
        lambda x, y, c: [(2 * (x > 0)).sum((0, 2, 3))],  # of whole numbers
        lambda x, y, c: [(2.0 * x[:0]).sum((0, 2, 3)), (2.0 * x).sum(()), (2.0 * x[0, 0, 0, 0]).sum((0,))],
    )
    for function in functions:
        graph = trace(function, [x, y, c])
        for found, wanted in zip(rewritten(graph)(x, y, c), function(x, y, c), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
            assert found.dtype == wanted.dtype
    for function in functions[:4]:
        graph = trace(function, [x, y, c])
        assert [list(n.args[1]) for n in sums(rewritten(graph))] == [list(n.args[1]) for n in sums(graph)]


@pytest.mark.parametrize("keepdim", [False, True])
def test_a_longer_sum_than_the_compilers_is_taken_in_two(keepdim):
    x = inputs(images=50, side=10)[0].float()
    assert x.numel() / 3 > CHUNK

    def total(x):
        return [x.sum((0, -2, -1), keepdim=keepdim)]

    graph = trace(total, [x])
    fast = rewritten(graph)
    assert len(sums(graph)) == 1 and [sorted(a % 4 for a in node.args[1]) for node in sums(fast)] == [[2, 3], [0, 2, 3]]
    exact = total(x.double())[0]
    (found,) = fast(x)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
    assert found.shape == total(x)[0].shape
    for short in (x[:40], torch.randn(1, 3, 100, 100), torch.randn(2, 3, 100, 100)):  # few; not two axes; one of two too long by itself
        assert len(sums(rewritten(trace(total, [short])))) == 1
