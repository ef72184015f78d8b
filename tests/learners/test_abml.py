"""ABML: its fixed point, its noise, and one maths through two doors (ours and Pyro's)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from bayesmeta import HierarchicalModel, meta_train
from bayesmeta.learners import ABML
from bayesmeta.learners.noise import standard_noise

from ..conftest import episode, positive_program, radon_program, ragged
from .closed_forms import posterior


@pytest.mark.parametrize("counts", [(4, 1, 6), (60, 2, 30)])
def test_the_fixed_point_is_the_mean_field_optimum(linear_model, counts):
    points = ragged(counts, 2)
    q = ABML(linear_model, inner_steps=1500, inner_lr=0.2).adapt(points)
    for task in range(3):
        mean, precision = posterior(linear_model, points, task)
        torch.testing.assert_close(q.mean[task], mean.detach(), rtol=0, atol=1e-8)
        torch.testing.assert_close(q.distribution.stddev[task], precision.detach().diagonal() ** -0.5, rtol=0, atol=1e-8)


def test_five_iid_draws_are_far_from_it(linear_model):
    points = ragged((6,), 2)
    q = ABML(linear_model, inner_steps=1500, inner_lr=0.2, noise="iid").adapt(points)
    assert (q.distribution.stddev[0] - posterior(linear_model, points, 0)[1].diagonal() ** -0.5).abs().max() > 1e-3


def test_without_support_q_is_the_prior(linear_model):
    q = ABML(linear_model, inner_steps=5).adapt(ragged((0, 3), 2)).select([0])
    torch.testing.assert_close(q.mean[0], linear_model.params["mean"].detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(q.distribution.stddev[0], linear_model.params["sd"].exp().detach(), rtol=0, atol=1e-14)


def test_a_smaller_kl_weight_widens_less_towards_the_prior(linear_model):
    points = ragged((2,), 2)
    full, light = (ABML(linear_model, inner_steps=800, kl_weight=w).adapt(points) for w in (1.0, 0.1))
    assert (light.distribution.stddev > 0).all()
    mean = posterior(linear_model, points, 0)[0]
    assert (full.mean[0] - mean).abs().max() < 1e-6 < (light.mean[0] - mean).abs().max()


def program_with_global_plates(points):
    """Global sites in plates of their own: two in one plate, one with an event, one in two plates, one in none."""
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("features", 3):
        mean = pyro.sample("mean", dist.Normal(torch.tensor(0.2), 1.0))
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 4, dim=-1):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("tasks", points.num_tasks):
        w = pyro.sample("w", dist.Normal(mean, sd).to_event(1))
        y_hat = (w @ weights.mT)[..., None, 0] * points.x[..., 0] + shift.sum() + w.sum(-1, keepdim=True)
        pyro.sample("y", dist.Normal(y_hat, noise).mask(points.mask).to_event(1), obs=points.y)


@pytest.mark.parametrize("noise", ["whitened", "antithetic", "iid"])
@pytest.mark.parametrize("program", [radon_program, positive_program, program_with_global_plates])
@pytest.mark.parametrize("theta", ["map", "variational"])
def test_the_loss_is_pyros_mean_field_elbo(float64, program, noise, theta):
    e = episode(counts_as_targets=True)
    model = HierarchicalModel(program, example=e, theta=theta)
    learner = ABML(model, inner_steps=3, inner_lr=0.05, noise=noise)
    pyro.set_rng_seed(7)
    wanted = TraceMeanField_ELBO().loss(model, learner.guide, e)
    generator = torch.Generator().manual_seed(7)
    with model.theta_at(model.draw_theta(generator)):
        got = learner.meta_loss(e, generator=generator).sum() + learner.global_loss()
    assert got.item() == pytest.approx(wanted, abs=1e-10)


def test_trace_elbo_agrees_on_average(float64):
    e = episode()
    model = HierarchicalModel(radon_program, example=e)
    learner = ABML(model, inner_steps=2)
    pyro.set_rng_seed(0)
    draws = torch.tensor([Trace_ELBO().loss(model, learner.guide, e) for _ in range(400)])
    ours = torch.stack([learner.meta_loss(e, generator=torch.Generator().manual_seed(i)).sum() for i in range(400)])
    gap, error = (draws.mean() - ours.mean()).abs(), (draws.var() / 400 + ours.var() / 400).sqrt()
    assert gap < 4 * error


@pytest.mark.parametrize("program", [radon_program, positive_program, program_with_global_plates])
def test_svi_and_meta_train_take_the_same_path(float64, program):
    e = episode(counts_as_targets=True)
    one, two = (HierarchicalModel(program, example=e) for _ in range(2))
    ours = ABML(one, inner_steps=3, inner_lr=0.05)
    adam = lambda p: torch.optim.Adam(p, 0.02, eps=1e-12)  # noqa: E731
    history = meta_train(ours, e, steps=20, generator=torch.Generator().manual_seed(3), optimizer=adam)
    theirs = ABML(two, inner_steps=3, inner_lr=0.05)
    pyro.set_rng_seed(3)
    svi = SVI(two, theirs.guide, pyro.optim.Adam({"lr": 0.02, "eps": 1e-12}), TraceMeanField_ELBO())
    losses = [svi.step(e) / e.num_tasks for _ in range(20)]
    torch.testing.assert_close(torch.tensor(history.loss), torch.tensor(losses), rtol=1e-8, atol=1e-8)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    assert not pyro.get_param_store().keys()


def test_the_guide_sees_the_support_only(float64):
    e = episode()
    model = HierarchicalModel(radon_program, example=e)
    learner = ABML(model)
    changed = e._replace(query=e.query._replace(y=e.query.y + 5))
    traces = []
    for data in (e, changed):
        pyro.set_rng_seed(1)
        traces.append(pyro.poutine.trace(learner.guide).get_trace(data).nodes["level"]["value"])
    assert torch.equal(*traces)


def test_first_order_has_the_same_loss_and_another_gradient(float64):
    e = episode()
    model = HierarchicalModel(radon_program, example=e)
    losses = [ABML(model, first_order=flag).meta_loss(e) for flag in (False, True)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss.sum(), model.params["sd"])[0] for loss in losses]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


def test_the_second_order_gradient_is_the_finite_difference(float64):
    e = episode()
    model = HierarchicalModel(radon_program, example=e)
    learner = ABML(model, inner_steps=4)

    def loss(bump):
        with torch.no_grad():
            model.params["sd"] += bump
        value = learner.meta_loss(e).sum()
        with torch.no_grad():
            model.params["sd"] -= bump
        return value

    (gradient,) = torch.autograd.grad(loss(0.0), model.params["sd"])
    for d in range(2):
        bump = torch.zeros(2)
        bump[d] = 1e-6
        assert gradient[d].item() == pytest.approx(((loss(bump) - loss(-bump)) / 2e-6).item(), rel=1e-6)


def test_noise_has_the_moments_it_promises(float64):
    like = torch.zeros(())
    white = standard_noise((7, 5, 3), "whitened", like=like)
    torch.testing.assert_close(white.mean(0), torch.zeros(5, 3), rtol=0, atol=1e-12)
    covariance = torch.einsum("sbd,sbe->bde", white, white) / 7
    torch.testing.assert_close(covariance, torch.eye(3).expand(5, 3, 3), rtol=0, atol=1e-12)
    for kind in ("antithetic", "whitened"):  # too few draws to whiten: antithetic
        pairs = standard_noise((4, 5, 8), kind, like=like)
        torch.testing.assert_close(pairs.mean(0), torch.zeros(5, 8), rtol=0, atol=1e-12)
        torch.testing.assert_close(pairs.square().mean(0), torch.ones(5, 8), rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts", [(4, 1, 6), (60, 2, 30)])
def test_with_one_more_direction_the_fixed_point_in_two_dimensions_is_the_posterior(linear_model, counts):
    # a diagonal plus u uᵀ is any 2 × 2 covariance, and 4 whitened draws in 3 dimensions are exact for a quadratic
    points = ragged(counts, 2)
    q = ABML(linear_model, inner_steps=4000, inner_lr=0.1, rank=1, num_draws=4).adapt(points).distribution
    for task in range(3):
        mean, precision = posterior(linear_model, points, task)
        torch.testing.assert_close(q.mean[task], mean.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(q.covariance_matrix[task], torch.linalg.inv(precision.detach()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("program", [radon_program, positive_program])
def test_with_a_low_rank_factor_the_loss_is_pyros_elbo(float64, program):
    e = episode(counts_as_targets=True)
    model = HierarchicalModel(program, example=e)
    learner = ABML(model, inner_steps=3, inner_lr=0.05, rank=2)
    learner.materialise(e)
    pyro.set_rng_seed(7)
    wanted = Trace_ELBO().loss(model, learner.guide, e)
    got = learner.meta_loss(e, generator=torch.Generator().manual_seed(7)).sum() + learner.global_loss()
    assert got.item() == pytest.approx(wanted, abs=1e-8)


def test_a_low_rank_posterior_goes_through_every_door(float64):
    e = episode()
    learner = ABML(HierarchicalModel(radon_program), inner_steps=3, rank=1)
    empty = learner.adapt(ragged((0, 4))).select([0])
    torch.testing.assert_close(empty.distribution.covariance_matrix[0], torch.eye(2), rtol=0, atol=1e-12)
    q = learner.adapt(e.support)
    assert q.select([2, 0]).mean.shape == (2, 2)
    draws = pyro.infer.Predictive(learner.model, guide=q.guide(), num_samples=20)(e.support)
    assert draws["level"].shape == (20, 4)
    assert any(p is learner.factor.value for p in learner.trained_parameters())


@pytest.mark.parametrize("rank", [0, 1])
def test_steps_in_units_of_the_prior(linear_model, rank):
    """One step moves (μ, σ, U) by α σ_θ² times the plain gradient; the fixed point is the same."""
    support = ragged((4, 3), 2)
    with torch.no_grad():
        linear_model.params["sd"].copy_(torch.tensor([0.05, 2.0]).log())
    plain, prior = (ABML(linear_model, inner_steps=1, inner_lr=0.01, rank=rank, step_units=u) for u in ("plain", "prior"))
    for learner in (plain, prior):
        learner.materialise(support)
        if rank:
            with torch.no_grad():
                learner.factor.value.copy_(torch.tensor([[0.1], [-0.2]]))
    one, two = (
        learner._adapted(learner.prepared(support), keep_graph=False) for learner in (plain, prior) if torch.manual_seed(3)
    )
    mean, sd = linear_model.prior_moments(support)
    start = (mean, sd, torch.tensor([[0.1], [-0.2]]).expand(2, 2, 1))[: 2 + rank]
    for v0, a, b in zip(start, one, two, strict=True):
        scale = sd.square() if v0.dim() == 2 else sd.square()[..., None]
        torch.testing.assert_close(b - v0, scale * (a - v0), rtol=1e-9, atol=1e-14)
        assert (a - v0).abs().max() > 1e-3


@pytest.mark.parametrize("draws", [2, 3, 4])
def test_noise_that_is_exactly_zero_keeps_its_scale(monkeypatch, draws):
    """It happens once in ten million draws of float32, and a network's training draws that many in minutes."""
    monkeypatch.setattr(torch, "randn", lambda *size, **kwargs: torch.zeros(*size, **kwargs))
    noise = standard_noise((draws, 1, 5), "antithetic", like=torch.zeros(()))
    torch.testing.assert_close(noise.square().mean(0), torch.ones(1, 5))


def test_svi_trains_the_factor_too():
    """A learner's own parameters are announced to Pyro's optimiser."""
    learner = ABML(HierarchicalModel(radon_program, example=episode()), inner_steps=1, inner_lr=0.05, rank=1)
    learner.materialise(episode())
    before = learner.factor.value.detach().clone()
    svi = SVI(learner.model, learner.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):
        svi.step(episode())
    assert not torch.equal(before, learner.factor.value.detach())
    assert not pyro.get_param_store().keys()
