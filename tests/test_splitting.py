"""A graph of a step and its derivative as two: the same results, convolutions' handed on instead of taken anew."""

import pytest
import torch
from torch.nn.functional import conv2d

from bayesmeta.graphs import trace
from bayesmeta.splitting import NotInTwo, split


def there_and_back(x, w, slope):
    """A step's two results, and those that hang on ``slope``."""
    w = w.detach().requires_grad_()
    with torch.enable_grad():
        y = conv2d(torch.relu(conv2d(x, w, padding=1)), w, padding=1).tanh()
        (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        new = w - 0.1 * g
        back = torch.autograd.grad(new, w, slope)
    return [new.detach().contiguous(), y.detach().sum(), *back, slope * y.detach().mean()]


def example(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype) for shape in ((2, 3, 5, 5), (3, 3, 3, 3), (3, 3, 3, 3))]


def convolutions(graph):
    return {node.name for node in graph.graph.nodes if node.op == "call_function" and "convolution" in str(node.target)}


@pytest.mark.parametrize("memory", [2**20, 0])
def test_both_parts_together_are_the_whole(memory):
    x, w, slope = example()
    joint = trace(there_and_back, [x, w, slope])
    first, second = split(joint, range(2, 3), 2, memory)
    x, w, slope = x + 1, w - 1, slope * 2
    wanted = there_and_back(x, w, slope)
    new, total, *kept = first(x, w)
    assert bool(kept) is bool(memory)
    torch.testing.assert_close([new, total, *second(x, w, *kept, slope)], wanted)


def test_no_convolution_is_taken_twice():
    joint = trace(there_and_back, example())
    first, second = split(joint, range(2, 3), 2, 2**20)
    anew, again = split(joint, range(2, 3), 2, 0)
    assert convolutions(first) == convolutions(anew) == {"convolution", "convolution_1", "convolution_backward", "convolution_backward_1"}
    assert not convolutions(first) & convolutions(second)
    assert convolutions(again) - convolutions(second) == {"convolution", "convolution_1"}


def test_only_what_the_way_back_takes_is_kept():
    """Not the first step's gradient, which only the first results are made of."""
    x = example()[0]
    joint = trace(lambda x, slope: [conv2d(x, x).sum(), conv2d(x, x + 1).exp(), slope * conv2d(x, 2 * x).sum()], [x, torch.ones(())])
    first, second = split(joint, range(1, 2), 2, 2**20)
    *_, kept = first(x)
    assert not convolutions(second) and len(first(x)) == 3
    torch.testing.assert_close(kept, conv2d(x, 2 * x))
    torch.testing.assert_close(second(x, kept, torch.tensor(3.0)), [3 * conv2d(x, 2 * x).sum()])


def test_inputs_behind_the_slopes_are_both_parts():
    joint = trace(lambda x, slope, noise: [x + noise, slope * noise + x], [torch.ones(3) for _ in range(3)])
    first, second = split(joint, range(1, 2), 1, 0)
    x, slope, noise = torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 6, 7]), torch.tensor([2.0, 4, 8])
    torch.testing.assert_close(first(x, noise), [x + noise])
    torch.testing.assert_close(second(x, slope, noise), [slope * noise + x])


def writes(x, slope):
    """In place: into a part of something of the step's own, into what the slopes are put in."""
    mine, theirs = torch.zeros(4), torch.zeros(4)
    mine[1:].add_(x[1:])
    theirs[:2].copy_(slope[:2] * mine[1])
    return [mine * 2, theirs + mine]


def test_what_is_written_in_place_is_written_where_it_is_needed():
    joint = trace(writes, [torch.ones(4), torch.ones(4)])
    first, second = split(joint, range(1, 2), 1, 2**20)
    x, slope = torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8])
    torch.testing.assert_close([*first(x), *second(x, slope)], writes(x, slope))


def through(x, slope):
    y = torch.zeros(4)
    y[1:].add_(slope[1:])
    return [y * 2, slope * x]


def among_others(x, slope):
    a, b = torch.zeros(4), torch.zeros(4)
    torch._foreach_add_([a, b], [x, slope])
    return [b * 1, a * slope]


@pytest.mark.parametrize("function", [through, among_others, lambda x, slope: [x + slope, slope]])
def test_a_step_that_hangs_on_the_slopes_cannot_be_taken_out(function):
    joint = trace(function, [torch.ones(4), torch.ones(4)])
    with pytest.raises(NotInTwo, match="hangs on the slopes"):
        split(joint, range(1, 2), 1, 0)
