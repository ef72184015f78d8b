"""The sinusoid experiment of BMAML (Kim, Yoon et al. 2018, section 5.1): few training tasks, many particles, equal work.

    python benchmarks/sinusoid_bmaml.py                                    100 tasks of 5 points, 300,000 gradients a task
    python benchmarks/sinusoid_bmaml.py --tasks 100 1000 --shots 5 10      the paper's four settings

Setting: amplitude U[0.1, 5], frequency U[0.5, 2], phase U[0, 2π], noise sd 0.01 of the amplitude, x U[-5, 5]; a fixed set of training
tasks with fixed points; 3 layers of 40; tested on 1,000 other tasks with noise-free targets. BMAML with 10 particles (chaser, and the
mixture's query NLL), an ensemble of 10 MAMLs and one MAML spend the same number of gradient evaluations a task in training, forward and
backward through a batch of 10 tasks counted as one each. Printed and drawn: mean squared error of the mean prediction, and NLL, along
that budget, with 95% intervals over tasks. The paper gives curves and no numbers.

BMAML steps by ε = 0.01 from a prior of sd 0.3, not by the paper's 0.001, which hardly moves it: particles that are far apart share no
gradient, so a Stein step moves each by about a fifth of ε here.
"""

import argparse
import csv
import datetime
import json
import platform
import time
import warnings
from pathlib import Path

import matplotlib
import torch

import bayesmeta as bm
from bayesmeta.recipes import multilayer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTICLES, STEPS = 10, 5


def model(seed: int, prior_sd: float = 0.1) -> bm.HierarchicalModel:
    torch.manual_seed(seed)
    network = bm.networks.WeightNetwork(multilayer(1, 40, 40, 40, 1))
    return bm.HierarchicalModel.from_network(network, bm.likelihoods.Gaussian(), bm.networks.NormalPrior.of(network, prior_sd))


def learners(seed: int) -> dict[str, tuple[bm.AbstractMetaLearner, int]]:
    """Name to learner and its gradient evaluations a task and step: every inner and leader step, and the outer one."""
    maml = lambda one: bm.learners.MAML(one, inner_steps=STEPS, inner_lr=0.01)  # noqa: E731
    options = {"num_particles": PARTICLES, "inner_steps": STEPS, "inner_lr": 0.01, "start_scale": 0.5}
    return {
        "BMAML, chaser": (bm.learners.BMAML(model(seed, 0.3), **options), PARTICLES * (STEPS + 2)),
        "BMAML, mixture NLL": (bm.learners.BMAML(model(seed, 0.3), objective="predictive", **options), PARTICLES * (STEPS + 1)),
        "ensemble of 10 MAMLs": (bm.learners.Ensemble(model(seed), maml, size=PARTICLES), PARTICLES * (STEPS + 1)),
        "one MAML": (maml(model(seed)), STEPS + 1),
    }


def scores(learner: bm.AbstractMetaLearner, episode: bm.Episode) -> dict[str, bm.metrics.Interval]:
    with warnings.catch_warnings(record=True):  # of tasks that diverged: they have no score
        predictive = learner.adapt(episode.support).predict(episode.query.x)
    values = {"mse": (predictive.mean - episode.query.y) ** 2, "nll": -predictive.log_prob(episode.query.y)}
    return {k: bm.metrics.bootstrap_interval((t := bm.metrics.task_mean(v, episode.query.mask))[t.isfinite()]) for k, v in values.items()}


def curve(learner: bm.AbstractMetaLearner, cost: int, family: bm.TaskFamily, episode: bm.Episode, budget: int, points: int, folder: Path):
    """Rows of (gradient evaluations, scores) at ``points`` places along the budget; an interrupted run goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "scores.json"
    found = json.loads(written.read_text()) if written.exists() else []
    for k in range(points + 1):
        spent = budget * k // points
        if k < len(found) and found[k][0] == spent:
            continue
        bm.meta_train(
            learner, family, steps=spent // cost, tasks_per_step=10, clip=10.0, bad_tasks="skip",
            checkpoint=folder / "checkpoint", checkpoint_every=10**9, resume=True,
        )  # fmt: skip
        found.append((spent, scores(learner, episode)))
        written.write_text(json.dumps(found))
    return [(spent, {name: bm.metrics.Interval(*values) for name, values in of.items()}) for spent, of in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100])
    parser.add_argument("--shots", type=int, nargs="+", default=[5])
    parser.add_argument("--budget", type=int, default=300_000, help="gradient evaluations a task in training (default: 300,000)")
    parser.add_argument("--points", type=int, default=6, help="places along the budget where it is tested")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sinusoid_bmaml"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = [(t, s) for t in options.tasks for s in options.shots]
    figure, axes = plt.subplots(2, len(settings), figsize=(5.5 * len(settings), 7), squeeze=False, sharex=True, layout="constrained")
    rows = []
    for column, (tasks, shots) in enumerate(settings):
        train = bm.tasks.Sinusoid.bmaml(num_tasks=tasks, num_support=shots, seed=0)
        test = bm.tasks.Sinusoid.bmaml(num_tasks=None, num_support=shots, num_query=50, noise_free_query=True)
        episode = test.sample(1000, generator=torch.Generator().manual_seed(1))
        for name, (learner, cost) in learners(options.seed).items():
            start = time.monotonic()
            folder = options.out / f"{tasks}-{shots}-{name.replace(' ', '-')}"
            found = curve(learner, cost, train, episode, options.budget, options.points, folder)
            for row, score in enumerate(("mse", "nll")):
                ax, values = axes[row, column], [s[score] for _, s in found]
                spent = [n for n, _ in found]
                (line,) = ax.plot(spent, [v.estimate for v in values], marker="o", label=name)
                ax.fill_between(spent, [v.lower for v in values], [v.upper for v in values], alpha=0.15, color=line.get_color())
                ax.set_ylabel({"mse": "mean squared error", "nll": "NLL, nats a point"}[score])
            axes[0, column].set(title=f"{tasks} training tasks, {shots} shots", yscale="log", ylim=(0.3, 6))
            axes[1, column].set_ylim(1, 4)  # means over tasks, of which a single one that diverges leaves the picture
            axes[1, column].set_xlabel("gradient evaluations a task in training")
            rows += [(tasks, shots, name, n, k, v.estimate, v.lower, v.upper) for n, s in found for k, v in s.items()]
            mse, nll = found[-1][1]["mse"], found[-1][1]["nll"]
            print(
                f"{tasks:5} tasks {shots:3} shots  {name:22} {options.budget // cost:6} steps  {time.monotonic() - start:6.0f} s"
                f"  MSE {mse.estimate:.3f} [{mse.lower:.3f}, {mse.upper:.3f}]  NLL {nll.estimate:.3f} [{nll.lower:.3f}, {nll.upper:.3f}]",
                flush=True,
            )
    axes[0, 0].legend(frameon=False)
    figure.savefig(options.out / "curves.png", dpi=120)
    with (options.out / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("tasks", "shots", "learner", "gradients", "score", "estimate", "lower", "upper"))
        writer.writerows(rows)
    facts = f"{datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    print(f"{facts}: {options.out}/curves.png")


if __name__ == "__main__":
    main()
