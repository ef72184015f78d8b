"""MAML against its closed form, Grant's identity and the published hand computation."""

from functools import partial

import pytest
import torch
from torch import nn

from bayesmeta import Episode, HierarchicalModel, Points, meta_train
from bayesmeta.learners import LLAMA, MAML, Reptile
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import WeightNetwork
from bayesmeta.tasks import Sinusoid
from bayesmeta.training_run import predictive_nll

from ..conftest import episode, ragged
from .closed_forms import design, maml, theta


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_phi_and_its_derivative_are_the_closed_form(linear_model, steps):
    points = ragged((4, 1, 6), 2)
    learner = MAML(linear_model, inner_steps=steps, inner_lr=0.2)
    phi = learner._phi(linear_model.prepare(points), steps, keep_graph=True)
    for task in range(3):
        wanted, power, _ = maml(linear_model, points, task, steps, 0.2)
        torch.testing.assert_close(phi[task], wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(learner.adapt(points).mean[task], wanted.detach(), rtol=0, atol=1e-10)
        for d in range(2):
            (row,) = torch.autograd.grad(phi[task, d], linear_model.params["mean"], retain_graph=True)
            torch.testing.assert_close(row, power[d], rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_grants_identity(linear_model, count):
    """K steps are the MAP under N(θ, Q/N), Q = ((I − αH)^−K − I) H⁻¹ (αK where H has no curvature), for 0 < αλ < 1."""
    steps, points = 4, ragged((count,), 2)
    mean, _, variance = theta(linear_model)
    x, y = design(points, 0)
    h = x.T @ x / (count * variance)
    alpha = 0.5 / torch.linalg.eigvalsh(h).max().item()
    phi = MAML(linear_model, inner_steps=steps, inner_lr=alpha).adapt(points).mean[0]
    values, vectors = torch.linalg.eigh(h)
    flat = values < 1e-12
    values = torch.where(flat, 1.0, values)
    q = torch.where(flat, alpha * steps, ((1 - alpha * values) ** -steps - 1) / values)
    precision = count * (vectors / q) @ vectors.T
    map_estimate = torch.linalg.solve(precision + x.T @ x / variance, precision @ mean + x.T @ y / variance)
    torch.testing.assert_close(phi, map_estimate.detach(), rtol=0, atol=1e-10)


def test_the_implied_prior_is_indefinite_for_large_steps_and_odd_k(linear_model):
    x, _ = design(ragged((5,), 2), 0)
    h = x.T @ x / (5 * theta(linear_model)[2].detach())
    alpha = 1.5 / torch.linalg.eigvalsh(h).min()
    values = torch.linalg.eigvalsh(h)
    assert ((((1 - alpha * values) ** -3) - 1) / values < 0).any()


def linear_net(weights):
    net = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([weights]))
    likelihood = Gaussian(1.0, learn=False)  # unit noise: the NLL is ½ (w·x)² + ½ log 2π for y = 0
    return HierarchicalModel.from_network(WeightNetwork(net), likelihood).double()


def one_point(x):
    return Points.of(torch.tensor([[x]]), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("support", "query", "first_order", "adapted", "loss", "gradient"),
    [
        ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], False, [-9.5, -20.0, -29.5], 49612.5, [3780.0, 8505.0, 13230.0]),
        ([4.0, 5.0, 6.0], [1.0, 2.0, 3.0], True, [-104.0, -129.5, -154.0], 340312.5, [-825.0, -1650.0, -2475.0]),
    ],
)
def test_the_hand_computed_example(float64, support, query, first_order, adapted, loss, gradient):
    model = linear_net([2.0, 3.0, 5.0])
    learner = MAML(model, inner_steps=1, inner_lr=0.5, first_order=first_order)
    torch.testing.assert_close(learner.adapt(one_point(support)).mean[0], torch.tensor(adapted), rtol=0, atol=1e-10)
    value = learner.meta_loss(Episode(one_point(support), one_point(query)))
    half_log_2pi = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(value - half_log_2pi, torch.tensor([loss]), rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(value.sum(), model.program.prior.loc)
    torch.testing.assert_close(got, torch.tensor(gradient), rtol=1e-12, atol=0)


def test_three_steps_of_the_hand_computed_example(float64):
    learner = MAML(linear_net([2.0, 3.0, 5.0]), inner_steps=3, inner_lr=1.0)
    wanted = torch.tensor([-3609.0, -7219.0, -10828.0])
    torch.testing.assert_close(learner.adapt(one_point([1.0, 2.0, 3.0])).mean[0], wanted, rtol=1e-12, atol=0)


def test_first_order_takes_the_outer_gradient_at_phi_k(linear_model):
    e = episode(features=2)
    learner = MAML(linear_model, inner_steps=3, inner_lr=0.1, first_order=True)
    (got,) = torch.autograd.grad(learner.meta_loss(e).sum(), linear_model.params["mean"])
    phi = learner.adapt(e.support).mean.requires_grad_()
    nll = -linear_model.log_likelihood(phi, e.query) / e.query.counts
    (wanted,) = torch.autograd.grad(nll.sum(), phi)
    torch.testing.assert_close(got, wanted.sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("scalar", ()), ("per_parameter", (2,)), ("per_step", (3,)), ("per_step_per_parameter", (3, 2))],
)
def test_learned_step_sizes(linear_model, kind, shape):
    e = episode(features=2)
    learner = MAML(linear_model, inner_steps=3, inner_lr=0.1, learn_lr=kind)
    plain = MAML(linear_model, inner_steps=3, inner_lr=0.1)
    torch.testing.assert_close(learner.meta_loss(e), plain.meta_loss(e))  # it starts as MAML
    assert learner.step_size.value.shape == shape
    assert any(p is learner.step_size.value for p in learner.trained_parameters())

    def loss(alpha):
        learner.step_size.value.data = alpha
        return learner.meta_loss(e).sum()

    alpha = learner.step_size.value.detach().clone()
    (gradient,) = torch.autograd.grad(loss(alpha), learner.step_size.value)
    with torch.no_grad():
        bump = 1e-6 * torch.ones(shape)
        difference = (loss(alpha + bump) - loss(alpha - bump)) / 2e-6
    torch.testing.assert_close(gradient.sum(), difference, rtol=1e-6, atol=1e-6)


