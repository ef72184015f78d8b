"""MAML's sinusoid experiment (Finn, Abbeel & Levine 2017, section 5.1): mean squared error after 1, 5 and 10 steps.

    python benchmarks/sinusoid_maml.py                 the paper's 70,000 steps
    python benchmarks/sinusoid_maml.py --steps 2000    a shortened run

Setting: amplitude U[0.1, 5], phase U[0, π], x U[-5, 5], no noise, 10 shots; MLP 1-40-40-1 with ReLU; one inner step of 0.01 in
training, meta-batch 25, Adam 1e-3. The weights start as in the authors' code (github.com/cbfinn/maml): normal, sd 0.01, cut at 2 sd;
biases 0. The paper reports 0.67 / 0.38 / 0.35 at 5 test points, after training at 10 shots (figures as quoted in the literature from
its figure 3 and appendix); both 5 and 10 test points are printed, with 95% intervals over tasks. A task whose adaptation diverges has
no error: it is counted beside the mean of the others. An interrupted run goes on from its checkpoint when started again.
"""

import argparse
import datetime
import json
import platform
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import bayesmeta as bm

PAPER = {1: 0.67, 5: 0.38, 10: 0.35}


def sinusoid_model(seed: int) -> bm.HierarchicalModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    for layer in net[::2]:
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(layer.bias)
    return bm.HierarchicalModel.from_network(bm.networks.WeightNetwork(net), bm.likelihoods.Gaussian(0.5**0.5, learn=False))


def train(steps: int, seed: int = 0, checkpoint: Path | None = None) -> bm.learners.MAML:
    # with noise variance ½ the NLL is the squared error plus a constant, so α = 0.01 is the paper's
    learner = bm.learners.MAML(sinusoid_model(seed), inner_steps=1, inner_lr=0.01)
    bm.meta_train(
        learner, bm.tasks.Sinusoid.maml(), steps=steps, tasks_per_step=25, generator=torch.Generator().manual_seed(seed),
        checkpoint=checkpoint, resume=checkpoint is not None,
    )  # fmt: skip
    return learner


def errors(learner: bm.learners.MAML, shots: int, num_tasks: int = 1000, seed: int = 1) -> dict[int, tuple[bm.metrics.Interval, int]]:
    """Mean squared error on 100 query points a task, after 1, 5 and 10 steps from ``shots`` points; and how many tasks diverged."""
    family = bm.tasks.Sinusoid.maml(num_support=shots, num_query=100)
    episode = family.sample(num_tasks, generator=torch.Generator().manual_seed(seed))
    found = {}
    for steps in PAPER:
        learner.adapt_steps = steps
        with warnings.catch_warnings(record=True):  # of tasks that diverged: they are counted here
            mean = learner.adapt(episode.support).predict(episode.query.x).mean
        error = bm.metrics.task_mean((mean - episode.query.y) ** 2, episode.query.mask)
        fine = error.isfinite()
        found[steps] = bm.metrics.bootstrap_interval(error[fine]), int((~fine).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=70_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sinusoid_maml.json"))
    options = parser.parse_args()
    start = time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    learner = train(options.steps, options.seed, options.out.with_suffix(".checkpoint"))
    seconds = time.monotonic() - start
    table = {}
    print(f"{options.steps} steps in {seconds:.0f} s ({1000 * seconds / max(options.steps, 1):.1f} ms a step)")
    print(f"{'':16}" + "".join(f"{f'{k} step' + 's' * (k > 1):>34}" for k in PAPER))
    print(f"{'paper':16}" + "".join(f"{v:>34}" for v in PAPER.values()))
    for shots in (5, 10):
        found = errors(learner, shots)
        table[f"{shots} shots"] = {k: {"mse": v.estimate, "interval": [v.lower, v.upper], "diverged": n} for k, (v, n) in found.items()}
        cells = (f"{v.estimate:.3f} [{v.lower:.3f}, {v.upper:.3f}]" + (f", {n} diverged" if n else "") for v, n in found.values())
        print(f"{f'{shots} test points':16}" + "".join(f"{cell:>34}" for cell in cells))
    facts = {"steps": options.steps, "seed": options.seed, "seconds": seconds, "mse": table, "paper": PAPER, "torch": torch.__version__,
             "machine": platform.machine(), "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}  # fmt: skip
    options.out.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
