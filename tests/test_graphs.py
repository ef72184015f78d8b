"""Large products of a compiled graph go to oneDNN: which do, and that they are the same."""

import pytest
import torch
from torch.nn.functional import linear

from bayesmeta.graphs import LARGE, _with_fast_products, trace

PRODUCT = torch.ops.bayesmeta.product.default


def count(module):
    return sum(node.target == PRODUCT for node in module.graph.nodes)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_large_products_are_the_same_and_small_ones_stay():
    torch.manual_seed(0)
    x, w, bias = torch.randn(1500, 64), torch.randn(48, 64), torch.randn(48)
    small = torch.randn(20, 20)
    assert x.numel() * len(w) > LARGE

    def several(x, w, bias, small):
        y = linear(x, w, bias)
        return [y, x @ w.T, y.T @ x, small @ small]

    graph = trace(several, [x, w, bias, small])
    fast = _with_fast_products(graph)
    assert count(graph) == 0 and count(fast) == 3
    for found, wanted in zip(fast(x, w, bias, small), several(x.double(), w.double(), bias.double(), small.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_a_graph_without_any_stays_as_it_is():
    for dtype, size in ((torch.float64, 2000), (torch.float32, 10)):
        graph = trace(lambda a, b: [a @ b], [torch.zeros(size, 64, dtype=dtype), torch.zeros(64, 64, dtype=dtype)])
        assert count(_with_fast_products(graph)) == 0
