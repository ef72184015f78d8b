"""Products of matrices by code of our own: which ones, that they are right however the matrices stand, and what they are compiled to."""

import os
import subprocess
import sys

import pytest
import torch

from bayesmeta.backends import inductor
from bayesmeta.graphs import trace
from bayesmeta.rewriting import kernels, products, rewritten

from .conftest import compiled_result

pytestmark = pytest.mark.usefixtures("compiled_anew", "vectors")
PRODUCT = products.PRODUCT


def count(module, target=PRODUCT):
    return len(module.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ((4, 2), (2, 4), 1), ((7, 5, 9), (7, 9, 4), 1), ((2000, 64), (64, 700), 1),
        ((3, 9), (9, 9), 0), ((9, 9), (9, 3), 0), ((9, 1), (1, 9), 0), ((0, 5, 9), (0, 9, 5), 0), ((9, 0), (0, 9), 0),
    ],
)  # fmt: skip
def test_which_ones(a, b, wanted):
    for dtype in (torch.float32, torch.float64):
        given = [torch.randn(a, dtype=dtype), torch.randn(b, dtype=dtype)]
        fast = rewritten(trace(lambda a, b: [a @ b], given))
        assert count(fast) == (wanted if dtype == torch.float32 else 0)
        torch.testing.assert_close(fast(*given)[0], given[0] @ given[1])


def test_sums_with_a_bias_are_taken_apart():
    bias, a, b = torch.randn(6), torch.randn(5, 7), torch.randn(7, 6)
    fast = rewritten(trace(lambda bias, a, b: [torch.addmm(bias, a, b), torch.addmm(bias, a, b, beta=2.0)], [bias, a, b]))
    assert count(fast) == 1 and count(fast, torch.ops.aten.addmm.default) == 1
    for found, wanted in zip(fast(bias, a, b), (bias + a @ b, 2 * bias + a @ b), strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_of_another():
    given = [torch.randn(6), torch.randn(5, 7), torch.randn(7, 6), torch.randn(6, 9), torch.randn(9, 8)]
    fast = rewritten(trace(lambda bias, a, b, c, d: [torch.addmm(bias, a, b) @ c @ d], given))
    assert count(fast) == 3
    torch.testing.assert_close(fast(*given)[0], (given[0] + given[1] @ given[2]) @ given[3] @ given[4])


SIZES = [  # pairs, rows, numbers in a sum, columns
    (1, 4, 5, 4), (3, 10, 40, 40), (2, 5, 2, 17), (2, 33, 16, 16), (1, 300, 70, 50), (4, 10, 600, 10), (1, 7, 301, 113), (2, 16, 8, 64),
    (3, 12, 129, 4), (1, 4, 128, 31), (2, 65, 5, 33),
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lanes", [512, 256])
def test_they_are_right_however_the_matrices_stand(lanes, threads, monkeypatch):
    """Rows in one piece, columns in one piece, every other number, parts of larger ones; against float64; with wide vectors and narrow."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "PARALLEL", 1000)

    def several(*given):
        found = []
        for a, b in zip(given[::2], given[1::2], strict=True):
            found += [a @ b, a.mT.contiguous().mT @ b.mT.contiguous().mT, a[..., ::2] @ b[..., ::2, :], a[..., 1:] @ b[..., 1:, 2:]]
            found += [a @ torch.cat([b, b], -1)[..., ::2], a @ b.flatten()[: b.shape[-2] * b.shape[-1]].view(b.shape[-1], -1).mT]
        return found

    given = [torch.randn(*([pairs] * (pairs > 1)), *size) for pairs, m, k, n in SIZES for size in ((m, k), (k, n))]
    graph = trace(several, given)
    assert count(rewritten(graph)) >= 4 * len(SIZES)
    found = compiled_result(graph, given, threads=threads, lanes=lanes)
    for one, wanted in zip(found, several(*(v.double() for v in given)), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=0, atol=3e-6 * wanted.abs().max().item())


def test_they_are_compiled_with_the_rest_and_take_matrices_as_they_stand():
    """Views, a matrix made by a fused kernel, a constant, one matrix on both sides, one shared by all pairs; nothing is called."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    x, w, v = torch.randn(6, 5, 16), torch.randn(6, 24, 16), torch.randn(16, 100)
    constant = torch.randn(16, 8)

    def several(x, w, v):
        y = torch.nn.functional.silu(x @ w.mT)
        return [y, y.mT @ x, x[0] @ v[:, 30:80], y @ w, x @ x.mT, x.flatten(0, 1) @ constant, x @ v[:, :8].expand(6, 16, 8)]

    graph = trace(several, [x, w, v])
    with torch.no_grad():
        found, (code,) = run_and_get_code(lambda: inductor(graph, [x, w, v])(x, w, v))
    assert code.count("    bayesmeta::products<") == 7 and "aoti_torch_cpu_" not in code
    constant = constant.double()
    wanted = several(*(t.double() for t in (x, w, v)))
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=0, atol=1e-5 * right.abs().max().item())


def test_what_is_not_finite_stays_so():
    a, b = torch.ones(8, 20), torch.ones(20, 20)
    a[1, 3], b[4, 5], b[6, 7] = torch.nan, torch.inf, -torch.inf
    found = inductor(trace(lambda a, b: [a @ b], [a, b]), [a, b])(a, b)[0]
    torch.testing.assert_close(found, a @ b, equal_nan=True)


def test_what_comes_after_a_product_is_never_lost(monkeypatch):
    """Where the compiler fuses it with the product all the same, that is an error and no wrong number."""
    from torch._inductor import config, scheduler

    given = [torch.randn(9, 13), torch.randn(13, 9)]
    graph = trace(lambda a, b: [(a @ b).relu() + 1], given)
    monkeypatch.setattr(scheduler, "_is_epilogue_fusion_enabled", lambda node: True)
    with config.patch({"force_disable_caches": True}), pytest.raises(Exception, match="which would be lost"):
        inductor(graph, given)


def test_where_the_compiler_cannot_torchs_products_stay(monkeypatch):
    monkeypatch.setattr(products, "is_lowered", lambda: False)
    given = [torch.randn(9, 8), torch.randn(8, 7)]
    assert count(rewritten(trace(lambda a, b: [a @ b], given))) == 0


def test_the_first_graph_of_a_process_has_them():
    """The compiler's parts import each other; and it remembers how it did an operation at first, in a graph that stays with Python."""
    script = """
import torch
from torch._inductor.utils import run_and_get_code
from bayesmeta.backends import inductor
from bayesmeta.graphs import trace

x, w = torch.randn(1500, 64), torch.randn(64, 48)
for first in (lambda v: v.median(0).values, lambda v: v + 1):
    graph = trace(lambda x, w: [first(x) @ w[:, 0], x @ w], [x, w])
    found, codes = run_and_get_code(lambda: inductor(graph, [x, w])(x, w))
    torch.testing.assert_close(found[1], x @ w)
    assert codes and all("bayesmeta::products<1500, 48>" in code for code in codes), codes
"""
    anew = os.environ | {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=anew)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_compilers_disk_cache_keeps_another_version_apart(monkeypatch, tmp_path):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given = [torch.randn(9, 11), torch.randn(11, 8)]
    graph = trace(lambda a, b: [a @ b], given)

    def is_written_anew():
        before = counters["inductor"]["fxgraph_cache_miss"]
        inductor(graph, given)
        return counters["inductor"]["fxgraph_cache_miss"] > before

    assert is_written_anew() and not is_written_anew()
    monkeypatch.setattr(kernels, "version", lambda: "another")
    assert is_written_anew()
