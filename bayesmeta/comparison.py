"""`compare`: ready-made comparisons, each a family of tasks, a model for it, and learners trained and scored side by side.

What differs between learners is the inference for φ alone: each gets its own copy of the same model, the same training tasks
and the same held-out ones.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .episodes import Points
from .evaluation import DEFAULT_TASKS, evaluate
from .learners import ABML, MAML, NUTS, CompletePooling, Exact, NoPooling
from .learners.base import AbstractAdapter, AbstractMetaLearner, checked_choice, checked_steps
from .likelihoods import Gaussian
from .model import HierarchicalModel
from .networks import WeightNetwork
from .report import Report
from .tasks import LinearGaussian, Panel, SineOrLine, Sinusoid, TaskFamily
from .training import History, meta_train

FAMILIES = ("radon", "sinusoid", "sine-or-line", "linear-gaussian")
Make = Callable[[HierarchicalModel], AbstractAdapter]


@dataclass(frozen=True)
class Recipe:
    """One comparison: where tasks come from, the model, and how each learner is made and trained.

    ``learners``: name to constructor, in the order of the report; ``default``: which of them run unasked. ``steps``,
    ``learning_rate``: of Adam, the same for all.
    """

    title: str
    train: TaskFamily
    test: TaskFamily
    model: HierarchicalModel
    learners: dict[str, Make]
    default: tuple[str, ...]
    steps: int
    learning_rate: float
    notes: tuple[str, ...] = ()


def compare(
    family: str | Panel = "radon", *, learners: Sequence[str] | None = None, steps: int | None = None, seed: int = 0,
    num_tasks: int | None = None, say: Callable[[str], None] | None = None, progress: bool | None = None,
) -> Report:
    """Trains the learners on one family's training tasks and reports on its held-out ones.

    ``family``: "radon", "sinusoid", "sine-or-line", "linear-gaussian", or a `Panel` (hierarchical regression on its features).
    ``learners``: names, by default those that suit the family. ``steps``: of training, instead of the recipe's. ``seed``: of
    everything. ``num_tasks``: held-out tasks of an endless family. ``say``: told what is going on, a line at a time.
    Raises ValueError with the nearest name for an unknown family or learner.
    """
    say = say or (lambda line: None)
    with torch.random.fork_rng():  # networks draw their first weights from torch's global stream
        torch.manual_seed(seed)
        recipe = panel_recipe(family) if isinstance(family, Panel) else RECIPES[checked_choice("family", family, FAMILIES)](seed)
    names = [checked_choice("learners", name, tuple(recipe.learners)) for name in (learners or recipe.default)]
    if num_tasks is not None:
        checked_steps("num_tasks", num_tasks, least=1)
    trained: dict[str, AbstractAdapter] = {}
    histories: dict[str, History] = {}
    for name in dict.fromkeys(name for name in names if name != "NUTS"):  # NUTS comes later: it takes another learner's θ
        learner = recipe.learners[name](copy.deepcopy(recipe.model))
        assert isinstance(learner, AbstractMetaLearner)
        start = time.monotonic()
        histories[name] = meta_train(
            learner, recipe.train, steps=recipe.steps if steps is None else steps, generator=torch.Generator().manual_seed(seed),
            optimizer=lambda params: torch.optim.Adam(params, recipe.learning_rate), clip=10.0, progress=progress,
        )  # fmt: skip
        say(f"trained {name}: {histories[name].steps} steps in {time.monotonic() - start:.1f} s, loss {histories[name].loss[-1]:.4g}"
            if histories[name].loss else f"{name}: untrained")  # fmt: skip
        trained[name] = learner
    notes = list(recipe.notes)
    if "NUTS" in names:
        source = next((name for name in ("Exact", "ABML", "MAML") if name in trained), None)
        model = trained[source].model if source else recipe.model
        trained["NUTS"] = recipe.learners["NUTS"](model)
        notes.append(f"NUTS learns no θ: it uses the one that {f'{source} learned' if source else 'it starts with'}.")
    say(f"evaluating on {_how_many(recipe.test, num_tasks)} held-out tasks")
    return evaluate(
        {name: trained[name] for name in recipe.learners if name in trained}, recipe.test, num_tasks=num_tasks, seed=seed,
        title=recipe.title, notes=tuple(notes), histories={name: h for name, h in histories.items() if h.loss},
    )  # fmt: skip


def hierarchical_regression(mean: Tensor, sd: Tensor, noise: float) -> Callable[[Points], None]:
    """The program y = level_i + Σ_f slope_if x_f + noise, level and slopes Normal over tasks; ``mean``, ``sd`` ``(1 + F,)`` at the start.

    With the floor of measurement as its one feature this is the radon model of Gelman & Hill (2007), chapter 13.
    """

    def program(points: Points) -> None:
        centre = pyro.param("mean", mean)
        spread = pyro.param("sd", sd, constraint=dist.constraints.positive)
        residual = pyro.param("noise", torch.as_tensor(noise), constraint=dist.constraints.positive)
        with pyro.plate("tasks", points.num_tasks):
            level = pyro.sample("level", dist.Normal(centre[0], spread[0]))
            slopes = [pyro.sample(f"slope{f}", dist.Normal(centre[f], spread[f])) for f in range(1, len(mean))]
            y_hat = level[..., None]
            for f, slope in enumerate(slopes):
                y_hat = y_hat + slope[..., None] * points.x[..., f]
            y_hat = y_hat.expand(level.shape + points.mask.shape[1:])
            pyro.sample("y", dist.Normal(y_hat, residual).mask(points.mask).to_event(1), obs=points.y)

    return program


def panel_recipe(panel: Panel, title: str | None = None) -> Recipe:
    """Hierarchical regression on a panel's features, started from the training rows' mean and sd."""
    train, test = panel.split("train"), panel.split("test")
    everything = train.episodes(generator=torch.Generator().manual_seed(0)).union()
    y = everything.y[everything.mask]  # type: ignore[index]
    if not float(y.std()) > 0:
        raise ValueError(f"{panel.target_name}: every training row has the value {float(y[0]):g}: there is nothing to learn")
    size = everything.x.shape[-1] + 1
    mean, sd = torch.zeros(size), torch.full((size,), 0.5 * float(y.std()))
    mean[0] = y.mean()
    model = HierarchicalModel(hierarchical_regression(mean, sd, float(y.std())), example=everything)
    notes = [f"{train.num_tasks} groups to train on, {test.num_tasks} held out, of {panel.num_tasks}."]
    if test.num_short:
        notes.append(f"{test.num_short} held-out groups are too short for the full support set and get a smaller one; none is left out.")
    return Recipe(
        title=title or f"{panel.target_name} by {panel.group_label}", train=train, test=test, model=model,
        learners=_regression_learners(), default=tuple(_regression_learners()), steps=1000, learning_rate=0.02, notes=tuple(notes),
    )  # fmt: skip


def _radon(seed: int = 0) -> Recipe:
    # half of the counties held out, for narrow intervals; half of each county's homes seen, so that support sizes differ
    return panel_recipe(Panel.radon(fractions=(0.5, 0.0, 0.5), num_support=0.5, seed=seed), "Radon in Minnesota homes, by county")


def _linear_gaussian(seed: int = 0) -> Recipe:
    mean, cov = torch.tensor([1.0, -0.5]), torch.diag(torch.tensor([1.0, 0.25]))
    family = LinearGaussian(weight_mean=mean, weight_cov=cov, noise=0.5, num_support=(0, 8))
    model = HierarchicalModel(hierarchical_regression_without_level(2), example=family.sample(1, generator=_seeded()).query)
    return Recipe(
        title="Linear-Gaussian tasks", train=family, test=family, model=model, learners=_regression_learners(),
        default=tuple(_regression_learners()), steps=1000, learning_rate=0.02,
    )  # fmt: skip


def hierarchical_regression_without_level(num_features: int) -> Callable[[Points], None]:
    """The program y = wᵢ · x + noise with w Normal over tasks: the linear-Gaussian family's own, its θ to be learned."""

    def program(points: Points) -> None:
        mean = pyro.param("mean", torch.zeros(num_features))
        sd = pyro.param("sd", torch.ones(num_features), constraint=dist.constraints.positive)
        noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.Normal(mean, sd).to_event(1))
            y_hat = (w[..., None, :] * points.x).sum(-1)
            pyro.sample("y", dist.Normal(y_hat, noise).mask(points.mask).to_event(1), obs=points.y)

    return program


