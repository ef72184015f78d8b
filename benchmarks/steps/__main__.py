"""Milliseconds a meta-step, side by side: this package eager and compiled, and what else one could write or use.

    python -m benchmarks.steps                        all workloads, from the repository's root
    python -m benchmarks.steps --only W1 W5 --out runs/steps
    python -m benchmarks.steps --scaling --out runs/scaling
    python -m benchmarks.steps --remains --only W1    what is left: arithmetic, optimiser, Python

    python -m benchmarks.steps --join runs/W1 runs/W2 --out runs/steps      one table and chart of several runs
    python -m benchmarks.steps --device cuda --out runs/steps-gpu

    compiled   the package, its step traced through Pyro and compiled      eager    the package, step by step through Python
    loop       plain PyTorch, one task after the other                     vmap     `torch.func.vmap` and `grad`, eager
    unbatched  the same, and one particle or draw after the other (W3, W4)
    batched    tasks batched by hand, `torch.compile` of the whole step    jax      the same step in JAX, jitted whole
    numpyro    NumPyro's SVI step, jitted                                  bf16     compiled, with autocast=torch.bfloat16 (W2)

A step is loss, gradient and an Adam step of θ. Contenders take turns, round after round; a ratio is the median over rounds of the times in
one round, to the first contender's time. Compilation is apart, with the compiler's disk cache as it is. First losses must agree: those of
three steps, fed the same noise where there is any; the first alone for a JAX step that draws its own noise afterwards; of NumPyro, whose
noise is its own, the mean over 50 draws. Memory (``--memory``) is what the process grows by during a step (on a CPU).

On a GPU ``--device cuda`` takes W2 with 32 tasks and W1 with 1,000 as well; data are there already, all is float32 without TensorFloat-32,
and a step ends when its loss is on the CPU. JAX and NumPyro take part where they have the GPU.

W1 MLP 1-40-40-1, 10 + 10 points, second order. W2 28 × 28, 5 classes, 1 + 15 images each, four strided convolutions of 64 filters, batch
norm by the statistics of the set at hand. W3 the "predictive" objective. W5 a user's Pyro program; 8 + 8 points a
task.
The extra `bench` brings JAX and NumPyro: pip install -e '.[bench]'.
"""

import argparse
import csv
import importlib
import importlib.util
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..machine import facts
from . import batched, chart, loops, measure, ours, remains, scaling
from .workloads import ON_GPU, WORKLOADS, Contender, Workload

Make = Callable[[Workload], Contender | None]
NOT_INSTALLED = "not installed"
BFLOAT16 = 0.03  # how far losses in it may be


def contenders() -> dict[str, Make | None]:
    """By name, in the order of the table; None for what is not installed."""
    found: dict[str, Make | None] = {
        "compiled": ours.compiled, "bf16": ours.bfloat16, "eager": ours.eager, "loop": loops.loop,
        "unbatched": loops.unbatched, "batched": batched.batched, "vmap": loops.vmapped,
    }  # fmt: skip
    for name, package, module, function in (("jax", "jax", "jaxed", "jitted"), ("numpyro", "numpyro", "numpyroed", "svi")):
        there = importlib.util.find_spec(package) is not None and importlib.util.find_spec("jax") is not None
        found[name] = getattr(importlib.import_module(f".{module}", __package__), function) if there else None
    return found


def check(w: Workload, made: dict[str, Contender]) -> None:
    """First losses against the first contender's; raises AssertionError where they differ."""
    wanted = next(iter(made.values())).losses
    for name, contender in made.items():
        if name == "numpyro":
            continue  # compared where it is made, in distribution
        for step, (here, there) in enumerate(zip(contender.losses, wanted, strict=False)):
            # a bias before a batch norm has a gradient of rounding alone, of which Adam makes full steps; second derivatives jump where
            # rounding decides on which side of 0 a rectified unit is
            near = BFLOAT16 if name == "bf16" else 1e-2 if step and w.kind == "omniglot" else 1e-4
            assert abs(here - there) < near * abs(there), f"{w.name}: {name} has losses {contender.losses}, expected {wanted}"


