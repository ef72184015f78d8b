"""Convolutions by code of our own: which ones, that they and their derivatives are right, and what they are compiled to."""

import functools

import pytest
import torch
from torch.nn.functional import conv2d, conv_transpose2d

from bayesmeta.backends import inductor
from bayesmeta.graphs import trace
from bayesmeta.rewriting import convolutions, kernels, rewritten
from bayesmeta.rewriting.layouts import _is_dense

from .conftest import compiled_result

pytestmark = pytest.mark.usefixtures("compiled_anew", "vectors")
aten = torch.ops.aten
TORCHS = (aten.convolution.default, aten.convolution_backward.default)


def count(module, *targets):
    return sum(len(module.graph.find_nodes(op="call_function", target=target)) for target in targets)


def images(n, channels, height, width, dtype=torch.float32):
    return torch.randn(n, channels, height, width, dtype=dtype)


def weights(out, channels, *size, dtype=torch.float32):
    return torch.randn(out, channels, *size, dtype=dtype) / (channels * size[0] * size[1]) ** 0.5


@pytest.mark.parametrize(
    ("x", "w", "settings", "is_ours"),
    [
        (images(5, 16, 6, 6), weights(16, 16, 3, 3), {}, True),
        (images(6, 17, 6, 9), weights(40, 17, 1, 4), {"stride": (1, 2), "padding": (0, 1)}, True),
        (images(4, 16, 6, 6), weights(16, 16, 3, 3), {}, False),  # few images
        (images(5, 15, 6, 6), weights(16, 15, 3, 3), {}, False),  # few channels
        (images(5, 16, 6, 6), weights(15, 16, 3, 3), {}, False),
        (images(5, 32, 6, 6), weights(32, 16, 3, 3), {"groups": 2}, False),
        (images(5, 16, 9, 9), weights(16, 16, 3, 3), {"dilation": 2}, False),
        (images(5, 16, 6, 6, torch.float64), weights(16, 16, 3, 3, dtype=torch.float64), {}, False),
        (images(5, 16, 6, 6, torch.bfloat16), weights(16, 16, 3, 3, dtype=torch.bfloat16), {}, False),
        (images(16, 16, 64, 65), weights(16, 16, 3, 3), {}, False),  # large
        (images(5, 16, 6, 6)[:0], weights(16, 16, 3, 3), {}, False),
    ],
)
def test_which_ones(x, w, settings, is_ours):
    graph = trace(lambda x, w: [conv2d(x, w, **settings)], [x, w])
    made = rewritten(graph)
    assert (count(made, convolutions.CONVOLUTION), count(made, *TORCHS)) == ((1, 0) if is_ours else (0, 1))
    torch.testing.assert_close(made(x, w)[0], graph(x, w)[0])


def test_gradients_by_themselves():
    def gradients(y, x, w, wanted):
        found = aten.convolution_backward(y, x, w, [16], [2, 2], [1, 1], [1, 1], False, [0, 0], 1, wanted)
        return [part for part, is_wanted in zip(found, wanted, strict=True) if is_wanted]

    given = [images(5, 16, 3, 3), images(5, 16, 6, 6), weights(16, 16, 3, 3)]
    for wanted in ([True, False, False], [False, True, False], [False, False, True], [False, True, True], [True, True, True]):
        graph = trace(functools.partial(gradients, wanted=wanted), given)
        made = rewritten(graph)
        assert count(made, *convolutions.OURS) == sum(wanted[:2]) and not count(made, *TORCHS)
        torch.testing.assert_close(list(made(*given)), list(graph(*given)), rtol=1e-4, atol=1e-4)


def test_those_of_other_dimensions_and_transposed_with_gaps_are_left():
    x, w = torch.randn(5, 16, 20), torch.randn(16, 16, 3)
    y, v = images(5, 16, 6, 6), weights(16, 16, 3, 3)
    graph = trace(lambda x, w, y, v: [torch.conv1d(x, w), conv_transpose2d(y, v, dilation=2)], [x, w, y, v])
    assert count(rewritten(graph), *TORCHS) == 2 and not count(rewritten(graph), *convolutions.OURS)


