"""Graphs whose intermediate results are addresses: the same numbers, and nothing of it outside."""

from pathlib import Path

import pytest
import torch
from torch._inductor.codegen import common

from bayesmeta.backends import LITTLE, inductor
from bayesmeta.graphs import trace
from bayesmeta.light_buffers import light_buffers

pytestmark = pytest.mark.usefixtures("compiled_anew")


def parts(x, w):
    """Intermediate results in fused kernels, in products of matrices, in views of parts, and results that are views."""
    hidden = torch.relu(x @ w).softmax(-1)
    halves = torch.cat([hidden[:, :3].cumsum(1), hidden[:, 3:].exp()], 1)
    again = halves @ w.mT
    scale = again.var(0).sqrt()
    return [(again / scale).square().sum(), scale, halves.mT[2], (halves.mT @ again).mT, again.argmax(1), again[1:, 2:]]


def test_the_numbers_are_the_same_and_stay():
    torch.manual_seed(0)
    x, w = torch.randn(8, 5), torch.randn(5, 6)
    run = inductor(trace(parts, [x, w]), [x, w])
    first = run(x, w)
    copies = [v.clone() for v in first]
    for _ in range(20):  # other memory for each call: no result lies in a pool that is gone
        x2, w2 = torch.randn(8, 5), torch.randn(5, 6)
        torch.testing.assert_close(list(run(x2, w2)), parts(x2, w2))
    torch.testing.assert_close(list(first), parts(x, w))
    torch.testing.assert_close(list(first), copies, rtol=0, atol=0)


def joined(x, w):
    """Parts that are put together, multiplied, and go on by themselves."""
    a = (x @ w).tanh()
    b = (x @ a).sin()
    both = torch.cat([a, b]) @ w
    return [a + both[:3], b * both[3:], both.sum()]


def stacked(x, w):
    a = (x @ w) / 3
    c = torch.bmm(a[None].expand(2, 3, 3), torch.stack([x.tanh(), a]))[1] / 3
    return [torch.where(a > c, a, c).mT, c.sum()]


@pytest.mark.parametrize("function", [joined, stacked])
def test_parts_of_what_was_put_together_are_results_in_their_own_right(function):
    torch.manual_seed(0)
    x, w = torch.randn(3, 3), torch.randn(3, 3)
    run = inductor(trace(function, [x, w]), [x, w])
    for _ in range(5):
        x, w = torch.randn(3, 3), torch.randn(3, 3)
        torch.testing.assert_close(list(run(x, w)), function(x, w))


@pytest.mark.parametrize("size, light", [(50, True), (int(LITTLE**0.5), False)])
def test_it_is_for_small_graphs(size, light, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(size, size)
    inductor(trace(lambda x: [(x.exp() / x.exp().sum(1, keepdim=True)).amax(0)], [x]), [x])
    sources = [path.read_text() for path in Path(tmp_path).rglob("*.cpp")]
    assert any("inductor_entry_impl" in source for source in sources)
    assert any("= PlaceInPool(" in source for source in sources) is light


def test_the_compiler_is_as_it_was_afterwards():
    common.init_backend_registration()
    before = common.device_codegens["cpu"].cpp_wrapper_codegen
    with pytest.raises(ZeroDivisionError), light_buffers():
        assert common.device_codegens["cpu"].cpp_wrapper_codegen is not before
        _ = 1 / 0
    assert common.device_codegens["cpu"].cpp_wrapper_codegen is before


def test_the_compilers_disk_cache_keeps_such_graphs_apart(monkeypatch, tmp_path):
    """A graph that was written another way before, by an earlier version say, is written anew."""
    import bayesmeta.light_buffers as module

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(9, 9)
    graph = trace(lambda x: [(x.exp() / x.exp().sum(1, keepdim=True)).amax(0)], [x])

    def light():
        inductor(graph, [x])
        return any("= PlaceInPool(" in path.read_text() for path in Path(tmp_path).rglob("*.cpp"))

    with monkeypatch.context() as without:
        without.setattr(module, "_wrapper", lambda: None)
        assert not light()
    assert light()


def test_without_the_compilers_parts_tensors_are_made(monkeypatch):
    import bayesmeta.light_buffers as module

    monkeypatch.setattr(module, "_wrapper", lambda: None)
    x, w = torch.randn(8, 4), torch.randn(4, 6)
    found = inductor(trace(lambda x, w: [(x @ w).exp().sum(1)], [x, w]), [x, w])(x, w)
    torch.testing.assert_close(found[0], (x @ w).exp().sum(1))
