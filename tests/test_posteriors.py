"""Task posteriors: every kind gives draws, sites, densities, guides and ArviZ groups of one and the same distribution."""

import copy
import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import Predictive as PyroPredictive
from pyro.infer import Trace_ELBO

from bayesmeta import HierarchicalModel, Particles, TaskPosterior
from bayesmeta.posteriors import MixturePosterior, delta

from .conftest import episode, linear_program, positive_program, radon_program, ragged

T, D = 3, 2
KINDS = ("delta", "normal", "multivariate", "particles")
every_kind = pytest.mark.parametrize("kind", KINDS)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def covariance_of(seed=1):
    """A covariance a task, far from diagonal, ``(T, D, D)``."""
    root = torch.randn(T, D, D, generator=seeded(seed))
    return root @ root.mT + 0.3 * torch.eye(D)


def distribution(kind):
    loc = torch.randn(T, D, generator=seeded(0))
    if kind == "delta":
        return delta(loc)
    if kind == "normal":
        return dist.Normal(loc, torch.rand(T, D, generator=seeded(2)) + 0.2).to_event(1)
    if kind == "multivariate":
        return dist.MultivariateNormal(loc, covariance_of())
    return Particles(torch.randn(12, T, D, generator=seeded(3)), chains=2)


@pytest.fixture
def model(float64):
    return HierarchicalModel(linear_program, example=ragged((4, 4, 4), D))


@pytest.fixture
def counts_model(float64):
    """Two scalar sites in packed order (log rate, slope), and a points plate."""
    return HierarchicalModel(positive_program, example=episode(counts_as_targets=True))


# --- the distribution


@every_kind
def test_moments_of_the_draws_are_the_posteriors(model, kind):
    q = distribution(kind)
    posterior = TaskPosterior(model, q)
    n = 20_000
    draws = posterior.draws(n, generator=seeded())
    assert draws.shape == (n, T, D) and not draws.requires_grad
    variance = torch.zeros(T, D) if kind == "delta" else q.variance
    # five standard errors of a mean of n draws; a Delta has none
    gap = (draws.mean(0) - q.mean).abs()
    assert (gap <= 5 * (variance / n).sqrt() + 1e-14).all()
    torch.testing.assert_close(draws.var(0, unbiased=False), variance, rtol=0.06, atol=1e-14)
    assert torch.equal(posterior.mean, q.mean)
    assert posterior.num_tasks == T
    assert posterior.is_point == (kind == "delta")
    if kind == "multivariate":
        centred = draws - draws.mean(0)
        torch.testing.assert_close(torch.einsum("std,ste->tde", centred, centred) / n, covariance_of(), rtol=0.05, atol=0.05)


def test_how_many_draws_come_unasked(model):
    for kind, wanted in zip(KINDS, (1, 100, 100, 12), strict=True):
        assert len(TaskPosterior(model, distribution(kind)).draws()) == wanted


@every_kind
@pytest.mark.parametrize("n", [0, -1])
def test_no_draws_is_an_error(model, kind, n):
    with pytest.raises(ValueError, match=f"n: expected at least 1 draw, got {n}"):
        TaskPosterior(model, distribution(kind)).draws(n)


@every_kind
def test_generators_are_explicit_and_the_callers_stream_stays(model, kind):
    posterior = TaskPosterior(model, distribution(kind))
    x = ragged((4, 4, 4), D).x
    before = torch.get_rng_state()

    def everything(generator):
        predictive = posterior.predict(x, 13, generator=generator)
        return [posterior.draws(13, generator=generator), posterior.sites(13, generator=generator)["w"], predictive.mean,
                predictive.sample(5, generator=generator)]  # fmt: skip

    first, again, other = everything(seeded(1)), everything(seeded(1)), everything(seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], other[0]) == (kind == "delta")
    assert not torch.equal(first[3], other[3])
    generator = seeded(1)
    unequal = posterior.draws(13, generator=generator), posterior.draws(13, generator=generator)
    assert torch.equal(*unequal) == (kind == "delta")  # the generator has moved on
    everything(None)
    assert torch.equal(before, torch.get_rng_state())


