"""The model is a Pyro model: SVI, autoguides, NUTS and Predictive take it as it is, and give the right answers."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from bayesmeta import HierarchicalModel, meta_train
from bayesmeta.learners import ABML, Exact
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import HeadNetwork, NormalPrior, WeightNetwork
from bayesmeta.packing import peel

from .conftest import episode, linear_program, positive_program, radon_program, ragged


class Features(PyroModule):
    """Features that all tasks share: a PyroModule and a plain one, a constrained and a plain parameter, a site with a hyperprior."""

    def __init__(self):
        super().__init__()
        self.features = PyroModule[nn.Linear](1, 2)
        self.shift = nn.Linear(1, 1)
        self.mean = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.sd = PyroParam(torch.tensor(0.8), dist.constraints.positive)
        self.noise = PyroSample(dist.LogNormal(torch.tensor(-0.5), 0.5))

    def forward(self, points):
        noise, features = self.noise, torch.tanh(self.features(points.x)) + self.shift(points.x)
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.Normal(self.mean, self.sd).to_event(1))
            y_hat = (w[..., None, :] * features).sum(-1)
            pyro.sample("y", dist.Normal(y_hat, noise).mask(points.mask).to_event(1), obs=points.y)


class Plain(nn.Module):
    """A module of torch's that also has a ``pyro.param`` statement."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(1, 2)

    def forward(self, points):
        noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
        features = torch.tanh(self.features(points.x))
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal((w[..., None, :] * features).sum(-1), noise).to_event(1), obs=points.y)


def network():
    return HierarchicalModel.from_network(WeightNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))), Gaussian(0.5))


def head():
    return HierarchicalModel.from_network(HeadNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh()), 3, 1), Gaussian(0.5))


MODELS = {
    "function": lambda: HierarchicalModel(radon_program),
    "points plate and hyperprior": lambda: HierarchicalModel(positive_program),
    "PyroModule": lambda: HierarchicalModel(Features()),
    "module": lambda: HierarchicalModel(Plain()),
    "weight network": network,
    "head network": head,
}
GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": lambda model: AutoLowRankMultivariateNormal(model, rank=2),
    "AutoDelta": AutoDelta,
}
POINTS_PLATE = {"points plate and hyperprior"}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name):
    torch.manual_seed(1)
    e = episode(counts_as_targets=True)
    model = MODELS[name]()
    model.materialise(e)
    return model, e


def moved(model, before):
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


# --- training


