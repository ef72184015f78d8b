"""What every learner promises, run over a dictionary name → constructor. A new learner is one line here."""

import pickle
import warnings

import pyro
import pytest
import torch
from torch import nn

from bayesmeta import AbstractMetaLearner, Episode, HierarchicalModel, MixturePosterior, Points, TaskPosterior, meta_train
from bayesmeta.learners import (
    ABML,
    BMAML,
    LLAMA,
    MAML,
    NUTS,
    PLATIPUS,
    BayesianBlackBox,
    BlackBox,
    CompletePooling,
    Ensemble,
    Exact,
    NoPooling,
    Reptile,
)
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.networks import HeadNetwork, NormalPrior, WeightNetwork

from ..conftest import episode, hyper_program, positive_program, radon_program, ragged

LEARNERS = {
    "NoPooling": lambda model: NoPooling(model, inner_steps=4),
    "CompletePooling": lambda model: CompletePooling(model),
    "MAML": lambda model: MAML(model, inner_steps=3, inner_lr=0.1),
    "FOMAML": lambda model: MAML(model, inner_steps=3, inner_lr=0.1, first_order=True),
    "MetaSGD": lambda model: MAML(model, inner_steps=2, inner_lr=0.1, learn_lr="per_parameter"),
    "Reptile": lambda model: Reptile(model, inner_steps=3, inner_lr=0.1),
    "LLAMA": lambda model: LLAMA(model, inner_steps=3, inner_lr=0.1, eta=0.05, damping=0.1),
    "LLAMA evidence": lambda model: LLAMA(model, inner_steps=3, inner_lr=0.02, objective="evidence"),
    "LLAMA diagonal": lambda model: LLAMA(
        model, inner_steps=3, inner_lr=0.02, objective="evidence", curvature="diagonal", hessian="gauss_newton"
    ),
    "ABML": lambda model: ABML(model, inner_steps=3, inner_lr=0.1),
    "ABML antithetic": lambda model: ABML(model, inner_steps=3, inner_lr=0.1, noise="antithetic", num_draws=4, kl_weight=0.5),
    "ABML low rank": lambda model: ABML(model, inner_steps=2, inner_lr=0.05, rank=1, step_units="prior"),
    "BMAML": lambda model: BMAML(model, num_particles=3, inner_steps=2, inner_lr=1e-3),
    "BMAML predictive": lambda model: BMAML(
        model, num_particles=3, inner_steps=2, inner_lr=1e-3, objective="predictive", bandwidth=0.5
    ),
    "BMAML first order": lambda model: BMAML(model, num_particles=3, inner_steps=2, inner_lr=1e-3, first_order=True),
    "PLATIPUS": lambda model: PLATIPUS(model, inner_steps=2, inner_lr=0.05, num_particles=4, noise="antithetic", num_draws=2),
    "BlackBox": lambda model: BlackBox(model, hidden=8),
    "BayesianBlackBox": lambda model: BayesianBlackBox(model, hidden=8, posterior="full"),
    "BayesianBlackBox lecture": lambda model: BayesianBlackBox(
        model, hidden=8, objective="lecture", kl_weight=0.5, num_draws=3, encoder="recurrent"
    ),
    "BayesianBlackBox neural process": lambda model: BayesianBlackBox(model, hidden=8, objective="neural_process", posterior="flow"),
    "BayesianBlackBox predictive": lambda model: BayesianBlackBox(model, hidden=8, objective="predictive", encoder="attention"),
    "Ensemble of MAMLs": lambda model: Ensemble(model, lambda one: MAML(one, inner_steps=2, inner_lr=0.1), size=3),
    "Ensemble of ABMLs": lambda model: Ensemble(model, lambda one: ABML(one, inner_steps=2, inner_lr=0.1), size=2, seed=3),
    "NUTS": lambda model: NUTS(model, num_draws=8, warmup=8, chains=1),
    "Exact": lambda model: Exact(model),
}
QUADRATIC_ONLY = {"Exact"}
SAMPLERS = {"NUTS"}
LAPLACE = {"LLAMA", "LLAMA evidence", "LLAMA diagonal"}
AMORTISED = {name for name in LEARNERS if name.startswith("BayesianBlackBox")}
# and NUTS, whose draws are checked on their own
EXACT_PRIOR = {"ABML", "ABML antithetic", "ABML low rank", "PLATIPUS", "Exact"} | LAPLACE | AMORTISED
POINTS = {"NoPooling", "CompletePooling", "MAML", "FOMAML", "MetaSGD", "Reptile", "BlackBox"}
ENSEMBLES = {"Ensemble of MAMLs", "Ensemble of ABMLs"}  # of an empty support each member has its own prior: see test_ensemble
STEIN = {"BMAML", "BMAML predictive", "BMAML first order"}  # Stein steps on the prior: see test_bmaml
# a stopped gradient, by definition: first order, leaders, φ_K as a target, or a gradient that is another objective's
STOPPED = {"FOMAML", "MetaSGD", "NoPooling", "CompletePooling", "Reptile", "BMAML", "BMAML first order"}

