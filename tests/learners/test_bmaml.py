"""BMAML: its fixed point, both objectives against plain loops, what trains what, and precisions that belong to a task."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bayesmeta import HierarchicalModel, meta_train
from bayesmeta.learners import MAML
from bayesmeta.learners.bmaml import BMAML
from bayesmeta.learners.stein import transport
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import HeadNetwork, NormalPrior

from ..conftest import episode, linear_program, radon_program, ragged
from .closed_forms import posterior

pytestmark = pytest.mark.usefixtures("float64")


def radon(**arguments):
    e = episode()
    return BMAML(HierarchicalModel(radon_program, example=e), **{"num_particles": 4, "inner_steps": 3, "inner_lr": 0.01, **arguments}), e


def starts(learner, data):
    learner.materialise(data)
    return learner.starts.value.detach()


def stein_loop(learner, start, points, steps, lr, h):
    """SVGD of one task with plain loops: ``start (M, D)``, the kernel's bandwidth fixed at h."""
    phi = start
    for _ in range(steps):
        leaf = phi.clone().requires_grad_()
        (score,) = torch.autograd.grad(learner.model.log_joint(leaf[:, None], points).sum(), leaf)
        new = []
        for a in phi:
            ks = [torch.exp(-((a - b) ** 2).sum() / h) for b in phi]
            new.append(a + lr / len(phi) * sum(k * s + k * 2 * (a - b) / h for k, b, s in zip(ks, phi, score, strict=True)))
        phi = torch.stack(new).detach()
    return phi


def finite_difference(value, parameter, index, step=1e-6):
    """dvalue/dparameter[index] by central differences."""
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[index] += sign * step
        ends.append(value())
        with torch.no_grad():
            parameter.view(-1)[index] -= sign * step
    return (ends[0] - ends[1]) / (2 * step)


