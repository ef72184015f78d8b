"""The twin in plain torch and the library are one maths: same φ, same loss, same gradients, for every learner the twin has."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bayesmeta import Episode, HierarchicalModel, Points, Predictive
from bayesmeta.learners.abml import ABML
from bayesmeta.learners.bayesian_black_box import BayesianBlackBox
from bayesmeta.learners.bmaml import BMAML
from bayesmeta.learners.complete_pooling import CompletePooling
from bayesmeta.learners.exact import Exact
from bayesmeta.learners.layers import positive
from bayesmeta.learners.llama import LLAMA
from bayesmeta.learners.maml import MAML
from bayesmeta.learners.no_pooling import NoPooling
from bayesmeta.learners.objectives import mean_nll
from bayesmeta.learners.platipus import PLATIPUS
from bayesmeta.learners.reptile import Reptile
from bayesmeta.metrics.regression import interval_coverage
from bayesmeta.randomness import rng

from .conftest import episode, radon_program

PATH = Path(__file__).parents[1] / "examples" / "minibayesmeta.py"
SEED = 7


def load():
    spec = importlib.util.spec_from_file_location("minibayesmeta", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mini(float64):
    return load()


@pytest.fixture(params=["every task has support points", "one has none"])
def e(request, float64):
    """Support and query sets of four tasks, all of unequal size."""
    return episode() if request.param.startswith("every") else episode((3, 0, 1, 8))


@pytest.fixture
def model(e):
    """`radon_program` away from its round starting values."""
    model = HierarchicalModel(radon_program, example=e)
    with torch.no_grad():
        model.params["mean"].copy_(torch.tensor([0.7, -0.4]))
        model.params["sd"].copy_(torch.tensor([-0.3, 0.2]))
        model.params["noise"].copy_(torch.tensor(-0.25))
    return model


def theta_of(mini, model):
    """The twin's θ, leaves of its own at the values of the library's."""
    return mini.Theta(*(model.params[name].detach().clone().requires_grad_() for name in ("mean", "sd", "noise")))


def tasks(data):
    """What the twin sees: each task's unpadded ``(x, y)``, or pairs of them for an episode."""
    if isinstance(data, Episode):
        return list(zip(tasks(data.support), tasks(data.query), strict=True))
    return [(x[real, 0], y[real]) for x, y, real in zip(data.x, data.y, data.mask, strict=True)]