every_learner = pytest.mark.parametrize("name", LEARNERS)
every_meta_learner = pytest.mark.parametrize("name", [name for name in LEARNERS if name not in SAMPLERS])
pytestmark = pytest.mark.filterwarnings("ignore:NUTS:RuntimeWarning")  # eight draws are few, and NUTS says so


def network(classes=None):
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, classes or 1))
    return HierarchicalModel.from_network(WeightNetwork(body), Categorical(classes) if classes else Gaussian(0.5)).double()


def head():
    torch.manual_seed(1)
    return HierarchicalModel.from_network(HeadNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh()), 3, 1), Gaussian(0.5)).double()


MODELS = {
    "user program": lambda: HierarchicalModel(radon_program),
    "program with points plate, hyperprior and positive site": lambda: HierarchicalModel(positive_program),
    "weight network": network,
    "head network": head,
    "classification network": lambda: network(3),
}


def uncertain(kind):
    """Models whose θ has a posterior of its own."""
    if kind == "user program":
        return HierarchicalModel(hyper_program, theta="variational")
    torch.manual_seed(1)
    body = WeightNetwork(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    prior = NormalPrior.of(body, 0.1, hyperprior=(1.0, 0.01))
    return HierarchicalModel.from_network(body, Gaussian(0.5), prior, theta="variational").double()


def data(model_name, counts=(3, 5, 2, 8), queries=(4, 1, 6, 2)):
    e = episode(counts, queries, counts_as_targets="positive" in model_name)
    if "classification" in model_name:
        e = Episode(*(p._replace(y=(p.y.abs() * 2).long().clamp(max=2)) for p in e))
    return e


def make(name, model_name="user program"):
    if name in QUADRATIC_ONLY and model_name not in ("user program", "head network"):
        pytest.skip(f"{name} serves models whose log joint is quadratic in φ")
    torch.set_default_dtype(torch.float64)
    learner = LEARNERS[name](MODELS[model_name]())
    e = data(model_name)
    learner.materialise(e.support)
    return learner, e


def seeded():
    return torch.Generator().manual_seed(5)


def numbers(posterior):
    """Everything a posterior is made of, the task axis first."""
    if isinstance(posterior, MixturePosterior):
        return tuple(v for c in posterior.components for v in numbers(c))
    q = posterior.distribution
    if hasattr(q, "values"):
        return (q.values.transpose(0, 1),)
    return (q.mean,) if posterior.is_point else (q.mean, q.variance)


def with_padding(points, columns, value):
    """``points`` with more padded columns, and ``value`` in all the padding."""
    def pad(v):
        if v is None:
            return None
        v = torch.cat([v, v.new_zeros(len(v), columns, *v.shape[2:])], 1)
        real = mask.view(*mask.shape, *(1,) * (v.dim() - 2))
        return torch.where(real, v, torch.full_like(v, value if v.is_floating_point() else 10**6))

    mask = torch.cat([points.mask, torch.zeros(len(points.mask), columns, dtype=torch.bool)], 1)
    return Points(pad(points.x), pad(points.y), mask)


@every_learner
@pytest.mark.parametrize("model_name", MODELS)
def test_shapes(name, model_name):
    learner, e = make(name, model_name)
    posterior = learner.adapt(e.support, generator=seeded())
    dim = learner.model.dim
    assert isinstance(posterior, MixturePosterior if name in ENSEMBLES else TaskPosterior)
    assert posterior.distribution.batch_shape == (4,)
    assert posterior.distribution.event_shape == (dim,)
    assert posterior.is_point == (name in POINTS)
    assert posterior.draws(6, generator=seeded()).shape == (6, 4, dim)
    assert not posterior.draws(2).requires_grad
    predictive = posterior.predict(e.query.filled().x, 5)
    assert predictive.log_prob(e.query.filled().y).shape == (4, 6)
    assert predictive.log_prob(e.query.filled().y).isfinite().all()
    assert all(v.shape[:2] == (3, 4) for v in posterior.sites(3).values())
    if isinstance(learner, AbstractMetaLearner):
        loss = learner.meta_loss(e, generator=seeded())
        assert loss.shape == (4,)
        assert loss.isfinite().all()
        assert learner.global_loss().shape == ()


@every_learner
def test_a_batch_is_its_tasks_one_at_a_time(name):
    """Tasks do not see each other. Where noise is drawn (inner draws of ABML) it is shared by tasks, so it is the same."""
    if name in SAMPLERS:
        pytest.skip("NUTS draws its own noise; that its tasks are independent is tested against exact posteriors")
    learner, e = make(name)
    together = numbers(learner.adapt(e.support, generator=seeded()))
    for task in range(4):
        count = int(e.support.counts[task])
        alone = Points(e.support.x[[task], :count], e.support.y[[task], :count], e.support.mask[[task], :count])
        for a, b in zip(together, numbers(learner.adapt(alone, generator=seeded())), strict=True):
            torch.testing.assert_close(a[task], b[0], rtol=0, atol=1e-10)


@every_learner
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_padding_values_change_nothing_to_the_last_bit(name, model_name, value):
    learner, e = make(name, model_name)
    zero, odd = (Episode(*(with_padding(p, 2, v) for p in e)) for v in (0.0, value))
    for a, b in zip(*(numbers(learner.adapt(x.support, generator=seeded())) for x in (zero, odd)), strict=True):
        assert torch.equal(a, b)
    if isinstance(learner, AbstractMetaLearner):
        losses, gradients = [], []
        for x in (zero, odd):
            loss = learner.meta_loss(x, generator=seeded())
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss.sum(), learner.trained_parameters(), allow_unused=True))
        assert torch.equal(*losses)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_learner
