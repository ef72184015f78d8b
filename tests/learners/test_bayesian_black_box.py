"""BayesianBlackBox: each objective by hand from q's parameters, one maths through two doors, and what it converges to."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from bayesmeta import Episode, HierarchicalModel, Points, meta_train
from bayesmeta.learners.bayesian_black_box import BayesianBlackBox
from bayesmeta.learners.encoders import random_part
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.networks import DecoderNetwork, HeadNetwork
from bayesmeta.randomness import rng
from bayesmeta.tasks import LinearGaussian

from ..conftest import episode, linear_program, positive_program, radon_program, ragged
from .closed_forms import posterior

KINDS = ("diagonal", "full", "flow")


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def moved(learner, data):
    """The learner with every weight of its own moved off its start."""
    learner.materialise(data)
    with torch.no_grad():
        for name, p in learner.named_parameters():
            if not name.startswith("model."):
                p += 0.3 * torch.randn_like(p)
    return learner


def train(learner, family, steps):
    """Adam with a cosine schedule from 3e-3 to 0."""
    meta_train(
        learner, family, steps=steps, tasks_per_step=32, optimizer=lambda p: torch.optim.Adam(p, 3e-3),
        schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip


def nothing(points):
    """An empty set of points of the same tasks."""
    return Points(points.x[:, :0], points.y[:, :0], points.mask[:, :0])


def alone(points, task):
    return Points(*(v[[task]][:, points.mask[task]] for v in points))


def radon(e, **arguments):
    return moved(BayesianBlackBox(HierarchicalModel(radon_program, example=e), hidden=8, **arguments), e)


def q_of(learner, points):
    """q's mean and sd as tensors with a graph, one task at a time, without padding: u's mean by least squares, its variances by a sum."""
    rows = []
    for task in range(points.num_tasks):
        one = alone(points, task)
        m, s = learner.model.prior_moments(one)
        e, parts = learner.encoder(one)[0], []
        g = learner.factors.gate * e
        for x, y in zip(one.x[0], one.y[0], strict=True):
            b = learner.factors.linear["b"](x) + learner.factors.network["b"](torch.cat([x, g]))
            xy = torch.cat([x, y[None]])
            parts.append((b, learner.factors.linear["t"](xy) + learner.factors.network["t"](torch.cat([xy, g]))))
        b, t = (torch.stack(v) for v in zip(*parts, strict=True))
        ridge = torch.linalg.lstsq(torch.cat([b, torch.eye(2)]), torch.cat([t, torch.zeros(2, 1)])).solution[:, 0]
        r = torch.log1p((math.e - 1) * learner.head(e).exp())
        variance = 1e-6 + (1 - 1e-6) * r**2 / (1 + sum(v**2 for v in b))
        rows.append((m + s * ridge, s * variance.sqrt()))
    return (torch.cat(v) for v in zip(*rows, strict=True))


def log_likelihood(learner, phi, points):
    """Σ_j log N(y_j; level + effect x_j, 1) of `radon_program`, task by task; ``phi (M, T, 2)``."""
    noise = learner.model.params["noise"].exp()
    rows = []
    for task in range(points.num_tasks):
        x, y = points.x[task][points.mask[task]][:, 0], points.y[task][points.mask[task]]
        level, effect = phi[:, task, 0, None], phi[:, task, 1, None]
        rows.append(Normal(level + effect * x, noise).log_prob(y).sum(-1))
    return torch.stack(rows, -1)


def normal_kl(mean, sd, mean2, sd2):
    return ((sd / sd2).square() / 2 + ((mean - mean2) / sd2).square() / 2 - 0.5 + (sd2 / sd).log()).sum(-1)


def draws(learner, mean, sd, generator):
    with rng(generator):
        noise = torch.stack([torch.stack([torch.randn(len(mean)) for _ in range(2)], -1) for _ in range(learner.num_draws)])
    return mean + sd * noise


def prior(learner):
    return learner.model.params["mean"], learner.model.params["sd"].exp()


def test_elbo_by_hand(float64):
    e = episode()
    learner = radon(e, num_draws=3, kl_weight=0.7, subsets=False)
    both = e.union()
    mean, sd = q_of(learner, both)
    phi = draws(learner, mean, sd, seeded())
    wanted = -log_likelihood(learner, phi, both).mean(0) + 0.7 * normal_kl(mean, sd, *prior(learner))
    torch.testing.assert_close(learner.meta_loss(e, generator=seeded()), wanted, rtol=0, atol=1e-10)


def test_elbo_of_s_and_a_random_part_of_q_by_hand(float64):
    e = episode()
    learner = radon(e)
    sizes = set()
    for seed in range(12):
        generator = seeded(seed)
        with rng(generator):
            learner.model.noise(4)
            share = (2 * torch.rand(4) - 1).clamp(min=0)
            filled = e.query.filled()
            part = random_part(filled, learner.encoder.points.values(filled), share)
        sizes |= {(task, int(part[task].sum())) for task in range(4)}
        a = e.support.union(e.query._replace(mask=part))
        mean, sd = q_of(learner, a)
        phi = draws(learner, mean, sd, seeded(seed))
        wanted = -log_likelihood(learner, phi, a).mean(0) + normal_kl(mean, sd, *prior(learner))
        torch.testing.assert_close(learner.meta_loss(e, generator=seeded(seed)), wanted, rtol=0, atol=1e-10)
    assert {size for task, size in sizes if task == 1} == {0, 1}
    assert len({size for task, size in sizes if task == 2}) > 2


def test_lecture_by_hand(float64):
    e = episode()
    learner = radon(e, objective="lecture", num_draws=2, kl_weight=0.5)
    mean, sd = q_of(learner, e.support)
    phi = draws(learner, mean, sd, seeded())
    wanted = -log_likelihood(learner, phi, e.query).mean(0) + 0.5 * normal_kl(mean, sd, *prior(learner))
    torch.testing.assert_close(learner.meta_loss(e, generator=seeded()), wanted, rtol=0, atol=1e-10)


def test_neural_process_by_hand(float64):
    e = episode()
    learner = radon(e, objective="neural_process", num_draws=2, kl_weight=2.0)
    mean, sd = q_of(learner, e.union())
    mean_s, sd_s = q_of(learner, e.support)
    kl = kl_divergence(Normal(mean, sd), Normal(mean_s, sd_s)).sum(-1)
    assert (kl > 1e-4).all()
    wanted = -log_likelihood(learner, draws(learner, mean, sd, seeded()), e.query).mean(0) + 2 * kl
    torch.testing.assert_close(learner.meta_loss(e, generator=seeded()), wanted, rtol=0, atol=1e-10)


def test_the_neural_process_kl_of_full_covariances_and_of_flows(float64):
    e = episode()
    learner = radon(e, objective="neural_process", posterior="full")
    no_kl = copy.deepcopy(learner)
    no_kl.kl_weight = 0.0
    one, two = (learner.adapt(p).distribution for p in (e.union(), e.support))
    wanted = kl_divergence(*(MultivariateNormal(q.loc, q.covariance_matrix) for q in (one, two)))
    got = learner.meta_loss(e, generator=seeded()) - no_kl.meta_loss(e, generator=seeded())
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)

    learner = radon(e, objective="neural_process", posterior="flow", num_draws=4000)
    no_kl = copy.deepcopy(learner)
    no_kl.kl_weight = 0.0
    got = learner.meta_loss(e, generator=seeded()) - no_kl.meta_loss(e, generator=seeded())
    one, two = (learner.adapt(p).distribution for p in (e.union(), e.support))
    phi = one.sample((4000,))
    ratio = one.log_prob(phi) - two.log_prob(phi)
    assert ((got - ratio.mean(0)).abs() < 5 * ratio.std(0) / math.sqrt(2000)).all()


def test_predictive_by_hand_with_a_loop_over_points_and_draws(float64):
    e = episode()
    learner = radon(e, objective="predictive", num_draws=4)
    mean, sd = q_of(learner, e.support)
    phi = draws(learner, mean, sd, seeded())
    loss = learner.meta_loss(e, generator=seeded())
    for task in range(4):
        total = 0.0
        for x, y in zip(*(v[task][e.query.mask[task]] for v in e.query[:2]), strict=True):
            densities = [Normal(phi[m, task, 0] + phi[m, task, 1] * x[0], 1.0).log_prob(y).exp() for m in range(4)]
            total -= torch.log(sum(densities) / 4).item()
        assert loss[task].item() == pytest.approx(total, abs=1e-10)


def test_ten_draws_for_predictive_and_one_for_the_others(float64):
    for objective, wanted in (("elbo", 1), ("lecture", 1), ("neural_process", 1), ("predictive", 10)):
        assert BayesianBlackBox(HierarchicalModel(radon_program), objective=objective).num_draws == wanted


@pytest.mark.parametrize("encoder", ["deep_set", "recurrent", "attention"])
@pytest.mark.parametrize("program", [radon_program, positive_program])
@pytest.mark.parametrize("theta", ["map", "variational"])
@pytest.mark.parametrize("num_draws", [1, 3])
def test_the_loss_on_points_is_pyros_mean_field_elbo(float64, program, theta, encoder, num_draws):
    if theta == "variational" and num_draws > 1 and program is positive_program:
        pytest.skip("Pyro draws θ anew for every particle, here one θ is shared by all of a pass")
    points = ragged((3, 5, 2, 8), counts_as_targets=True)
    model = HierarchicalModel(program, example=points, theta=theta)
    learner = moved(BayesianBlackBox(model, hidden=8, encoder=encoder, num_draws=num_draws), points)
    pyro.set_rng_seed(7)
    wanted = TraceMeanField_ELBO(num_particles=num_draws).loss(model, learner.guide, points)
    generator = seeded(7)
    with model.theta_at(model.draw_theta(generator)):
        got = learner.meta_loss(Episode(points, nothing(points)), generator=generator).sum() + learner.global_loss()
    assert got.item() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", [radon_program, positive_program])
def test_the_loss_on_an_episode_without_subsets_is_pyros_elbo(float64, program, kind):
    e = episode(counts_as_targets=True)
    model = HierarchicalModel(program, example=e)
    learner = moved(BayesianBlackBox(model, hidden=8, posterior=kind, subsets=False), e)
    pyro.set_rng_seed(7)
    elbo = TraceMeanField_ELBO() if kind == "diagonal" else Trace_ELBO()
    wanted = elbo.loss(model, learner.guide, e)
    got = learner.meta_loss(e, generator=seeded(7)).sum() + learner.global_loss()
    assert got.item() == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_svi_and_meta_train_take_the_same_path(float64, kind):
    points = ragged((3, 5, 2, 8))
    e = Episode(points, nothing(points))
    one = radon(points, posterior=kind)
    two = copy.deepcopy(one)
    history = meta_train(one, e, steps=10, generator=seeded(3), optimizer=lambda p: torch.optim.SGD(p, 4e-3))
    pyro.set_rng_seed(3)
    elbo = TraceMeanField_ELBO() if kind == "diagonal" else Trace_ELBO()
    svi = SVI(two.model, two.guide, pyro.optim.SGD({"lr": 1e-3}), elbo)
    losses = []
    for _ in range(10):
        losses.append(svi.step(points) / 4)
        torch.rand(4), torch.randn(2), torch.rand(())  # what `meta_loss` draws for A, on top
    torch.testing.assert_close(torch.tensor(history.loss), torch.tensor(losses), rtol=0, atol=1e-9)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_guide_sees_the_support_only_unless_it_is_told(float64, kind):
    e = episode()
    changed = e._replace(query=e.query._replace(y=e.query.y + 5))
    for arguments, same in (({}, True), ({"objective": "lecture", "subsets": False}, True), ({"subsets": False}, False)):
        learner = radon(e, posterior=kind, **arguments)
        traces = []
        for data in (e, changed):
            pyro.set_rng_seed(1)
            traces.append(pyro.poutine.trace(learner.guide).get_trace(data).nodes["level"]["value"])
        assert torch.equal(*traces) == same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["elbo", "lecture", "neural_process", "predictive"])
def test_without_points_q_is_the_prior(float64, kind, objective):
    learner = radon(episode(), posterior=kind, objective=objective)
    mean, sd = prior(learner)
    for points in (ragged((0, 0)), ragged((0, 6)), Points(torch.zeros(1, 0, 1), None, torch.zeros(1, 0, dtype=torch.bool))):
        q = learner.adapt(points).distribution
        torch.testing.assert_close(q.mean[0], mean.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(q.variance[0], sd.detach() ** 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_q_is_near_the_prior_for_one_point(float64, kind):
    learner = BayesianBlackBox(HierarchicalModel(radon_program), posterior=kind)
    q = learner.adapt(ragged((1, 1, 1))).distribution
    assert (q.mean - torch.tensor([1.0, -0.5])).abs().max() < 1.0
    assert ((q.stddev > 0.3) & (q.stddev < 1.2)).all()


def test_the_scale_has_a_floor(float64):
    e = episode()
    for kind in KINDS:
        learner = BayesianBlackBox(HierarchicalModel(radon_program, example=e), posterior=kind, min_scale=0.2)
        learner.materialise(e)
        with torch.no_grad():
            learner.factors.linear["b"].weight.mul_(1e6)
            if kind == "flow":
                for layer in (learner.flow.elementwise[-1], *(network[-1] for network in learner.flow.networks)):
                    layer.weight.zero_(), layer.bias.zero_()
                learner.flow.elementwise[-1].bias[6:] = -1e4
        q = learner.adapt(e.support).distribution
        if kind == "full":
            smallest = torch.linalg.eigvalsh(q.covariance_matrix).amin(-1).sqrt()
            torch.testing.assert_close(smallest, torch.full((4,), 0.2), rtol=0, atol=1e-6)
        else:  # the flow has a floor of its own, on top
            torch.testing.assert_close(q.stddev, torch.full((4, 2), 0.2 if kind == "diagonal" else 0.04), rtol=0, atol=1e-6)
    for bad in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=f"min_scale: expected a number between 0 and 1, in prior sds, got {bad}"):
            BayesianBlackBox(HierarchicalModel(radon_program), min_scale=bad)


def test_bad_choices_are_named():
    model = HierarchicalModel(radon_program)
    with pytest.raises(ValueError, match="objective: expected one of 'elbo', 'lecture', 'neural_process', 'predictive', got 'versa'"):
        BayesianBlackBox(model, objective="versa")
    with pytest.raises(ValueError, match="posterior: expected one of 'diagonal', 'full', 'flow', got 'normal'"):
        BayesianBlackBox(model, posterior="normal")
    with pytest.raises(ValueError, match="num_draws: expected a whole number of at least 1, got 0"):
        BayesianBlackBox(model, num_draws=0)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("dim", [2, 5])
def test_it_holds_every_linear_gaussian_posterior_exactly(float64, kind, dim):
    """b = x ∘ sd / σ and t = (y − x · m) / σ are linear in (x, y): set so, q is the exact posterior or its mean field, at any N."""
    points = ragged((4, 0, 40, 1), dim)
    small = points.select([0, 1, 3])  # fewer points than weights: the mean field solves the smaller system
    small = Points(*(v[:, :4] for v in small))
    model = HierarchicalModel(linear_program, example=points)
    learner = BayesianBlackBox(model, hidden=8, posterior=kind, min_scale=1e-9)
    learner.materialise(points)
    m, sd, noise = model.params["mean"], model.params["sd"].exp(), model.params["noise"].exp()
    with torch.no_grad():
        for layer in (*(n[-1] for n in learner.factors.network.values()), learner.head.network[-1], *learner.factors.linear.values()):
            layer.weight.zero_(), layer.bias.zero_()
        learner.factors.linear["b"].weight.copy_(torch.diag(sd / noise))
        learner.factors.linear["t"].weight.copy_(torch.cat([-m, torch.ones(1)]) / noise)
    for data in (points, small):
        q = learner.adapt(data).distribution
        for task in range(data.num_tasks):
            mean, precision = (v.detach() for v in posterior(model, data, task))
            torch.testing.assert_close(q.mean[task], mean, rtol=0, atol=1e-9)
            if kind == "full":
                torch.testing.assert_close(q.covariance_matrix[task], torch.linalg.inv(precision), rtol=0, atol=1e-9)
            else:
                torch.testing.assert_close(q.stddev[task], precision.diagonal() ** -0.5, rtol=0, atol=1e-9)


def test_a_classifier_has_as_many_pseudo_observations_for_each_point_as_classes(float64):
    e = episode()
    classes = Episode(*(p._replace(y=(p.y.abs() * 2).long().clamp(max=2)) for p in e))
    model = HierarchicalModel.from_network(HeadNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh()), 3, 3), Categorical(3))
    learner = BayesianBlackBox(model, hidden=8, posterior="full")
    support = learner.prepared(classes.support)
    f = learner.encoder.points(support)
    b, t = learner.factors(f, learner.encoder(support), support.mask)
    assert b.shape == (4, 8 * 3, 12)
    assert t.shape == (4, 8 * 3, 1)
    assert not b.unflatten(1, (8, 3))[~support.mask].any()


def test_a_flow_posterior_goes_through_every_door_and_stays_as_it_is(float64):
    e = episode(counts_as_targets=True)
    learner = moved(BayesianBlackBox(HierarchicalModel(positive_program, example=e), hidden=8, posterior="flow"), e)
    q = learner.adapt(e.support)
    phi = q.draws(50, generator=seeded())
    density = q.log_prob(phi)
    assert not density.requires_grad
    assert (q.sites(20)["rate"] > 0).all()
    assert q.select([2, 0]).predict(e.query.filled().x[[2, 0]], 10).mean.shape == (2, 6)
    draws = pyro.infer.Predictive(learner.model, guide=q.guide(), num_samples=20)(e.support)
    assert draws["rate"].shape == (20, 4, 1)
    with torch.no_grad():
        for p in learner.flow.parameters():
            p += 1.0
    assert torch.equal(q.log_prob(phi), density)


def test_a_task_that_diverges_is_nan_of_its_own(float64):
    learner = radon(episode(), posterior="full")
    with torch.no_grad():
        learner.factors.linear["b"].weight.mul_(1e160)  # overflows for a task with points, never for one without
    with pytest.warns(RuntimeWarning, match="1 of 2 tasks diverged"):
        q = learner.adapt(ragged((0, 4)))
    assert q.mean[0].isfinite().all()
    assert q.mean[1].isnan().all()


def test_versa_and_neural_processes_on_networks(float64):
    e = episode()
    classes = Episode(*(p._replace(y=(p.y.abs() * 2).long().clamp(max=2)) for p in e))
    versa = HierarchicalModel.from_network(HeadNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh()), 3, 3), Categorical(3))
    process = HierarchicalModel.from_network(DecoderNetwork(nn.Linear(3, 1), 2), Gaussian())
    for model, data, objective in ((versa, classes, "predictive"), (process, e, "neural_process")):
        learner = BayesianBlackBox(model, hidden=8, objective=objective, posterior="full")
        before = learner.meta_loss(data, generator=seeded()).mean()
        meta_train(learner, data, steps=15, optimizer=lambda p: torch.optim.Adam(p, 0.01), generator=seeded())
        assert learner.meta_loss(data, generator=seeded()).mean() < before


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_made_before_the_first_data_is_its_own(float64, kind):
    e = episode()
    one = BayesianBlackBox(HierarchicalModel(radon_program), hidden=8, posterior=kind)
    two = pickle.loads(pickle.dumps(copy.deepcopy(one)))
    two.materialise(e)
    one.materialise(e)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    torch.testing.assert_close(one.meta_loss(e, generator=seeded()), two.meta_loss(e, generator=seeded()), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["deep_set", "attention"])
def test_the_elbo_of_a_full_covariance_comes_within_a_twentieth_of_a_nat_of_the_evidence(encoder):
    mean, cov, noise = [1.0, -0.5], [[0.64, 0.32], [0.32, 1.16]], 0.5
    torch.manual_seed(0)

    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.MultivariateNormal(torch.tensor(mean), torch.tensor(cov)))
            pyro.sample("y", dist.Normal((w[..., None, :] * points.x).sum(-1), noise).to_event(1), obs=points.y)

    family = LinearGaussian(weight_mean=mean, weight_cov=cov, noise=noise, num_support=(0, 10), num_query=(0, 10))
    learner = BayesianBlackBox(HierarchicalModel(program), encoder=encoder, posterior="full")
    train(learner, family, 2500)
    held = LinearGaussian(weight_mean=mean, weight_cov=cov, noise=noise, num_support=(1, 10)).sample(1000, generator=seeded(9)).support
    q, learner.num_draws = learner.adapt(held).distribution, 200
    gap = family.log_evidence(held) + learner.meta_loss(Episode(held, nothing(held)), generator=seeded()).detach()
    exact = kl_divergence(q, family.exact_posterior(held))
    print(f"{encoder}: gap {gap.mean():.4f} at draws, {exact.mean():.4f} in closed form")
    assert exact.mean() < 0.05
    assert abs(gap.mean() - exact.mean()) < 0.02


@pytest.mark.slow
def test_lecture_is_narrower_than_the_posterior_by_the_number_of_query_points():
    """Three support points, n query points, λσ² = 0.1: sd ratio √((0.1 + 3) / (0.1 + n)), documented as 0.77, 0.45, 0.25."""
    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.Normal(torch.tensor(0.0), math.sqrt(10.0)))
            pyro.sample("y", dist.Normal(w[..., None] * points.x[..., 0], 1.0).to_event(1), obs=points.y)

    ratios = {}
    for n in (5, 15, 50):
        torch.manual_seed(0)
        family = LinearGaussian(weight_mean=[0.0], weight_cov=[[10.0]], noise=1.0, num_support=3, num_query=n, intercept=True)
        learner = BayesianBlackBox(HierarchicalModel(program), hidden=32, objective="lecture", num_draws=4)
        train(learner, family, 1500)
        held = family.sample(500, generator=seeded(9)).support
        ratios[n] = float((learner.adapt(held).distribution.stddev / family.exact_posterior(held).stddev).mean())
    print(f"sd ratios of lecture: {ratios}")
    assert 1 > ratios[5] > ratios[15] > ratios[50]
    for n, documented in ((5, 0.77), (15, 0.45), (50, 0.25)):
        assert ratios[n] == pytest.approx(math.sqrt(3.1 / (n + 0.1)), abs=0.01)
        assert ratios[n] == pytest.approx(documented, abs=0.015)