def _sinusoid(seed: int = 0) -> Recipe:
    return _network_recipe("Sinusoids", Sinusoid.maml(), (1, 40, 40, 1))


def _sine_or_line(seed: int = 0) -> Recipe:
    return _network_recipe("Sine or line", SineOrLine(), (1, 100, 100, 100, 1))


def _network_recipe(title: str, family: TaskFamily, sizes: tuple[int, ...]) -> Recipe:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = HierarchicalModel.from_network(WeightNetwork(nn.Sequential(*layers[:-1])), Gaussian())
    learners: dict[str, Make] = {
        "NoPooling": lambda model: NoPooling(model),
        "CompletePooling": lambda model: CompletePooling(model),
        "MAML": lambda model: MAML(model, inner_steps=1, inner_lr=0.01, adapt_steps=5),
        "ABML": lambda model: ABML(model, inner_steps=5, inner_lr=0.01, num_draws=2),
        "NUTS": lambda model: NUTS(model, num_draws=50, warmup=50, chains=1),
    }
    return Recipe(
        title=title, train=family, test=family, model=model, learners=learners, default=("NoPooling", "CompletePooling", "MAML", "ABML"),
        steps=3000, learning_rate=1e-3,
    )  # fmt: skip


def _regression_learners() -> dict[str, Make]:
    return {
        "NoPooling": lambda model: NoPooling(model),
        "CompletePooling": lambda model: CompletePooling(model),
        "MAML": lambda model: MAML(model, inner_steps=5, inner_lr=0.1),
        "ABML": lambda model: ABML(model, inner_steps=10, inner_lr=0.1),
        "NUTS": lambda model: NUTS(model),
        "Exact": lambda model: Exact(model),
    }


RECIPES: dict[str, Callable[[int], Recipe]] = {
    "radon": _radon, "sinusoid": _sinusoid, "sine-or-line": _sine_or_line, "linear-gaussian": _linear_gaussian,
}  # fmt: skip


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _how_many(family: Any, num_tasks: int | None) -> int:
    total = getattr(family, "num_tasks", None)
    return min(num_tasks or DEFAULT_TASKS, total or num_tasks or DEFAULT_TASKS)


def is_csv(name: str) -> bool:
    """Whether a family's name is meant as a file."""
    return name.endswith(".csv") or os.sep in name
