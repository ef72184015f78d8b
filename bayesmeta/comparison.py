"""`compare`: learners trained and scored side by side on one family of tasks (`bayesmeta.recipes`).

What differs between learners is the inference for φ alone: each gets its own copy of the same model, the same training tasks
and the same held-out ones.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .evaluation import DEFAULT_TASKS, evaluate
from .learners.base import AbstractAdapter, AbstractMetaLearner, checked_choice, checked_steps
from .meta_gradient import TrainingError
from .recipes import FAMILIES, RECIPES, Recipe, panel_recipe
from .report import Report
from .tasks import Panel
from .training import meta_train
from .training_run import History


def compare(
    family: str | Panel = "radon", *, learners: Sequence[str] | None = None, steps: int | None = None, seed: int = 0,
    num_tasks: int | None = None, root: str | os.PathLike[str] | None = None, say: Callable[[str], None] | None = None,
    progress: bool | None = None,
) -> Report:
    """Trains the learners on one family's training tasks and reports on its held-out ones.

    ``family``: "radon", "sinusoid", "sine-or-line", "circles", "linear-gaussian", "gp-rbf", "gp-matern", "gp-periodic", "glyphs",
    "omniglot", or a `Panel` (hierarchical regression on its features). ``learners``: names, ("all",), or by default those that suit the
    family. ``steps``: of training, instead of the recipe's. ``seed``: of everything. ``num_tasks``: how many held-out tasks at most.
    ``root``: the folder of Omniglot's data, by default that of the environment variable BAYESMETA_DATA. ``say``: told what is going on,
    a line at a time.

    A learner whose training fails is left out, and the report says so. Raises ValueError with the nearest name for an unknown family
    or learner, FileNotFoundError where Omniglot's data are not, TrainingError where no learner is left.
    """
    say = say or (lambda line: None)
    with torch.random.fork_rng():  # networks draw their first weights from torch's global stream
        torch.manual_seed(seed)
        recipe = _recipe(family, seed, root)
    asked = list(recipe.learners) if learners is not None and list(learners) == ["all"] else (learners or recipe.default)
    names = [checked_choice("learners", name, tuple(recipe.learners)) for name in asked]
    if num_tasks is not None:
        checked_steps("num_tasks", num_tasks, least=1)
    trained: dict[str, AbstractAdapter] = {}
    histories: dict[str, History] = {}
    failed: dict[str, TrainingError] = {}
    for name in dict.fromkeys(name for name in names if name != "NUTS"):  # NUTS comes later: it takes another learner's θ
        start = time.monotonic()
        with torch.random.fork_rng():  # a learner's own networks
            torch.manual_seed(seed)
            learner = recipe.learners[name](copy.deepcopy(recipe.model))
            assert isinstance(learner, AbstractMetaLearner)
            try:
                histories[name] = meta_train(
                    learner, recipe.train, steps=recipe.steps if steps is None else steps, tasks_per_step=recipe.tasks_per_step,
                    generator=torch.Generator().manual_seed(seed), compile=recipe.compile,
                    optimizer=lambda params: torch.optim.Adam(params, recipe.learning_rate), clip=10.0, progress=progress,
                )  # fmt: skip
            except TrainingError as error:  # the others' work is not thrown away
                failed[name] = error
                say(f"{name} left out, its training failed at {error}")
                continue
        say(f"trained {name}: {histories[name].steps} steps in {time.monotonic() - start:.1f} s, loss {histories[name].loss[-1]:.4g}"
            if histories[name].loss else f"{name}: untrained")  # fmt: skip
        trained[name] = learner
    if failed and not trained and "NUTS" not in names:
        raise next(iter(failed.values()))
    notes = [*recipe.notes, *(f"{name} is left out: its training failed at {error}." for name, error in failed.items())]
    if "NUTS" in names:
        source = next((name for name in ("Exact", "ABML", "MAML") if name in trained), None)
        model = trained[source].model if source else recipe.model
        trained["NUTS"] = recipe.learners["NUTS"](model)
        notes.append(f"NUTS learns no θ: it uses the one that {f'{source} learned' if source else 'it starts with'}.")
    say(f"evaluating on {_how_many(recipe.test, num_tasks)} held-out tasks")
    return evaluate(
        {name: trained[name] for name in recipe.learners if name in trained}, recipe.test, num_tasks=num_tasks, seed=seed,
        title=recipe.title, notes=tuple(notes), histories={name: h for name, h in histories.items() if h.loss},
        task_chunk=recipe.task_chunk,
    )  # fmt: skip


def _recipe(family: str | Panel, seed: int, root: str | os.PathLike[str] | None) -> Recipe:
    name = "a table" if isinstance(family, Panel) else checked_choice("family", family, FAMILIES)
    if root is not None and name != "omniglot":
        raise ValueError(f"root: the folder of Omniglot's data, of no use to {name}")
    if isinstance(family, Panel):
        return panel_recipe(family)
    return RECIPES[name](seed) if root is None else RECIPES[name](seed, root=root)


def _how_many(family: Any, num_tasks: int | None) -> int:
    total = getattr(family, "num_tasks", None)
    return min(num_tasks or DEFAULT_TASKS, total or num_tasks or DEFAULT_TASKS)


def is_csv(name: str) -> bool:
    """Whether a family's name is meant as a file."""
    return name.endswith(".csv") or os.sep in name
