"""Peak memory of a training step as a function of tasks and inner steps, whole and in chunks of tasks.

    python benchmarks/memory.py

Second-order MAML on the sinusoids' network (1-40-40-1, 10 + 10 points), three eager steps in a process of their own for each row; what
the process grew by over the same learner before its first step. ``task_chunk`` takes the same steps up to rounding.
"""

import argparse
import resource
import subprocess
import sys

import torch

import bayesmeta as bm
from bayesmeta.recipes import multilayer


def grown(tasks: int, steps: int, chunk: int | None) -> float:
    """MiB that three steps add to the process's peak."""
    torch.manual_seed(0)
    model = bm.HierarchicalModel.from_network(bm.networks.WeightNetwork(multilayer(1, 40, 40, 1)), bm.likelihoods.Gaussian())
    learner, family = bm.learners.MAML(model, inner_steps=steps, inner_lr=0.01), bm.tasks.Sinusoid.maml()
    bm.meta_train(learner, family, steps=1, tasks_per_step=1, compile=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bm.meta_train(learner, family, steps=3, tasks_per_step=tasks, task_chunk=chunk, compile=False)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    one = parser.parse_args().one
    if one:
        print(grown(one[0], one[1], one[2] or None))
        return
    print(f"{'tasks':>6}{'K':>4}{'all at once, MiB':>20}{'task_chunk=25, MiB':>20}")
    for tasks, steps in ((25, 5), (100, 5), (400, 5), (1600, 5), (100, 1), (100, 20)):
        values = []
        for chunk in (0, 25):
            command = [sys.executable, __file__, "--one", str(tasks), str(steps), str(chunk)]
            values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{tasks:6}{steps:4}{values[0]:20.0f}{values[1]:20.0f}", flush=True)


if __name__ == "__main__":
    main()