@every_kind
def test_select(model, kind):
    q = distribution(kind)
    posterior = TaskPosterior(model, q, {"note": 1.0})
    chosen = posterior.select([2, 0])
    assert chosen.num_tasks == 2 and chosen.diagnostics == {"note": 1.0} and chosen.is_point == posterior.is_point
    assert torch.equal(chosen.mean, q.mean[[2, 0]])
    if kind == "particles":
        assert torch.equal(chosen.draws(), q.values[:, [2, 0]]) and chosen.distribution.chains == 2
        return
    phi = torch.randn(7, T, D) if kind != "delta" else q.mean.expand(7, T, D)
    torch.testing.assert_close(chosen.log_prob(phi[:, [2, 0]]), posterior.log_prob(phi)[:, [2, 0]], rtol=0, atol=1e-13)


def test_select_refuses_what_it_does_not_know(model):
    with pytest.raises(TypeError, match=r"expected a Delta, Normal, .*MultivariateNormal or Particles, got Independent"):
        TaskPosterior(model, dist.Laplace(torch.zeros(T, D), 1.0).to_event(1)).select([0])


def test_log_prob_is_scipys(model):
    phi = torch.randn(4, T, D)
    normal, multivariate = distribution("normal"), distribution("multivariate")
    wanted = scipy.stats.norm(normal.mean.numpy(), normal.stddev.numpy()).logpdf(phi.numpy()).sum(-1)
    np.testing.assert_allclose(TaskPosterior(model, normal).log_prob(phi).numpy(), wanted, rtol=0, atol=1e-12)
    got = TaskPosterior(model, multivariate).log_prob(phi)
    for task in range(T):
        truth = scipy.stats.multivariate_normal(multivariate.mean[task].numpy(), covariance_of()[task].numpy())
        np.testing.assert_allclose(got[:, task].numpy(), truth.logpdf(phi[:, task].numpy()), rtol=0, atol=1e-11)


def test_a_delta_has_all_mass_at_its_point(model):
    posterior = TaskPosterior(model, distribution("delta"))
    at = posterior.mean
    assert posterior.log_prob(at).tolist() == [0.0] * T
    assert posterior.log_prob(at + 1e-6).tolist() == [-math.inf] * T
    assert torch.equal(posterior.draws(4), at.expand(4, T, D))


# --- particles


def test_particles_know_their_moments_and_no_density():
    values = torch.randn(12, T, D, dtype=torch.float64)
    q = Particles(values)
    np.testing.assert_allclose(q.mean.numpy(), values.numpy().mean(0), atol=1e-15)
    np.testing.assert_allclose(q.variance.numpy(), values.numpy().var(0), atol=1e-15)
    assert (q.batch_shape, q.event_shape) == ((T,), (D,))
    with pytest.raises(NotImplementedError, match="particles have no density"):
        q.log_prob(values[0])


def test_fewer_draws_than_particles_are_particles_at_even_distances(model):
    values = torch.arange(12.0)[:, None, None].expand(12, T, D)
    posterior = TaskPosterior(model, Particles(values))
    assert torch.equal(posterior.draws(), values) and torch.equal(posterior.draws(12), values)
    assert posterior.draws(2)[:, 0, 0].tolist() == [0.0, 11.0]
    assert posterior.draws(1).shape == (1, T, D)
    for n in range(2, 12):
        chosen = posterior.draws(n)[:, 0, 0]
        assert len(chosen.unique()) == n
        assert (chosen - torch.linspace(0, 11, n)).abs().max() <= 0.5


