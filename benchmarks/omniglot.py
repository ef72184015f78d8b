"""Few-shot classification of Omniglot's characters: prototypical networks and MAML, in minutes on one core, or at the papers' length.

    python -m benchmarks.omniglot protonet --root path/to/omniglot             5-way 1-shot; --shots 5 for five
    python -m benchmarks.omniglot maml                                         four blocks of convolutions
    python -m benchmarks.omniglot maml-fc                                      256-128-64-64, no convolution
    python -m benchmarks.omniglot maml --full --device cuda                    64 filters, 60,000 steps of 32 tasks (on a GPU)

Vinyals' split: 1,028 characters to train on, 172 for the learning curve, 423 to test on, each turned by 90, 180 and 270 degrees as classes
of their own. Test: 1,000 episodes of 15 queries a class; accuracy, NLL and Brier are means over episodes with 95% intervals, ECE (15 bins)
pools all queries. Prototypical networks train with more classes an episode than they are tested with (Snell et al. 2017). MAML takes one
inner step in training and three in the test, of 0.4; the fully connected network of 0.2, trained on drawings that are moved a little.
Batch norm is by the set at hand, so both are transductive.

The papers: prototypical networks 98.8 and 99.7% (1 and 5 shots), MAML 98.7 and 99.9, fully connected 89.7 and 97.5 (Snell et al. 2017, Finn
et al. 2017). An interrupted run goes on from its checkpoint when started again with the same arguments.
"""

import argparse
import csv
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import bayesmeta as bm
from bayesmeta.image_networks import convolutional, fully_connected
from bayesmeta.learners import MAML, ProtoNet
from bayesmeta.likelihoods import Categorical
from bayesmeta.networks import PrototypeNetwork, WeightNetwork

from .augmentation import jittered

WAYS, IMAGE = 5, (1, 28, 28)


@dataclass(frozen=True)
class Setting:
    """How one learner is made and trained.

    ``queries``: of each class in training; ``chunk``: tasks held in memory at once; ``moved``: drawings are, at random, in training.
    """

    steps: int
    tasks: int
    ways: int = WAYS
    queries: int = 5
    lr: float = 1e-3
    filters: int = 64
    pooled: bool = False
    batch_norm: str = "task"
    inner_lr: float = 0.4
    chunk: int | None = None
    compile: bool | str = False
    moved: bool = False


SETTINGS = {
    "protonet": Setting(steps=12_000, tasks=1, ways=20),
    "maml": Setting(steps=5000, tasks=16, filters=32, lr=2e-3, chunk=2, compile="auto"),
    "maml-fc": Setting(steps=25_000, tasks=16, lr=3e-3, inner_lr=0.2, compile="auto", moved=True),
}
FULL = {
    "protonet": {"steps": 20_000, "filters": 64, "pooled": True},
    "maml": {"steps": 60_000, "tasks": 32, "filters": 64, "compile": "auto"},
    "maml-fc": {"steps": 60_000, "tasks": 32, "lr": 1e-3, "inner_lr": 0.4, "compile": "auto", "moved": False},
}


def learner_of(name: str, s: Setting, seed: int) -> bm.AbstractMetaLearner:
    torch.manual_seed(seed)
    if name == "protonet":
        features = convolutional(IMAGE, filters=s.filters, pooled=s.pooled)
        return ProtoNet(bm.HierarchicalModel.from_network(
            PrototypeNetwork(features, s.filters, s.ways, batch_norm=s.batch_norm), Categorical(s.ways)
        ))  # fmt: skip
    net = fully_connected(IMAGE, s.ways) if name == "maml-fc" else convolutional(IMAGE, s.ways, filters=s.filters, pooled=s.pooled)
    model = bm.HierarchicalModel.from_network(WeightNetwork(net, batch_norm=s.batch_norm), Categorical(s.ways))
    return MAML(model, inner_steps=1, inner_lr=s.inner_lr, adapt_steps=3)


def for_test(learner: bm.AbstractMetaLearner) -> bm.AbstractMetaLearner:
    """The learner for tasks of `WAYS` classes, on the same features."""
    network = learner.model.network
    if not isinstance(network, PrototypeNetwork):
        return learner
    other = PrototypeNetwork(network.features, network.num_features, WAYS)
    other.batch_norms = network.batch_norms
    return ProtoNet(bm.HierarchicalModel.from_network(other, Categorical(WAYS)).to(learner.model.device))


