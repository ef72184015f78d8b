"""BlackBox: φ and the loss from their formulas, one task at a time; the predictive head; what it learns."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from bayesmeta import Episode, FunctionPosterior, HierarchicalModel, Points, evaluate, meta_train
from bayesmeta.learners.black_box import BlackBox
from bayesmeta.learners.encoders import Attention, DeepSet
from bayesmeta.likelihoods import Categorical, Gaussian, Poisson
from bayesmeta.networks import DecoderNetwork, HeadNetwork, WeightNetwork
from bayesmeta.tasks import LinearGaussian

from ..conftest import episode, linear_program, positive_program, radon_program, ragged

NAMES = ("deep_set", "recurrent", "attention")


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def moved(learner, data):
    """The learner with every weight moved off its start."""
    learner.materialise(data)
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.1 * torch.randn_like(p)
    return learner


def alone(e, task):
    """One task without its padding."""
    return Episode(*(Points(*(v[[task]][:, p.mask[task]] for v in p)) for p in e))


def decoder(likelihood=None, outputs=1, inputs=1):
    net = nn.Sequential(nn.Linear(inputs + 2, 5), nn.Tanh(), nn.Linear(5, outputs))
    return HierarchicalModel.from_network(DecoderNetwork(net, 2), likelihood or Gaussian(0.5))


@pytest.mark.parametrize("encoder", NAMES)
@pytest.mark.parametrize("program", [radon_program, positive_program])
def test_phi_and_the_loss_are_their_formulas(float64, program, encoder):
    e = episode(counts_as_targets=True)
    learner = moved(BlackBox(HierarchicalModel(program), encoder=encoder, hidden=8), e)
    model, q, loss = learner.model, learner.adapt(e.support), learner.meta_loss(e)
    for task in range(4):
        one = alone(e, task)
        mean, sd = model.prior_moments(one.support)
        phi = mean + sd * learner.head(learner.encoder(one.support))
        assert (phi - mean).abs().max() > 1e-3
        torch.testing.assert_close(q.mean[task], phi[0].detach(), rtol=0, atol=1e-10)
        density = model.predict(phi, one.query.x).log_prob(one.query.y)
        assert loss[task].item() == pytest.approx(-density.mean().item(), abs=1e-10)
    assert q.is_point


@pytest.mark.parametrize("encoder", NAMES)
def test_it_starts_near_the_priors_mean_and_is_there_without_points(float64, encoder):
    learner = BlackBox(HierarchicalModel(radon_program), encoder=encoder)
    q = learner.adapt(ragged((0, 5, 30)))
    mean, sd = learner.model.prior_moments(ragged((3,)))
    torch.testing.assert_close(q.mean[0], mean[0].detach(), rtol=0, atol=0)
    assert 0 < ((q.mean[1:] - mean) / sd).abs().max() < 0.1


def test_an_encoder_of_ones_own(float64):
    given = Attention(16, blocks=1, heads=2, features=nn.Linear(1, 3))
    learner = BlackBox(HierarchicalModel(radon_program), encoder=given)
    assert learner.adapt(ragged((3, 4))).mean.shape == (2, 2)
    trained = {id(p) for p in learner.trained_parameters()}
    assert {id(p) for p in given.parameters()} <= trained


def test_a_head_networks_features_learn_through_the_encoder_too(float64):
    e = episode()
    own = HeadNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh()), 3, 1)
    learner = moved(BlackBox(HierarchicalModel.from_network(own, Gaussian()), hidden=8), e)
    phi = learner._phi(learner.prepared(e.support))
    assert torch.autograd.grad(phi.sum(), own.features[0].weight)[0].abs().max() > 0


def test_a_user_program_has_no_predictive_head():
    with pytest.raises(ValueError, match="predictive_head: expected a model made by"):
        BlackBox(HierarchicalModel(radon_program), predictive_head=True)
    with pytest.raises(ValueError, match="encoder: expected one of"):
        BlackBox(HierarchicalModel(radon_program), encoder="lstm")


@pytest.mark.parametrize("encoder", NAMES)
def test_the_predictive_head_is_its_formula(float64, encoder):
    e = episode()
    learner = moved(BlackBox(decoder(), encoder=encoder, hidden=8, predictive_head=True), e)
    posterior, loss = learner.adapt(e.support), learner.meta_loss(e)
    assert isinstance(posterior, FunctionPosterior)
    predictive = posterior.predict(e.query.filled().x)
    for task in range(4):
        one = alone(e, task)
        encoding = learner.encoder(one.support)[0]
        output = torch.cat([learner.head(torch.cat([encoding, x])) for x in one.query.x[0]])
        wanted = Normal(output, learner.model.program.likelihood.noise)
        torch.testing.assert_close(predictive.mean[task][e.query.mask[task]], wanted.mean.detach(), rtol=0, atol=1e-10)
        assert loss[task].item() == pytest.approx(-wanted.log_prob(one.query.y[0]).mean().item(), abs=1e-10)
    torch.testing.assert_close(posterior.select([2, 0]).predict(e.query.filled().x[[2, 0]]).mean, predictive.mean[[2, 0]])


@pytest.mark.parametrize("encoder", NAMES)
def test_the_predictive_head_is_blind_to_padding_and_knows_the_empty_set(float64, encoder):
    e = episode((3, 0, 2, 8))
    learner = moved(BlackBox(decoder(), encoder=encoder, hidden=8, predictive_head=True), e)
    odd = Episode(*(p._replace(x=torch.where(p.mask[..., None], p.x, torch.nan), y=torch.where(p.mask, p.y, torch.nan)) for p in e))
    losses = [learner.meta_loss(x) for x in (e, odd)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss.sum(), learner.trained_parameters()) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    empty = Points(torch.zeros(2, 0, 1), None, torch.zeros(2, 0, dtype=torch.bool))
    x = e.query.filled().x
    torch.testing.assert_close(learner.adapt(empty).predict(x[:2]).mean[1], learner.adapt(e.support).predict(x).mean[1], rtol=0, atol=1e-12)


def test_exactly_what_the_predictive_head_uses_is_trained(float64):
    e = episode()
    learner = BlackBox(decoder(), hidden=8, predictive_head=True)
    learner.materialise(e)
    learner.meta_loss(e).sum().backward()
    touched = {n for n, p in learner.named_parameters() if p.grad is not None}
    trained = {id(p) for p in learner.trained_parameters()}
    assert touched == {n for n, p in learner.named_parameters() if id(p) in trained}
    assert {n for n in touched if n.startswith("model.")} == {"model.program.likelihood.log_noise"}


def test_the_predictive_head_serves_classes_and_counts_with_exposure(float64):
    e = episode()
    classes = Episode(*(p._replace(y=(p.y.abs() * 2).long().clamp(max=2)) for p in e))
    learner = BlackBox(decoder(Categorical(3), 3), hidden=8, predictive_head=True)
    probs = learner.adapt(classes.support).predict(classes.query.filled().x).probs
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, 6), rtol=0, atol=1e-12)

    counts = episode(features=2, counts_as_targets=True)
    learner = BlackBox(decoder(Poisson(exposure=True), inputs=1), hidden=8, predictive_head=True)
    x = counts.query.filled().x
    predictive = learner.adapt(counts.support).predict(x)
    more = x + torch.tensor([0.0, 1.0])
    assert predictive.mean.shape == (4, 6)
    # a log exposure is an input of the network as well, so the mean is not simply e times as large: compare through the rule
    points = learner.encoder.points
    support = learner.prepared(counts.support)
    inputs = points.inputs(more)
    output = learner.head(torch.cat([learner.encoder(support)[:, None].expand(4, 6, -1), inputs], -1))[..., 0]
    torch.testing.assert_close(
        learner.adapt(counts.support).predict(more).mean, (output + more[..., 1]).exp().detach(), rtol=1e-12, atol=0
    )


def test_evaluation_takes_a_predictive_head(float64):
    family = LinearGaussian(weight_mean=[1.0], weight_cov=[[1.0]], noise=0.5, num_support=(0, 5), dtype=torch.float64)
    report = evaluate(BlackBox(decoder(), hidden=8, predictive_head=True), family, num_tasks=20)
    assert "BlackBox" in report.results


@pytest.mark.slow
@pytest.mark.parametrize("encoder", NAMES)
def test_it_learns_the_posterior_mean_of_a_linear_gaussian_family(encoder):
    """The best point under squared error is the posterior's mean; half way there from the prior's is far too little."""
    torch.manual_seed(0)
    family = LinearGaussian(weight_mean=[1.0, -0.5], weight_cov=[[0.64, 0.3], [0.3, 1.2]], noise=0.5, num_support=(1, 10), num_query=10)
    model = HierarchicalModel(linear_program, example=ragged((2,), 2))
    learner = BlackBox(model, encoder=encoder, hidden=32)
    meta_train(learner, family, steps=1500, tasks_per_step=64, optimizer=lambda p: torch.optim.Adam(p, 3e-3))
    held = family.sample(500, generator=seeded(1))
    exact = family.exact_posterior(held.support)
    distance = (learner.adapt(held.support).mean - exact.mean).square().sum(-1).mean()
    start = (family.weight_mean - exact.mean).square().sum(-1).mean()
    assert distance < 0.1 * start


def test_a_weight_network_is_a_black_box_too(float64):
    body = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    model = HierarchicalModel.from_network(WeightNetwork(body), Gaussian(0.5))
    learner = BlackBox(model, encoder=DeepSet(8))
    q = learner.adapt(ragged((4, 2)))
    assert q.mean.shape == (2, 13)


@pytest.mark.parametrize("predictive_head", [False, True])
def test_a_copy_made_before_the_first_data_is_its_own(float64, predictive_head):
    e = episode()
    one = BlackBox(decoder(), hidden=8, predictive_head=predictive_head)
    two = copy.deepcopy(one)
    two.materialise(e)
    one.materialise(e)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    torch.testing.assert_close(one.meta_loss(e), two.meta_loss(e), rtol=0, atol=0)
