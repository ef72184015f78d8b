"""`HierarchicalModel`: packing, densities, priors and θ against the same things worked out by hand."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn
from torch.distributions import constraints

from bayesmeta import Episode, HierarchicalModel, Points
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import NormalPrior, WeightNetwork

from .conftest import episode, linear_program, positive_program, radon_program, ragged


def every_kind_of_site(points):
    """A site of every support, all joined in the mean of y."""
    with pyro.plate("tasks", points.num_tasks):
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        weights = pyro.sample("weights", dist.Normal(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), 0.5).to_event(2))
        phase = pyro.sample("phase", dist.Uniform(torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 2.0])).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(2.0)))
        spread = pyro.sample("spread", dist.Wishart(torch.tensor(5.0), torch.eye(2)))
        y_hat = rate + (share * torch.tensor([1.0, 2.0, 3.0])).sum(-1) + weights.sum((-1, -2)) + phase.prod(-1)
        y_hat = y_hat + corr.sum((-1, -2)) + spread.logdet()
        pyro.sample("y", dist.Normal(y_hat[..., None] * points.x[..., 0], 0.5).mask(points.mask).to_event(1), obs=points.y)


SIZES = {"rate": 1, "share": 2, "weights": 4, "phase": 2, "corr": 3, "spread": 3}
EVENTS = {"rate": (), "share": (3,), "weights": (2, 2), "phase": (2,), "corr": (3, 3), "spread": (2, 2)}


def by_hand(phi, points):
    """log p(φ) with Jacobians and log p(y | φ) of one task and one draw, its site values taken from φ by formulas of its own."""
    rate, share_u, weights, phase_u, corr_u, spread_u = phi.split(list(SIZES.values()))
    rate = rate.exp()[0]
    log_prior = torch.distributions.Gamma(2.0, 3.0).log_prob(rate) + rate.log()
    sticks = torch.sigmoid(share_u - torch.tensor([2.0, 1.0]).log())
    share = torch.stack([sticks[0], (1 - sticks[0]) * sticks[1], (1 - sticks[0]) * (1 - sticks[1])])
    jacobian = (sticks * (1 - sticks)).log().sum() + (1 - sticks[0]).log()
    log_prior = log_prior + torch.distributions.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).log_prob(share) + jacobian
    weights = weights.reshape(2, 2)
    log_prior = log_prior + torch.distributions.Normal(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), 0.5).log_prob(weights).sum()
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 2.0])
    s = torch.sigmoid(phase_u)
    phase = low + (high - low) * s
    log_prior = log_prior + (-(high - low).log() + ((high - low) * s * (1 - s)).log()).sum()
    partial = torch.tanh(corr_u)  # of the canonical partial correlations
    corr = torch.eye(3)
    corr[1, 0], corr[1, 1] = partial[0], (1 - partial[0] ** 2).sqrt()
    corr[2, 0], corr[2, 1] = partial[1], partial[2] * (1 - partial[1] ** 2).sqrt()
    corr[2, 2] = ((1 - partial[1] ** 2) * (1 - partial[2] ** 2)).sqrt()
    jacobian = (1 - partial**2).log().sum() + 0.5 * (1 - partial[1] ** 2).log()
    log_prior = log_prior + torch.distributions.LKJCholesky(3, 2.0).log_prob(corr) + jacobian
    a, b, c = spread_u  # L = [[eᵃ, 0], [b, eᶜ]]; d(LLᵀ)/dL = 2² L₁₁² L₂₂; dL/du = eᵃ eᶜ
    root = torch.stack([torch.stack([a.exp(), torch.zeros(())]), torch.stack([b, c.exp()])])
    spread = root @ root.T
    wishart = scipy.stats.wishart(df=5, scale=torch.eye(2).numpy()).logpdf(spread.numpy())
    log_prior = log_prior + float(wishart) + 2 * math.log(2) + 2 * a + c + a + c
    y_hat = rate + (share * torch.tensor([1.0, 2.0, 3.0])).sum() + weights.sum() + phase.prod() + corr.sum() + spread.logdet()
    x, y = points
    return log_prior, torch.distributions.Normal(y_hat * x[:, 0], 0.5).log_prob(y).sum()


def make(program, theta="map", **options):
    return HierarchicalModel(program, example=episode(counts_as_targets=True), theta=theta, **options)


# --- packing and densities


def bounds_that_move(points):
    """Supports with a bound for each task, or each draw: from a parameter, a global site and another task-level site."""
    least = pyro.param("least", torch.tensor(0.5), constraint=constraints.positive)
    top = pyro.sample("top", dist.Pareto(torch.ones(2), 3.0).to_event(1))
    with pyro.plate("tasks", points.num_tasks, dim=-2):
        width = pyro.sample("width", dist.Pareto(least, 3.0))
        part = pyro.sample("part", dist.Uniform(-width, width))
        both = pyro.sample("both", dist.Uniform(-1.0, top.expand(points.num_tasks, 1, 2)).to_event(1))
        with pyro.plate("points", points.num_points, dim=-1):
            pyro.sample("y", dist.Normal(width + part * points.x[..., 0] + both.sum(-1), 1.0), obs=points.y)


@pytest.mark.parametrize("theta", ["map", "variational"])
@pytest.mark.parametrize("draws", [(), (3,), (2, 3)])
def test_bounds_may_follow_from_theta_and_other_sites(float64, draws, theta):
    model, e, phi = make(bounds_that_move, theta), episode(), torch.randn(*draws, 4, 4)
    assert [(site.name, site.size) for site in model.sites] == [("width", 1), ("part", 1), ("both", 2)]
    sites, top = model.unpack(phi), model.theta()["top"].detach()
    share = phi[..., 1:].sigmoid()
    width = 0.5 + phi[..., 0].exp()
    part, both = width * (2 * share[..., 0] - 1), (1 + top) * share[..., 1:] - 1
    for name, value in (("width", width), ("part", part), ("both", both)):
        torch.testing.assert_close(sites[name].detach(), value, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.pack(sites), phi, rtol=0, atol=1e-7)
    prior = (3 * 0.5**3 / width**4).log() + phi[..., 0] + (share * (1 - share)).log().sum(-1)  # a Uniform's 1/width is its Jacobian's
    torch.testing.assert_close(model.log_prior(phi, e).detach(), prior, rtol=0, atol=1e-9)
    mean = (width + both.sum(-1))[..., None] + part[..., None] * e.support.filled().x[..., 0].double()
    likelihood = torch.where(e.support.mask, dist.Normal(mean, 1.0).log_prob(e.support.filled().y.double()), 0.0).sum(-1)
    torch.testing.assert_close(model.log_likelihood(phi, e.support).detach(), likelihood, rtol=0, atol=1e-9)


@pytest.mark.parametrize("draws", [(), (2,), (2, 3)])
def test_pack_is_the_inverse_of_unpack_for_every_kind_of_site(float64, draws):
    model = make(every_kind_of_site)
    assert {site.name: site.size for site in model.sites} == SIZES
    phi = torch.randn(*draws, 4, 15)
    sites = model.unpack(phi)
    assert {n: v.shape for n, v in sites.items()} == {n: (*draws, 4, *event) for n, event in EVENTS.items()}
    torch.testing.assert_close(model.pack(sites), phi, rtol=0, atol=1e-9)
    for name, support in {"rate": "positive", "share": "simplex", "corr": "corr_cholesky", "spread": "positive_definite"}.items():
        assert getattr(constraints, support).check(sites[name]).all()
    assert (sites["phase"] > torch.tensor([-1.0, 0.0])).all()
    assert (sites["phase"] < torch.tensor([3.0, 2.0])).all()


def test_the_log_joint_is_the_one_by_hand_jacobians_and_all(float64):
    model, points = make(every_kind_of_site), ragged((3, 1, 0, 5))
    phi = torch.randn(3, 4, 15)
    log_prior, log_likelihood = model.log_parts(phi, points)
    for draw in range(3):
        for task, data in enumerate(points.to_tasks()):
            prior, likelihood = by_hand(phi[draw, task], data)
            torch.testing.assert_close(log_prior[draw, task], prior, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(log_likelihood[draw, task], likelihood, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.log_joint(phi, points), log_prior + log_likelihood, rtol=0, atol=0)
    torch.testing.assert_close(model.log_prior(phi, points), log_prior, rtol=0, atol=0)
    torch.testing.assert_close(model.log_likelihood(phi, points), log_likelihood, rtol=0, atol=0)


@pytest.mark.parametrize("program", [every_kind_of_site, positive_program, radon_program, linear_program])
def test_draws_in_front_are_draws_one_by_one(float64, program):
    model, points = make(program), episode(counts_as_targets=True).union()
    phi = torch.randn(2, 3, 4, model.dim)
    together = model.log_joint(phi, points)
    assert together.shape == (2, 3, 4)
    apart = torch.stack([torch.stack([model.log_joint(phi[i, j], points) for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def test_a_points_plate_and_a_hyperprior_by_hand(float64):
    model = make(positive_program)
    with torch.no_grad():
        model.params["centre"].fill_(0.2)
        model.theta_loc.fill_(math.log(1.7))
    points = ragged((3, 1, 0, 5), counts_as_targets=True)
    phi = torch.randn(4, 2)
    prior = scipy.stats.norm(0.2, 1.7).logpdf(phi[:, 0]) + scipy.stats.norm.logpdf(phi[:, 1])
    torch.testing.assert_close(model.log_prior(phi, points), torch.as_tensor(prior), rtol=0, atol=1e-12)
    for task, (x, y) in enumerate(points.to_tasks()):
        rate = phi[task, 0].exp() * torch.exp(0.3 * phi[task, 1] * x[:, 0])
        assert model.log_likelihood(phi, points)[task].item() == pytest.approx(scipy.stats.poisson(rate).logpmf(y).sum(), abs=1e-12)
    assert model.log_hyperprior().item() == pytest.approx(scipy.stats.halfcauchy.logpdf(1.7), abs=1e-12)
    assert model.theta()["spread"].item() == pytest.approx(1.7)
    theta = torch.tensor([0.4])
    joint = model.log_full_joint(phi, theta, points)
    with model.theta_at(theta):
        wanted = model.log_joint(phi, points).sum()
    assert joint.item() == pytest.approx(wanted.item() + scipy.stats.halfcauchy.logpdf(math.exp(0.4)) + 0.4, abs=1e-12)


@pytest.mark.parametrize("program", [positive_program, radon_program])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_stands_in_the_padding_changes_no_gradient(float64, program, value):
    model, points = make(program), ragged((3, 0, 5, 2), counts_as_targets=True)
    odd = Points(*(torch.where(points.mask.view(4, 5, *(1,) * (v.dim() - 2)), v, value) for v in points[:2]), points.mask)
    results = []
    for p in (points, odd):
        phi = torch.zeros(4, model.dim, requires_grad=True)
        joint = model.log_joint(phi, p)
        results.append((joint, *torch.autograd.grad(joint.sum(), [phi, *model.params.values()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_program_may_scale_and_mask_itself(float64):
    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            with pyro.poutine.scale(scale=0.5):
                level = pyro.sample("level", dist.Normal(1.0, 2.0))
            with pyro.poutine.scale(scale=3.0), pyro.poutine.mask(mask=points.x[..., 0].sum(-1) > 0):
                y_hat = level[..., None] + 0 * points.x[..., 0]
                pyro.sample("y", dist.Normal(y_hat, 1.0).mask(points.x[..., 0] > -1).to_event(1), obs=points.y)

    points = Points.of(torch.tensor([[1.0, 2.0, -2.0], [-1.0, 0.0, 0.0]])[..., None], torch.tensor([[0.3, 0.4, 0.5], [0.6, 0.7, 0.8]]))
    model = HierarchicalModel(program, example=points)
    log_prior, log_likelihood = model.log_parts(torch.zeros(2, 1), points)
    assert log_prior.tolist() == pytest.approx([0.5 * scipy.stats.norm(1, 2).logpdf(0)] * 2, abs=1e-12)
    assert log_likelihood.tolist() == pytest.approx([3 * scipy.stats.norm.logpdf([0.3, 0.4]).sum(), 0.0], abs=1e-12)


# --- the prior and where φ starts


def start_of(*fns):
    """`initial` and the sd of a model whose only site has the prior ``fn``."""
    moments = []
    for fn in fns:

        def program(points, fn=fn):
            with pyro.plate("tasks", points.num_tasks):
                value = pyro.sample("value", fn)
                pyro.sample("y", dist.Normal(value[..., None] + 0 * points.x[..., 0], 1.0).to_event(1), obs=points.y)

        moments.append([v[0, 0].item() for v in HierarchicalModel(program).prior_moments(ragged((2, 3)))])
    return moments


def test_initial_is_the_mean_in_packed_space(float64):
    u = scipy.integrate.quad(lambda v: math.log(v) * scipy.stats.halfcauchy(scale=2.0).pdf(v), 0, math.inf)[0]
    variance = scipy.integrate.quad(lambda t: t * t / math.cosh(t) / math.pi, -60, 60)[0]
    lognormal, cauchy, normal = start_of(dist.LogNormal(0.0, 1.0), dist.HalfCauchy(torch.tensor(2.0)), dist.Normal(3.0, 2.0))
    assert lognormal == [0.0, 1.0]
    assert normal == [3.0, 2.0]
    assert cauchy == pytest.approx([u, math.sqrt(variance)], abs=1e-7)
    assert u == pytest.approx(math.log(2.0), abs=1e-7)


def test_initial_is_differentiable_in_theta(float64):
    def program(points):
        concentration = pyro.param("concentration", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("tasks", points.num_tasks):
            rate = pyro.sample("rate", dist.Gamma(concentration, 3.0))
            pyro.sample("y", dist.Normal(rate[..., None] + 0 * points.x[..., 0], 1.0).to_event(1), obs=points.y)

    model, points = HierarchicalModel(program), ragged((2, 3))
    mean, sd = model.prior_moments(points)  # of log Gamma: ψ(a) − log b, √ψ'(a)
    (slope,) = torch.autograd.grad(mean[0, 0], model.params["concentration"], retain_graph=True)
    (slope_sd,) = torch.autograd.grad(sd[0, 0], model.params["concentration"])
    first, second = (torch.polygamma(k, torch.tensor(2.0)) for k in (1, 2))
    assert slope.item() == pytest.approx(2 * first.item(), abs=1e-8)
    assert slope_sd.item() == pytest.approx((second / first.sqrt()).item(), abs=1e-8)


@pytest.mark.parametrize("program", [every_kind_of_site, positive_program, radon_program, linear_program])
def test_the_prior_is_a_distribution_in_packed_space(float64, program):
    model, points = make(program), episode(counts_as_targets=True).support
    prior = model.prior(points)
    assert prior.batch_shape == (4,)
    assert prior.event_shape == (model.dim,)
    draws = prior.sample((3, 2))
    assert draws.shape == (3, 2, 4, model.dim)
    torch.testing.assert_close(prior.log_prob(draws), model.log_prior(draws, points), rtol=1e-12, atol=1e-12)
    assert torch.equal(prior.mean, model.initial(points))
    assert isinstance(getattr(prior, "base_dist", None), dist.Normal) == (program in (radon_program, linear_program))
    many = prior.sample((20_000,))
    mean, sd = model.prior_moments(points)
    close = 5 * sd / 20_000**0.5 + (0.04 if program is every_kind_of_site else 0.0)  # the moments of a Wishart are of 4,096 draws
    assert ((many.mean(0) - mean).abs() < close).all()
    torch.testing.assert_close(many.std(0), sd.expand(4, -1), rtol=0.05, atol=0)


def test_a_prior_that_depends_on_data_and_other_sites_is_no_normal(float64):
    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            level = pyro.sample("level", dist.Normal(points.x[..., 0, 0], 1.0))
            effect = pyro.sample("effect", dist.Normal(2 * level, 0.5))
            y_hat = level[..., None] + effect[..., None] * points.x[..., 0]
            pyro.sample("y", dist.Normal(y_hat, 1.0).to_event(1), obs=points.y)

    model, points = HierarchicalModel(program), ragged((2, 3))
    first = points.x[:, 0, 0]
    torch.testing.assert_close(model.initial(points), torch.stack([first, 2 * first], -1), rtol=0, atol=1e-12)
    phi = torch.randn(2, 2)
    wanted = scipy.stats.norm(first).logpdf(phi[:, 0]) + scipy.stats.norm(2 * phi[:, 0], 0.5).logpdf(phi[:, 1])
    torch.testing.assert_close(model.prior(points).log_prob(phi), torch.as_tensor(wanted), rtol=0, atol=1e-12)
    draws = model.prior(points).sample((50_000,))
    assert torch.corrcoef(draws[:, 0].T)[0, 1].item() == pytest.approx(2 / math.sqrt(4.25), abs=0.01)


@pytest.mark.parametrize(
    ("handler", "counts"),
    [
        (lambda: pyro.poutine.scale(scale=0.25), 0.25), (lambda: pyro.poutine.scale(scale=torch.tensor(3.0)), 3.0),
        (lambda: pyro.poutine.mask(mask=torch.tensor(False)), 0.0), (lambda: pyro.poutine.mask(mask=True), 1.0),
    ],
)  # fmt: skip
def test_a_prior_under_a_handler_counts_what_it_counts_in_the_joint(float64, handler, counts):
    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            with handler():
                level = pyro.sample("level", dist.Normal(0.5, 2.0))
            pyro.sample("y", dist.Normal(level[..., None] + 0 * points.x[..., 0], 1.0).mask(points.mask).to_event(1), obs=points.y)

    e, phi = episode(), torch.randn(3, 4, 1)
    model = HierarchicalModel(program, example=e)
    wanted = counts * dist.Normal(0.5, 2.0).log_prob(phi[..., 0])
    torch.testing.assert_close(model.log_prior(phi, e), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.prior(e).log_prob(phi), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [True, False])
def test_a_masked_prior_is_not_taken_for_a_normal(float64, masked):
    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            fn = dist.Normal(torch.zeros(2), 1.0)
            level = pyro.sample("level", (fn.mask(torch.tensor([True, False])) if masked else fn).to_event(1)).sum(-1)
            pyro.sample("y", dist.Normal(level[..., None] + 0 * points.x[..., 0], 1.0).to_event(1), obs=points.y)

    model, points, phi = HierarchicalModel(program), ragged((2, 3)), torch.randn(2, 2)
    wanted = scipy.stats.norm.logpdf(phi).sum(-1) if not masked else scipy.stats.norm.logpdf(phi[:, 0])
    torch.testing.assert_close(model.prior(points).log_prob(phi), torch.as_tensor(wanted), rtol=0, atol=1e-12)


# --- predicting


@pytest.mark.parametrize("draws", [(), (5,), (2, 3)])
@pytest.mark.parametrize("program", [radon_program, positive_program, every_kind_of_site])
def test_predict_is_the_distribution_of_one_point(float64, draws, program):
    model = make(program)
    phi = 0.1 * torch.randn(*draws, 4, model.dim)
    x = torch.randn(4, 6, 1)
    fn = model.predict(phi, x)
    assert fn.batch_shape == (*draws, 4, 6)
    assert fn.event_shape == ()
    y = torch.floor(torch.rand(4, 6) * 4)
    total = model.log_likelihood(phi, Points.of(x, y))
    torch.testing.assert_close(fn.log_prob(y).sum(-1), total, rtol=1e-12, atol=1e-12)


def test_a_likelihood_without_phi_is_expanded(float64):
    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            pyro.sample("level", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(points.x[..., 0], 1.0).to_event(1), obs=points.y)

    fn = HierarchicalModel(program, example=ragged((2, 2))).predict(torch.zeros(5, 2, 1), torch.ones(2, 3, 1))
    assert fn.batch_shape == (5, 2, 3)
    assert fn.mean.shape == (5, 2, 3)


def test_outputs_of_several_numbers(float64):
    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y_hat = w[..., None, :] * points.x
            pyro.sample("y", dist.Normal(y_hat, 1.0).to_event(2), obs=points.y)

    x, y = torch.randn(3, 4, 1), torch.randn(3, 4, 2)
    mask = torch.arange(4) < torch.tensor([4, 2, 0])[:, None]
    model, phi = HierarchicalModel(program, example=Points.of(x, y, mask)), torch.randn(5, 3, 2)
    fn = model.predict(phi, x)
    assert (fn.batch_shape, fn.event_shape) == ((5, 3, 4), (2,))
    each = torch.as_tensor(scipy.stats.norm(phi[:, :, None] * x).logpdf(y)).sum(-1)
    torch.testing.assert_close(fn.log_prob(y), each, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.log_likelihood(phi, Points.of(x, y, mask)), (each * mask).sum(-1), rtol=0, atol=1e-12)


# --- θ


def with_global_sites(points):
    """Hyperpriors whose KL to a Normal in packed space is known."""
    mean = pyro.sample("mean", dist.Normal(torch.tensor([1.0, -1.0]), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(0.5, 0.8))
    pyro.factor("weight", -mean.square().sum())
    with pyro.plate("tasks", points.num_tasks):
        w = pyro.sample("w", dist.Normal(mean[..., 0], spread))
        pyro.sample("y", dist.Normal(w[..., None] + mean[..., 1] * points.x[..., 0], 1.0).to_event(1), obs=points.y)


def test_a_point_theta(float64):
    model = HierarchicalModel(with_global_sites, example=ragged((2, 3)))
    assert [site.name for site in model.theta_sites] == ["mean", "spread"]
    assert model.theta_loc.tolist() == [1.0, -1.0, 0.5]
    theta = model.theta()
    assert theta["mean"].tolist() == [1.0, -1.0]
    assert theta["spread"].item() == pytest.approx(math.exp(0.5))
    wanted = scipy.stats.norm(0, 2).logpdf([0.0, 0.0]).sum() + scipy.stats.lognorm(0.8, scale=math.exp(0.5)).logpdf(math.exp(0.5)) - 2
    assert model.log_hyperprior().item() == pytest.approx(wanted, abs=1e-12)
    assert model.global_loss().item() == pytest.approx(-wanted, abs=1e-12)
    assert model.draw_theta() is None


def test_a_variational_theta(float64):
    model = HierarchicalModel(with_global_sites, example=ragged((2, 3)), theta="variational")
    assert model.theta_log_scale.exp().tolist() == pytest.approx([0.1] * 3)
    with torch.no_grad():
        model.theta_loc.copy_(torch.tensor([0.2, 0.4, 0.6]))
        model.theta_log_scale.copy_(torch.tensor([0.3, 0.5, 0.7]).log())
    loc, sd = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, 2.0, 0.8])
    m, s = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.3, 0.5, 0.7])
    kl = ((sd / s).log() + (s**2 + (m - loc) ** 2) / (2 * sd**2) - 0.5).sum().item()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([model.draw_theta(generator) for _ in range(4000)]).detach()
    assert ((draws.mean(0) - m).abs() < 5 * s / 4000**0.5).all()
    torch.testing.assert_close(draws.std(0), s, rtol=0.06, atol=0)
    for draw in draws[:2]:  # the KL is the same at every draw; the factor is not, it is taken where θ stands
        with model.theta_at(draw):
            assert model.global_loss().item() == pytest.approx(kl + draw[:2].square().sum().item(), abs=1e-12)
            assert model.theta()["spread"].item() == pytest.approx(draw[2].exp().item())
    assert model.draw_theta(generator).requires_grad
    assert torch.equal(*(model.draw_theta(torch.Generator().manual_seed(1)) for _ in range(2)))


def test_theta_of_draws(float64):
    model = HierarchicalModel(with_global_sites, example=ragged((2, 3)), theta="nuts")
    assert model.theta_draws.tolist() == [[1.0, -1.0, 0.5]]
    model.theta_draws = torch.arange(12.0).reshape(4, 3)
    assert model.theta()["mean"].tolist() == [4.5, 5.5]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([model.draw_theta(generator) for _ in range(40)])
    assert {tuple(d) for d in draws.tolist()} == {tuple(d) for d in model.theta_draws.tolist()}


def test_theta_at_is_put_back_even_after_an_error(float64):
    model, points = HierarchicalModel(with_global_sites, example=ragged((2, 3))), ragged((2, 3))
    phi, other = torch.zeros(2, 1), torch.tensor([0.0, 0.0, 0.0])
    before = model.log_joint(phi, points)
    with model.theta_at(other):
        inside = model.log_joint(phi, points)
        with model.theta_at(None):
            assert torch.equal(model.log_joint(phi, points), inside)
    with pytest.raises(KeyError), model.theta_at(other):
        raise KeyError
    assert torch.equal(model.log_joint(phi, points), before)
    assert not torch.equal(inside, before)
    wanted = scipy.stats.norm.logpdf([0.0, 0.0])
    with model.theta_at(other):
        assert model.log_prior(phi, points).tolist() == pytest.approx(wanted, abs=1e-12)


def test_without_a_hyperprior_theta_adds_nothing(float64):
    model = make(radon_program)
    assert not model.has_hyperprior
    assert (model.global_loss().item(), model.log_hyperprior().item(), model.theta()) == (0.0, 0.0, {})
    assert model.draw_theta() is None


# --- the module


def test_the_first_data_make_theta_and_an_episode_is_both_sets(float64):
    for first in (lambda m, e: m.initial(e), lambda m, e: m.log_joint(torch.zeros(4, 2), e), lambda m, e: m(e), lambda m, e: m.prior(e)):
        model, e = HierarchicalModel(radon_program), episode()
        first(model, e)
        assert set(dict(model.named_parameters())) == {"params.mean", "params.sd", "params.noise"}
    phi = torch.randn(4, 2)
    torch.testing.assert_close(
        model.log_likelihood(phi, e), model.log_likelihood(phi, e.support) + model.log_likelihood(phi, e.query), rtol=0, atol=1e-12
    )


def with_constants(points):
    """Numbers and an improper prior, which have no dtype of their own, and a Cholesky factor, which has no mean."""
    with pyro.plate("tasks", points.num_tasks):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        shift = pyro.sample("shift", dist.ImproperUniform(constraints.positive, (), ()))
        corr = pyro.sample("corr", dist.LKJCholesky(2, points.x.new_tensor(2.0)))
        y_hat = (level + shift.log() + corr[..., 1, 0])[..., None] + 0 * points.x[..., 0]
        pyro.sample("y", dist.Normal(y_hat, 1.0).to_event(1), obs=points.y)


@pytest.mark.parametrize("theta", ["map", "variational", "nuts"])
@pytest.mark.parametrize("program", [linear_program, radon_program, positive_program, with_global_sites, with_constants])
def test_dtype_follows_the_data_and_the_module(program, theta):
    def check(model, dtype, data):
        phi = model.initial(data)
        assert {p.dtype for p in [*model.parameters(), *model.buffers()]} <= {dtype}
        assert {phi.dtype, model.prior_moments(data)[1].dtype} == {dtype}
        assert program is with_constants or model.prior(data).sample().dtype == dtype  # nothing draws from an improper prior
        assert {model.log_joint(phi, data).dtype, model.log_likelihood(phi, data).dtype, model.global_loss().dtype} == {dtype}
        assert {v.dtype for v in model.unpack(phi).values()} == {dtype}
        assert model.predict(phi, data.x).mean.dtype == dtype
        assert model.log_joint(phi, data).isfinite().all()

    single = episode(counts_as_targets=True).support.filled()
    check(HierarchicalModel(program, single, theta=theta), torch.float32, single)
    check(HierarchicalModel(program, single.to(torch.float64), theta=theta), torch.float64, single.to(torch.float64))
    check(HierarchicalModel(program, single, theta=theta).double(), torch.float64, single)
    check(HierarchicalModel(program, theta=theta).double(), torch.float64, single)
    check(HierarchicalModel(program, single, theta=theta).double().float(), torch.float32, single)


def test_example_data_that_carry_a_graph_leave_none_behind(float64):
    points = ragged((3, 2))
    x = points.x.clone().requires_grad_()
    model = HierarchicalModel(radon_program, example=points._replace(x=2 * x))
    assert not model.made_up_points(1, 1).x.requires_grad
    copy.deepcopy(model)


@pytest.mark.parametrize("early", [True, False])
def test_reinitialise_is_another_start_by_seed(float64, early):
    def model(seed):
        torch.manual_seed(0)
        made = HierarchicalModel(radon_program) if early else make(radon_program)
        made.reinitialise(seed, jitter=0.5)
        made.materialise(episode())
        return torch.cat([p.detach().flatten() for p in made.parameters()])

    start = torch.cat([p.detach().flatten() for p in make(radon_program).parameters()])
    one, same, other = model(1), model(1), model(2)
    assert torch.equal(one, same)
    assert (one != other).all()
    assert (one - start).abs().max() < 0.5 * 5
    assert torch.equal(make(radon_program).params["mean"], torch.tensor([1.0, -0.5]))


def test_reinitialise_draws_layers_anew_and_the_prior_starts_there(float64):
    torch.manual_seed(0)
    network = WeightNetwork(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    model = HierarchicalModel.from_network(network, Gaussian(0.3), NormalPrior.of(network, 0.2), example=episode())
    before = model.program.prior.loc.detach().clone()
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    model.reinitialise(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.program.prior.loc != before).all()
    assert torch.equal(model.program.prior.loc, network.initial())
    torch.testing.assert_close(model.program.prior.scale, torch.full((13,), 0.2), rtol=0, atol=1e-12)
    assert model.program.likelihood.noise.item() == pytest.approx(0.3)
    assert torch.equal(twin.program.prior.loc, before)
    assert torch.equal(twin.network.initial(), before)


def test_gradient_evaluations_count_draws(float64):
    model, points = make(radon_program), ragged((2, 3, 1, 1))
    model.log_joint(torch.zeros(4, 2), points)
    assert model.gradient_evaluations == 0
    model.log_joint(torch.zeros(5, 4, 2, requires_grad=True), points)
    model.log_joint(torch.zeros(4, 2, requires_grad=True), points)
    assert model.gradient_evaluations == 6


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_targets_that_the_likelihood_cannot_give_are_named(float64, value):
    model, points = make(positive_program), ragged((3, 2, 1, 1), counts_as_targets=True)
    y = points.y.clone()
    y[1, 1] = value
    wanted = rf"query\.y: task 1, point 1: the likelihood expects a value in IntegerGreaterThan\(lower_bound=0\), got {value}"
    with pytest.raises(ValueError, match=wanted):
        model.check_targets(points._replace(y=y), "query")
    y[1, 1], y[2, 2] = 1.0, value  # padding
    model.check_targets(points._replace(y=y))


def test_it_takes_an_episode_of_unequal_sets(float64):
    model = make(radon_program)
    e = Episode(ragged((3, 0, 1)), ragged((1, 4, 2), seed=1))
    assert model.log_joint(torch.zeros(3, 2), e).shape == (3,)
    assert model.prepare(e).num_points == 7
