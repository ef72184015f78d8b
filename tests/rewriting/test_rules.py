"""What is done to a graph before it is compiled: which products change, and that all stay the same."""

import pytest
import torch

from bayesmeta.graphs import trace
from bayesmeta.rewriting import rewritten
from bayesmeta.rewriting.nodes import TRANSPOSES


def count(module, *targets):
    return sum(node.target in targets for node in module.graph.nodes)


FLIPPED = {
    "a product": lambda a, b: [(a @ b).mT.flatten(-2)],
    "a sum of products": lambda a, b: [(a @ b + 2.0 * (a @ b)).mT.flatten(-2)],
    "a sum with a transpose in it": lambda a, b: [((a @ b) - (b.mT @ a.mT).mT).mT.flatten(-2), a],
    "leading axes regrouped": lambda a, b: [(a @ b).reshape(1, -1, *(a @ b).shape[-2:]).mT.flatten(-2)],
    "views and a sign": lambda a, b: [(-(a @ b).view(a.shape[:-1] + b.shape[-1:])).mT.flatten(-2)],
}


@pytest.mark.parametrize("axes", [(), (5,)], ids=["matrices", "batches"])
@pytest.mark.parametrize("function", FLIPPED.values(), ids=FLIPPED)
def test_a_product_that_is_transposed_is_made_so(function, axes):
    a, b = torch.randn(*axes, 3, 4, dtype=torch.float64), torch.randn(*axes, 4, 6, dtype=torch.float64)
    graph = rewritten(trace(function, [a, b]))
    for found, wanted in zip(graph(a, b), function(a, b), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    products = [node for node in graph.graph.nodes if node.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)]
    assert products and all(user.target not in TRANSPOSES for node in products for user in node.users)


def test_what_is_wanted_both_ways_is_multiplied_once():
    def both(a, b):
        y = a @ b
        return [y, y.mT.flatten()]

    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    graph = rewritten(trace(both, [a, b]))
    assert count(graph, torch.ops.aten.mm.default) == 1
    for found, wanted in zip(graph(a, b), both(a, b), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_other_axes_are_left_alone():
    a, b = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    for function in (lambda a, b: [(a @ b).transpose(0, 1)], lambda a, b: [(a @ b).permute(2, 0, 1)], lambda a, b: [(a @ b + b[:, :2]).mT]):
        torch.testing.assert_close(rewritten(trace(function, [a, b]))(a, b), function(a, b), rtol=0, atol=1e-12)


def test_a_product_with_few_columns_is_turned_where_it_adds_up_many_rows():
    a, b = torch.randn(900, 40, dtype=torch.float64), torch.randn(900, 9, dtype=torch.float64)
    graph = rewritten(trace(lambda a, b: [a.T @ b], [a, b]))
    (product,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert product.args[1].op == "placeholder"  # A stands where it is multiplied by, and B is what is transposed
    torch.testing.assert_close(graph(a, b)[0], a.T @ b, rtol=0, atol=1e-11)


def test_axes_that_are_put_into_one_keep_their_order_in_memory():
    def function(x, y):
        z = x.relu() * y.sum((2, 3), keepdim=True)
        return [z.movedim(1, -1).reshape(-1, 8), z]

    x, y = (torch.randn(20, 8, 26, 26).contiguous(memory_format=torch.channels_last) for _ in range(2))
    graph = rewritten(trace(function, [x, y]))
    forced = [node for node in graph.graph.nodes if "force_stride_order" in str(node.target)]
    assert len(forced) == 1 and forced[0].args[1] == [8 * 26 * 26, 1, 8 * 26, 8]
    for found, wanted in zip(graph(x, y), function(x, y), strict=True):
        torch.testing.assert_close(found, wanted)
    few = rewritten(trace(function, [x[:1, :, :19], y[:1, :, :19]]))
    assert not any("force_stride_order" in str(node.target) for node in few.graph.nodes)  # small ones are not worth it


@pytest.mark.parametrize("size", [1, 2, 5, 44, 45])
def test_medians_are_taken_without_python(size):
    torch.manual_seed(0)
    x = torch.randn(size, 7, dtype=torch.float64)

    def both(x):
        low, place = x.median(0)
        return [low, place, x.mT.median(-1, keepdim=True).values]

    fast = rewritten(trace(both, [x]))
    assert count(fast, torch.ops.aten.median.dim) == 0 and count(fast, torch.ops.aten.kthvalue.default) == 2
    for found, wanted in zip(fast(x), both(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
