"""Seconds that the first step of each workload takes compiled: with nothing on disk, and in the next process.

    python -m benchmarks.first_steps [--only W3]          from the repository's root

A first step is a traced one, the compiling of it (or the loading of what was compiled), and the eager steps that it is held to.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.machine import facts
from benchmarks.steps import ours
from benchmarks.steps.workloads import WORKLOADS


def first_step(name: str) -> None:
    """Prints how many graphs and operations the step has, the seconds of compiling them, and of the step with that."""
    (workload,) = (w for w in WORKLOADS if w.name == name)
    run, step = ours.training(workload, True)
    compiler, sizes, taken = run.gradient.compiler, [], 0.0
    backend = compiler.backend

    def timed(module, inputs):
        nonlocal taken
        start = time.perf_counter()
        found = backend(module, inputs)
        taken += time.perf_counter() - start
        sizes.append(len(module.graph.nodes))
        return found

    compiler.backend = timed
    start = time.perf_counter()
    step()
    print(len(sizes), sum(sizes), f"{taken:.3f}", f"{time.perf_counter() - start:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="workloads whose names start so")
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workload:
        first_step(options.workload)
        return
    print(facts())
    print(f"{'':50}{'':>19}{'nothing on disk':>22}{'next process':>22}")
    print(f"{'':50}{'graphs':>8}{'operations':>11}" + 2 * f"{'compiling':>12}{'in all':>10}")
    for workload in WORKLOADS:
        if not workload.name.startswith(tuple(options.only)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.first_steps", "--workload", workload.name]
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
            cold, warm = (subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split() for _ in range(2))
        graphs, operations, *seconds = cold
        print(f"{workload.name:50}{graphs:>8}{operations:>11}" + "".join(f"{a:>12}{b:>10}" for a, b in (seconds, warm[2:])), flush=True)


if __name__ == "__main__":
    main()
