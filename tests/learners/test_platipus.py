"""PLATIPUS: its two Normals by hand, what is drawn from which, and its start from MAML."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from bayesmeta import HierarchicalModel, meta_train
from bayesmeta.learners import MAML
from bayesmeta.learners.platipus import PLATIPUS
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import NormalPrior, WeightNetwork

from ..conftest import episode, linear_program, positive_program, ragged
from .closed_forms import design, maml, theta

pytestmark = pytest.mark.usefixtures("float64")
COUNTS = (3, 5, 2, 8), (4, 1, 6, 2)


def linear(**arguments):
    e = episode(*COUNTS, features=2)
    learner = PLATIPUS(HierarchicalModel(linear_program, example=e), **arguments)
    learner.materialise(e)
    with torch.no_grad():  # every parameter has its own value
        learner.gamma_p.value.copy_(torch.tensor([0.2, 0.05]))
        learner.gamma_q.value.copy_(torch.tensor([0.1, 0.3]))
        learner.log_v_q.value.copy_(torch.tensor([-0.4, 0.3]))
    return learner, e


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def gradient(model, w, points, task):
    """∇ of the mean NLL of `linear_program` at w: Xᵀ(Xw − y) / (N σ²)."""
    x, y = design(points, task)
    return x.T @ (x @ w - y) / (max(len(y), 1) * theta(model)[2])


def normals(learner, e, task):
    """q(φ_0 | Q) and p(φ_0 | S) of one task, by hand."""
    model = learner.model
    mu, sd = model.params["mean"], model.params["sd"].exp()
    q = Normal(mu - learner.gamma_q.value * gradient(model, mu, e.query, task), learner.log_v_q.value.exp())
    return q, Normal(mu - learner.gamma_p.value * gradient(model, mu, e.support, task), sd)


def test_the_loss_by_hand():
    """The KL is torch's own between the Normals by hand, and the likelihood is taken at draws from q that took their steps."""
    learner, e = linear(inner_steps=2, inner_lr=0.07, num_draws=3, kl_weight=0.3)
    loss = learner.meta_loss(e, generator=seeded())
    noise = torch.randn(3, 4, 2, generator=seeded())
    for task in range(4):
        q, p = normals(learner, e, task)
        (x, y), total = design(e.query, task), torch.zeros(())
        for draw in range(3):
            phi = q.loc + q.scale * noise[draw, task]
            for _ in range(2):
                phi = phi - 0.07 * gradient(learner.model, phi, e.support, task)
            total = total - Normal(x @ phi, theta(learner.model)[2].sqrt()).log_prob(y).sum() / 3
        wanted = (total + 0.3 * kl_divergence(q, p).sum()) / len(y)
        torch.testing.assert_close(loss[task], wanted, rtol=0, atol=1e-12)


def test_the_kl_is_the_difference_that_its_weight_makes():
    (full, e), (none, _) = linear(), linear(kl_weight=0.0)
    gap = full.meta_loss(e, generator=seeded()) - none.meta_loss(e, generator=seeded())
    for task, count in enumerate(COUNTS[1]):
        q, p = normals(full, e, task)
        by_hand = (p.scale / q.scale).log() + (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2) - 0.5
        torch.testing.assert_close(gap[task] * count, by_hand.sum(), rtol=0, atol=1e-12)


def test_adapting_draws_from_p_and_then_takes_its_steps():
    learner, e = linear(adapt_steps=3, inner_lr=0.07, num_particles=5)
    values = learner.adapt(e.support, generator=seeded()).draws()
    noise = torch.randn(5, 1, 2, generator=seeded())[:, 0]
    for task in range(4):
        p = normals(learner, e, task)[1]
        for particle in range(5):
            phi = p.loc + p.scale * noise[particle]
            for _ in range(3):
                phi = phi - 0.07 * gradient(learner.model, phi, e.support, task)
            torch.testing.assert_close(values[particle, task], phi.detach(), rtol=0, atol=1e-12)


def test_adapting_never_looks_at_q():
    learner, e = linear()
    before = learner.adapt(e.support, generator=seeded()).draws()
    with torch.no_grad():
        learner.gamma_q.value.add_(1.0)
        learner.log_v_q.value.add_(1.0)
    assert torch.equal(before, learner.adapt(e.support, generator=seeded()).draws())


