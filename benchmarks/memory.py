"""Peak memory of a training step as a function of tasks and inner steps: eager, whole and in chunks of tasks, and compiled.

    python -m benchmarks.memory                       from the repository's root

Second-order MAML on the sinusoids' network (1-40-40-1, 10 + 10 points), each number from a process of its own. Eager: what the process grew
by in three steps over the same learner before its first step; ``task_chunk`` takes the same steps up to rounding. Compiled: what it grows
by during a step, over what it keeps; with many inner steps that is a backward sweep (`bayesmeta.sweep`).
"""

import argparse
import resource
import subprocess
import sys

import torch

import bayesmeta as bm
from bayesmeta.recipes import multilayer

from .steps import measure, ours
from .steps.workloads import Workload


def grown(tasks: int, steps: int, chunk: int | None) -> float:
    """MiB that three steps add to the process's peak."""
    torch.manual_seed(0)
    model = bm.HierarchicalModel.from_network(bm.networks.WeightNetwork(multilayer(1, 40, 40, 1)), bm.likelihoods.Gaussian())
    learner, family = bm.learners.MAML(model, inner_steps=steps, inner_lr=0.01), bm.tasks.Sinusoid.maml()
    bm.meta_train(learner, family, steps=1, tasks_per_step=1, compile=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bm.meta_train(learner, family, steps=3, tasks_per_step=tasks, task_chunk=chunk, compile=False)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def compiled(tasks: int, steps: int) -> float:
    """MiB that the process grows by during a compiled step."""
    torch.set_num_threads(1)
    measure.one_arena()
    return measure.working_memory(ours.compiled(Workload("memory", "sinusoid", tasks, steps)).step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    one = parser.parse_args().one
    if one:
        print(compiled(one[0], one[1]) if one[2] < 0 else grown(one[0], one[1], one[2] or None))
        return
    print(f"{'tasks':>6}{'K':>4}{'all at once, MiB':>20}{'task_chunk=25, MiB':>20}{'compiled, MiB':>20}")
    for tasks, steps in ((25, 5), (100, 5), (400, 5), (1600, 5), (100, 1), (100, 20), (100, 100)):
        print(f"{tasks:6}{steps:4}", end="", flush=True)
        for how in (0, 25, -1) if tasks == 100 else (0, 25):  # compiling takes its time
            command = [sys.executable, "-m", "benchmarks.memory", "--one", str(tasks), str(steps), str(how)]
            print(f"{float(subprocess.run(command, check=True, capture_output=True, text=True).stdout):20.0f}", end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
