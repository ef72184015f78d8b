"""Divisions that become multiplications, means that become sums, and what is worked out once: fewer slow operations, the same numbers."""

import pytest
import torch

from bayesmeta.backends import inductor
from bayesmeta.graphs import trace
from bayesmeta.rewriting import rewritten
from bayesmeta.rewriting.divisions import MANY, ONCE, TIMES

aten = torch.ops.aten
DIVISIONS = (aten.div.Tensor, aten.reciprocal.default)
ROWS, COLUMNS = 50, 100  # more than MANY together


def tensor(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64) + 0.5


def count(module, *targets):
    return sum(node.target in targets for node in module.graph.nodes)


def both(function, *inputs):
    graph = trace(function, list(inputs))
    fast = rewritten(graph)
    for found, wanted in zip(fast(*inputs), graph(*inputs), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    return fast


@pytest.mark.parametrize("number", [3, 0.1, -7.0, 2**20])
def test_by_a_number_it_is_a_multiplication(number):
    assert count(both(lambda x: [x / number], tensor(4)), *DIVISIONS) == 0


@pytest.mark.parametrize("number", [0.0, 1e-310, float("inf"), float("nan")])
def test_by_a_number_without_a_good_reciprocal_it_stays_a_division(number):
    x = torch.tensor([0.0, 1e-310, 3.0, float("inf")], dtype=torch.float64)
    graph = trace(lambda x: [x / number], [x])
    assert torch.equal(rewritten(graph)(x)[0].nan_to_num(7.0), graph(x)[0].nan_to_num(7.0))
    assert count(rewritten(graph), *DIVISIONS) == 1


def test_by_what_is_repeated_it_is_a_multiplication_by_a_reciprocal_that_is_put_into_memory():
    fast = both(lambda x, y, s: [x / s, y / s.exp()], tensor(ROWS, COLUMNS), tensor(ROWS, COLUMNS), tensor(COLUMNS))
    assert count(fast, aten.div.Tensor) == 0
    assert count(fast, aten.reciprocal.default) == count(fast, ONCE) == 2


def test_what_is_slow_and_repeated_is_put_into_memory_once():
    def function(x, s):
        return [x * s.exp().mul(2), x.mT + s.exp().mul(2).unsqueeze(1), (x[:3] - s.exp().mul(2))]

    fast = both(function, tensor(ROWS, COLUMNS), tensor(COLUMNS))
    assert count(fast, aten.exp.default) == count(fast, ONCE) == 1
    (once,) = fast.graph.find_nodes(op="call_function", target=ONCE)
    assert once.args[0].target == aten.mul.Tensor  # with what is done to it before it is repeated


@pytest.mark.parametrize(
    "function",
    [
        lambda x, s: [x * (s * 2)],  # quick to work out
        lambda x, s: [x * s],
        lambda x, s: [x[: TIMES - 1] / s],  # not repeated often
        lambda x, s: [x[: MANY // COLUMNS] * s.exp()],  # small
        lambda x, s: [x * (x + 1).log()],  # not repeated
        lambda x, s: [x * (x + 1).log().sum(0)],  # in memory as it is
    ],
)
def test_other_results_are_left_to_the_compiler(function):
    assert count(both(function, tensor(ROWS, COLUMNS), tensor(COLUMNS)), ONCE) == 0


def test_whole_numbers_are_divided_as_they_were():
    for function in (lambda x, s: [x / 3], lambda x, s: [x / s], lambda x, s: [torch.div(x, 3, rounding_mode="floor")]):
        inputs = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS), torch.arange(1, COLUMNS + 1)
        graph = trace(function, list(inputs))
        assert torch.equal(rewritten(graph)(*inputs)[0], graph(*inputs)[0])


def test_means_are_sums():
    fast = both(lambda x: [x.mean(0), x.mean((0, 1), keepdim=True), x.mean(-1)], tensor(4, 5))
    assert count(fast, aten.mean.dim) == 0 and count(fast, aten.sum.dim_IntList) == 3
    nothing = torch.zeros(0, 3, dtype=torch.float64)
    graph = rewritten(trace(lambda x: [x.mean(0)], [nothing]))
    assert graph(nothing)[0].isnan().all()


def test_what_is_worked_out_twice_is_worked_out_once():
    def function(x, s):
        return [x.exp() + s.sum(0) + 1, x.exp() * s.sum(0) + 1.0, s.sum(0) + s.sum(1), x * 0.0, x * -0.0]

    fast = both(function, -tensor(4, 4), tensor(4, 4))
    assert count(fast, aten.exp.default) == 1 and count(fast, aten.sum.dim_IntList) == 2
    zeros = fast(-tensor(4, 4), tensor(4, 4))[3:]
    assert zeros[0].signbit().all() and not zeros[1].signbit().any()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x * 2.0, x * 2.0],
        lambda x: [torch.zeros_like(x), torch.zeros_like(x)],
        lambda x: [x.clone().t(), x.clone().reshape(-1), (x + 1.0)[1:], x + 1.0],
        lambda x: [*x.exp().split(2), x.exp()],
    ],
)
def test_two_results_stay_two_tensors(function):
    """Somebody may write over one of them."""
    x = tensor(4, 4)
    places = [value.untyped_storage().data_ptr() for value in trace(function, [x])(x)]
    found = [value.untyped_storage().data_ptr() for value in both(function, x)(x)]
    assert [a == b for a in found for b in found] == [a == b for a in places for b in places]


def test_means_of_coarse_numbers_do_not_overflow():
    x = torch.full((1000, 64), 200.0, dtype=torch.float16)
    assert (rewritten(trace(lambda x: [x.mean(0)], [x]))(x)[0] == 200).all()


def test_numbers_drawn_twice_are_two_draws():
    graph = rewritten(trace(lambda p: [torch.bernoulli(p), torch.bernoulli(p)], [torch.full((500,), 0.5)]))
    assert not torch.equal(*graph(torch.full((500,), 0.5)))


@pytest.mark.slow
def test_compiled_it_is_in_memory_once():
    def function(x, s):
        return [x / s.exp() + (x * s.sqrt()).sum(0), (x.mT - s.exp().unsqueeze(1)).sum(1)]

    x, s = tensor(300, 200).float(), tensor(200).float()
    graph = trace(function, [x, s])
    with torch.no_grad():
        for found, wanted in zip(inductor(graph, [x, s])(x, s), graph(x, s), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
