"""Reptile against its update, its closed form, and the likelihood's own gradient."""

import pytest
import torch
from torch import nn

from bayesmeta import Episode, HierarchicalModel
from bayesmeta.learners import MAML
from bayesmeta.learners.reptile import Reptile
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import HeadNetwork

from ..conftest import episode, positive_program, ragged
from .closed_forms import maml


def gradients(learner, e):
    """Of the mean over tasks, by parameter name; None where the loss does not look."""
    names, parameters = zip(*learner.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(learner.meta_loss(e).mean(), parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("steps", [2, 5])
def test_adaptation_is_the_closed_form(linear_model, steps):
    points = ragged((4, 1, 6), 2)
    learner = Reptile(linear_model, inner_steps=steps, inner_lr=0.2)
    for task in range(3):
        wanted = maml(linear_model, points, task, steps, 0.2)[0].detach()
        torch.testing.assert_close(learner.adapt(points).mean[task], wanted, rtol=0, atol=1e-12)


def test_the_gradient_is_theta_minus_phi_k_of_all_points(linear_model):
    e = episode(features=2)
    learner = Reptile(linear_model, inner_steps=4, inner_lr=0.2)
    theta = linear_model.params["mean"].detach()
    phi = torch.stack([maml(linear_model, e.union(), task, 4, 0.2)[0] for task in range(4)]).detach()
    torch.testing.assert_close(learner.meta_loss(e), 0.5 * (theta - phi).square().sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(learner, e)["model.params.mean"], (theta - phi).mean(0), rtol=0, atol=1e-12)


def test_one_gradient_step_is_the_papers_update(linear_model):
    e = episode(features=2)
    learner = Reptile(linear_model, inner_steps=3, inner_lr=0.2)
    theta = linear_model.params["mean"].detach().clone()
    phi = learner.adapt(e.union()).mean
    optimiser = torch.optim.SGD([linear_model.params["mean"]], lr=0.25)
    learner.meta_loss(e).mean().backward()
    optimiser.step()
    torch.testing.assert_close(linear_model.params["mean"].detach(), theta + 0.25 * (phi - theta).mean(0), rtol=0, atol=1e-12)


def test_packed_space_is_where_it_moves(float64):
    """The rate is packed as its logarithm, and `initial` is the prior's mean of that."""
    model = HierarchicalModel(positive_program)
    e = episode(counts_as_targets=True)
    learner = Reptile(model, inner_steps=3, inner_lr=0.1)
    phi = learner.adapt(e.union()).mean
    start = model.initial(e.union()).detach()
    assert (phi - start).abs().min() > 1e-3
    torch.testing.assert_close(gradients(learner, e)["model.params.centre"], (start - phi)[:, 0].mean(), rtol=0, atol=1e-12)


def test_the_noise_is_trained_by_the_likelihood_at_phi_k_and_the_prior_sd_not_at_all(linear_model):
    e = episode(features=2)
    learner = Reptile(linear_model, inner_steps=3, inner_lr=0.2)
    phi = learner.adapt(e.union()).mean
    noise = linear_model.params["noise"].exp()
    both = e.union()
    mean = (both.x * phi[:, None]).sum(-1)
    nll = torch.where(both.mask, -torch.distributions.Normal(mean, noise).log_prob(both.y), 0).sum(1) / both.counts
    (wanted,) = torch.autograd.grad(nll.mean(), linear_model.params["noise"])
    got = gradients(learner, e)
    torch.testing.assert_close(got["model.params.noise"], wanted, rtol=0, atol=1e-12)
    assert got["model.params.sd"] is None
    trained = {id(p) for p in learner.trained_parameters()}
    assert trained == {id(linear_model.params[name]) for name in ("mean", "noise")}


def test_features_under_a_head_are_trained_too(float64):
    model = HierarchicalModel.from_network(HeadNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh()), 3, 1), Gaussian(0.5))
    e = episode()
    learner = Reptile(model, inner_steps=2)
    learner.materialise(e)
    got = gradients(learner, e)
    assert {name for name, g in got.items() if g is None} == {"model.program.prior.log_scale"}
    assert all((g != 0).any() for g in got.values() if g is not None)


def test_support_and_query_play_the_same_part(linear_model):
    e = episode(features=2)
    learner = Reptile(linear_model, inner_steps=3)
    torch.testing.assert_close(learner.meta_loss(e), learner.meta_loss(Episode(e.query, e.support)), rtol=0, atol=1e-12)


def test_it_repeats_until_tasks_agree(linear_model):
    """The fixed point of the update: the mean over tasks of φ_K − θ is 0, here solved from the closed form."""
    points = ragged((6, 5, 8), 2)
    nothing = ragged((0, 0, 0), 2)
    learner = Reptile(linear_model, inner_steps=4, inner_lr=0.2)
    powers, offsets = [], []
    theta = linear_model.params["mean"]
    for task in range(3):
        phi, power, _ = maml(linear_model, points, task, 4, 0.2)
        powers.append(power.detach())
        offsets.append((phi - power @ theta).detach())
    wanted = torch.linalg.solve(torch.eye(2) - torch.stack(powers).mean(0), torch.stack(offsets).mean(0))
    for _ in range(400):
        (step,) = torch.autograd.grad(learner.meta_loss(Episode(points, nothing)).mean(), theta)
        with torch.no_grad():
            theta -= 0.5 * step
    torch.testing.assert_close(theta.detach(), wanted, rtol=0, atol=1e-10)


def test_steps_at_test_and_too_few_steps(linear_model):
    points = ragged((4,), 2)
    learner = Reptile(linear_model, inner_steps=2, inner_lr=0.1, adapt_steps=5)
    torch.testing.assert_close(learner.adapt(points).mean, MAML(linear_model, inner_steps=5, inner_lr=0.1).adapt(points).mean)
    with pytest.raises(ValueError, match=r"inner_steps: expected a whole number of at least 2, got 1"):
        Reptile(linear_model, inner_steps=1)
    with pytest.raises(ValueError, match=r"adapt_steps: expected a whole number of at least 0, got -1"):
        Reptile(linear_model, adapt_steps=-1)
