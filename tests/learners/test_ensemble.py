"""The ensemble: members differ in start and task order, train one by one, and their mixture is the posterior."""

import math

import pytest
import torch
from torch import nn

from bayesmeta import FunctionPosterior, HierarchicalModel, MixturePosterior, evaluate, meta_train
from bayesmeta.learners import ABML, MAML, BlackBox, Ensemble
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import HeadNetwork, WeightNetwork
from bayesmeta.tasks import Sinusoid

from ..conftest import episode, radon_program


def maml(model):
    return MAML(model, inner_steps=2, inner_lr=0.1)


def network():
    torch.manual_seed(1)
    return HierarchicalModel.from_network(WeightNetwork(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))), Gaussian(0.5))


@pytest.fixture
def ensemble(float64):
    learner = Ensemble(HierarchicalModel(radon_program), maml, size=3)
    learner.materialise(episode())
    return learner


@pytest.mark.parametrize("make", [lambda: HierarchicalModel(radon_program), network], ids=["program", "network"])
def test_members_start_apart_and_the_first_is_the_model_itself(make):
    model = make()
    learner = Ensemble(model, maml, size=3, seed=5)
    learner.materialise(episode())
    assert learner.members[0].model is model is learner.model
    flat = [torch.cat([p.detach().flatten() for p in member.parameters()]) for member in learner.members]
    assert all((flat[i] - flat[j]).abs().max() > 0.01 for i in range(3) for j in range(i))
    again = Ensemble(make(), maml, size=3, seed=5)
    again.materialise(episode())
    for one, two in zip(learner.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_predictive_is_the_mean_of_the_members_densities(ensemble):
    e = episode()
    query = e.query.filled()
    posterior = ensemble.adapt(e.support)
    assert isinstance(posterior, MixturePosterior)
    each = torch.stack([member.adapt(e.support).predict(query.x).log_prob(query.y) for member in ensemble.members])
    torch.testing.assert_close(posterior.predict(query.x).log_prob(query.y), each.logsumexp(0) - math.log(3), rtol=0, atol=1e-12)
    assert (each.max(0).values - each.min(0).values).max() > 1e-3


def test_the_loss_is_the_mean_of_the_members(ensemble):
    e = episode()
    each = torch.stack([member.meta_loss(e) for member in ensemble.members])
    torch.testing.assert_close(ensemble.meta_loss(e), each.mean(0), rtol=0, atol=1e-14)


def test_what_members_disagree_about_is_uncertainty_about_theta(ensemble):
    parts = ensemble.adapt(episode().support).predict(episode().query.filled().x).decompose()
    assert (parts.phi == 0).all() and (parts.theta > 0).all()
    means = torch.stack([m.adapt(episode().support).predict(episode().query.filled().x).mean for m in ensemble.members])
    torch.testing.assert_close(parts.theta, means.var(0, unbiased=False), rtol=0, atol=1e-12)


def test_training_is_each_member_on_its_own_tasks(float64):
    """Member k takes the path that it would take alone on the stream where member k − 1 left it."""
    family = Sinusoid.maml(num_support=4, num_query=4)
    together = Ensemble(network().double(), maml, size=2)
    history = meta_train(together, family, steps=4, tasks_per_step=3, generator=torch.Generator().manual_seed(7))
    alone, generator = Ensemble(network().double(), maml, size=2), torch.Generator().manual_seed(7)
    losses = [meta_train(member, family, steps=4, tasks_per_step=3, generator=generator).loss for member in alone.members]
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    assert history.loss == pytest.approx([sum(pair) / 2 for pair in zip(*losses, strict=True)])


def test_checkpoints_of_members_resume(tmp_path, float64):
    family = Sinusoid.maml(num_support=4, num_query=4)
    straight, broken = (Ensemble(network().double(), maml, size=2) for _ in range(2))
    meta_train(straight, family, steps=6, tasks_per_step=3)
    for steps in (3, 6):
        meta_train(broken, family, steps=steps, tasks_per_step=3, checkpoint=tmp_path / "c", resume=True)
    assert sorted(p.name for p in tmp_path.iterdir() if "previous" not in p.name) == ["c.member0", "c.member1"]
    first = straight.members[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(first, broken.members[0].parameters(), strict=True))


def test_ensembles_of_posteriors_are_scored(float64):
    learner = Ensemble(HierarchicalModel(radon_program), lambda one: ABML(one, inner_steps=2, inner_lr=0.1), size=2)
    (result,) = evaluate({"E": learner}, episode(), num_draws=20).results.values()
    assert all(v == v for v in result.metrics["nll"])
    assert learner.adapt(episode().support).draws(7).shape == (7, 4, 2)


def test_members_without_phi_predict_together_and_draw_nothing(float64):
    """Prediction needs no φ: the mixture of functions of the support set is one too."""
    torch.manual_seed(1)
    model = HierarchicalModel.from_network(HeadNetwork(nn.Linear(1, 3), 3, 1), Gaussian(0.5)).double()
    learner = Ensemble(model, lambda one: BlackBox(one, hidden=8, predictive_head=True), size=3)
    e = episode()
    posterior, query = learner.adapt(e.support), e.query.filled()
    each = torch.stack([member.adapt(e.support).predict(query.x).log_prob(query.y) for member in learner.members])
    torch.testing.assert_close(posterior.predict(query.x).log_prob(query.y), each.logsumexp(0) - math.log(3), rtol=0, atol=1e-12)
    assert not posterior.has_phi
    for asked in (posterior.draws, posterior.sites, lambda: posterior.mean):
        with pytest.raises(NotImplementedError, match="no φ of fixed size"):
            asked()
    assert set(evaluate({"E": learner}, e).results) == {"E"}


def test_a_mixture_is_of_one_kind():
    with_phi = MAML(HierarchicalModel(radon_program)).adapt(episode().support)
    without = FunctionPosterior(with_phi.model, lambda support, x, mask: None, episode().support)
    with pytest.raises(ValueError, match="all have a φ, or none"):
        MixturePosterior([with_phi, without])


def test_a_size_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="size: expected a whole number of at least 1, got 0"):
        Ensemble(HierarchicalModel(radon_program), maml, size=0)