def scores(learner: bm.AbstractMetaLearner, family: bm.TaskFamily, episodes: int) -> dict[str, tuple[float, float, float]]:
    """Estimate and 95% interval of accuracy, NLL, Brier and ECE."""
    report = bm.evaluate({"it": for_test(learner)}, family, num_tasks=episodes, task_chunk=50, seed=1, examples=1)
    rows = {row["metric"]: (row["estimate"], row["lower"], row["upper"]) for row in report.summary()}
    return {name: rows[name] for name in ("accuracy", "nll", "brier", "ece")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learner", choices=SETTINGS)
    parser.add_argument("--root", help="the folder of Omniglot's data (default: that of the environment variable BAYESMETA_DATA)")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--test-shots", type=int, help="of the test alone; default: as --shots. A trained run is tested again")
    parser.add_argument("--full", action="store_true", help="the paper's length and width; meant for --device cuda")
    parser.add_argument("--device", help="cuda, say")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=1000, help="of the test")
    parser.add_argument("--parts", type=int, default=5, help="points of the learning curve")
    parser.add_argument("--batch-norm", choices=("task", "running", "per_step", "none"), help="default: the learner's own")
    parser.add_argument("--pooled", action="store_true", default=None, help="halve by max-pooling instead of strides")
    parser.add_argument("--moved", action="store_true", default=None, help="train on drawings turned, stretched and moved a little")
    parser.add_argument("--compile", choices=("auto", "yes", "no"))
    for number in ("steps", "tasks", "ways", "queries", "filters", "chunk"):
        parser.add_argument(f"--{number}", type=int, help="of training; default: the learner's own")
    for number in ("lr", "inner-lr"):
        parser.add_argument(f"--{number}", type=float, help="default: the learner's own")
    parser.add_argument("--out", type=Path, default=Path("runs/omniglot"))
    options = parser.parse_args()
    given = {k: v for k, v in vars(options).items() if k in Setting.__dataclass_fields__ and v is not None}
    if options.compile:
        given["compile"] = {"auto": "auto", "yes": True, "no": False}[options.compile]
    s = replace(SETTINGS[options.learner], **((FULL[options.learner] if options.full else {}) | given))

    options.out.mkdir(parents=True, exist_ok=True)
    run = f"{options.learner}-{WAYS}way-{options.shots}shot" + "-full" * options.full + f"-seed{options.seed}"
    checkpoint = options.out / f"{run}.checkpoint"
    test_shots = options.test_shots or options.shots
    every = bm.tasks.Omniglot(options.root, splits="vinyals", rotations=True, ways=WAYS, shots=test_shots)
    train = bm.tasks.Omniglot(
        options.root, splits="vinyals", rotations=True, ways=s.ways, shots=options.shots, test_shots=s.queries,
        transform=jittered if s.moved else None,
    ).split("train")  # fmt: skip
    learner, seconds = learner_of(options.learner, s, options.seed), 0.0
    print(f"{run}: {s}", flush=True)
    for part in range(1, options.parts + 1):
        history = bm.meta_train(
            learner, train, steps=s.steps * part // options.parts, tasks_per_step=s.tasks, task_chunk=s.chunk, compile=s.compile,
            generator=torch.Generator().manual_seed(options.seed), optimizer=lambda params: torch.optim.Adam(params, s.lr), clip=10.0,
            schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.steps), device=options.device,
            checkpoint=checkpoint, checkpoint_every=100, resume=True,
        )  # fmt: skip
        seconds = history.seconds
        found = scores(learner, every.split("val"), min(200, options.episodes))["accuracy"]
        loss, percent = statistics.fmean(history.loss[-50:]), tuple(100 * value for value in found)
        print(f"step {history.steps:6}  {seconds:5.0f} s  loss {loss:.4f}  validation accuracy "
              f"{percent[0]:.2f}% ({percent[1]:.2f} to {percent[2]:.2f})", flush=True)  # fmt: skip
    found = scores(learner, every.split("test"), options.episodes)
    tested = run if test_shots == options.shots else f"{run}-tested-with-{test_shots}"
    with (options.out / f"{tested}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["learner", "ways", "shots", "test_shots", "steps", "training_seconds", "metric", "estimate", "lower", "upper"])
        for metric, values in found.items():
            settings = [options.learner, WAYS, options.shots, test_shots, s.steps, f"{seconds:.1f}"]
            writer.writerow([*settings, metric, *(f"{v:.5f}" for v in values)])
            scale, unit = (100, "%") if metric in ("accuracy", "ece") else (1, "")
            print(f"{metric:9} {scale * values[0]:.3f}{unit} ({scale * values[1]:.3f} to {scale * values[2]:.3f})")
    print(f"{seconds:.0f} s of training ({1000 * seconds / max(s.steps, 1):.0f} ms a step)", flush=True)


if __name__ == "__main__":
    main()
