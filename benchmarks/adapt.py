"""Milliseconds to adapt to one task, eagerly and through `bayesmeta.Compiled`, interleaved.

    python benchmarks/adapt.py

MAML on the sinusoids' network (1-40-40-1), one task of 10 points, 1 and 5 gradient steps, checks of the data included.
"""

import datetime
import os
import platform
import statistics
import time

import torch

import bayesmeta as bm
from bayesmeta.recipes import multilayer

ROUNDS, CALLS = 20, 50


def main() -> None:
    facts = f"{torch.get_num_threads()} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, {facts}, medians of {ROUNDS} rounds")
    support = bm.tasks.Sinusoid.maml().sample(1, generator=torch.Generator().manual_seed(0)).support
    for steps in (1, 5):
        torch.manual_seed(0)
        model = bm.HierarchicalModel.from_network(bm.networks.WeightNetwork(multilayer(1, 40, 40, 1)), bm.likelihoods.Gaussian())
        learner = bm.learners.MAML(model, inner_steps=steps, inner_lr=0.01)
        contenders: dict[str, bm.AbstractAdapter] = {"eager": learner, "compiled": bm.Compiled(learner)}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS + 1):  # the first round traces and compiles
            for name, adapter in contenders.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    adapter.adapt(support)
                times[name].append(1000 * (time.perf_counter() - start) / CALLS)
        ms = {name: statistics.median(values[1:]) for name, values in times.items()}
        print(f"K = {steps}: eager {ms['eager']:.2f} ms, compiled {ms['compiled']:.2f} ms, {ms['eager'] / ms['compiled']:.1f}×")


if __name__ == "__main__":
    main()
