"""MAML's sinusoid experiment, shortened: the full length is `make sinusoid`."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "sinusoid_maml.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("sinusoid_maml", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_steps_run(benchmark):
    learner = benchmark.train(3)
    found = {steps: interval for steps, (interval, _) in benchmark.errors(learner, shots=5, num_tasks=20).items()}
    assert set(found) == {1, 5, 10}
    assert all(i.lower < i.estimate < i.upper for i in found.values())


@pytest.mark.slow
def test_a_shortened_run_learns_to_adapt(benchmark):
    """After 6,000 of the 70,000 steps: well under the error of predicting zero (4.4), better with more steps, at 10 shots."""
    learner = benchmark.train(6_000)
    found = {steps: interval for steps, (interval, diverged) in benchmark.errors(learner, shots=10).items() if not diverged}
    assert found[1].upper < 1.8
    assert found[5].upper < found[1].lower
    assert found[10].estimate < found[5].estimate + 0.05
