"""Who stays calibrated on images: all learners on the same episodes of Omniglot, under shift, and asked what they cannot know.

    python benchmarks/image_calibration.py --root path/to/omniglot             trains, then scores and draws
    python benchmarks/image_calibration.py --learners ProtoNet MAML            only these; a later run adds others
    … --learners LLAMA-all ABML-all BMAML-all --draws 20                       all weights of the network as φ: not among the default ones

Learners and embedding are those of ``compare omniglot``, on Vinyals' split with rotations. A trained learner is kept in ``--out`` and not
trained again; one that was interrupted goes on from its checkpoint. Written there: ``clean/report.html``; as CSV ``clean.csv`` (without
shift), ``shift.csv`` (by kind and severity), ``elsewhere.csv`` (tasks within one alphabet, by other drawers, of clothes) and
``detection.csv``; as pictures ``shift-confidence.png`` and ``shift-severity.png``. "Tempered" is a learner at the temperature that was
best on tasks of the validation classes.
"""

import argparse
import copy
import csv
import time
from collections.abc import Iterable
from pathlib import Path

import torch

import bayesmeta as bm
from bayesmeta.learners import AbstractAdapter, AbstractMetaLearner, TemperatureScaling
from bayesmeta.metrics import (
    adaptive_calibration_error,
    debiased_calibration_error,
    maximum_calibration_error,
    risk_coverage_area,
)
from bayesmeta.plots import confidence_under_shift, severity_curves
from bayesmeta.recipes import Recipe, image_recipe
from bayesmeta.tasks import AbstractFewShot, FewShot, TaskFamily

WAYS, QUERIES = 5, 5
FEW = ("ProtoNet", "MAML", "Ensemble", "ABML", "BMAML", "PLATIPUS", "BayesianBlackBox")  # as many as there are colours
PARTS = ("clean", "shift", "elsewhere", "detection")
METRICS = ("accuracy", "nll", "brier", "ece")
POOLED = {"mce": maximum_calibration_error, "adaptive_ece": adaptive_calibration_error, "debiased_ece": debiased_calibration_error}
COMPILED = ("MAML", "FOMAML", "Reptile", "Ensemble", "LLAMA-all", "ABML-all")  # all weights as φ, two tasks at a time: it pays for those


def trained(name: str, recipe: Recipe, options: argparse.Namespace) -> tuple[AbstractMetaLearner, float]:
    """The learner after ``options.steps`` steps, read where it was trained already, and its seconds of training."""
    torch.manual_seed(options.seed)
    learner = recipe.learners[name](copy.deepcopy(recipe.model))
    assert isinstance(learner, AbstractMetaLearner)
    start = time.time()
    compiled = name in COMPILED
    history = bm.meta_train(
        learner, recipe.train, steps=options.steps, tasks_per_step=recipe.tasks_per_step, clip=10.0,
        compile=compiled, task_chunk=2 if compiled else None,
        generator=torch.Generator().manual_seed(options.seed), optimizer=lambda params: torch.optim.Adam(params, recipe.learning_rate),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps),
        checkpoint=options.out / f"{name}.checkpoint", checkpoint_every=100, resume=True,
    )  # fmt: skip
    print(f"{name}: {history.steps} steps, {history.seconds:.0f} s ({time.time() - start:.0f} s now), "
          f"loss {sum(history.loss[-50:]) / 50:.3f}", flush=True)  # fmt: skip
    return learner, history.seconds


def tempered(name: str, learner: AbstractMetaLearner, family: bm.tasks.Omniglot, draws: int) -> TemperatureScaling:
    """The learner at the temperature that suits 200 tasks of the validation classes best."""
    scaled = TemperatureScaling(learner)
    g = torch.Generator().manual_seed(2)
    scaled.fit(family.split("val").sample(200, generator=g), num_draws=draws, generator=g)
    print(f"{name}: temperature {scaled.temperature:.3f}", flush=True)
    return scaled


def clean(learners: dict[str, AbstractAdapter], recipe: Recipe, seconds: dict[str, float], options: argparse.Namespace) -> None:
    """All on the same test episodes, as they are and at their own temperature."""
    report = bm.evaluate(
        learners, recipe.test, num_tasks=options.episodes, seed=1, task_chunk=50, num_draws=options.draws, compile=False,
        title=recipe.title, notes=recipe.notes,
    )  # fmt: skip
    report.save(options.out / "clean")
    rows: dict[str, dict[str, object]] = {name: {"learner": name, "training_seconds": round(seconds[name])} for name in learners}
    for row in report.summary():
        if row["metric"] in METRICS:
            rows[row["learner"]] |= {row["metric"]: row["estimate"]} | {f"{row['metric']}_{end}": row[end] for end in ("lower", "upper")}
    for name, result in report.results.items():
        probs, labels = torch.tensor(result.probs), torch.tensor(result.labels)
        mask = labels >= 0
        for metric, score in POOLED.items():
            rows[name][metric] = float(score(probs, labels, mask))
        confidence, right = probs.amax(-1), (probs.argmax(-1) == labels) & mask
        rows[name]["risk_coverage_area"] = float(risk_coverage_area(confidence, right, mask))
    write(options.out / "clean.csv", rows.values())
    for row in rows.values():
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in row.items() if not k.endswith(("lower", "upper"))))


