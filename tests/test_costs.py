"""What tracing and compiling are reckoned to take, and the mark that tells a graph which is on disk."""

import pytest
import torch

from bayesmeta import costs, meta_train
from bayesmeta.graphs import trace
from bayesmeta.learners import MAML
from bayesmeta.model import HierarchicalModel

from .conftest import episode, radon_program


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
    assert not costs.is_on_disk([graph()])
    costs.note_on_disk([graph()])
    assert costs.is_on_disk([graph()])
    others = [[graph(3.0)], [graph(size=4)], [graph(dtype=torch.float64)], [graph(), graph()]]
    assert not any(costs.is_on_disk(one) for one in others)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert not costs.is_on_disk([graph()])
    finally:
        torch.set_num_threads(threads)


def test_what_is_on_disk_costs_less_and_a_slower_machine_more(disk):
    graphs = [graph(), graph(3.0)]
    cold = costs.compiling(graphs, at_pace(graphs))
    assert cold > 2 * costs.COMPILE_SECONDS
    assert costs.compiling(graphs, 1.5 * at_pace(graphs)) == pytest.approx(1.5 * cold)
    assert costs.compiling(graphs, 100 * at_pace(graphs)) == pytest.approx(2 * cold)  # arithmetic, not a slow machine
    costs.note_on_disk(graphs)
    assert costs.compiling(graphs, at_pace(graphs)) == pytest.approx(costs.LOAD_SECONDS, rel=0.01)


def test_a_folder_that_cannot_be_written_to_is_no_harm(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a file"))
    costs.note_on_disk([graph()])
    assert not costs.is_on_disk([graph()])


@pytest.mark.slow
def test_the_next_process_finds_the_graphs_of_a_compiled_step(disk):
    """As torch counts them: a miss the first time, a hit after what is kept in memory is forgotten."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import clear_caches

    def train():
        counters.clear()
        learner = MAML(HierarchicalModel(radon_program), inner_steps=1, inner_lr=0.02)
        history = meta_train(learner, episode(), steps=3, compile=True)
        torch._dynamo.reset()
        clear_caches()
        return history.loss, counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]

    first, *cold = train()
    again, *warm = train()
    assert cold == [1, 0] and warm == [0, 1]
    assert again == first
