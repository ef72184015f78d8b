"""Ready-made comparisons: where tasks come from, the model, and how each learner is made, one recipe a family."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .episodes import Points
from .image_networks import convolutional
from .learners import (
    ABML,
    BMAML,
    LLAMA,
    MAML,
    NUTS,
    PLATIPUS,
    BayesianBlackBox,
    BlackBox,
    CompletePooling,
    Ensemble,
    Exact,
    MatchingNet,
    NoPooling,
    ProtoNet,
    Reptile,
)
from .learners.base import AbstractAdapter
from .likelihoods import Bernoulli, Categorical, Gaussian
from .model import HierarchicalModel
from .networks import DecoderNetwork, HeadNetwork, NormalPrior, PrototypeNetwork, WeightNetwork
from .tasks import Circles, GaussianProcess, Glyphs, LinearGaussian, Omniglot, Panel, SineOrLine, Sinusoid, TaskFamily

Make = Callable[[HierarchicalModel], AbstractAdapter]
SIX = ("NoPooling", "CompletePooling", "MAML", "ABML", "NUTS", "Exact")
FOUR = ("NoPooling", "CompletePooling", "MAML", "ABML")
WAYS, QUERIES, TASKS = 5, 5, 8  # of images: classes, queries of each class, and tasks a step


@dataclass(frozen=True)
class Recipe:
    """One comparison: where tasks come from, the model, and how each learner is made and trained.

    ``learners``: name to constructor, in the order of the report; ``default``: which of them run unasked. ``steps``,
    ``learning_rate``: of Adam, the same for all; ``tasks_per_step``: as for `meta_train`. ``task_chunk``: how many held-out tasks
    are adapted to at once, None for all. ``compile``: as for `meta_train`.
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
    tasks_per_step: int | None = None
    task_chunk: int | None = None
    compile: bool | str = "auto"


# --- hierarchical regression: small programs, where the exact posterior is at hand


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
    if idle := panel.num_tasks - train.num_tasks - test.num_tasks:
        notes.append(f"{idle} groups, a validation split, are neither trained on nor held out.")
    if test.num_short:
        notes.append(f"{test.num_short} held-out groups are too short for the full support set and get a smaller one; none is left out.")
    return Recipe(
        title=title or f"{panel.target_name} by {panel.group_label}", train=train, test=test, model=model,
        learners=_regression_learners(), default=SIX, steps=1000, learning_rate=0.02, notes=tuple(notes),
    )  # fmt: skip


def _radon(seed: int = 0) -> Recipe:
    # half of the counties held out, for narrow intervals; half of each county's homes seen, so that support sizes differ
    return panel_recipe(Panel.radon(fractions=(0.5, 0.0, 0.5), num_support=0.5, seed=seed), "Radon in Minnesota homes, by county")


