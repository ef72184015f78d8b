"""What tracing and compiling are reckoned to take, and the mark that tells a graph which is on disk."""

import pytest
import torch

from bayesmeta import costs
from bayesmeta.graphs import trace
from bayesmeta.saved_graphs import Saved


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """An empty folder in the place of the compiler's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def graph(factor=2.0, size=3, dtype=torch.float32):
    return trace(lambda x: [factor * x.sin()], [torch.zeros(size, dtype=dtype)])


def at_pace(graphs):
    """What tracing them took on the machine that the constants are of."""
    return costs.TRACE_SECONDS_A_NODE * sum(len(one.graph.nodes) for one in graphs)


def test_tracing_takes_eager_steps_or_seconds():
    assert costs.tracing(0.005) == pytest.approx(0.005 * costs.TRACE_STEPS)
    assert costs.tracing(10.0) == costs.TRACE_SECONDS


def test_a_mark_is_of_the_graph_its_inputs_and_the_threads(disk):
    assert costs.how_on_disk([graph()]) is None
    costs.note_on_disk([graph()], [graph()])
    assert costs.how_on_disk([graph()]) == costs.COMPILER
    others = [[graph(3.0)], [graph(size=4)], [graph(dtype=torch.float64)], [graph(), graph()]]
    assert not any(costs.how_on_disk(one) for one in others)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert costs.how_on_disk([graph()]) is None
    finally:
        torch.set_num_threads(threads)


def test_what_is_on_disk_costs_less_and_a_slower_machine_more(disk):
    graphs = [graph(), graph(3.0)]
    cold = costs.compiling(graphs, at_pace(graphs))
    assert cold > 2 * costs.COMPILE_SECONDS
    assert costs.compiling(graphs, 1.5 * at_pace(graphs)) == pytest.approx(1.5 * cold)
    assert costs.compiling(graphs, 100 * at_pace(graphs)) == pytest.approx(2 * cold)  # arithmetic, not a slow machine
    costs.note_on_disk(graphs, [Saved(len), graphs[1]])
    assert costs.compiling(graphs, at_pace(graphs)) == pytest.approx(costs.LOAD_SECONDS, rel=0.01)
    costs.note_on_disk(graphs, [Saved(len), Saved(len)])
    assert costs.compiling(graphs, at_pace(graphs)) == pytest.approx(2 * costs.SAVED_SECONDS, rel=0.01)


def test_a_folder_that_cannot_be_written_to_is_no_harm(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a file"))
    costs.note_on_disk([graph()], [graph()])
    assert costs.how_on_disk([graph()]) is None