def write(file: Path, rows: Iterable[dict[str, object]]) -> None:
    listed = list(rows)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(listed[0]))
        writer.writeheader()
        writer.writerows(listed)


def other_families(options: argparse.Namespace) -> dict[str, TaskFamily]:
    """Tasks that are harder, or far away."""

    def omniglot(**more: object) -> bm.tasks.Omniglot:
        return bm.tasks.Omniglot(options.root, splits="vinyals", ways=WAYS, shots=1, test_shots=QUERIES, **more).split("test")  # type: ignore[arg-type]

    found: dict[str, TaskFamily] = {
        "one alphabet a task": omniglot(rotations=True, within_groups=True),
        "other drawers": omniglot(rotations=True).across_sources(range(1, 11), range(11, 21)),
    }
    if options.clothes:
        found["clothes"] = clothes(options)
    return found


def elsewhere(learners: dict[str, AbstractAdapter], kind: str, tasks: TaskFamily, ask: dict[str, int]) -> list[dict[str, object]]:
    report = bm.evaluate(learners, tasks, examples=0, compile=False, **ask)  # type: ignore[arg-type]
    kept = ("learner", "metric", "estimate", "lower", "upper")
    return [{"tasks": kind, **{k: row[k] for k in kept}} for row in report.summary() if row["metric"] in METRICS]


def clothes(options: argparse.Namespace) -> AbstractFewShot:
    """Fashion-MNIST, all ten classes as they are: nothing is trained on them."""
    every = FewShot.from_npz(options.clothes, labels="label", splits={"test": range(10)}, ways=WAYS, shots=1, test_shots=QUERIES)
    return every.split("test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="the folder of Omniglot's data (default: that of the environment variable BAYESMETA_DATA)")
    parser.add_argument("--clothes", help="fashion_mnist_2000.npz, for what is far away; left out without it")
    parser.add_argument("--learners", nargs="+", help="default: those of compare omniglot")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=1000, help="of the test without shift")
    parser.add_argument("--shifted-episodes", type=int, default=200, help="of every test under shift")
    parser.add_argument("--draws", type=int, default=100, help="of φ, for each prediction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="of the scores; none: training alone")
    parser.add_argument("--out", type=Path, default=Path("runs/image_calibration"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    family = bm.tasks.Omniglot(options.root, splits="vinyals", rotations=True, ways=WAYS, shots=1, test_shots=QUERIES)
    recipe = image_recipe("Omniglot (Vinyals' split), 5-way 1-shot", family)
    learners, seconds = {}, {}
    for name in options.learners or recipe.default:
        learners[name], seconds[name] = trained(name, recipe, options)
    if "clean" in options.parts:
        scaled = {f"{name}, tempered": tempered(name, learner, family, options.draws) for name, learner in learners.items()}
        clean(learners | scaled, recipe, seconds | {f"{name}, tempered": seconds[name] for name in learners}, options)
    ask = {"num_tasks": options.shifted_episodes, "seed": 1, "task_chunk": 50, "num_draws": options.draws}
    if "shift" in options.parts:
        shifts = bm.under_shift(learners, recipe.test, **ask, compile=False)
        write(options.out / "shift.csv", shifts)
        confidence_under_shift(shifts)[0].figure.savefig(options.out / "shift-confidence.png", dpi=150)
        few = [name for name in FEW if name in learners] or list(learners)
        severity_curves(shifts, learners=few)[0].figure.savefig(options.out / "shift-severity.png", dpi=150)
    if "elsewhere" in options.parts:
        others = [row for kind, tasks in other_families(options).items() for row in elsewhere(learners, kind, tasks, ask)]
        write(options.out / "elsewhere.csv", others)
    if "detection" in options.parts:
        wide = bm.tasks.Omniglot(options.root, splits="vinyals", rotations=True, ways=WAYS, shots=1, test_shots=15).split("test")
        detected = [{"questions": "other characters", **row} for row in bm.out_of_episode(learners, wide, **ask)]
        if options.clothes:
            far = bm.out_of_episode(learners, wide, outside=clothes(options), **ask)
            detected += [{"questions": "clothes", **row} for row in far]
        write(options.out / "detection.csv", detected)


if __name__ == "__main__":
    main()
