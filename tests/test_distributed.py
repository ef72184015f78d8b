"""Training shared out over processes: the steps of one, one that writes, an end in every process where any has one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bayesmeta import Episode, HierarchicalModel, evaluate, meta_train
from bayesmeta.checkpoints import load_checkpoint
from bayesmeta.distributed import Ranks
from bayesmeta.learners import ABML, MAML

from .conftest import hyper_program

STEPS = 6


class Tasks:
    """Five tasks a step, so that two processes have unequal shares. ``bad``: at the fourth step the last one overflows."""

    def __init__(self, bad=False, lost=False):
        self.bad, self.lost, self.calls = bad, lost, -1  # the first call is for materialising

    def sample(self, num_tasks, *, generator):
        self.calls += 1
        if self.lost and self.calls == 4 and os.environ.get("RANK") == "1":
            os._exit(1)  # as a machine does that loses its power
        sets = [torch.randn(num_tasks, 4, *tail, generator=generator) for _ in range(2) for tail in ((1,), ())]
        if self.bad and self.calls == 4:
            sets[0][-1] *= 1e200
        return Episode.from_tuple(sets)


def train(kind, folder, family, **options):
    """What each process runs; started by `processes` as a script's would be."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # unequal on purpose
    make = {"MAML": MAML, "ABML": ABML}[kind]
    learner = make(HierarchicalModel(hyper_program), inner_steps=2, inner_lr=0.05)
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", 0)))
    history = meta_train(
        learner, family, steps=STEPS, tasks_per_step=5, num_tasks=40, generator=generator, clip=1.0,
        checkpoint=Path(folder) / "checkpoint", checkpoint_every=2, **options,
    )  # fmt: skip
    return {"state": learner.state_dict(), "loss": history.loss, "skipped": history.skipped, "generator": generator.get_state()}


def scored(kind, folder, family):
    """The report of an evaluation, as each process has it."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    report = evaluate(MAML(HierarchicalModel(hyper_program), inner_steps=2, inner_lr=0.05), family, num_tasks=7, task_chunk=2)
    result = report.results["MAML"]
    return {"nll": result.metrics["nll"].tolist(), "bands": [band.task for band in result.bands]}


def run(arguments, folder):
    """The body of a process: what `train` gives is left in ``folder``, by number; an error is left as its text."""
    family = Tasks(bad="bad" in arguments, lost="lost" in arguments)
    options = {"bad_tasks": "skip"} if "skip" in arguments else {}
    name = Path(folder) / f"rank{os.environ['RANK']}"
    try:
        torch.save((scored if "scored" in arguments else train)(arguments[0], folder, family, **options), name)
    except Exception as error:
        name.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        raise


def processes(arguments, folder, count=2):
    """Runs ``count`` of them to their end and returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from tests.test_distributed import run; run({arguments!r}, {str(folder)!r})"
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, env={**os.environ, **shared, "RANK": str(k), "LOCAL_RANK": str(k)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for k in range(count)
    ]  # fmt: skip
    try:
        return [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_take_the_steps_of_one(count, tmp_path, float64):
    """Deterministic learner, in float64; data, start and first generator are the first process's; one process writes."""
    assert processes(["MAML"], tmp_path, count) == [0] * count
    each = [torch.load(tmp_path / f"rank{k}") for k in range(count)]
    alone = train("MAML", tmp_path / "alone", Tasks()) if (tmp_path / "alone").mkdir() is None else None
    for one in each:
        torch.testing.assert_close(one["state"], alone["state"], rtol=0, atol=1e-10)
        torch.testing.assert_close(one["loss"], alone["loss"], rtol=0, atol=1e-10)
        assert torch.equal(one["generator"], alone["generator"])
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    torch.testing.assert_close(checkpoint["parameters"], alone["state"], rtol=0, atol=1e-10)


def test_noise_is_each_processs_own_and_their_parameters_one(tmp_path):
    assert processes(["ABML"], tmp_path) == [0, 0]
    one, two = (torch.load(tmp_path / f"rank{k}") for k in range(2))
    assert one["loss"] == two["loss"]
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name])


def test_a_bad_task_ends_every_process_or_is_skipped_in_all(tmp_path, float64):
    """The last task is the second process's: the first one says so too, and neither waits for ever."""
    assert all(processes(["MAML", "bad"], tmp_path))
    errors = [(tmp_path / f"rank{k}.error").read_text() for k in range(2)]
    assert "step 4: the loss of task 4 is" in errors[1] and all(e.startswith("TrainingError") for e in errors)
    assert processes(["MAML", "bad", "skip"], tmp_path) == [0, 0]
    each = [torch.load(tmp_path / f"rank{k}") for k in range(2)]
    (tmp_path / "alone").mkdir()
    alone = train("MAML", tmp_path / "alone", Tasks(bad=True), bad_tasks="skip")
    for one in each:
        assert one["skipped"] == alone["skipped"] == 1
        torch.testing.assert_close(one["state"], alone["state"], rtol=0, atol=1e-10)


def test_a_lost_process_ends_the_run_and_leaves_the_checkpoint(tmp_path):
    assert all(processes(["MAML", "lost"], tmp_path))
    assert len(load_checkpoint(tmp_path / "checkpoint")["history"]["loss"]) == 2
    assert not list(tmp_path.glob("*.tmp*"))


def test_an_evaluation_is_shared_out_and_every_process_has_all_of_it(tmp_path, float64):
    assert processes(["MAML", "scored"], tmp_path) == [0, 0]
    alone = scored("MAML", tmp_path, Tasks())
    for each in (torch.load(tmp_path / f"rank{k}") for k in range(2)):
        assert each["bands"] == alone["bands"] and each["nll"] == pytest.approx(alone["nll"], abs=1e-12)


@pytest.mark.parametrize(("count", "size"), [(5, 2), (6, 3), (1, 4), (0, 2), (1000, 7)])
def test_shares_are_even_and_complete(count, size):
    shares = [Ranks(k, size).share(count) for k in range(size)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(count))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_alone_nothing_is_exchanged():
    values = [torch.tensor([1.0, 2.0])]
    assert Ranks().total(values)[0] is values[0] and Ranks().agreed("x") == "x" and Ranks().same(values) is None
