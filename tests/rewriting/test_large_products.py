"""Large products by oneDNN: which ones, of matrices however they stand in memory, and without Python once they are compiled."""

import subprocess
import sys

import pytest
import torch

from bayesmeta.graphs import inductor, trace
from bayesmeta.rewriting import rewritten
from bayesmeta.rewriting.large_products import has_door_in_c

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
PRODUCT = torch.ops.bayesmeta.product.default


def products(module):
    return len(module.graph.find_nodes(op="call_function", target=PRODUCT))


@pytest.mark.parametrize(
    ("shapes", "turned", "wanted"),
    [
        (((1500, 64), (64, 48)), False, 1), (((15000, 9), (9, 64)), False, 1), (((100000, 3), (3, 64)), False, 0),
        (((100, 64), (64, 64)), False, 0),
        (((1500, 64), (1500, 48)), True, 1), (((15000, 9), (15000, 64)), True, 1), (((15000, 16), (15000, 48)), True, 0),
        (((1500, 40), (1500, 40)), True, 0),
    ],
)  # fmt: skip
def test_large_ones_and_no_others(shapes, turned, wanted):
    torch.manual_seed(0)
    a, b = (torch.randn(shape) for shape in shapes)

    def multiply(a, b):
        return [(a.mT if turned else a) @ b]

    fast = rewritten(trace(multiply, [a, b]))
    assert products(fast) == wanted
    exact = multiply(a.double(), b.double())[0]
    torch.testing.assert_close(fast(a, b)[0].double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def test_compiled_ones_are_called_from_c_with_matrices_as_they_stand():
    """Plain, transposed, a part of another, made by a fused kernel, added to a bias; sizes are written into the code."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    x, w, v, bias = torch.randn(40, 50, 64), torch.randn(48, 64), torch.randn(64, 100), torch.randn(48)

    def several(x, w, v, bias):
        flat = (x + 1).reshape(-1, 64)
        y = torch.nn.functional.silu(torch.nn.functional.linear(flat, w, bias))
        return [y, y.mT @ flat, flat @ v[:, 30:80], y @ w, (y.sum() * flat[:, 8:]) @ v[8:, :60]]

    graph = trace(several, [x, w, v, bias])
    assert products(rewritten(graph)) == 5 and has_door_in_c()
    with torch.no_grad():
        found, (code,) = run_and_get_code(lambda: inductor(graph, [x, w, v, bias])(x, w, v, bias))
    assert code.count("aoti_torch_cpu__linear_pointwise(") == 5 and "bayesmeta.product.default(" not in code and "ks0" not in code
    for one, wanted in zip(found, several(*(t.double() for t in (x, w, v, bias))), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_a_graph_that_stays_with_python_does_not_close_the_door_for_later_ones():
    """In a new process: the compiler remembers how it did an operation at first."""
    script = """
import torch
from torch._inductor.utils import run_and_get_code
from bayesmeta.graphs import inductor, trace

x, w = torch.randn(1500, 64), torch.randn(64, 48)
for first in (lambda v: v.median(0).values, lambda v: v + 1):
    graph = trace(lambda x, w: [first(x) @ w[:, 0], x @ w], [x, w])
    found, codes = run_and_get_code(lambda: inductor(graph, [x, w])(x, w))
    torch.testing.assert_close(found[1], x @ w)
    assert codes and all("_linear_pointwise" in code for code in codes), codes
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
