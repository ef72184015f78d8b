"""No pooling and complete pooling against least squares."""

import pytest
import torch

from bayesmeta import Episode, HierarchicalModel, Points, meta_train
from bayesmeta.learners import CompletePooling, NoPooling
from bayesmeta.learners.steps import derivatives, newton

from ..conftest import episode, linear_program, positive_program, ragged
from .closed_forms import design


def trained(learner, e, steps=3000):
    cosine = lambda optimiser: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)  # noqa: E731
    meta_train(learner, e, steps=steps, optimizer=lambda p: torch.optim.Adam(p, 0.02), schedule=cosine)
    return learner


def pooled(e):
    """Least squares over the points of all tasks: coefficients and residual sum of squares."""
    x, y = (torch.cat(v) for v in zip(*(design(e.union(), task) for task in range(e.num_tasks)), strict=True))
    w = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return w, ((y - x @ w) ** 2).sum(), len(y)


def test_complete_pooling_is_least_squares_over_all_points(float64):
    e = episode(features=2)
    learner = trained(CompletePooling(HierarchicalModel(linear_program)), e)
    w, rss, n = pooled(e)
    torch.testing.assert_close(learner.centre.value.detach(), w, rtol=0, atol=1e-6)
    torch.testing.assert_close(learner.model.params["noise"].detach().exp() ** 2, rss / n, rtol=1e-6, atol=0)
    posterior = learner.adapt(ragged((0, 7), 2))
    torch.testing.assert_close(posterior.mean, w.expand(2, 2), rtol=0, atol=1e-6)


def test_no_pooling_is_the_minimum_norm_deviation_from_complete_pooling(float64):
    e = episode(counts=(6, 1, 3, 0), queries=(4, 2, 6, 1), features=2)
    learner = trained(NoPooling(HierarchicalModel(linear_program)), e)
    centre = learner.centre.value.detach()
    torch.testing.assert_close(centre, pooled(e)[0], rtol=0, atol=1e-6)
    phi = learner.adapt(e.support).mean
    for task in range(4):
        x, y = design(e.support, task)
        wanted = centre + torch.linalg.pinv(x) @ (y - x @ centre) if len(y) else centre
        torch.testing.assert_close(phi[task], wanted, rtol=0, atol=1e-9)


def test_no_poolings_noise_is_not_biased_by_the_parameters_it_fits(float64):
    """Restricted maximum likelihood: σ² = Σ RSS_i / Σ (N_i − rank_i)."""
    e = episode(features=2)
    learner = trained(NoPooling(HierarchicalModel(linear_program)), e)
    rss, freedom = 0.0, 0
    for task in range(e.num_tasks):
        x, y = design(e.union(), task)
        w = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        rss, freedom = rss + ((y - x @ w) ** 2).sum(), freedom + len(y) - 2
    torch.testing.assert_close(learner.model.params["noise"].detach().exp() ** 2, rss / freedom, rtol=1e-6, atol=0)


def test_no_pooling_in_float32_finds_the_same(float64):
    points = ragged((6, 3), 2)
    exact = NoPooling(HierarchicalModel(linear_program, example=points)).adapt(points).mean
    torch.set_default_dtype(torch.float32)
    single = points.to(torch.float32)
    rough = NoPooling(HierarchicalModel(linear_program, example=single)).adapt(single).mean
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=0, atol=1e-5)


def test_newton_on_a_count_model_reaches_a_stationary_point(float64):
    e = episode(counts_as_targets=True)
    model = HierarchicalModel(positive_program, example=e)
    points = model.prepare(e)
    loss = lambda phi: -model.log_joint(phi, points)  # noqa: E731
    phi, hessian = newton(loss, model.initial(points), steps=50)
    _, gradient, _ = derivatives(loss, phi)
    assert gradient.abs().max() < 1e-6
    assert (torch.linalg.eigvalsh(hessian) > 0).all()


def test_a_large_network_takes_adam_steps(float64):
    from torch import nn

    from bayesmeta.likelihoods import Gaussian
    from bayesmeta.networks import WeightNetwork

    points = ragged((5, 3), 1)
    net = WeightNetwork(nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)))
    model = HierarchicalModel.from_network(net, Gaussian(0.1), example=points)
    learner = NoPooling(model, inner_steps=300, inner_lr=0.02)
    before = -model.log_likelihood(model.initial(points), points)
    after = -model.log_likelihood(learner.adapt(points).mean, points)
    assert (after < 0.2 * before).all()
    loss = learner.meta_loss(Episode(points, points))
    (gradient,) = torch.autograd.grad(loss.sum(), model.program.likelihood.log_noise)
    assert torch.isfinite(gradient)


def test_one_point_tasks_of_training_count_for_nothing_in_the_noise(float64):
    empty = Points.from_tasks([(torch.randn(1, 2), torch.randn(1))])
    e = Episode(empty.select([0])._replace(mask=torch.zeros(1, 1, dtype=torch.bool)), empty)
    model = HierarchicalModel(linear_program, example=empty)
    learner = NoPooling(model)
    learner.materialise(empty)
    (gradient,) = torch.autograd.grad(learner.meta_loss(e).sum(), model.params["noise"])
    assert gradient.item() == pytest.approx(0.0, abs=1e-9)
