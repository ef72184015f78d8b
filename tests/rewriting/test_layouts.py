"""Convolutions' weights put in order once: the same numbers, in fewer passes."""

import pytest
import torch
from torch._inductor import inductor_prims
from torch.nn.functional import conv2d

from bayesmeta.backends import inductor
from bayesmeta.graphs import trace
from bayesmeta.rewriting import rewritten
from bayesmeta.rewriting.nodes import MANY


def gradient(x, weights):
    """Of a network of two convolutions with the same weights, as one vector."""
    w = weights.view(32, 32, 3, 3).detach().requires_grad_()
    with torch.enable_grad():
        y = conv2d(torch.relu(conv2d(x, w, stride=2, padding=1)), w)
        (g,) = torch.autograd.grad(y.square().sum(), w)
    return [g.clone().reshape(-1) * 2 + weights, y]


def example(channels=32):
    torch.manual_seed(0)
    return [torch.randn(3, channels, 9, 9).to(memory_format=torch.channels_last), torch.randn(channels * channels * 9) / 9]


def forced(module):
    return module.graph.find_nodes(op="call_function", target=inductor_prims.force_stride_order)


def test_weights_are_put_in_order_once():
    x, weights = example()
    graph = trace(gradient, [x, weights])
    made = rewritten(graph)
    torch.testing.assert_close(list(made(x, weights)), list(graph(x, weights)))
    laid = [node for node in forced(made) if list(node.args[1]) == [288, 1, 96, 32]]
    laid = [node for node in laid if "output" not in {user.op for user in node.users}]
    assert len(laid) == 1 and sum("convolution" in str(user.target) for user in laid[0].users) == 4


def test_gradients_become_vectors_in_order():
    made = rewritten(trace(gradient, example()))
    (ordered,) = [node for node in forced(made) if list(node.args[1]) == [288, 9, 3, 1]]
    (user,) = ordered.users
    assert user.target == torch.ops.aten.reshape.default and "clone" in str(ordered.args[0].target)


def small(x, w):
    return [conv2d(conv2d(x, w), w)]


def once(x, w):
    return [conv2d(x, w)]


@pytest.mark.parametrize(("function", "channels"), [(small, 4), (once, 32)])
def test_small_weights_and_those_of_one_convolution_are_left(function, channels):
    x, w = torch.randn(3, channels, 9, 9), torch.randn(channels, channels, 3, 3)
    assert w.numel() < MANY or function is once
    assert not forced(rewritten(trace(function, [x, w])))


def test_weights_that_stand_so_already_are_left():
    x, w = torch.randn(3, 32, 9, 9), torch.randn(32, 32, 3, 3).to(memory_format=torch.channels_last)
    assert not forced(rewritten(trace(small, [x, w])))


def step(x, weights):
    """Of weights to new ones, which the next call of its graph is given."""
    w = weights.view(32, 32, 3, 3).detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(conv2d(torch.relu(conv2d(x, w, stride=2, padding=1)), w).square().sum(), w)
    return [g * -1e-3 + w.detach()]


def test_results_stand_as_they_did():
    x, weights = example()
    x = x.contiguous()
    made = rewritten(trace(step, [x, weights]))
    (result,) = made.graph.output_node().args[0]
    assert result in forced(made) and list(result.args[1]) == [288, 9, 3, 1]
    ((found,), (wanted,)) = made(x, weights), step(x, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert found.stride() == wanted.stride()


@pytest.mark.slow
def test_compiled_it_is_the_same():
    x, weights = example()
    run = inductor(trace(gradient, [x, weights]), [x, weights])
    for _ in range(3):
        x, weights = torch.randn_like(x), torch.randn_like(weights) / 9
        torch.testing.assert_close(list(run(x, weights)), gradient(x, weights), rtol=1e-4, atol=1e-4)