def run(w: Workload, chosen: list[str], options: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each contender of a workload."""
    made: dict[str, Contender] = {}
    missing = []
    for name, make in contenders().items():
        if name not in chosen:
            continue
        if make is None:
            missing.append(name)
            continue
        contender = make(w)
        if contender is not None:
            made[name] = contender
    check(w, made)
    steps = {name: contender.step for name, contender in made.items()}
    times = measure.interleaved(steps, options.repeats, most_seconds=options.seconds)
    rows: list[dict[str, object]] = []
    for name, contender in made.items():
        typical = measure.medians(times[name])
        memory = measure.working_memory(contender.step) if options.memory and w.device == "cpu" else math.nan
        rows.append({
            "workload": w.name, "contender": name, "ms": round(typical.wall, 4), "cpu_ms": round(typical.cpu, 4),
            "ratio": round(measure.ratio(times[name], times[next(iter(made))]), 3), "rounds": len(times[name]),
            "first_step_s": round(contender.seconds, 2), "step_memory_mib": round(memory, 1),
            "first_loss": round(contender.losses[0], 6),
        })  # fmt: skip
    return rows + [{"workload": w.name, "contender": name, "ms": NOT_INSTALLED} for name in missing]


def show(rows: list[dict[str, object]], seconds: float) -> None:
    print(f"\n{rows[0]['workload']}   ({seconds:.0f} s, load {os.getloadavg()[0]:.1f})")
    for row in rows:
        if row["ms"] == NOT_INSTALLED:
            print(f"  {row['contender']:10}{NOT_INSTALLED:>12}")
            continue
        print(f"  {row['contender']:10}{row['ms']:>12.3f} ms{row['ratio']:>10.2f} ×   cpu {row['cpu_ms']:>10.3f} ms"
              f"   first step {row['first_step_s']:>7.1f} s"
              + ("" if math.isnan(row["step_memory_mib"]) else f"   memory {row['step_memory_mib']:>8.1f} MiB")
              + f"   loss {row['first_loss']}", flush=True)  # fmt: skip


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__, formatter_class=raw)
    parser.add_argument("--only", nargs="*", default=[""], help="workloads whose name begins so")
    parser.add_argument("--contenders", nargs="*", help="of those above; all")
    parser.add_argument("--repeats", type=int, default=30, help="rounds")
    parser.add_argument("--seconds", type=float, default=60.0, help="after this long a workload's rounds end, 3 or more of them done")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", action="store_true", help="measure it too, with one heap for all threads, which slows some contenders")
    parser.add_argument("--out", type=Path, help="folder for results.csv and results.png")
    parser.add_argument("--task-chunk", type=int, help="tasks that the compiled step takes at a time")
    parser.add_argument("--remains", action="store_true", help="what a compiled step's time goes into")
    parser.add_argument("--scaling", action="store_true", help="T = 1 … 1000, K = 1 … 20, M = 1 … 64, compiled against the loop")
    parser.add_argument("--join", nargs="+", type=Path, help="measures nothing: results of runs in these folders go together into --out")
    options = parser.parse_args()
    if options.join:
        return save([row for folder in options.join for row in earlier(folder)], options)
    options.memory |= options.scaling
    if options.memory:
        measure.one_arena()
    torch.backends.cudnn.allow_tf32 = False
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | ({"JAX_PLATFORMS": "cpu"} if options.device == "cpu" else {})
    print(f"{facts() if options.device == 'cpu' else facts(torch.cuda.get_device_name())}, float32")
    workloads = scaling.WORKLOADS if options.scaling else WORKLOADS if options.device == "cpu" else ON_GPU
    workloads = [replace(w, device=options.device, task_chunk=options.task_chunk) for w in workloads]
    chosen = options.contenders or (["compiled", "loop"] if options.scaling else list(contenders()))
    rows: list[dict[str, object]] = []
    for w in workloads:
        if not w.name.startswith(tuple(options.only)):
            continue
        if options.remains:
            print(f"{w.name}: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in remains.remains(w).items()), flush=True)
            continue
        start = time.perf_counter()
        found = run(w, chosen, options)
        show(found, time.perf_counter() - start)
        rows += found
        if options.out is not None:
            save(rows, options)


def earlier(folder: Path) -> list[dict[str, object]]:
    """The rows that a run has saved."""

    def number(text: str) -> object:
        try:
            return float(text)
        except ValueError:
            return text

    with (folder / "results.csv").open(newline="") as file:
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def save(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    """Writes what there is so far."""
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    measured = [row for row in rows if row["ms"] != NOT_INSTALLED]
    (chart.scaling if options.scaling else chart.ratios)(measured, options.out / "results.png")


if __name__ == "__main__":
    main()
