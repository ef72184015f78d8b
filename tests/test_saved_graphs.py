"""Compiled graphs from the disk: the same bits without the compiler, never another graph's, and nothing kept that is not all of it."""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bayesmeta import backends, saved_graphs
from bayesmeta.backends import inductor
from bayesmeta.graphs import trace
from bayesmeta.saved_graphs import Saved, identity


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty one of our own, beside the compiler's."""
    monkeypatch.setattr(saved_graphs, "cache_folder", lambda: tmp_path / "kept")
    return tmp_path / "kept"


def refused(*_):
    raise AssertionError("it was compiled")


def several(x, w):
    return [(x @ w).tanh() * 1.25, x.mT.sum(-1), w[1:, 2:].exp()]


def test_the_second_time_nothing_is_compiled(monkeypatch, folder):
    x, w = torch.randn(7, 5), torch.randn(5, 4)
    first = inductor(trace(several, [x, w]), [x, w])
    assert isinstance(first, Saved) and len([*folder.iterdir()]) == 1
    monkeypatch.setattr(backends, "_compiled", refused)
    again = inductor(trace(several, [x, w]), [x, w])
    for _ in range(3):
        x, w = torch.randn(7, 5), torch.randn(5, 4)
        torch.testing.assert_close([*again(x, w)], several(x, w))
        torch.testing.assert_close([*again(x, w)], [*first(x, w)], rtol=0, atol=0)
    with pytest.raises(AssertionError, match="it was compiled"):
        inductor(trace(several, [x.double(), w.double()]), [x.double(), w.double()])


def test_its_name_tells_graphs_inputs_and_circumstances_apart(monkeypatch):
    from torch._inductor import config

    x, constant = torch.randn(4, 6), torch.randn(6)

    def name(factor=2.0, x=x, constant=constant):
        return identity(trace(lambda x: [factor * x.sin() + constant], [x.contiguous()]), [x])

    same = name()
    assert same == name() == name(constant=constant.clone())
    others = [name(3.0), name(2), name(x=x[:3]), name(x=x.double()), name(x=x.mT.contiguous().mT), name(constant=constant + 1)]
    with config.patch({"cpp.simdlen": 256}):
        others.append(name())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        others.append(name())
    finally:
        torch.set_num_threads(threads)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # torch's older setting cannot be read then
    try:
        others.append(name())
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision
    with torch.no_grad():
        others.append(name())
    monkeypatch.setenv("TORCHINDUCTOR_CPP_SIMDLEN", "256")
    others.append(name())
    monkeypatch.delenv("TORCHINDUCTOR_CPP_SIMDLEN")
    assert len({same, *others}) == 1 + len(others)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "another one in every process")
    assert name() == same  # patching a setting and taking it back leaves no trace


def test_inputs_that_it_writes_over_are_written_over_once():
    state, x = torch.zeros(3, 5).mT, torch.randn(5, 3)

    def step(state, x):
        return [state.copy_(state * 0.75 + x), x.sum(0)]

    graph = trace(step, [state, x])
    state.zero_()  # to trace it is to take it
    for run in (inductor(graph, [state, x]), inductor(graph, [state, x])):
        assert not state.any() and isinstance(run, Saved)  # compiling it wrote nothing
        run(state, x)
        torch.testing.assert_close(state, x)
        run(state, x)
        torch.testing.assert_close(state, 1.75 * x)
        state.zero_()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: [x, x + 1.5],
        lambda x, w: [x.mT, w[1:]],
        lambda x, w: [y := x @ w, y, y.mT],
        lambda x, w: [w.copy_(w * 1.5), w],
        lambda x, w: [x.sum(), torch.ones(3)],
        lambda x, w: [x + torch.arange(30.0).sin().view(6, 5)],
    ],
    ids=["an input", "parts of inputs", "one result twice", "an input written over", "of nothing", "of a range"],
)
def test_results_stand_for_the_same_whether_kept_or_not(function):
    """Where the compiler does something besides the library, it is not kept: either way this holds."""
    torch.manual_seed(0)
    graph = trace(function, [torch.randn(6, 5), torch.randn(5, 5)])
    for _ in range(2):
        x, w = torch.randn(6, 5), torch.randn(5, 5)
        run = inductor(graph, [x, w])
        copies = [x.clone(), w.clone()]
        found, wanted = [*run(x, w)], function(*copies)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close([x, w], copies)