@pytest.mark.parametrize(
    "bound",
    [
        lambda y: y.as_strided((7,), (11,)), lambda y: torch.as_strided_scatter(y, torch.zeros(7), (7,), (11,)),
        lambda y: y.view(torch.int16), lambda y: torch.view_as_complex(y.view(5, 16, 4, 2, 2)).abs(),
    ],
)  # fmt: skip
def test_where_numbers_stand_is_not_changed_where_an_operation_is_bound_to_it(bound):
    x, w = images(5, 16, 6, 6), weights(16, 16, 3, 3)
    graph = trace(lambda x, w: [bound(conv2d(x, w))], [x, w])
    assert count(rewritten(graph), aten.convolution.default) == 1
    torch.testing.assert_close(rewritten(graph)(x, w)[0], graph(x, w)[0])


def test_one_number_for_rows_and_columns():
    """torch takes a list of one where a pair is meant; ours would read past it."""
    x, w, y, v = images(5, 16, 9, 8), weights(16, 16, 3, 3), images(5, 16, 5, 4), weights(16, 16, 3, 3)

    def function(x, w, y, v):
        found = [conv2d(x, w, stride=[2], padding=[1]), conv_transpose2d(y, v, stride=[2], padding=[1])]
        return [*found, *aten.convolution_backward(y, x, w, None, [2], [1], [1], False, [0], 1, [True, True, False])[:2]]

    graph = trace(function, [x, w, y, v])
    assert count(rewritten(graph), *convolutions.OURS) == 4
    for run in (rewritten(graph), inductor(graph, [x, w, y, v])):
        with torch.no_grad():
            torch.testing.assert_close(list(run(x, w, y, v)), function(x, w, y, v), rtol=1e-4, atol=1e-4)


def test_what_only_looks_like_a_gradient_in_weights_is_none():
    """Images and slopes turned, and part of the result: of weights of that size there would be no such slopes."""
    x, y = images(20, 16, 6, 7), images(20, 16, 4, 5)

    def function(x, y):
        made = conv2d(x.transpose(0, 1), y.transpose(0, 1), padding=(3, 1)).transpose(0, 1)
        return [made[:, :, :2][..., :-1], conv2d(x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)[:, :, :0]]

    graph = trace(function, [x, y])
    assert count(rewritten(graph), convolutions.CONVOLUTION) == 2 and not count(rewritten(graph), convolutions.OF_WEIGHTS)
    torch.testing.assert_close(list(rewritten(graph)(x, y)), function(x, y), rtol=1e-4, atol=1e-4)


SIZES = [  # images, channels, their height and width, filters, their size; stride, padding, padding on the other side
    (5, 64, 7, 7, 64, 3, 3, (2, 2), (1, 1), (1, 1)), (6, 16, 16, 8, 16, 3, 3, (1, 1), (1, 1), (0, 0)),
    (19, 17, 9, 6, 40, 2, 5, (1, 2), (0, 3), (0, 1)), (5, 24, 4, 4, 33, 1, 1, (1, 1), (0, 0), (0, 0)),
    (7, 16, 2, 3, 16, 3, 3, (3, 2), (2, 1), (1, 0)), (29, 20, 5, 5, 16, 5, 5, (2, 3), (4, 4), (0, 2)),
    (9, 32, 4, 4, 32, 3, 3, (2, 2), (1, 1), (1, 1)), (12, 16, 20, 20, 16, 3, 3, (1, 1), (1, 1), (0, 0)),
]  # fmt: skip