def seeded():
    return torch.Generator().manual_seed(SEED)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def gradients(losses, leaves):
    """Of a sum that weighs every task differently."""
    weighed = (losses * torch.linspace(1.0, 2.0, len(losses))).sum()
    grads = torch.autograd.grad(weighed, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def same_loss(learner, e, theta, losses, *pairs):
    """Values, and gradients in θ and in every pair (the library's parameter, the twin's leaf)."""
    wanted, got = learner.meta_loss(e, generator=seeded()), torch.stack(losses)
    close(got, wanted.detach())
    params = learner.model.params
    ours = [params["mean"], params["sd"], params["noise"], *(a for a, _ in pairs)]
    for twin, own in zip(gradients(got, [*theta, *(b for _, b in pairs)]), gradients(wanted, ours), strict=True):
        close(twin, own)


def leaf(value):
    return value.detach().clone().requires_grad_()


def test_the_model(mini, model, e):
    theta, phi = theta_of(mini, model), torch.randn(3, 4, 2)
    for i, task in enumerate(tasks(e.support)):
        close(mini.log_likelihood(theta, phi[:, i], task), model.log_likelihood(phi, e.support)[:, i])
        close(mini.log_prior(theta, phi[:, i]), model.log_prior(phi, e.support)[:, i])
        close(mini.log_joint(theta, phi[:, i], task), model.log_joint(phi, e.support)[:, i])
        close(mini.mean_nll(theta, phi[:, i], task), mean_nll(model, phi, e.support)[:, i])


def test_exact(mini, model, e):
    learner, theta = Exact(model), theta_of(mini, model)
    q = learner.adapt(e.support).distribution
    for i, support in enumerate(tasks(e.support)):
        mean, covariance = mini.exact_adapt(theta, support)
        close(mean, q.mean[i])
        close(covariance, q.covariance_matrix[i])
    same_loss(learner, e, theta, [mini.exact_loss(theta, *task) for task in tasks(e)])


def test_complete_pooling(mini, model, e):
    learner, theta = CompletePooling(model), theta_of(mini, model)
    learner.materialise(e)
    centre = leaf(learner.centre.value)
    losses = [mini.complete_pooling_loss(theta, centre, *task) for task in tasks(e)]
    same_loss(learner, e, theta, losses, (learner.centre.value, centre))


def test_no_pooling(mini, model, e):
    learner, theta = NoPooling(model), theta_of(mini, model)
    learner.materialise(e)
    with torch.no_grad():
        learner.centre.value.copy_(torch.tensor([0.2, 0.9]))
    centre, phi = leaf(learner.centre.value), learner.adapt(e.support).mean
    for i, support in enumerate(tasks(e.support)):
        close(mini.no_pooling_adapt(centre, support).detach(), phi[i])
    same_loss(learner, e, theta, [mini.no_pooling_loss(theta, centre, *task) for task in tasks(e)])
    # φ_c has its own loss in the twin, complete pooling's; the library adds that one's gradient
    pooled = torch.stack([mini.complete_pooling_loss(theta, centre, *task) for task in tasks(e)])
    close(gradients(pooled, [centre]), gradients(learner.meta_loss(e), [learner.centre.value]))


@pytest.mark.parametrize("first_order", [False, True])
def test_maml(mini, model, e, first_order):
    learner, theta = MAML(model, inner_steps=3, inner_lr=0.1, first_order=first_order), theta_of(mini, model)
    phi = learner.adapt(e.support).mean
    for i, support in enumerate(tasks(e.support)):
        close(mini.maml_adapt(theta, support, 3, 0.1, first_order).detach(), phi[i])
    same_loss(learner, e, theta, [mini.maml_loss(theta, *task, 3, 0.1, first_order) for task in tasks(e)])


def test_reptile(mini, model, e):
    learner, theta = Reptile(model, inner_steps=4, inner_lr=0.1), theta_of(mini, model)
    phi = learner.adapt(e.support).mean
    for i, support in enumerate(tasks(e.support)):
        close(mini.maml_adapt(theta, support, 4, 0.1).detach(), phi[i])
    same_loss(learner, e, theta, [mini.reptile_loss(theta, *task, 4, 0.1) for task in tasks(e)])


def test_llama(mini, model, e):
    learner, theta = LLAMA(model, objective="evidence", inner_steps=3, inner_lr=0.05), theta_of(mini, model)
    q = learner.adapt(e.support).distribution
    for i, support in enumerate(tasks(e.support)):
        mean, covariance = mini.llama_adapt(theta, support, 3, 0.05)
        close(mean.detach(), q.mean[i])
        close(covariance.detach(), q.covariance_matrix[i])
    same_loss(learner, e, theta, [mini.llama_loss(theta, *task, 3, 0.05) for task in tasks(e)])


@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("kind", ["whitened", "iid"])
def test_abml(mini, model, e, kind, alpha):
    """iid: the draws that the library makes; whitened: four draws of the twin's own, since both are exact for a quadratic.

    With the larger steps a sd goes past 0.
    """
    learner = ABML(model, inner_steps=3, inner_lr=alpha, kl_weight=0.7, num_draws=5, noise=kind)
    theta = theta_of(mini, model)
    with rng(seeded()):
        noise = [torch.randn(5, 1, 2)[:, 0] for _ in range(3)]
        outer = torch.stack([torch.randn(4), torch.randn(4)], -1)  # site by site, as Pyro draws
    noise = noise if kind == "iid" else [mini.WHITE] * 3
    q = learner.adapt(e.support, generator=seeded()).distribution
    for i, support in enumerate(tasks(e.support)):
        mean, sd = mini.abml_adapt(theta, support, noise, alpha, 0.7)
        close(mean.detach(), q.mean[i])
        close(sd.detach(), q.stddev[i])
    # the library's kl_weight is of the inner steps alone
    losses = [mini.abml_loss(theta, *task, noise, outer[i, None], alpha, 0.7) for i, task in enumerate(tasks(e))]
    same_loss(learner, e, theta, losses)


def test_the_white_draws_are_white(mini):
    close(mini.WHITE.mean(0), torch.zeros(2))
    close(mini.WHITE.mT @ mini.WHITE / len(mini.WHITE), torch.eye(2))


def test_bayesian_black_box(mini, model, e):
    """The library's own encoder, shown one task at a time; its floor under q's sd lowered till it is lost in rounding."""
    learner = BayesianBlackBox(model, hidden=8, kl_weight=0.7, num_draws=2, min_scale=1e-12, subsets=False)
    learner.materialise(e)
    parameters = [p for name, p in learner.named_parameters() if not name.startswith("model.")]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))
    theta = theta_of(mini, model)

    def encoder(x, y):
        points = Points.of(x[None, :, None], y[None])
        f = learner.encoder.points(points)
        encoding = learner.encoder.encode(points, f)
        b, t = learner.factors(f, encoding, points.mask)
        return b[0], t[0, :, 0], positive(bool(len(x)) * learner.head(encoding), 0.0)[0]

    q = learner.adapt(e.support).distribution
    for i, support in enumerate(tasks(e.support)):
        mean, sd = mini.black_box_adapt(theta, encoder, support)
        close(mean.detach(), q.mean[i])
        close(sd.detach(), q.stddev[i])
    with rng(seeded()):
        noise = torch.stack([torch.stack([torch.randn(4), torch.randn(4)], -1) for _ in range(2)])
    losses = [mini.black_box_loss(theta, encoder, mini.union(*task), noise[:, i], 0.7) for i, task in enumerate(tasks(e))]
    same_loss(learner, e, theta, losses, *((p, p) for p in parameters))