def test_padding_amount_changes_nothing_to_1e6(name):
    learner, e = make(name)
    more = Episode(*(with_padding(p, 7, 3.0) for p in e))
    if name not in SAMPLERS:  # a chain magnifies rounding
        for a, b in zip(*(numbers(learner.adapt(x.support, generator=seeded())) for x in (e, more)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    if isinstance(learner, AbstractMetaLearner):
        losses = [learner.meta_loss(x, generator=seeded()) for x in (e, more)]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-6)


@every_meta_learner
def test_the_order_of_points_does_not_matter(name):
    learner, _ = make(name)
    full = Episode(*(Points.of(torch.randn(4, n, 1), torch.randn(4, n)) for n in (5, 6)))
    shuffled = Episode(*(Points(p.x[:, order], p.y[:, order], p.mask) for p in full for order in [torch.randperm(p.num_points)]))
    for a, b in zip(*(numbers(learner.adapt(x.support, generator=seeded())) for x in (full, shuffled)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    torch.testing.assert_close(*(learner.meta_loss(x, generator=seeded()) for x in (full, shuffled)), rtol=0, atol=1e-9)


@every_meta_learner
def test_the_order_of_tasks_goes_through(name):
    learner, e = make(name)
    order = torch.tensor([2, 0, 3, 1])
    for a, b in zip(*(numbers(learner.adapt(x, generator=seeded())) for x in (e.support, e.support.select(order))), strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-10)


@every_meta_learner
@pytest.mark.parametrize("model_name", MODELS)
def test_exactly_the_trained_parameters_get_a_gradient(name, model_name):
    learner, e = make(name, model_name)
    (learner.meta_loss(e, generator=seeded()).sum() + learner.global_loss()).backward()
    touched = {n for n, p in learner.named_parameters() if p.grad is not None}
    trained = {id(p) for p in learner.trained_parameters()}
    assert touched == {n for n, p in learner.named_parameters() if id(p) in trained}
    assert touched
    assert any(bool((p.grad != 0).any()) for p in learner.trained_parameters())


@pytest.mark.parametrize("name", ["MAML", "FOMAML", "NoPooling", "CompletePooling", "Reptile"])
def test_what_point_learners_do_not_train(name):
    learner, _ = make(name)
    assert not any(p is learner.model.params["sd"] for p in learner.trained_parameters())


@every_learner
def test_empty_support(name):
    learner, _ = make(name)
    model = learner.model
    empty = ragged((0, 0))._replace(y=None, x=torch.zeros(2, 0, 1))
    posterior = learner.adapt(empty, generator=seeded())
    some = learner.adapt(ragged((0, 4)), generator=seeded()) if name not in SAMPLERS else posterior
    start, (mean, sd) = model.initial(empty).detach(), model.prior_moments(empty)
    for q in (posterior, some):
        if name in EXACT_PRIOR:
            torch.testing.assert_close(q.distribution.mean[0], mean[0].detach(), rtol=0, atol=1e-12)
            torch.testing.assert_close(q.distribution.variance[0], sd[0].detach() ** 2, rtol=0, atol=1e-12)
        elif name in POINTS:
            torch.testing.assert_close(q.mean[0], start[0], rtol=0, atol=1e-12)
    if name in SAMPLERS:
        many = NUTS(model, num_draws=20_000, chains=1).adapt(empty, generator=seeded()).draws()
        torch.testing.assert_close(many.mean(0), mean.detach(), rtol=0, atol=0.04)
        torch.testing.assert_close(many.std(0), sd.detach(), rtol=0.03, atol=0)


@every_learner
def test_randomness_is_explicit(name):
    learner, e = make(name)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = numbers(learner.adapt(e.support, generator=seeded()))
    learner.adapt(e.support)
    posterior = learner.adapt(e.support)
    posterior.draws(3)
    posterior.predict(e.query.filled().x, 3).sample(2)
    if isinstance(learner, AbstractMetaLearner):
        learner.meta_loss(e)
        learner.meta_loss(e, generator=seeded())
        learner.trained_parameters()
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(first, numbers(learner.adapt(e.support, generator=seeded())), strict=True):
        assert torch.equal(a, b)
    assert not pyro.get_param_store().keys()


@every_meta_learner
@pytest.mark.parametrize("model_name", MODELS)
def test_the_meta_gradient_is_the_finite_difference(name, model_name):
    """Along a random direction in θ; of first-order methods only that there is a gradient."""
    learner, e = make(name, model_name)
    parameters = learner.trained_parameters()
    gradients = torch.autograd.grad(learner.meta_loss(e, generator=seeded()).sum(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    if name in STOPPED:
        assert any(bool((g != 0).any()) for g in gradients)
        return
    direction = [torch.randn_like(p) for p in parameters]
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
        values.append(learner.meta_loss(e, generator=seeded()).sum().item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p -= step * d
    slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-5)


@every_learner
@pytest.mark.parametrize("kind", ["user program", "weight network"])
def test_theta_with_a_posterior_splits_the_uncertainty(name, kind):
    """Under draws of θ the predictive is a mixture, and its variance the sum of three parts; training moves q(θ)."""
    if name in QUADRATIC_ONLY and kind == "weight network":
        pytest.skip(f"{name} serves models whose log joint is quadratic in φ")
    torch.set_default_dtype(torch.float64)
    learner, e = LEARNERS[name](uncertain(kind)), data(kind)
    posterior = learner.adapt_over_theta(e.support, num_theta=3, generator=seeded())
    assert isinstance(posterior, MixturePosterior)
    parts = posterior.predict(e.query.filled().x, 12, generator=seeded()).decompose()
    torch.testing.assert_close(parts.total, parts.aleatoric + parts.phi + parts.theta, rtol=0, atol=1e-12)
    pooling = name in ("NoPooling", "CompletePooling")  # their φ comes from the data alone, whatever θ says
    assert (parts.aleatoric > 0).all() and (parts.phi >= 0).all() and bool((parts.theta > 0).all()) == (not pooling)
    assert bool((parts.phi > 0).any()) == (name not in POINTS and name != "Ensemble of MAMLs")
    if isinstance(learner, AbstractMetaLearner) and name not in ENSEMBLES and not pooling:
        before = learner.model.theta_loc.detach().clone()
        history = meta_train(learner, e, steps=2, num_tasks=4)
        assert history.steps == 2
        assert not torch.equal(before, learner.model.theta_loc.detach())


@every_learner
def test_bad_input_is_named(name):
    learner, e = make(name)
    y = e.support.y.clone()
    y[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"support\.y: task 2, point 1: expected a finite number.*got nan"):
        learner.adapt(e.support._replace(y=y))
    x = e.support.x.clone()
    x[1, 0] = float("inf")
    with pytest.raises(ValueError, match=r"support\.x: task 1, point 0: expected a finite number, got"):
        learner.adapt(e.support._replace(x=x))
    with pytest.raises(ValueError, match="y: expected targets"):
        learner.adapt(e.support._replace(y=None))
    with pytest.raises(ValueError, match="mask: expected bool"):
        learner.adapt(e.support._replace(mask=e.support.mask.long()))


@every_learner
def test_float32_and_unmaterialised(name):
    learner = LEARNERS[name](HierarchicalModel(radon_program))
    support = ragged((3, 2))
    assert support.x.dtype == torch.float32
    posterior = learner.adapt(support, generator=seeded())
    assert posterior.mean.dtype == torch.float32
    assert posterior.mean.isfinite().all()


@every_learner
@pytest.mark.parametrize("materialised", [False, True])
def test_a_pickled_learner_adapts_as_before(name, materialised):
    torch.set_default_dtype(torch.float64)
    learner, e = LEARNERS[name](HierarchicalModel(radon_program)), data("user program")
    if materialised:
        learner.materialise(e.support)
    twin = pickle.loads(pickle.dumps(learner))
    pairs = zip(*(numbers(one.adapt(e.support, generator=seeded())) for one in (learner, twin)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@every_meta_learner
def test_a_state_is_loaded_whole_or_refused(name):
    """Without `materialise` where the model has seen data; where it has not, an error says what to do."""
    learner, e = make(name)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 0.01
    twin = LEARNERS[name](HierarchicalModel(radon_program, example=e.support))
    twin.load_state_dict(learner.state_dict())
    pairs = zip(*(numbers(one.adapt(e.support, generator=seeded())) for one in (learner, twin)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(RuntimeError, match=r"has not seen data yet, so it has no place for .*example=points.*materialise\(points\)"):
        LEARNERS[name](HierarchicalModel(radon_program)).load_state_dict(learner.state_dict())


def test_a_state_for_a_network_that_has_seen_no_data():
    """A network has its parameters from the start; a learner may not."""
    learner, e = make("MAML", "weight network")
    with torch.no_grad():
        learner.model.program.prior.loc += 0.1
    twin = LEARNERS["MAML"](network())
    twin.load_state_dict(learner.state_dict())
    assert torch.equal(learner.adapt(e.support).mean, twin.adapt(e.support).mean)
    learner.model.load_state_dict(twin.model.state_dict())
    platipus, _ = make("PLATIPUS", "weight network")
    with pytest.raises(RuntimeError, match=r"this PLATIPUS has not seen data yet, so it has no place for 'gamma_p\.value', 'gamma_q"):
        LEARNERS["PLATIPUS"](network()).load_state_dict(platipus.state_dict())
    with pytest.raises(RuntimeError, match="its starting point is still to come"):  # drawn when it sees data, which would undo the load
        ensemble = LEARNERS["Ensemble of MAMLs"](network())
        ensemble.load_state_dict(ensemble.state_dict())


def test_the_warning_filter_is_needed():
    """Eight draws do give a NUTS warning: the filter of this file hides something real."""
    learner, e = make("NUTS")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.adapt(e.support)
    assert any("NUTS" in str(w.message) for w in caught)