def test_more_draws_than_particles_are_chosen_for_each_task_on_its_own(model):
    values = torch.arange(12.0)[:, None, None].expand(12, T, D)
    draws = TaskPosterior(model, Particles(values)).draws(6_000, generator=seeded())
    assert torch.equal(draws[..., 0], draws[..., 1])  # a particle is taken whole
    assert not torch.equal(draws[:, 0], draws[:, 1])
    counts = torch.stack([torch.bincount(draws[:, task, 0].long(), minlength=12) for task in range(T)])
    assert scipy.stats.chisquare(counts.numpy(), axis=1).pvalue.min() > 1e-4


def test_particles_check_their_shape():
    with pytest.raises(ValueError, match=r"values: expected shape \(M, T, D\) with M a multiple of 1 chains, got \(4, 2\)"):
        Particles(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"M a multiple of 3 chains, got \(4, 2, 1\)"):
        Particles(torch.zeros(4, 2, 1), chains=3)


def test_a_predictive_of_particles_has_each_of_them_once(model):
    posterior = TaskPosterior(model, distribution("particles"))
    x = ragged((4, 4, 4), D).x
    assert [posterior.predict(x, n).num_draws for n in (None, 5, 12, 50)] == [12, 5, 12, 12]


# --- sites and predictions


@every_kind
def test_sites_are_the_draws_in_the_programs_units(counts_model, kind):
    q = distribution(kind)
    posterior = TaskPosterior(counts_model, q)
    draws = posterior.draws(9, generator=seeded())
    sites = posterior.sites(9, generator=seeded())
    assert list(sites) == ["rate", "slope"]
    torch.testing.assert_close(sites["rate"], draws[..., 0].exp(), rtol=1e-14, atol=0)
    torch.testing.assert_close(sites["slope"], draws[..., 1], rtol=0, atol=0)
    assert sites["rate"].shape == (9, T) and not sites["rate"].requires_grad


@every_kind
def test_predictions_are_the_programs_at_the_draws(model, kind):
    posterior = TaskPosterior(model, distribution(kind))
    x = ragged((4, 4, 4), D).x
    draws = posterior.draws(9, generator=seeded())
    predictive = posterior.predict(x, 9, generator=seeded())
    wanted = torch.einsum("std,tnd->stn", draws, x.double())
    torch.testing.assert_close(predictive.means, wanted, rtol=0, atol=1e-12)
    spread = predictive.means.var(0, unbiased=False) + 0.7**2
    torch.testing.assert_close(predictive.variance, spread, rtol=1e-12, atol=0)
    assert predictive.num_draws == 9 and not predictive.mean.requires_grad
    with pytest.raises(ValueError, match=r"x: expected shape \(T, N, \*I\) with T = 3 tasks, got \(2, 4, 2\)"):
        posterior.predict(x[:2])


def test_a_trained_model_moves_predictions_and_not_draws(model):
    posterior = TaskPosterior(model, distribution("normal"))
    x = ragged((4, 4, 4), D).x
    draws, spread = posterior.draws(1), posterior.predict(x, 1).stddev
    with torch.no_grad():
        model.params["noise"] += math.log(2.0)
    assert torch.equal(draws, posterior.draws(1))
    torch.testing.assert_close(posterior.predict(x, 1).stddev, 2 * spread, rtol=1e-12, atol=0)


# --- several θ


