"""The package's own steps, as `bayesmeta.meta_train` takes them: eager, and compiled."""

from collections.abc import Callable

import torch

import bayesmeta as bm
from bayesmeta.adam import AdamStep
from bayesmeta.distributed import Ranks
from bayesmeta.meta_gradient import MetaGradient
from bayesmeta.networks import NormalPrior, WeightNetwork
from bayesmeta.recipes import hierarchical_regression
from bayesmeta.training_run import TrainingRun

from . import workloads
from .workloads import Contender, Workload


def learner(w: Workload) -> bm.learners.AbstractMetaLearner:
    """The workload's learner, its parameters made."""
    torch.manual_seed(0)
    made = _learner(w).to(w.device)
    made.materialise(workloads.episode(w))
    return made


def _learner(w: Workload) -> bm.learners.AbstractMetaLearner:
    if w.kind in ("radon", "elbo"):
        model = bm.HierarchicalModel(hierarchical_regression(torch.tensor([1.0, -0.5]), torch.ones(2), 1.0))
        if w.kind == "elbo":
            return bm.learners.BayesianBlackBox(model, objective="elbo", subsets=False)
        return bm.learners.MAML(model, inner_steps=w.steps, inner_lr=w.inner_lr)
    if w.kind == "omniglot":
        model = bm.HierarchicalModel.from_network(WeightNetwork(workloads.convolutions(), batch_norm="task"), bm.likelihoods.Categorical(5))
        return bm.learners.MAML(model, inner_steps=w.steps, inner_lr=w.inner_lr)
    network, likelihood = WeightNetwork(workloads.mlp()), bm.likelihoods.Gaussian(workloads.NOISE, learn=False)
    if w.kind == "sinusoid":
        return bm.learners.MAML(bm.HierarchicalModel.from_network(network, likelihood), inner_steps=w.steps, inner_lr=w.inner_lr)
    model = bm.HierarchicalModel.from_network(network, likelihood, NormalPrior.of(network, workloads.PRIOR_SCALE))
    if w.kind == "abml":
        return bm.learners.ABML(model, inner_steps=w.steps, inner_lr=w.inner_lr, num_draws=workloads.DRAWS)
    return bm.learners.BMAML(
        model, num_particles=w.particles, inner_steps=w.steps, inner_lr=w.inner_lr, objective="predictive"
    )


def eager(w: Workload) -> Contender:
    return _contender(w, False)


def compiled(w: Workload) -> Contender:
    return _contender(w, True)


def bfloat16(w: Workload) -> Contender | None:
    """Compiled, convolutions in bfloat16, on a GPU; None for a workload without any."""
    return _contender(w, True, torch.bfloat16) if w.kind == "omniglot" and w.device == "cuda" else None


def _contender(w: Workload, mode: bool, autocast: torch.dtype | None = None) -> Contender:
    run, step = training(w, mode, autocast)
    contender = Contender.of(step)
    assert not mode or run.gradient.compiler.why_eager is None, run.gradient.compiler.why_eager
    return contender


def training(
    w: Workload, mode: bool, autocast: torch.dtype | None = None, *, with_adam: bool = True
) -> tuple[TrainingRun, Callable[[], float]]:
    """The state of a run as `meta_train` has it, and its step. ``with_adam``: whether a compiled graph may hold the optimiser's step."""
    made, episode, generator = learner(w), workloads.episode(w), torch.Generator().manual_seed(0)
    parameters = made.trained_parameters()
    optimiser = torch.optim.Adam(parameters, workloads.ADAM, fused=True)
    adam = AdamStep.of(optimiser, parameters, None) if with_adam else None
    # convolutions one task at a time: what belongs to a task then stays in the processor's cache
    one_by_one = w.kind == "omniglot" and episode.support.x.device.type == "cpu"
    chunk = (w.task_chunk or (1 if one_by_one else None)) if mode else None
    gradient = MetaGradient(made, parameters, 1, generator, compile=mode, adam=adam, autocast=autocast, task_chunk=chunk)
    run = TrainingRun(made, parameters, optimiser, None, generator, gradient, Ranks())

    return run, lambda: run.step(episode, None, 1)
