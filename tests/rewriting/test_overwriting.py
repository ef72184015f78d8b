"""Results that a graph puts where its inputs stand."""

import pytest
import torch

from bayesmeta.backends import Recorded, inductor
from bayesmeta.graphs import trace
from bayesmeta.rewriting import rewritten
from bayesmeta.rewriting.overwriting import give_back, overwrite, overwritten


def step(a, b, rate):
    """A sum, and a step of both."""
    move = rate * (a @ b)
    return [move.sum(), a - move, torch.where(move.sum() > 0, b + 1, b)]


def inputs():
    torch.manual_seed(0)
    return [torch.rand(3, 3), torch.rand(3, 3), torch.tensor(0.1)]


def overwriting():
    module = trace(step, inputs())
    overwrite(module, {1: 0, 2: 1})
    return module


def test_a_result_is_put_over_an_input_and_is_none_any_more():
    module, given = overwriting(), inputs()
    total, a, b = step(*inputs())
    assert overwritten(module) == [0, 1]
    (found,) = module(*given)
    torch.testing.assert_close([found, *given[:2]], [total, a, b], rtol=0, atol=0)


def test_it_can_be_undone():
    module, given = overwriting(), inputs()
    assert give_back(module) == {1: 0, 2: 1} and overwritten(module) == []
    torch.testing.assert_close(list(module(*given)), step(*inputs()), rtol=0, atol=0)
    torch.testing.assert_close(given, inputs(), rtol=0, atol=0)


def test_rules_for_graphs_leave_it_in_place():
    rows = torch.rand(5, 4)

    def function(w, x):
        y = x @ w
        return [y, (x.mT @ y).mT.mT]

    module = trace(function, [torch.zeros(4, 6), rows])
    overwrite(module, {1: 0})
    changed, w = rewritten(module), torch.rand(4, 6)
    wanted = function(w, rows)
    assert overwritten(module) == overwritten(changed) == [0]
    (found,) = changed(w, rows)
    torch.testing.assert_close([found, w], wanted)


def test_what_a_program_writes_in_the_midst_is_its_own():
    def function(a, b):
        a.add_(b)
        return [a * b, b + 1]

    module = trace(function, [torch.zeros(2), torch.ones(2)])
    overwrite(module, {1: 1})
    a, b = torch.ones(2), torch.full((2,), 3.0)
    assert overwritten(module) == [1]
    (found,) = rewritten(module)(a, b)
    assert found.tolist() == [12, 12] and a.tolist() == [4, 4] and b.tolist() == [4, 4]


@pytest.mark.parametrize("make", [inductor, lambda module, given: Recorded(module, module, given)], ids=["compiled", "recorded"])
def test_however_it_is_run(make):
    given = inputs()
    run = make(overwriting(), [v.clone() for v in given])
    for _ in range(3):
        wanted = step(*(v.clone() for v in given))
        (found,) = run(*given)
        torch.testing.assert_close([found, *given[:2]], wanted)