def test_more_steps_at_test_than_in_training(linear_model):
    points = ragged((4,), 2)
    learner = MAML(linear_model, inner_steps=1, inner_lr=0.1, adapt_steps=5)
    torch.testing.assert_close(learner.adapt(points).mean[0], maml(linear_model, points, 0, 5, 0.1)[0].detach())
    per_step = MAML(linear_model, inner_steps=2, inner_lr=0.1, adapt_steps=5, learn_lr="per_step")
    torch.testing.assert_close(per_step.adapt(points).mean, learner.adapt(points).mean)


def test_unknown_options_answer_with_the_nearest(linear_model):
    with pytest.raises(ValueError, match="did you mean 'per_step'"):
        MAML(linear_model, learn_lr="per_stp")
    with pytest.raises(ValueError, match=r"inner_steps: expected a whole number of at least 0, got -1"):
        MAML(linear_model, inner_steps=-1)


def sinusoid_network(noise):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return HierarchicalModel.from_network(WeightNetwork(body), Gaussian(noise))


@pytest.mark.parametrize("make", [MAML, Reptile, partial(LLAMA, curvature="last_layer", hessian="gauss_newton")])
def test_the_default_step_size_is_that_of_noise_1(float64, make):
    """α at noise 1 is α s² at noise s, to rounding; the defaults of all train a network from noise 1."""
    e = Sinusoid.maml().sample(10, generator=torch.Generator().manual_seed(0))
    one, other = make(sinusoid_network(1.0)), make(sinusoid_network(0.1), inner_lr=0.1 * 0.1**2)
    assert one.inner_lr == 0.1
    torch.testing.assert_close(one.adapt(e.support).mean, other.adapt(e.support).mean, rtol=0, atol=1e-9)
    before = predictive_nll(one, e).mean()
    meta_train(one, e, steps=30)
    assert predictive_nll(one, e).mean() < before