def test_one_particle_is_gradient_ascent_on_the_log_joint():
    learner, e = radon(num_particles=1, inner_lr=0.02)
    phi = starts(learner, e)[0].expand(4, 2)
    for _ in range(3):
        leaf = phi.clone().requires_grad_()
        phi = phi + 0.02 * torch.autograd.grad(learner.model.log_joint(leaf, e.support).sum(), leaf)[0]
    torch.testing.assert_close(learner.adapt(e.support).draws()[0], phi, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dim", "least", "most"), [(1, 0.9, 1.1), (3, 0.80, 0.92)])
def test_thirty_particles_at_convergence(dim, least, most):
    points = ragged((6, 4), dim)
    model = HierarchicalModel(linear_program, example=points)
    values = BMAML(model, num_particles=30, inner_steps=1500, inner_lr=0.05).adapt(points).draws()
    further = transport(lambda phi: model.log_joint(phi, points), values, steps=1, step_size=0.05, keep_graph=False)
    assert (further - values).abs().max() < 1e-3
    for task in range(2):
        mean, precision = posterior(model, points, task)
        sd = torch.linalg.inv(precision.detach()).diagonal().sqrt()
        assert ((values[:, task].mean(0) - mean.detach()).abs() < 0.05 * sd).all()
        ratio = values[:, task].std(0) / sd
        assert (ratio > least).all()
        assert (ratio < most).all()


def test_a_batch_is_its_tasks_one_at_a_time():
    for objective in ("predictive", "chaser"):
        learner, e = radon(objective=objective)
        together = learner.adapt(e.support).draws(), learner.meta_loss(e)
        for task in range(4):
            one = e.select([task])
            torch.testing.assert_close(together[0][:, task], learner.adapt(one.support).draws()[:, 0], rtol=0, atol=1e-12)
            torch.testing.assert_close(together[1][task], learner.meta_loss(one)[0], rtol=0, atol=1e-12)


def test_adapting_is_the_loop():
    learner, e = radon(bandwidth=1.5, adapt_steps=4, inner_lr=0.02)
    values = learner.adapt(e.support).draws()
    for task in range(4):
        wanted = stein_loop(learner, learner.starts.value.detach(), e.support.select([task]), 4, 0.02, 1.5)
        torch.testing.assert_close(values[:, task], wanted, rtol=0, atol=1e-12)


def test_the_predictive_loss_is_the_mixtures():
    """log 1/M Σ_m p per point, by loops and math.log."""
    learner, e = radon(objective="predictive")
    phi, noise = learner.adapt(e.support).draws(), learner.model.params["noise"].exp().item()
    loss = learner.meta_loss(e)
    for task in range(4):
        total, count = 0.0, 0
        for x, y, real in zip(e.query.x[task, :, 0], e.query.y[task], e.query.mask[task], strict=True):
            if real:
                z = [(y - level - effect * x).item() / noise for level, effect in phi[:, task]]
                total += math.log(sum(math.exp(-0.5 * v * v) / (noise * math.sqrt(2 * math.pi)) for v in z) / 4)
                count += 1
        assert loss[task].item() == pytest.approx(-total / count, abs=1e-12)


def test_without_query_points_the_predictive_loss_is_zero():
    learner, _ = radon(objective="predictive")
    assert learner.meta_loss(episode((3, 2), (0, 2)))[0] == 0


def test_the_meta_gradient_of_the_predictive_loss():
    learner, e = radon(objective="predictive", bandwidth=0.8, inner_lr=0.03)
    learner.materialise(e)
    parameters = dict(learner.named_parameters())
    gradients = torch.autograd.grad(learner.meta_loss(e).sum(), list(parameters.values()))
    assert set(parameters) == {"starts.value", "model.params.mean", "model.params.sd", "model.params.noise"}
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        for i in range(parameter.numel()):
            slope = finite_difference(lambda: learner.meta_loss(e).sum().item(), parameter, i)
            assert gradient.view(-1)[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_the_chaser_loss_is_the_distance_to_the_leader():
    learner, e = radon(bandwidth=0.8, inner_lr=0.03, leader_steps=2, leader_lr=0.01)
    start, loss = starts(learner, e), learner.meta_loss(e)
    for task in range(4):
        one = e.select([task])
        follower = stein_loop(learner, start, one.support, 3, 0.03, 0.8)
        leader = stein_loop(learner, follower, one.union(), 2, 0.01, 0.8)
        torch.testing.assert_close(loss[task], (follower - leader).square().sum(), rtol=0, atol=1e-12)


def test_the_leader_carries_no_gradient():
    """The chaser's gradient is 2 Σ (follower − leader) · dfollower/dstart, the leader held where it is."""
    learner, e = radon(bandwidth=0.8, inner_lr=0.03)
    learner.materialise(e)
    parameter = learner.starts.value
    (gradient,) = torch.autograd.grad(learner.meta_loss(e).sum(), parameter)
    follower = learner.adapt(e.support).draws()
    leader = transport(
        lambda phi: learner.model.log_joint(phi, e.union()), follower, steps=1, step_size=0.03, bandwidth=0.8, keep_graph=False
    )
    for i in range(parameter.numel()):
        slope = finite_difference(lambda: learner.adapt(e.support).draws(), parameter, i)
        wanted = 2 * ((follower - leader) * slope).sum()
        assert gradient.view(-1)[i].item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-8)
        moving = finite_difference(lambda: learner.meta_loss(e).sum().item(), parameter, i)
        assert abs(gradient.view(-1)[i].item() - moving) > 1e-3  # with a leader that moves along it would be another


def test_under_the_chaser_all_but_the_starts_learn_from_the_mixture():
    chaser, e = radon(bandwidth=0.8, inner_lr=0.03)
    plain = BMAML(chaser.model, num_particles=4, inner_steps=3, inner_lr=0.03, bandwidth=0.8, objective="predictive")
    plain.materialise(e)
    assert torch.equal(plain.starts.value, starts(chaser, e))
    parameters = list(chaser.model.parameters())
    gradients = [torch.autograd.grad(one.meta_loss(e).sum(), parameters) for one in (chaser, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert a.abs().max() > 1e-3
    start = [torch.autograd.grad(one.meta_loss(e).sum(), one.starts.value)[0] for one in (chaser, plain)]
    assert (start[0] - start[1]).abs().max() > 1e-3


@pytest.mark.parametrize("objective", ["chaser", "predictive"])
def test_first_order(objective):
    """The same loss; starts move as φ_K would, the noise learns at φ_K, and the prior is not reached."""
    full, e = radon(objective=objective)
    quick = BMAML(full.model, num_particles=4, inner_steps=3, inner_lr=0.01, objective=objective, first_order=True)
    torch.testing.assert_close(full.meta_loss(e), quick.meta_loss(e), rtol=0, atol=1e-14)
    trained = {id(p) for p in quick.trained_parameters()}
    assert trained == {id(quick.starts.value), id(quick.model.params["noise"])}
    assert {id(p) for p in full.trained_parameters()} == {id(full.starts.value), *map(id, full.model.parameters())}
    if objective == "chaser":
        follower = quick.adapt(e.support).draws()
        leader = transport(lambda phi: quick.model.log_joint(phi, e.union()), follower, steps=1, step_size=0.01, keep_graph=False)
        (gradient,) = torch.autograd.grad(quick.meta_loss(e).sum(), quick.starts.value)
        torch.testing.assert_close(gradient, 2 * (follower - leader).sum(1), rtol=0, atol=1e-12)


def test_without_support_the_particles_take_their_steps_on_the_prior():
    learner, _ = radon(bandwidth=0.9, inner_steps=4)
    empty = ragged((0, 3))
    values = learner.adapt(empty).draws()[:, 0]
    leaf = learner.starts.value.detach()
    wanted = transport(
        lambda phi: dist.Normal(torch.tensor([1.0, -0.5]), 1.0).log_prob(phi).sum(-1), leaf[:, None], steps=4, step_size=0.01,
        bandwidth=0.9, keep_graph=False,
    )[:, 0]  # fmt: skip
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-13)
    assert (values - leaf).abs().max() > 1e-3
    many = BMAML(learner.model, num_particles=30, inner_steps=800, inner_lr=0.3).adapt(empty).draws()[:, 0]
    torch.testing.assert_close(many.mean(0), torch.tensor([1.0, -0.5]), rtol=0, atol=0.02)
    assert (many.std(0) - 0.92).abs().max() < 0.05  # the prior as well as 30 particles can: 0.91 of its sd at D = 2


def test_starts_are_draws_from_the_prior_as_it_stands():
    e = episode()
    model = HierarchicalModel(radon_program, example=e)
    meta_train(MAML(model, inner_steps=2), e, steps=5, optimizer=lambda p: torch.optim.Adam(p, 0.1))
    mean, sd = (v[0].detach() for v in model.prior_moments(e.support))
    many = starts(BMAML(model, num_particles=20_000), e)
    torch.testing.assert_close(many.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(many.std(0), sd, rtol=0.03, atol=0)
    few = starts(BMAML(model, num_particles=5), e)
    assert torch.equal(few, starts(BMAML(model, num_particles=5), e))
    assert len(few.unique(dim=0)) == 5
    assert not torch.equal(few, starts(BMAML(model, num_particles=5, seed=1), e))
    narrow = starts(BMAML(model, num_particles=5, start_scale=0.1), e)
    torch.testing.assert_close(narrow - mean, 0.1 * (few - mean), rtol=0, atol=1e-14)


def precisions_program(points):
    """The paper's hyperpriors: each task has a precision of its weights and one of its noise."""
    centre = pyro.param("centre", torch.tensor([0.5]))
    with pyro.plate("tasks", points.num_tasks):
        weights = pyro.sample("weights", dist.Gamma(torch.tensor(2.0), 1.0))
        noise = pyro.sample("noise", dist.Gamma(torch.tensor(3.0), 1.0))
        w = pyro.sample("w", dist.Normal(centre, weights[..., None] ** -0.5).to_event(1))
        y_hat = w * points.x[..., 0]
        pyro.sample("y", dist.Normal(y_hat, noise[..., None] ** -0.5).mask(points.mask).to_event(1), obs=points.y)


@pytest.mark.parametrize("objective", ["chaser", "predictive"])
def test_precisions_of_a_task_are_part_of_its_particles(objective):
    e = episode()
    learner = BMAML(HierarchicalModel(precisions_program, example=e), num_particles=5, inner_steps=4, inner_lr=0.01, objective=objective)
    q = learner.adapt(e.support)
    sites = q.sites()
    assert {name: v.shape for name, v in sites.items()} == {"weights": (5, 4), "noise": (5, 4), "w": (5, 4, 1)}
    assert (sites["weights"] > 0).all()
    assert len(sites["noise"].unique()) == 20
    # the log density that the particles climb, with the Jacobian of the two logarithms, written out for one task
    u = q.draws()
    a, b, w = u[:, 1, 0], u[:, 1, 1], u[:, 1, 2]
    x, y = e.support.x[1, :5, 0], e.support.y[1, :5]
    wanted = dist.Gamma(2.0, 1.0).log_prob(a.exp()) + a + dist.Gamma(3.0, 1.0).log_prob(b.exp()) + b
    wanted = wanted + dist.Normal(0.5, (-a / 2).exp()).log_prob(w)
    wanted = wanted + dist.Normal(w[:, None] * x, (-b / 2).exp()[:, None]).log_prob(y).sum(-1)
    torch.testing.assert_close(learner.model.log_joint(u, e.support)[:, 1], wanted, rtol=0, atol=1e-12)
    before = BMAML(learner.model, num_particles=5, inner_steps=4, inner_lr=0.01, objective="predictive").meta_loss(e).mean()
    meta_train(learner, e, steps=60, optimizer=lambda p: torch.optim.Adam(p, 0.02))
    after = BMAML(learner.model, num_particles=5, inner_steps=4, inner_lr=0.01, objective="predictive")
    after.materialise(e)
    after.load_state_dict(learner.state_dict())
    assert after.meta_loss(e).mean() < before - 0.01


@pytest.mark.parametrize("objective", ["chaser", "predictive"])
def test_shared_features_learn_under_both_objectives(objective):
    torch.manual_seed(0)
    network = HeadNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh()), 3, 1)
    learner = BMAML(HierarchicalModel.from_network(network, Gaussian(0.5)), num_particles=3, inner_steps=2, objective=objective)
    learner.materialise(episode())
    names = {n for n, p in learner.named_parameters() if any(p is q for q in learner.trained_parameters())}
    program = "model.program."
    assert names == {
        "starts.value", f"{program}network.features.0.weight", f"{program}network.features.0.bias", f"{program}likelihood.log_noise",
        f"{program}prior.loc", f"{program}prior.log_scale",
    }


def test_too_large_a_step_is_said():
    torch.manual_seed(0)
    network = HeadNetwork(nn.Linear(1, 3), 3, 1)
    model = HierarchicalModel.from_network(network, Gaussian(0.5), NormalPrior.of(network, 1e-3))
    learner = BMAML(model, num_particles=4, inner_steps=200, inner_lr=1.0)
    with pytest.warns(RuntimeWarning, match="the adaptation of 4 of 4 tasks diverged"):
        learner.adapt(episode().support)


@pytest.mark.parametrize(("particles", "dim"), [(1, 3), (5, 3), (20, 3), (1, 40), (5, 40), (20, 40)])
def test_below_twice_the_priors_variance_steps_on_it_settle(particles, dim):
    torch.manual_seed(0)
    network = HeadNetwork(nn.Linear(1, dim - 1), dim - 1, 1)
    model = HierarchicalModel.from_network(network, Gaussian(0.5), NormalPrior.of(network, 0.2))
    learner = BMAML(model, num_particles=particles, inner_steps=200, inner_lr=1.9 * 0.2**2)
    learner.materialise(episode())
    assert learner.adapt(ragged((0,))).draws().abs().max() < 5 * 0.2


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_particles": 0}, "num_particles: expected a whole number of at least 1, got 0"),
    ({"inner_steps": -1}, "inner_steps: expected a whole number of at least 0, got -1"),
    ({"leader_steps": 0}, "leader_steps: expected a whole number of at least 1, got 0"),
    ({"objective": "chase"}, "objective: expected one of 'chaser', 'predictive', got 'chase'; did you mean 'chaser'"),
    ({"bandwidth": "median"}, "bandwidth: expected 'scalar', 'per_dimension' or a positive number, got 'median'"),
    ({"start_scale": 0.0}, "start_scale: expected a positive number"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        radon(**arguments)