@every_model
@pytest.mark.parametrize("guide", GUIDES)
def test_svi_with_an_autoguide_moves_the_modules_own_parameters(float64, name, guide):
    model, e = make(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    svi = SVI(model, GUIDES[guide](model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.tensor(svi.step(e)).isfinite() for _ in range(2))
    # the centre and scale of q(θ) belong to our own guides: an autoguide has its own
    assert moved(model, before) == {n for n in before if not n.startswith("theta_")}
    assert not any(n.startswith(("params", "program", "mean", "features", "network")) for n in pyro.get_param_store())


@pytest.mark.parametrize(
    ("name", "theta"),
    [*((name, "map") for name in MODELS), ("points plate and hyperprior", "variational"), ("PyroModule", "variational")],
)
def test_svi_and_meta_train_take_the_same_path(float64, name, theta):
    model, e = make(name)
    one = HierarchicalModel(model.program, e, theta=theta)
    two = copy.deepcopy(one)
    ours, theirs = (ABML(model, inner_steps=2, inner_lr=0.05) for model in (one, two))
    adam = lambda p: torch.optim.Adam(p, 0.01, eps=1e-12)  # noqa: E731
    history = meta_train(ours, e, steps=6, generator=torch.Generator().manual_seed(3), optimizer=adam)
    pyro.set_rng_seed(3)
    svi = SVI(two, theirs.guide, pyro.optim.Adam({"lr": 0.01, "eps": 1e-12}), TraceMeanField_ELBO())
    losses = [svi.step(e) / e.num_tasks for _ in range(6)]
    torch.testing.assert_close(torch.tensor(history.loss), torch.tensor(losses), rtol=1e-9, atol=1e-9)
    for (n, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=n)
    assert not pyro.get_param_store().keys()


def test_a_fixed_scale_stays_where_it_is(float64):
    net = WeightNetwork(nn.Linear(1, 1))
    model = HierarchicalModel.from_network(net, Gaussian(0.5, learn=False), NormalPrior.of(net, 0.3, learn_scale=False))
    e = episode()
    model.materialise(e)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(e)
    assert moved(model, before) == {"program.prior.loc"}


def test_pyros_elbo_modules_train_it_with_torchs_optimisers(float64):
    model, e = make("PyroModule")
    with pyro.settings.context(module_local_params=True):
        guide = AutoNormal(model)
        elbo = Trace_ELBO()(model, guide)
        elbo(e)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.Adam(elbo.parameters(), 0.01)
        elbo(e).backward()
        optimizer.step()
    assert moved(model, before) == {n for n in before if not n.startswith("theta_")}
    assert not pyro.get_param_store().keys()


# --- right answers


def at_the_exact_posterior(kind, model, points, q):
    """An autoguide of ``model`` set to ``q``, batch (T,), event (D,): its latent vector is φ of all tasks, site by site."""
    guide = GUIDES[kind](model)
    guide(points)
    tasks, dim = q.mean.shape
    ends = torch.tensor([site.size for site in model.sites]).cumsum(0).tolist()
    columns = [torch.arange(end - site.size, end) for site, end in zip(model.sites, ends, strict=True)]
    order = torch.cat([(torch.arange(tasks)[:, None] * dim + c).flatten() for c in columns])
    covariance = torch.block_diag(*q.covariance_matrix)[order][:, order]
    sd = covariance.diagonal().sqrt()
    with torch.no_grad():
        if kind == "AutoNormal":
            (site,) = model.sites
            getattr(guide.locs, site.name).copy_(q.mean)
            setattr(guide.scales, site.name, PyroParam(sd[:, None], dist.constraints.positive))
            return guide
        guide.loc.copy_(q.mean.flatten()[order])
        if kind == "AutoMultivariateNormal":  # scale times a factor with a unit diagonal
            tril = torch.linalg.cholesky(covariance)
            sd = tril.diagonal()
            guide.scale_tril = PyroParam(tril / sd[:, None], dist.constraints.unit_lower_cholesky)
        else:
            guide.cov_factor.zero_()
        guide.scale = PyroParam(sd, dist.constraints.positive)
    return guide


@pytest.mark.parametrize(
    ("program", "features", "kind"),
    [
        (linear_program, 2, "AutoMultivariateNormal"),
        (radon_program, 1, "AutoMultivariateNormal"),
        (linear_program, 1, "AutoNormal"),  # one parameter a task: the posterior is diagonal
        (linear_program, 1, "AutoLowRankMultivariateNormal"),
    ],
)
def test_the_elbo_of_an_autoguide_at_the_exact_posterior_is_the_log_evidence(float64, program, features, kind):
    points = ragged((4, 1, 0, 9), features)
    model = HierarchicalModel(program, example=points)
    exact = Exact(model)
    guide = at_the_exact_posterior(kind, model, points, exact.adapt(points).distribution)
    wanted = exact.log_evidence(points).sum().item()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        assert -Trace_ELBO().loss(model, guide, points) == pytest.approx(wanted, abs=1e-10)


def test_given_an_episode_pyro_sees_the_evidence_of_both_sets(linear_model):
    e = episode(features=2)
    exact = Exact(linear_model)
    guide = exact.adapt(e.union()).guide()
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        assert -elbo.loss(linear_model, guide, e) == pytest.approx(exact.log_evidence(e.union()).sum().item(), abs=1e-10)


@every_model
def test_the_potential_that_pyros_nuts_climbs_is_ours(float64, name):
    """−log p(y, φ, θ) with the Jacobians of the packing, at any place, to rounding."""
    model, e = make(name)
    _, potential, _, _ = pyro.infer.mcmc.util.initialize_model(model, model_args=(e,))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        phi, theta = (torch.randn(n, generator=generator) for n in ((4, model.dim), (sum(s.size for s in model.theta_sites),)))
        values, start = {}, 0
        for site in model.sites:
            part = phi[:, start : (start := start + site.size)].reshape(4, *(1,) * (name in POINTS_PLATE), *site.shape)
            values[site.name] = part
        start = 0
        for site in model.theta_sites:
            values[site.name] = theta[start : (start := start + site.size)].reshape(site.shape)
        wanted = -model.log_full_joint(phi, theta, e)
        torch.testing.assert_close(potential(values), wanted, rtol=0, atol=1e-10)


@every_model
def test_autodeltas_loss_is_the_point_estimates(float64, name):
    """−Σ log p(y, φ | θ) − log p(θ) in constrained values: the convention of `log_hyperprior`."""
    model, e = make(name)
    phi = 0.3 * torch.randn(4, model.dim)
    sites = model.unpack(phi)
    values = {n: v.detach()[:, None] if name in POINTS_PLATE else v.detach() for n, v in sites.items()}
    values |= {n: v.detach() for n, v in model.theta().items()}
    guide = AutoDelta(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values=values))
    log_det = sites["rate"].log() if "rate" in sites else torch.zeros(4)  # the Jacobian of the packing, which AutoDelta does not count
    wanted = -(model.log_joint(phi, e) - log_det).sum() - model.log_hyperprior()
    assert Trace_ELBO().loss(model, guide, e) == pytest.approx(wanted.item(), abs=1e-10)


@pytest.mark.parametrize("name", ["function", "points plate and hyperprior", "PyroModule", "head network"])
def test_mcmc_runs_on_every_kind_of_model(float64, name):
    model, e = make(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mcmc = MCMC(NUTS(model, max_tree_depth=3), 6, warmup_steps=6, disable_progbar=True)
    mcmc.run(e)
    draws = mcmc.get_samples()
    assert set(draws) == {site.name for site in (*model.sites, *model.theta_sites)}
    assert all(len(v) == 6 and v.isfinite().all() for v in draws.values())
    assert not moved(model, before)
    assert not pyro.get_param_store().keys()


def test_mcmc_is_within_four_standard_errors_of_the_exact_posterior(linear_model):
    points = ragged((4, 1), 2)
    pyro.set_rng_seed(1)
    mcmc = MCMC(NUTS(linear_model, max_tree_depth=4), 250, warmup_steps=100, disable_progbar=True)
    mcmc.run(points)
    draws = mcmc.get_samples()["w"]
    q = Exact(linear_model).adapt(points).distribution
    effective = mcmc.diagnostics()["w"]["n_eff"].clamp(max=250)
    assert effective.min() > 60
    assert ((draws.mean(0) - q.mean).abs() < 4 * (q.variance / effective).sqrt()).all()
    assert ((draws.std(0) / q.variance.sqrt()).log().abs() < 4 / (2 * effective).sqrt()).all()


def test_predictive_takes_posterior_samples(float64):
    model, e = make("points plate and hyperprior")
    rate = torch.tensor([0.5, 2.0, 20.0, 0.1]).expand(1000, 4)[..., None]
    samples = {"rate": rate, "slope": torch.zeros(1000, 4, 1), "spread": torch.ones(1000)}
    ask = e.query._replace(y=None, mask=torch.ones_like(e.query.mask))
    y = Predictive(model, samples)(ask)["y"]
    assert y.shape == (1000, 4, e.query.num_points)
    assert ((y.mean(0) - rate[0]).abs() < 5 * (rate[0] / 1000).sqrt()).all()


@every_model
def test_predictive_with_a_posteriors_guide(float64, name):
    model, e = make(name)
    q = ABML(model, inner_steps=2, inner_lr=0.02).adapt(e.support)
    draws = Predictive(model, guide=q.guide(), num_samples=5)(e.support._replace(y=None))
    assert draws["y"].shape == (5, 4, e.support.num_points)
    assert {site.name for site in model.sites} <= set(draws)


@pytest.mark.parametrize("name", ["function", "points plate and hyperprior", "weight network"])
def test_predictive_runs_all_draws_at_once(float64, name):
    model, e = make(name)
    phi = 0.1 * torch.randn(5, 4, model.dim)
    sites = {n: v.detach().reshape(5, 4, *(1,) * (name in POINTS_PLATE), *v.shape[2:]) for n, v in model.unpack(phi).items()}
    theta = {n: v.detach().expand(5, 1, 1) for n, v in model.theta().items()}
    ask = e.support.filled()._replace(y=None)
    trace = Predictive(model, sites | theta, parallel=True).get_vectorized_trace(ask)
    base, _, _ = peel(trace.nodes["y"]["fn"])
    torch.testing.assert_close(base.mean, model.predict(phi, ask.x).mean, rtol=1e-12, atol=1e-12)


# --- the object itself


@every_model
def test_nothing_of_ours_goes_into_pyros_store_and_its_own_stays(float64, name):
    theirs = pyro.param("theirs", torch.tensor(2.0))
    model, e = make(name)
    phi = model.initial(e)
    model.log_joint(phi, e), model.unpack(phi), model.prior(e).sample(), model.predict(phi, e.query.filled().x)
    pyro.poutine.trace(model).get_trace(e)
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    assert pyro.param("theirs").unconstrained() is theirs.unconstrained()
    assert pyro.settings.get("module_local_params") is False
    assert pyro.poutine.runtime._PYRO_STACK == []


@every_model
def test_a_deep_copy_is_independent(float64, name):
    model, e = make(name)
    pyro.poutine.trace(model).get_trace(e)
    twin = copy.deepcopy(model)
    phi = 0.1 * torch.randn(4, model.dim)
    wanted = twin.log_joint(phi, e).detach()
    torch.testing.assert_close(model.log_joint(phi, e), wanted, rtol=0, atol=0)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(e)
    assert torch.equal(twin.log_joint(phi, e), wanted)
    assert not torch.equal(model.log_joint(phi, e), wanted)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}


@every_model
def test_a_run_samples_the_programs_own_sites(float64, name):
    model, e = make(name)
    trace = pyro.poutine.trace(model).get_trace(e)
    plates = {"tasks", "points"} if name in POINTS_PLATE else {"tasks"}
    sampled = {n for n, site in trace.nodes.items() if site["type"] == "sample"}
    assert sampled == {"y"} | plates | {site.name for site in (*model.sites, *model.theta_sites)}
    parameters = {id(site["value"].unconstrained()) for site in trace.nodes.values() if site["type"] == "param"}
    assert parameters == {id(p) for n, p in model.named_parameters() if not n.startswith("theta_")}


@pytest.mark.parametrize("word", ["values", "half", "training", "type", "pop", "layer.weight", "a b"])
def test_any_name_does_for_a_parameter(float64, word):
    def program(points):
        mean = pyro.param(word, torch.tensor(0.25))
        with pyro.plate("tasks", points.num_tasks):
            level = pyro.sample("level", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(level[..., None] + 0 * points.x[..., 0], 1.0).to_event(1), obs=points.y)

    e = episode()
    model = HierarchicalModel(program, example=e).train().double()
    (parameter,) = model.parameters()
    assert torch.equal(model.initial(e), parameter.detach().expand(4, 1))
    twin = HierarchicalModel(program, example=e)
    with torch.no_grad():
        parameter.fill_(3.0)
    twin.load_state_dict(model.state_dict())
    assert twin.initial(e)[0, 0] == 3.0


@pytest.mark.parametrize(("one", "other"), [("a.b", "a__b"), ("a__b", "a.b"), ("half", "half_"), ("half_", "half")])
def test_names_that_look_alike_are_two_parameters(float64, one, other):
    def program(points):
        mean, sd = pyro.param(one, torch.tensor(0.25)), pyro.param(other, torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("tasks", points.num_tasks):
            level = pyro.sample("level", dist.Normal(mean, sd))
            pyro.sample("y", dist.Normal(level[..., None] + 0 * points.x[..., 0], 1.0).to_event(1), obs=points.y)

    e = episode()
    model = HierarchicalModel(program, example=e)
    assert len(list(model.parameters())) == 2
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    twin = HierarchicalModel(program, example=e)
    twin.load_state_dict(model.state_dict())
    for moments in (model.prior_moments(e), twin.prior_moments(e)):
        torch.testing.assert_close(torch.stack([v[0, 0] for v in moments]), torch.tensor([1.25, 2.0]), rtol=0, atol=1e-12)