def test_a_mixture_of_posteriors_has_the_mixtures_moments_and_density(model):
    parts = [distribution("normal"), distribution("multivariate")]
    mixture = MixturePosterior([TaskPosterior(model, q) for q in parts])
    means, variances = torch.stack([q.mean for q in parts]), torch.stack([q.variance for q in parts])
    second = (variances + means**2).mean(0)
    torch.testing.assert_close(mixture.mean, means.mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(mixture.distribution.variance, second - means.mean(0) ** 2, rtol=1e-12, atol=1e-13)
    n = 20_000
    for draws in (mixture.draws(n, generator=seeded()), mixture.distribution.sample((n,))):
        assert draws.shape == (n, T, D)
        assert ((draws.mean(0) - mixture.mean).abs() < 5 * (mixture.distribution.variance / n).sqrt()).all()
        torch.testing.assert_close((draws**2).mean(0), second, rtol=0.06, atol=0.02)
    phi = torch.randn(6, T, D)
    wanted = torch.log((parts[0].log_prob(phi).exp() + parts[1].log_prob(phi).exp()) / 2)
    torch.testing.assert_close(mixture.log_prob(phi), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixture.select([2, 0]).log_prob(phi[:, [2, 0]]), wanted[:, [2, 0]], rtol=0, atol=1e-12)
    assert mixture.num_tasks == T and not mixture.is_point
    with pytest.raises(ValueError, match="at least one component, got none"):
        MixturePosterior([])
    with pytest.raises(NotImplementedError, match=r"components\[k\]\.guide"):
        mixture.guide()


def test_what_components_disagree_about_is_theta(model):
    """Two points: no spread within a component, all of it between them; each predicts under its own θ."""
    loose = copy.deepcopy(model)
    with torch.no_grad():
        loose.params["noise"] += math.log(3.0)
    phis = torch.randn(2, T, D)
    mixture = MixturePosterior([TaskPosterior(m, delta(phi)) for m, phi in zip((model, loose), phis, strict=True)])
    x = ragged((4, 4, 4), D).x
    parts = mixture.predict(x).decompose()
    means = torch.einsum("std,tnd->stn", phis, x.double())
    torch.testing.assert_close(parts.theta, means.var(0, unbiased=False), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(parts.phi, torch.zeros(T, 4), rtol=0, atol=0)
    torch.testing.assert_close(parts.aleatoric, torch.full((T, 4), (0.7**2 + 2.1**2) / 2), rtol=1e-12, atol=0)
    torch.testing.assert_close(mixture.draws(), phis, rtol=0, atol=0)


# --- Pyro's door


@every_kind
@pytest.mark.parametrize("which", ["model", "counts_model"])
def test_the_guide_draws_from_the_posterior_in_pyros_predictive(request, kind, which):
    model = request.getfixturevalue(which)
    q = distribution(kind)
    points = ragged((2, 3, 1), D if which == "model" else 1, counts_as_targets=which == "counts_model")
    n = 150
    names = ["w"] if which == "model" else ["rate", "slope"]
    pyro.set_rng_seed(0)
    samples = PyroPredictive(model, guide=TaskPosterior(model, q).guide(), num_samples=n, return_sites=[*names, "y"])(points)
    if which == "model":
        packed = samples["w"].reshape(n, T, D)
    else:
        packed = torch.stack([samples["rate"].reshape(n, T).log(), samples["slope"].reshape(n, T)], -1)
    variance = torch.zeros(T, D) if kind == "delta" else q.variance
    assert ((packed.mean(0) - q.mean).abs() <= 4.5 * (variance / n).sqrt() + 1e-12).all()
    if kind != "delta":
        ratio = packed.var(0) / variance
        assert ((ratio - 1).abs() < 0.5).all()  # sd of the ratio is about 0.12
    assert samples["y"].shape[0] == n and samples["y"].isfinite().all()
    assert not pyro.get_param_store().keys()


def test_predictives_of_pyro_and_ours_agree(model):
    q = distribution("multivariate")
    points = ragged((2, 2, 2), D)
    pyro.set_rng_seed(0)
    n = 200
    posterior = TaskPosterior(model, q)
    pyros = PyroPredictive(model, guide=posterior.guide(), num_samples=n, return_sites=["y"])
    theirs = pyros(points._replace(y=None))["y"].reshape(n, T, 2)
    x = points.x.double()
    mean = torch.einsum("td,tnd->tn", q.mean, x)
    variance = torch.einsum("tnd,tde,tne->tn", x, covariance_of(), x) + 0.7**2
    assert ((theirs.mean(0) - mean).abs() < 4.5 * (variance / n).sqrt()).all()
    assert ((theirs.var(0) / variance - 1).abs() < 0.4).all()
    ours = posterior.predict(points.x, 20_000, generator=seeded())
    torch.testing.assert_close(ours.mean, mean, rtol=0, atol=0.06)
    torch.testing.assert_close(ours.variance, variance, rtol=0.06, atol=0)


@pytest.mark.parametrize("kind", ["normal", "multivariate"])
@pytest.mark.parametrize("which", ["model", "counts_model"])
def test_the_guides_density_is_log_prob(request, kind, which):
    """Jacobians and all: log q of a traced guide is the posterior's own at the packed draw, plus the Jacobian of exp for the rate."""
    model = request.getfixturevalue(which)
    posterior = TaskPosterior(model, distribution(kind))
    points = ragged((2, 3, 1), D if which == "model" else 1, counts_as_targets=which == "counts_model")
    trace = pyro.poutine.trace(posterior.guide()).get_trace(points)
    if which == "model":
        phi, jacobian = trace.nodes["w"]["value"].reshape(T, D), 0.0
    else:
        rate, slope = (trace.nodes[name]["value"].reshape(T) for name in ("rate", "slope"))
        phi, jacobian = torch.stack([rate.log(), slope], -1), rate.log().sum()
    nodes = [node for name, node in trace.nodes.items() if name in ("_phi", "w", "rate", "slope")]
    own = sum(node["fn"].log_prob(node["value"]).sum() for node in nodes)
    assert own.item() == pytest.approx((posterior.log_prob(phi).sum() - jacobian).item(), abs=1e-10)


def test_the_exact_posteriors_guide_makes_the_elbo_the_evidence(model):
    """Every draw of log p(y, φ) − log q(φ) is then the same number, so one draw tells."""
    from bayesmeta.learners import Exact

    points = ragged((3, 0, 5), D)
    exact = Exact(model)
    pyro.set_rng_seed(3)
    loss = Trace_ELBO().loss(model, exact.adapt(points).guide(), points)
    assert -loss == pytest.approx(exact.log_evidence(points).sum().item(), abs=1e-10)


@every_kind
def test_the_guide_refuses_other_tasks(model, kind):
    with pytest.raises(ValueError, match="this posterior is of 3 tasks, got points of 2"):
        TaskPosterior(model, distribution(kind)).guide()(ragged((2, 2), D))


# --- ArviZ


@every_kind
def test_arviz_has_chains_draws_and_tasks(model, kind):
    posterior = TaskPosterior(model, distribution(kind))
    group = posterior.to_arviz(generator=seeded()).posterior
    chains = 2 if kind == "particles" else 1
    draws = {"delta": 1, "particles": 6}.get(kind, 100)
    assert group["w"].dims == ("chain", "draw", "task", "w_0")
    assert group["w"].shape == (chains, draws, T, D)
    wanted = posterior.sites(generator=seeded())["w"]
    np.testing.assert_array_equal(np.asarray(group["w"]).reshape(chains * draws, T, D), wanted.numpy())
    some = posterior.to_arviz(4, generator=seeded()).posterior
    assert some["w"].shape == (1, 4, T, D)


def test_arviz_of_scalar_sites(float64):
    model = HierarchicalModel(radon_program, example=ragged((4, 4, 4)))
    posterior = TaskPosterior(model, distribution("particles"))
    group = posterior.to_arviz().posterior
    assert sorted(group.data_vars) == ["effect", "level"]
    assert group["level"].dims == ("chain", "draw", "task")
    np.testing.assert_array_equal(np.asarray(group["effect"]).reshape(12, T), posterior.distribution.values[..., 1].numpy())


def test_arviz_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"to_arviz needs ArviZ: pip install 'bayesmeta\[arviz\]'"):
        TaskPosterior(model, distribution("normal")).to_arviz()