def test_without_steps_and_shift_adapting_draws_from_the_prior():
    e = episode(features=2)
    model = HierarchicalModel(linear_program, example=e)
    prior = model.prior(e.support)
    exact = PLATIPUS(model, inner_steps=0, shift_lr=0.0, num_particles=6).adapt(e.support, generator=seeded()).draws()
    wanted = prior.mean + prior.stddev * torch.randn(6, 1, 2, generator=seeded())
    assert torch.equal(exact, wanted.detach())
    many = PLATIPUS(model, inner_steps=0, shift_lr=0.0, num_particles=40_000).adapt(e.support, generator=seeded()).distribution
    torch.testing.assert_close(many.mean, prior.mean.detach(), rtol=0, atol=0.02)
    torch.testing.assert_close(many.variance, prior.variance.detach(), rtol=0.02, atol=0)
    paired = PLATIPUS(model, inner_steps=0, shift_lr=0.0, num_particles=6, noise="antithetic").adapt(e.support).distribution
    torch.testing.assert_close(paired.mean, prior.mean.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(paired.variance, prior.variance.detach(), rtol=0, atol=1e-14)


def test_without_support_points_there_is_no_shift_and_no_step():
    learner, _ = linear(inner_steps=4, num_particles=6)
    mu, sd = learner.model.params["mean"], learner.model.params["sd"].exp()
    wanted = (mu + sd * torch.randn(6, 2, generator=seeded())).detach()
    torch.testing.assert_close(learner.adapt(ragged((0, 3), 2), generator=seeded()).draws()[:, 0], wanted, rtol=0, atol=1e-14)


def test_at_the_start_the_kl_is_zero_where_the_sets_are_the_same():
    """v_q starts at σ_θ, γ_q where γ_p does."""
    e = episode(features=2)
    same = e._replace(query=e.support)
    losses = [PLATIPUS(HierarchicalModel(linear_program, example=e), kl_weight=w).meta_loss(same) for w in (1.0, 1000.0)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-11)


def test_what_is_learned():
    learner, _ = linear()
    names = {n for n, p in learner.named_parameters() if any(p is q for q in learner.trained_parameters())}
    model = {"model.params.mean", "model.params.sd", "model.params.noise"}
    assert names == {"log_v_q.value", "gamma_p.value", "gamma_q.value"} | model
    assert {learner.gamma_p.value.shape, learner.gamma_q.value.shape, learner.log_v_q.value.shape} == {torch.Size([2])}


@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradient_goes_through_the_shifts_in_second_order(first_order):
    """Without steps the two settings are one, and the gradient is that of the loss by hand, through the gradients in it."""
    learner, e = linear(inner_steps=0, first_order=first_order)
    parameters = [*learner.model.parameters(), learner.gamma_p.value, learner.gamma_q.value, learner.log_v_q.value]
    got = torch.autograd.grad(learner.meta_loss(e, generator=seeded()).sum(), parameters)
    noise, wanted = torch.randn(1, 4, 2, generator=seeded()), torch.zeros(())
    for task in range(4):
        (q, p), (x, y) = normals(learner, e, task), design(e.query, task)
        nll = -Normal(x @ (q.loc + q.scale * noise[0, task]), learner.model.params["noise"].exp()).log_prob(y).sum()
        wanted = wanted + (nll + kl_divergence(q, p).sum()) / len(y)
    for a, b in zip(got, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_first_order_steps_have_the_same_loss_and_another_gradient():
    (full, e), (quick, _) = linear(inner_steps=2), linear(inner_steps=2, first_order=True)
    losses = [one.meta_loss(e, generator=seeded()) for one in (full, quick)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(loss.sum(), one.log_v_q.value)[0] for loss, one in zip(losses, (full, quick), strict=True)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_it_starts_where_maml_has_come_to(float64):
    e = episode(features=2)
    model = HierarchicalModel(linear_program, example=e)
    trained = MAML(model, inner_steps=3, inner_lr=0.1)
    meta_train(trained, e, steps=20, optimizer=lambda p: torch.optim.Adam(p, 0.02))
    with torch.no_grad():
        model.params["sd"].fill_(-25.0)  # draws at MAML's θ itself
    values = PLATIPUS(trained.model, inner_steps=3, inner_lr=0.1, shift_lr=0.0, num_particles=4).adapt(e.support).draws()
    torch.testing.assert_close(values, trained.adapt(e.support).mean.expand(4, 4, 2), rtol=0, atol=1e-9)
    for task in range(4):
        torch.testing.assert_close(values[0, task], maml(model, e.support, task, 3, 0.1)[0].detach(), rtol=0, atol=1e-9)


def test_a_shift_is_a_step_more():
    """γ_p = α and σ_θ → 0: MAML with K + 1 steps."""
    e = episode(features=2)
    model = HierarchicalModel(linear_program, example=e)
    learner = PLATIPUS(model, inner_steps=3, inner_lr=0.1)
    with torch.no_grad():
        model.params["sd"].fill_(-25.0)
    wanted = MAML(model, inner_steps=4, inner_lr=0.1).adapt(e.support).mean
    torch.testing.assert_close(learner.adapt(e.support).mean, wanted, rtol=0, atol=1e-9)


def test_a_program_without_a_normal_prior_takes_its_packed_moments():
    e = episode(counts_as_targets=True)
    model = HierarchicalModel(positive_program, example=e)
    mean, sd = model.prior_moments(e.support)
    values = PLATIPUS(model, inner_steps=0, shift_lr=0.0, num_particles=8).adapt(e.support, generator=seeded()).draws()
    torch.testing.assert_close(values, (mean + sd * torch.randn(8, 1, 2, generator=seeded())).detach(), rtol=0, atol=1e-13)
    sites = PLATIPUS(model).adapt(e.support).sites()
    assert (sites["rate"] > 0).all()


def test_training_a_network_brings_the_bound_down():
    torch.manual_seed(0)
    network = WeightNetwork(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    model = HierarchicalModel.from_network(network, Gaussian(0.5), NormalPrior.of(network))
    learner, e = PLATIPUS(model, inner_steps=2, inner_lr=0.05, num_draws=4), episode()
    history = meta_train(learner, e, steps=150, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    assert sum(history.loss[-20:]) < sum(history.loss[:20]) - 20 * 0.2
    assert learner.gamma_p.value.shape == (network.dim,)
    assert not torch.equal(learner.gamma_p.value, learner.gamma_q.value)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_draws": 0}, "num_draws: expected a whole number of at least 1, got 0"),
    ({"num_particles": 0}, "num_particles: expected a whole number of at least 1, got 0"),
    ({"inner_steps": 1.5}, "inner_steps: expected a whole number of at least 0, got 1.5"),
    ({"noise": "antithetical"}, "noise: expected one of .* did you mean 'antithetic'"),
    ({"kl_weight": -1.0}, "kl_weight: expected a number of at least 0, got -1.0"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear(**arguments)