def _linear_gaussian(seed: int = 0) -> Recipe:
    mean, cov = torch.tensor([1.0, -0.5]), torch.diag(torch.tensor([1.0, 0.25]))
    family = LinearGaussian(weight_mean=mean, weight_cov=cov, noise=0.5, num_support=(0, 8))
    example = family.sample(1, generator=torch.Generator().manual_seed(0)).query
    model = HierarchicalModel(hierarchical_regression_without_level(2), example=example)
    return Recipe(
        title="Linear-Gaussian tasks", train=family, test=family, model=model, learners=_regression_learners(), default=SIX,
        steps=1000, learning_rate=0.02,
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


def _regression_learners() -> dict[str, Make]:
    return {
        "NoPooling": lambda model: NoPooling(model),
        "CompletePooling": lambda model: CompletePooling(model),
        "MAML": lambda model: MAML(model, inner_steps=5, inner_lr=0.1),
        "Reptile": lambda model: Reptile(model, inner_steps=5, inner_lr=0.1),
        "BlackBox": lambda model: BlackBox(model),
        "Ensemble": lambda model: Ensemble(model, lambda one: MAML(one, inner_steps=5, inner_lr=0.1), size=5),
        "LLAMA": lambda model: LLAMA(model, inner_steps=10, inner_lr=0.1, objective="evidence"),
        "ABML": lambda model: ABML(model, inner_steps=10, inner_lr=0.1),
        "BMAML": lambda model: BMAML(model, inner_steps=10, inner_lr=0.01, objective="predictive"),
        "PLATIPUS": lambda model: PLATIPUS(model, inner_steps=5, inner_lr=0.1, num_particles=50),
        "BayesianBlackBox": lambda model: BayesianBlackBox(model, posterior="full"),
        "NUTS": lambda model: NUTS(model),
        "Exact": lambda model: Exact(model),
    }


# --- networks


def _sinusoid(seed: int = 0) -> Recipe:
    return _network_recipe("Sinusoids", Sinusoid.maml(), default=FOUR, steps=3000)


def _sine_or_line(seed: int = 0) -> Recipe:
    # PLATIPUS' family with 2 to 5 shots instead of 5, so that a quarter of the tasks leave open what they are
    return _network_recipe("Sine or line", SineOrLine(num_support=(2, 5)), steps=20_000)


def _circles(seed: int = 0) -> Recipe:
    family = Circles(num_positive=(1, 3), balanced_query=True)
    # a support set of one class is no sample of the task's points, as "elbo" takes it to be
    return _network_recipe("Circles", family, inputs=2, likelihood=Bernoulli, steps=10_000, amortised="predictive")


def _gaussian_process(kernel: str) -> Callable[[int], Recipe]:
    def recipe(seed: int = 0) -> Recipe:
        # noise of 0.02: a step may be far shorter than elsewhere, since it grows by 1 / noise²
        title = f"Gaussian process, {kernel} kernel"
        return _network_recipe(title, GaussianProcess(kernel=kernel), steps=10_000, inner_lr=0.003, stein_lr=0.001)

    return recipe


def multilayer(*sizes: int) -> nn.Sequential:
    """A fully connected network with ReLU between its layers."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _network_recipe(
    title: str, family: TaskFamily, *, inputs: int = 1, likelihood: type[nn.Module] = Gaussian, steps: int,
    default: tuple[str, ...] | None = None, amortised: str = "elbo", inner_lr: float = 0.01, stein_lr: float = 0.01,
) -> Recipe:  # fmt: skip
    """All weights of a network of two layers of 40 as φ; a latent code in a decoder of that size for what amortises."""
    network, code = WeightNetwork(multilayer(inputs, 40, 40, 1)), 16
    model = HierarchicalModel.from_network(network, likelihood(), NormalPrior.of(network, 0.1))

    def wide() -> HierarchicalModel:
        """The same model, its prior started wider: Stein steps of 0.01 along summed log joints bear no narrower one."""
        return HierarchicalModel.from_network(network, likelihood(), NormalPrior.of(network, 0.3))

    decoder = HierarchicalModel.from_network(DecoderNetwork(multilayer(inputs + code, 40, 40, 1), code), likelihood())
    learners: dict[str, Make] = {
        "NoPooling": lambda model: NoPooling(model, inner_steps=20, inner_lr=0.02),
        "CompletePooling": lambda model: CompletePooling(model),
        "MAML": lambda model: MAML(model, inner_steps=5, inner_lr=inner_lr),
        "Reptile": lambda model: Reptile(model, inner_steps=5, inner_lr=inner_lr / 10),
        "BlackBox": lambda model: BlackBox(copy.deepcopy(decoder)),
        "Ensemble": lambda model: Ensemble(model, lambda one: MAML(one, inner_steps=5, inner_lr=inner_lr), size=5),
        "LLAMA": lambda model: LLAMA(model, inner_steps=5, inner_lr=inner_lr, curvature="last_layer", hessian="gauss_newton"),
        "ABML": lambda model: ABML(model, inner_steps=5, inner_lr=0.1, num_draws=2, step_units="prior"),
        "BMAML": lambda model: BMAML(wide(), num_particles=5, inner_steps=5, inner_lr=stein_lr, objective="predictive", start_scale=0.5),
        "PLATIPUS": lambda model: PLATIPUS(model, inner_steps=5, inner_lr=inner_lr),
        "BayesianBlackBox": lambda model: BayesianBlackBox(copy.deepcopy(decoder), objective=amortised),
        "NUTS": lambda model: NUTS(model, num_draws=50, warmup=50, chains=1),
    }
    return Recipe(
        title=title, train=family, test=family, model=model, learners=learners,
        default=default or tuple(name for name in learners if name not in ("NoPooling", "NUTS")), steps=steps, learning_rate=1e-3,
    )  # fmt: skip


# --- images


def _glyphs(seed: int = 0) -> Recipe:
    return image_recipe("Glyphs, 5-way 1-shot", Glyphs(ways=WAYS, shots=1, test_shots=QUERIES, seed=seed))


def _omniglot(seed: int = 0, root: str | os.PathLike[str] | None = None) -> Recipe:
    family = Omniglot(root, rotations=True, ways=WAYS, shots=1, test_shots=QUERIES, seed=seed)
    return image_recipe("Omniglot (Lake's split), 5-way 1-shot", family)


def image_recipe(title: str, family: Glyphs | Omniglot, *, filters: int = 32, blocks: int = 4, steps: int = 300) -> Recipe:
    """Few-shot classification with one embedding for all: four blocks of convolutions, whose weights start the same in every learner.

    φ is all weights for MAML, its first-order form, Reptile and the ensemble; class means for ProtoNet; the last layer, on features
    that are θ's, for all others. Batch norm is by the set at hand, so all are transductive.
    """
    shape, ways = family.image_shape, family.ways
    features, likelihood = convolutional(shape, filters=filters, blocks=blocks), Categorical(ways)
    whole = nn.Sequential(*features, nn.Linear(filters, ways))
    all_weights = WeightNetwork(whole, batch_norm="task")
    model = HierarchicalModel.from_network(all_weights, likelihood)
    prototypes = HierarchicalModel.from_network(PrototypeNetwork(features, filters, ways, batch_norm="task"), likelihood)
    network = HeadNetwork(features, filters, ways, batch_norm="task")
    head = HierarchicalModel.from_network(network, likelihood)
    # what q may reach is a few prior sds: as wide as weights have to be to tell classes apart
    wide = HierarchicalModel.from_network(network, likelihood, NormalPrior.of(network, 1.0))
    # ABML pays for what its noise does to the logits: features without what they have in common, all of one length
    centring = nn.LayerNorm(filters, elementwise_affine=False)
    centred = HeadNetwork(nn.Sequential(*features, centring), filters, ways, batch_norm="task")
    even = HierarchicalModel.from_network(centred, likelihood, NormalPrior.of(centred, 0.2))

    def last(make: Make, on: HierarchicalModel = head) -> Make:
        return lambda model: make(copy.deepcopy(on))

    learners: dict[str, Make] = {
        "ProtoNet": last(ProtoNet, prototypes),
        "MatchingNet": last(lambda model: MatchingNet(model, temperature=0.1, learn_temperature=True), prototypes),
        "MAML": lambda model: MAML(model, inner_steps=1, inner_lr=0.4, adapt_steps=3),
        "FOMAML": lambda model: MAML(model, inner_steps=1, inner_lr=0.4, adapt_steps=3, first_order=True),
        "Reptile": lambda model: Reptile(model, inner_steps=5, inner_lr=0.1),
        "ANIL": last(lambda model: MAML(model, inner_steps=5, inner_lr=0.4)),
        "BlackBox": last(lambda model: BlackBox(model, encoder="per_class"), wide),
        "Ensemble": lambda model: Ensemble(model, lambda one: MAML(one, inner_steps=1, inner_lr=0.4, adapt_steps=3), size=3),
        "LLAMA": last(lambda model: LLAMA(model, inner_steps=5, inner_lr=0.4, curvature="last_layer", hessian="gauss_newton")),
        "ABML": last(lambda model: ABML(model, inner_steps=5, inner_lr=5.0, kl_weight=0.1, step_units="prior"), even),
        "BMAML": last(lambda model: BMAML(model, num_particles=5, inner_steps=5, inner_lr=0.3, objective="predictive"), wide),
        "PLATIPUS": last(lambda model: PLATIPUS(model, inner_steps=5, inner_lr=0.4)),
        "BayesianBlackBox": last(lambda model: BayesianBlackBox(model, encoder="per_class", objective="predictive"), wide),  # VERSA
    }
    default = tuple(learners)
    # the same with all weights as φ. Particles start near each other, under a prior that bears steps of their size; ABML's noise is in all
    # weights, and how much of it the embedding bears is little
    open_prior = HierarchicalModel.from_network(all_weights, likelihood, NormalPrior.of(all_weights, 1.0))
    noisy = WeightNetwork(nn.Sequential(*features, centring, nn.Linear(filters, ways)), batch_norm="task")
    scale = 0.3 * noisy.initial_scale()
    scale[-ways * (filters + 1) :] = 0.3
    narrow = HierarchicalModel.from_network(noisy, likelihood, NormalPrior.of(noisy, scale))
    learners |= {
        "LLAMA-all": lambda model: LLAMA(
            model, inner_steps=1, inner_lr=0.4, adapt_steps=3, curvature="diagonal", hessian="sampled", eta=0.0
        ),
        "ABML-all": last(lambda model: ABML(model, inner_steps=3, inner_lr=5.0, kl_weight=0.1, num_draws=3, step_units="prior"), narrow),
        "BMAML-all": last(lambda model: BMAML(
            model, num_particles=3, inner_steps=1, inner_lr=0.15, adapt_steps=3, objective="predictive", start_scale=0.02
        ), open_prior),
    }  # fmt: skip
    notes = (
        f"The embedding is small and training short, for CPUs: {blocks} blocks of {filters} filters and {TASKS} tasks a step, "
        "where the papers have 4 of 64 and 60,000 steps of 32. All learners take the same number of steps.",
    )
    return Recipe(
        title=title, train=family.split("train"), test=family.split("test"), model=model, learners=learners, default=default,
        steps=steps, learning_rate=2e-3, notes=notes, tasks_per_step=TASKS, task_chunk=50,
        compile=False,  # convolutions go through tasks one by one: large graphs, compiled in minutes
    )  # fmt: skip


RECIPES: dict[str, Callable[..., Recipe]] = {
    "radon": _radon, "sinusoid": _sinusoid, "sine-or-line": _sine_or_line, "circles": _circles, "linear-gaussian": _linear_gaussian,
    "gp-rbf": _gaussian_process("rbf"), "gp-matern": _gaussian_process("matern52"), "gp-periodic": _gaussian_process("periodic"),
    "glyphs": _glyphs, "omniglot": _omniglot,
}  # fmt: skip
FAMILIES = tuple(RECIPES)
