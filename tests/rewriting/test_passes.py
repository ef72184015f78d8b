"""Factors that go to the smaller side of a product, and operations on the parts of a tensor before they are put together."""

import pytest
import torch

from bayesmeta.graphs import trace
from bayesmeta.rewriting import LOWERED, rewritten
from bayesmeta.rewriting.nodes import note_values, shape
from bayesmeta.rewriting.passes import MANY

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, *LOWERED)


def tensor(*size, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=dtype)


def both(function, *inputs):
    """The rewritten graph, with what is known of its tensors; its results are those of the traced one."""
    graph = trace(function, list(inputs))
    fast = rewritten(graph)
    for found, wanted in zip(fast(*inputs), graph(*inputs), strict=True):
        near = 1e-12 if wanted.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)
    note_values(fast, graph)
    return fast


def scaled(module):
    """Sizes of what is multiplied by a number."""
    products = [node for node in module.graph.nodes if node.target in (aten.mul.Tensor, aten.mul.Scalar)]
    return [shape(node) for node in products if not isinstance(node.args[1], torch.fx.Node)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_goes_to_the_smaller_side_of_a_product(dtype):
    a, b = tensor(3, 5, 5, dtype=dtype), tensor(3, 5, 900, dtype=dtype)
    for function in (lambda a, b: [a @ (2.5 * b)], lambda a, b: [(-0.5 * (b * 3.0)).mT @ a.mT], lambda a, b: [a @ (b.mT * 2.5).mT / 4.0]):
        sizes = scaled(both(function, a, b))
        assert (3, 5, 5) in sizes and (3, 900, 5) not in sizes and sizes.count((3, 5, 900)) <= 1  # the last of a result


def test_or_to_the_product_itself():
    a, b = tensor(2, 6, 900), tensor(2, 900, 6)
    assert scaled(both(lambda a, b: [(2.0 * a) @ (b / 3.0)], a, b)) == [(2, 6, 6)] * 2


def test_factors_of_small_things_stay():
    a, b = tensor(3, 5, 5), tensor(3, 5, 40)
    assert scaled(both(lambda a, b: [a @ (2.5 * b)], a, b)) == [(3, 5, 40)]


@pytest.mark.parametrize("function", [lambda n, w: [(n * 0.5) @ w], lambda n, w: [((n > 3).view(-1, 64) * 2.0) @ w]])
def test_factors_that_make_numbers_real_stay(function):
    both(function, torch.randint(0, 9, (500, 64), generator=torch.Generator().manual_seed(0)), tensor(64, 4, dtype=torch.float32))


def parts(module):
    return [shape(node) for node in module.graph.nodes if node.target in (aten.add.Tensor, aten.mul.Tensor, aten.exp.default)]


def test_what_is_done_to_a_whole_is_done_to_its_parts():
    def function(x, y, row, column, single):
        whole = torch.cat([x.cumsum(0), y.cumsum(0), single.cumsum(0)], 1)
        return [(row * (whole + column).exp() + 2.0).mT @ x]

    inputs = tensor(60, 40), tensor(60, 59), tensor(100), tensor(60, 1), tensor(60, 1)
    fast = both(function, *inputs)
    assert (60, 100) not in parts(fast)
    assert {(60, 40), (60, 59), (60, 1)} <= set(parts(fast))


def test_long_chains_stay_what_they_are():
    """Each operation on parts is as many operations."""

    def function(*values):
        whole = torch.cat(values[:-1], 1)
        for _ in range(100):
            whole = (whole + values[-1]).tanh()
        return [whole]

    inputs = [tensor(70, 20) for _ in range(8)] + [tensor(160)]
    graph = trace(function, inputs)
    assert len(both(function, *inputs).graph.nodes) < len(graph.graph.nodes) + 600


def test_an_empty_part_of_one_axis():
    """As torch allows it."""
    both(lambda e, x: [torch.cat([e, x], 1) + 1.0, torch.cat([e, x], 0) * x[0]], tensor(0), tensor(100, 64))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (whole := torch.cat([x, y], 1)) + whole.sum(0),  # wanted by another one
        lambda x, y: torch.cat([x, y], 1)[:2] * 2.0,  # small
        lambda x, y: torch.cat([x, y], 1) * torch.cat([y, x], 1),  # two of them
        lambda x, y: torch.cat([x, y], 1).square().expand(2, -1, -1) + torch.cat([x, y], 1),  # of another size
        lambda x, y: torch.cat(x.split(1, 0), 0) + 1.0,  # of many parts
        lambda x, y: torch.cat([x.float(), y.float()], 1).double() * 2.0,  # of another type
    ],
)
def test_and_else_the_numbers_stay(function):
    x, y = tensor(70, 40), tensor(70, 60)
    assert x.numel() + y.numel() > MANY
    both(lambda x, y: [function(x, y)], x, y)