@pytest.mark.parametrize("num_particles", [2, 5])
def test_bmaml(mini, model, e, num_particles):
    """Of 5 particles the 10 pairs are even in number: the median is the lower one of two."""
    settings = {"num_particles": num_particles, "inner_steps": 3, "inner_lr": 0.05, "leader_steps": 2}
    learners = {objective: BMAML(model, objective=objective, **settings) for objective in ("predictive", "chaser")}
    for objective, learner in learners.items():
        learner.materialise(e)
        theta, starts = theta_of(mini, model), leaf(learner.starts.value)
        phi = learner.adapt(e.support).draws()
        for i, support in enumerate(tasks(e.support)):
            close(mini.bmaml_adapt(theta, starts, support, 3, 0.05).detach(), phi[:, i])
        loss, more = (mini.bmaml_loss, ()) if objective == "predictive" else (mini.bmaml_chaser_loss, (2,))
        losses = [loss(theta, starts, *task, 3, 0.05, *more) for task in tasks(e)]
        same_loss(learner, e, theta, losses, (learner.starts.value, starts))


def test_platipus(mini, model, e):
    learner = PLATIPUS(model, inner_steps=2, inner_lr=0.1, num_draws=3, num_particles=6, kl_weight=0.7)
    learner.materialise(e)
    own = learner.log_v_q.value, learner.gamma_p.value, learner.gamma_q.value
    with torch.no_grad():
        for parameter in own:
            parameter.add_(0.1 * torch.rand(2))
    theta, twins = theta_of(mini, model), [leaf(parameter) for parameter in own]
    with rng(seeded()):
        noise = torch.randn(6, 1, 2)[:, 0]
    phi = learner.adapt(e.support, generator=seeded()).draws()
    for i, support in enumerate(tasks(e.support)):
        close(mini.platipus_adapt(theta, twins[1], support, noise, 2, 0.1).detach(), phi[:, i])
    with rng(seeded()):
        noise = torch.randn(3, 4, 2)
    losses = [mini.platipus_loss(theta, *twins, *task, noise[:, i], 2, 0.1, 0.7) for i, task in enumerate(tasks(e))]
    same_loss(learner, e, theta, losses, *zip(own, twins, strict=True))


def test_the_predictive_and_its_coverage(mini, model):
    e = episode((3, 3), (200, 200))
    theta, phi = theta_of(mini, model), torch.randn(5, 2, 2)
    predictive = Predictive(model.predict(phi, e.query.x))
    for level in (0.5, 0.9):
        coverage = interval_coverage(*predictive.interval(level), e.query.y, e.query.mask)
        for i, query in enumerate(tasks(e.query)):
            close(mini.covered(theta, phi[:, i], query, level).double().mean(), coverage[i].detach())
    for i, query in enumerate(tasks(e.query)):
        close(mini.log_predictive(theta, phi[:, i], query), predictive.log_prob(e.query.y)[i])


def test_it_is_short_and_plain_torch():
    text = PATH.read_text()
    assert len(text.splitlines()) <= 250
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names == {"math", "typing", "torch"}


def rows(table):
    """``{learner: (coverage at 3 points, NLL, coverage at 12, NLL, noise)}`` of the table that the script prints."""
    found = re.findall(r"^([A-Za-z ]+?) +(\d+)% +(-?[\d.]+) +(\d+)% +(-?[\d.]+) +([\d.]+)$", table, flags=re.M)
    return {name: tuple(float(v) for v in values) for name, *values in found}


LEARNERS = ["complete pooling", "no pooling", "MAML", "ABML", "exact"]


def test_main_prints_its_table(capsys):
    load().main(steps=1)
    assert list(rows(capsys.readouterr().out)) == LEARNERS


@pytest.mark.slow
def test_the_script_shows_who_is_overconfident():
    done = subprocess.run([sys.executable, str(PATH)], capture_output=True, text=True, check=True, timeout=300)
    table = rows(done.stdout)
    assert list(table) == LEARNERS
    few, nll = ({name: row[i] for name, row in table.items()} for i in (0, 1))
    assert few["no pooling"] < 75
    assert few["no pooling"] < few["MAML"] < few["exact"]
    assert 86 <= few["exact"] <= 94
    assert 86 <= table["exact"][2] <= 94
    assert min(nll, key=nll.get) == "exact"
    assert 0.45 < table["exact"][4] < 0.55  # the noise that the tasks were made with is 0.5
