"""Few training tasks: 5-way 5-shot, one task for each alphabet of Omniglot, 30 to train on and 20 to test on.

    python -m benchmarks.small_omniglot --root path/to/omniglot

Each candidate is trained on 24 of the training alphabets and scored on the other six; the best is trained anew on all 30 and scored on the
20 test alphabets. Scores are means over ``--redraws`` draws of which five of a character's 20 drawings are seen; the interval resamples the
test tasks. ``--seeds`` draws of the characters of an alphabet, each with a selection of its own. ``--all`` tests every candidate, for the
table; the choice is by validation alone.

Tabulated for this setting by Müller et al. 2022 (prior-data fitted networks): a Bayesian network for each task 0.795, MAML 0.693, MLAP
0.700, BMAML 0.764, PACOH-NN 0.885 (Rothfuss et al. 2021), PFN 0.865. Here batch norm is by the set at hand where a name says "task": a
query set's 75 images then share statistics. "none" has no batch norm, "group" group norm in its place: every image stands for itself.
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.image_networks import convolutional
from bayesmeta.learners import BMAML, MAML, AbstractMetaLearner, ProtoNet
from bayesmeta.likelihoods import Categorical
from bayesmeta.metrics import bootstrap_interval
from bayesmeta.networks import HeadNetwork, NormalPrior, PrototypeNetwork

from .augmentation import jittered

WAYS, IMAGE, FILTERS, VALIDATION = 5, (1, 28, 28), 32, 6


@dataclass(frozen=True)
class Part:
    """Some of a family's tasks, their support and query drawn anew each time."""

    family: bm.tasks.Omniglot
    tasks: tuple[int, ...]

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> bm.Episode:
        which = torch.tensor(self.tasks)[torch.randperm(len(self.tasks), generator=generator)[:num_tasks]]
        return self.family.episodes(generator=generator).select(which)

    def episodes(self, *, generator: torch.Generator) -> bm.Episode:
        return self.family.episodes(generator=generator).select(list(self.tasks))


def grouped(module: nn.Sequential) -> nn.Sequential:
    """With group norm (Wu & He 2018), each image by itself, in place of batch norm."""
    return nn.Sequential(*(nn.GroupNorm(8, FILTERS) if isinstance(part, nn.BatchNorm2d) else part for part in module))


def prototypes(norm: str) -> AbstractMetaLearner:
    features = convolutional(IMAGE, filters=FILTERS)
    if norm == "group":
        network = PrototypeNetwork(grouped(features), FILTERS, WAYS)
    else:
        network = PrototypeNetwork(features, FILTERS, WAYS, batch_norm=norm)
    return ProtoNet(bm.HierarchicalModel.from_network(network, Categorical(WAYS)))


def head(batch_norm: str, scale: float | None = None) -> bm.HierarchicalModel:
    network = HeadNetwork(convolutional(IMAGE, filters=FILTERS), FILTERS, WAYS, batch_norm=batch_norm)
    return bm.HierarchicalModel.from_network(network, Categorical(WAYS), scale and NormalPrior.of(network, scale))


MAKE: dict[str, Callable[[str], AbstractMetaLearner]] = {
    "ProtoNet": prototypes,
    "ANIL": lambda norm: MAML(head(norm), inner_steps=5, inner_lr=0.4),
    "BMAML": lambda norm: BMAML(head(norm, 1.0), num_particles=5, inner_steps=5, inner_lr=0.1, objective="predictive"),
}


@dataclass(frozen=True)
class Candidate:
    learner: str
    norm: str
    augmented: bool

    def __str__(self) -> str:
        return f"{self.learner}, norm {self.norm}{', moved drawings' * self.augmented}"


CANDIDATES = [
    Candidate(learner, norm, augmented)
    for learner, norms in (("ProtoNet", ("task", "none", "group")), ("ANIL", ("task",)), ("BMAML", ("task",)))
    for norm in norms
    for augmented in (False, True)
]


def trained(candidate: Candidate, seed: int, tasks: tuple[int, ...], options: argparse.Namespace) -> AbstractMetaLearner:
    torch.manual_seed(seed)
    learner = MAKE[candidate.learner](candidate.norm)
    transform = jittered if candidate.augmented else None
    family = bm.tasks.Omniglot.small(options.root, ways=WAYS, seed=seed, transform=transform).split("train")
    bm.meta_train(
        learner, Part(family, tasks), steps=options.steps, tasks_per_step=4, generator=torch.Generator().manual_seed(seed), clip=10.0,
        optimizer=lambda params: torch.optim.Adam(params, 2e-3), compile=False,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps),
    )  # fmt: skip
    return learner


def accuracies(learner: AbstractMetaLearner, part: Part, redraws: int) -> dict[str, torch.Tensor]:
    """Accuracy and NLL of each task, ``(T,)``, means over draws of support and query."""
    found = [
        bm.evaluate({"it": learner}, part.episodes(generator=torch.Generator().manual_seed(seed)), examples=0, compile=False)
        for seed in range(redraws)
    ]
    return {
        name: torch.stack([torch.tensor(report.results["it"].metrics[name]) for report in found]).mean(0) for name in ("accuracy", "nll")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="the folder of Omniglot's data (default: that of the environment variable BAYESMETA_DATA)")
    parser.add_argument("--steps", type=int, default=500, help="of 4 tasks each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--redraws", type=int, default=10)
    parser.add_argument("--norm", choices=("task", "none", "group"), help="candidates of that kind alone")
    parser.add_argument("--all", action="store_true", help="test every candidate")
    parser.add_argument("--out", type=Path, default=Path("runs/small_omniglot"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    every, rows, chosen = tuple(range(30)), [], []
    candidates = [one for one in CANDIDATES if options.norm in (None, one.norm)]
    for seed in range(options.seeds):
        family = bm.tasks.Omniglot.small(options.root, ways=WAYS, seed=seed)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed)).tolist()
        known, held_out = tuple(order[VALIDATION:]), Part(family.split("train"), tuple(order[:VALIDATION]))
        test, scores = Part(family.split("test"), tuple(range(20))), {}
        for candidate in candidates:
            start = time.time()
            scores[candidate] = float(accuracies(trained(candidate, seed, known, options), held_out, options.redraws)["accuracy"].mean())
            print(f"seed {seed}  {candidate}: validation {scores[candidate]:.3f} ({time.time() - start:.0f} s)", flush=True)
        best = max(scores, key=lambda candidate: scores[candidate])
        for candidate in candidates if options.all else [best]:
            found = accuracies(trained(candidate, seed, every, options), test, options.redraws)
            interval = bootstrap_interval(found["accuracy"])
            print(f"seed {seed}  {candidate}: test accuracy {interval.estimate:.3f} ({interval.lower:.3f} to {interval.upper:.3f}), "
                  f"NLL {float(found['nll'].mean()):.3f}{', the chosen one' * (candidate == best)}", flush=True)  # fmt: skip
            numbers = (scores[candidate], *interval, float(found["nll"].mean()))
            rows.append([seed, candidate, candidate == best, *(f"{value:.4f}" for value in numbers)])
            chosen += [found["accuracy"]] * (candidate == best)
    with (options.out / "small_omniglot.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["seed", "candidate", "chosen", "validation", "test", "lower", "upper", "test_nll"], *rows])
    interval = bootstrap_interval(torch.stack(chosen).mean(0))
    print(f"chosen on validation, {options.seeds} draws of the characters: {interval.estimate:.3f} "
          f"({interval.lower:.3f} to {interval.upper:.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