def test_what_is_more_than_a_library_is_not_kept(folder):
    constant, x = torch.randn(300), torch.randn(300, 300)
    for function in (lambda x: [x * constant], lambda x: [torch.linalg.inv(x / 100 + torch.eye(300))]):
        graph = trace(function, [x])
        for _ in range(2):
            run = inductor(graph, [x])
            assert not isinstance(run, Saved)
            torch.testing.assert_close(run(x)[0], function(x)[0], rtol=1e-4, atol=1e-4)
    assert not folder.exists()


def test_a_graph_within_the_graph_is_not_taken_for_another():
    x = torch.randn(5)

    graphs = [
        trace(lambda x: [torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))], [x]),
        trace(lambda x: [torch.cond(x.sum() > 0, lambda x: x.cos(), lambda x: x.sin(), (x,))], [x]),
    ]
    assert graphs[0].code == graphs[1].code and identity(graphs[0]) != identity(graphs[1])
    with torch.no_grad():
        for graph, (one, other) in zip(graphs, ((torch.sin, torch.cos), (torch.cos, torch.sin)), strict=True):
            run = inductor(graph, [x])
            assert not isinstance(run, Saved)
            torch.testing.assert_close([run(x.abs())[0], run(-x.abs())[0]], [one(x.abs()), other(-x.abs())])


def test_threads_do_not_take_each_others_graphs():
    x, doors = torch.randn(5), torch._C._aoti
    before = doors.unsafe_alloc_void_ptrs_from_tensors, doors.alloc_tensors_by_stealing_from_void_ptrs
    graphs = [trace(functools.partial(lambda factor, x: [factor * x.cos()], factor), [x]) for factor in (1.1, 1.2, 1.3, 1.1)]
    with ThreadPoolExecutor(4) as pool:
        for run, factor in zip(pool.map(lambda graph: inductor(graph, [x]), graphs), (1.1, 1.2, 1.3, 1.1), strict=True):
            torch.testing.assert_close(run(x)[0], factor * x.cos())
    for graph, factor in zip(graphs, (1.1, 1.2, 1.3, 1.1), strict=True):
        torch.testing.assert_close(inductor(graph, [x])(x)[0], factor * x.cos())
    assert before == (doors.unsafe_alloc_void_ptrs_from_tensors, doors.alloc_tensors_by_stealing_from_void_ptrs)


@pytest.mark.parametrize("how", ["force_disable_caches", "fx_graph_cache"])
def test_nothing_is_kept_where_torch_is_told_so(how, folder, monkeypatch):
    from torch._inductor import config

    x = torch.randn(5)
    with config.patch({how: how == "force_disable_caches"}):
        assert not isinstance(inductor(trace(lambda x: [x.cos() * 0.3], [x]), [x]), Saved)
    assert not folder.exists()
    monkeypatch.setitem(sys.modules, "torch._inductor.config", None)  # as before its import
    assert not saved_graphs._keeps_nothing()
    monkeypatch.setenv(f"TORCHINDUCTOR_{how.upper()}", str(int(how == "force_disable_caches")))
    assert saved_graphs._keeps_nothing()


def test_half_a_file_is_written_anew(folder):
    x = torch.randn(5)
    graph = trace(lambda x: [x.cos() * 0.7], [x])
    (file := folder / f"{identity(graph, [x])}.so").parent.mkdir()
    file.write_bytes(b"\x7fELF half")
    torch.testing.assert_close(inductor(graph, [x])(x)[0], x.cos() * 0.7)
    assert file.stat().st_size > 1000 and [*folder.iterdir()] == [file]


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    x = torch.randn(5)
    run = inductor(trace(lambda x: [x.cos() * 0.8], [x]), [x])
    torch.testing.assert_close(run(x)[0], x.cos() * 0.8)
    assert not [*folder.iterdir()]


def test_a_folder_that_cannot_be_written_to_is_no_harm(folder):
    folder.touch()
    x = torch.randn(5)
    run = inductor(trace(lambda x: [x.cos() * 0.9], [x]), [x])
    assert not isinstance(run, Saved)
    torch.testing.assert_close(run(x)[0], x.cos() * 0.9)


def test_the_next_process_takes_the_same_steps_without_the_compiler(tmp_path):
    script = """
import sys, torch
from bayesmeta import meta_train
from bayesmeta.learners import MAML
from bayesmeta.model import HierarchicalModel
from tests.conftest import episode, radon_program

torch.manual_seed(0)
history = meta_train(MAML(HierarchicalModel(radon_program), inner_steps=1, inner_lr=0.02), episode(), steps=4, compile=True)
print([one.hex() for one in history.loss], "torch._inductor.compile_fx" in sys.modules)
"""
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=600, check=False,
            cwd=Path(__file__).parents[1], env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.strip())
    assert found[0].endswith("True") and found[1] == found[0].replace("True", "False")
