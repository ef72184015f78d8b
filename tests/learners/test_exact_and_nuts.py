"""Exact inference against plain matrices; NUTS against exact inference."""

import warnings

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from bayesmeta import HierarchicalModel, meta_train
from bayesmeta.learners import NUTS, Exact
from bayesmeta.tasks import LinearGaussian

from ..conftest import episode, linear_program, positive_program, radon_program, ragged
from .closed_forms import log_evidence, posterior


def test_posterior_and_evidence(linear_model):
    points = ragged((4, 1, 0, 9), 2)
    learner = Exact(linear_model)
    q, evidence = learner.adapt(points), learner.log_evidence(points)
    for task in range(4):
        mean, precision = posterior(linear_model, points, task)
        torch.testing.assert_close(q.mean[task], mean.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(q.distribution.precision_matrix[task], precision.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(evidence[task], log_evidence(linear_model, points, task), rtol=0, atol=1e-10)


def test_it_agrees_with_the_family_that_knows(float64):
    family = LinearGaussian(
        weight_mean=torch.tensor([1.0, -0.5]), weight_cov=torch.diag(torch.tensor([0.8, 1.3]) ** 2), noise=0.7, num_support=(0, 6)
    )
    support = family.sample(20, generator=torch.Generator().manual_seed(0)).support
    learner = Exact(HierarchicalModel(linear_program, example=support))
    q, known = learner.adapt(support), family.exact_posterior(support)
    torch.testing.assert_close(q.mean, known.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(q.distribution.covariance_matrix, known.covariance_matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(learner.log_evidence(support), family.log_evidence(support), rtol=0, atol=1e-10)
    x = support.filled().x
    many = q.predict(x, 20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(many.mean, family.exact_predictive(support, x).mean, rtol=0, atol=0.05)


@pytest.mark.parametrize("program", [linear_program, radon_program])
def test_pyros_elbo_under_the_exact_guide_is_the_log_evidence(float64, program):
    points = ragged((4, 1, 0, 9), 2)
    model = HierarchicalModel(program, example=points)
    learner = Exact(model)
    guide = learner.adapt(points).guide()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        elbo = -Trace_ELBO().loss(model, guide, points)
        assert elbo == pytest.approx(learner.log_evidence(points).sum().item(), abs=1e-10)


def test_evidence_gradient_is_exact(linear_model):
    e = episode(features=2)
    both = e.union()
    (got,) = torch.autograd.grad(Exact(linear_model).meta_loss(e).sum(), linear_model.params["sd"])
    wanted = torch.autograd.grad(-sum(log_evidence(linear_model, both, t) for t in range(4)), linear_model.params["sd"])[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_empirical_bayes_recovers_theta(float64):
    family = LinearGaussian(
        weight_mean=torch.tensor([1.0, -0.5]), weight_cov=torch.diag(torch.tensor([0.5, 2.0]) ** 2), noise=0.3, num_support=5, num_query=5
    )
    e = family.sample(2000, generator=torch.Generator().manual_seed(1))
    learner = Exact(HierarchicalModel(linear_program))
    meta_train(learner, e, steps=300, optimizer=lambda p: torch.optim.Adam(p, 0.05))
    params = learner.model.params
    torch.testing.assert_close(params["mean"].detach(), torch.tensor([1.0, -0.5]), rtol=0, atol=0.15)
    torch.testing.assert_close(params["sd"].detach().exp(), torch.tensor([0.5, 2.0]), rtol=0.06, atol=0)
    torch.testing.assert_close(params["noise"].detach().exp(), torch.tensor(0.3), rtol=0.03, atol=0)


def test_a_model_that_is_not_quadratic_is_refused(float64):
    e = episode(counts_as_targets=True)
    with pytest.raises(ValueError, match=r"not quadratic.*use NUTS"):
        Exact(HierarchicalModel(positive_program, example=e)).adapt(e.support)


@pytest.mark.parametrize("per_task", [False, True])
def test_nuts_is_within_four_standard_errors(linear_model, per_task):
    points = ragged((4, 0, 9) if not per_task else (4, 9), 2)
    sampler = NUTS(linear_model, num_draws=600, warmup=200, chains=2, per_task=per_task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # R̂ of 1.01 at 600 draws is no failure of this test
        q = sampler.adapt(points, generator=torch.Generator().manual_seed(0))
    exact = Exact(linear_model).adapt(points).distribution
    draws = q.draws()
    assert draws.shape == (1200, points.num_tasks, 2)
    for values, wanted in ((draws, exact.mean), ((draws - exact.mean).square(), exact.variance)):
        effective = pyro.ops.stats.effective_sample_size(values.unflatten(0, (2, 600)), chain_dim=0, sample_dim=1)
        error = values.std(0) / effective.sqrt()
        assert ((values.mean(0) - wanted).abs() < 4 * error).all()
    assert set(q.diagnostics) == {"divergences", "max_r_hat", "min_effective_draws"}


def test_nuts_on_a_count_model_agrees_with_quadrature(float64):
    e = episode(counts=(5,), queries=(1,), counts_as_targets=True)
    model = HierarchicalModel(positive_program, example=e)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        q = NUTS(model, num_draws=800, warmup=300, chains=1).adapt(e.support, generator=torch.Generator().manual_seed(0))
    grid = torch.stack(torch.meshgrid(torch.linspace(-4, 4, 161), torch.linspace(-5, 5, 161), indexing="ij"), -1).reshape(-1, 1, 2)
    weight = torch.softmax(model.log_joint(grid, e.support)[:, 0], 0).detach()
    mean = (weight[:, None] * grid[:, 0]).sum(0)
    sd = (weight[:, None] * (grid[:, 0] - mean) ** 2).sum(0).sqrt()
    assert ((q.mean[0] - mean).abs() < 0.25 * sd).all()
    torch.testing.assert_close(q.draws().std(0)[0], sd, rtol=0.15, atol=0)


def test_without_any_support_nuts_draws_the_prior(linear_model):
    q = NUTS(linear_model, num_draws=4000, chains=1).adapt(ragged((0, 0), 2)._replace(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.draws().std(0), linear_model.params["sd"].detach().exp().expand(2, 2), rtol=0.06, atol=0)


def test_bad_diagnostics_warn_with_advice(linear_model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        NUTS(linear_model, num_draws=8, warmup=2, chains=1).adapt(ragged((3,), 2))
    assert any("min_effective_draws" in str(w.message) and "take more draws" in str(w.message) for w in caught)