def all_of_them(x, w, bias, v, *, stride, padding, other):
    """A convolution, its gradients, the gradients of those along ``v``; and one transposed."""
    x, w, bias = (t.detach().requires_grad_() for t in (x, w, bias))
    with torch.enable_grad():
        y = conv2d(x, w, bias, stride, padding)
        first = torch.autograd.grad(y.tanh().sum(), (x, w, bias), create_graph=True)
        second = torch.autograd.grad((first[1] * v).sum() + first[0].square().sum() / 2, (x, w))
    back = conv_transpose2d(y, w, None, stride, padding, other)
    return [y, *first, *second, back]


@pytest.mark.parametrize("lanes", [512, 256])
@pytest.mark.parametrize("size", SIZES)
def test_they_and_their_derivatives_are_right(size, lanes, monkeypatch):
    """Against float64; wide vectors and narrow, one thread and two; images that are put apart, and many, which are taken block by block."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "PARALLEL", 1000)
    n, channels, height, width, filters, *kernel, stride, padding, other = size
    w, v = weights(filters, channels, *kernel), weights(filters, channels, *kernel)
    given = [images(n, channels, height, width), w, torch.randn(filters), v]

    def function(*given):
        return all_of_them(*given, stride=stride, padding=padding, other=other)

    graph = trace(function, given)
    made = rewritten(graph)
    assert count(made, convolutions.CONVOLUTION) == 3 and count(made, convolutions.OF_IMAGES) == 4  # no more than are needed
    assert count(made, convolutions.OF_WEIGHTS) == 3 and not count(made, *TORCHS)
    wanted = function(*(t.double() for t in given))
    for threads in (1, 2):
        found = compiled_result(graph, given, threads=threads, lanes=lanes)
        for one, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), right, rtol=0, atol=3e-6 * right.abs().max().item())


def test_images_may_stand_in_memory_in_any_way_and_results_stand_as_they_did():
    torch.manual_seed(0)
    x, w = images(6, 16, 8, 8), weights(20, 16, 3, 3)
    views = [x, x.to(memory_format=torch.channels_last), x[:, :, ::2, 1:], x[:1].expand(7, 16, 8, 8), x[:, :, :1, :1]]

    def function(w, *views):
        made = [conv2d(x, w, padding=1) for x in views]
        y = made[0]
        others = [y.flatten(1), y.view(-1), y > 0, y[:, :, 0, 0] * 2, y[:, :, :1].expand(6, 20, 8, 8), y[:, :, ::2], y.split(10, 1)[1]]
        return [*made, *(y.relu() for y in made), *others]

    graph = trace(function, [w, *views])
    assert count(rewritten(graph), convolutions.CONVOLUTION) == len(views)
    for run in (rewritten(graph), inductor(graph, [w, *views])):
        with torch.no_grad():
            found = run(w, *views)
        for one, wanted in zip(found, function(w, *views), strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
            assert one.stride() == wanted.stride() or not _is_dense(wanted)  # views may be put into memory by themselves


def test_they_are_compiled_with_the_rest():
    """Between fused kernels, with a bias; nothing is called."""
    from torch._inductor.utils import run_and_get_code

    x, w, bias = images(6, 16, 8, 8), weights(16, 16, 3, 3), torch.randn(16)
    graph = trace(lambda x, w, bias: [conv2d(conv2d(x.sin(), w, bias).relu(), w, bias).exp()], [x, w, bias])
    with torch.no_grad():
        found, (code,) = run_and_get_code(lambda: inductor(graph, [x, w, bias])(x, w, bias))
    assert code.count("    bayesmeta::convolution<") == 2 and "aoti_torch_cpu_" not in code
    torch.testing.assert_close(found[0], graph(x, w, bias)[0], rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_stays_so_and_stays_where_it_is():
    x, w = images(5, 16, 9, 9), weights(16, 16, 3, 3)
    x[1, 3, 4, 4], x[2, 5, 0, 0] = torch.nan, torch.inf
    (found,) = inductor(trace(lambda x, w: [conv2d(x, w, padding=1)], [x, w]), [x, w])(x, w)
    torch.testing.assert_close(found, conv2d(x, w, padding=1), equal_nan=True, rtol=1e-4, atol=1e-5)
