"""Matching networks against equation 1 written out in loops, and against a prototypical network where the two are one."""

import math

import pytest
import torch
from torch import nn

from bayesmeta import Episode, HierarchicalModel, Points
from bayesmeta.learners.matching_net import MatchingNet
from bayesmeta.learners.proto_net import ProtoNet
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.networks import HeadNetwork, PrototypeNetwork, WeightNetwork

from ..conftest import radon_program
from .test_proto_net import CLASSES, FEATURES, classes, episode, features

OPTIONS = [{}, {"attention": "squared_distance"}, {"temperature": 0.2}, {"temperature": 0.5, "learn_temperature": True}]


def make(network=PrototypeNetwork, **options):
    return MatchingNet(HierarchicalModel.from_network(network(features(), FEATURES, CLASSES), Categorical(CLASSES)), **options)


def probs_by_loops(learner, support, x, attention="cosine", temperature=1.0, learn_temperature=False):
    """eq. 1, point by point: (T, N, C)."""
    body = learner.model.network.features
    rows = []
    for (xs, ys), xq in zip(support.to_tasks(), x, strict=True):
        row = []
        for point in xq:
            e, other = body(point), body(xs)
            if attention == "cosine":
                scores = torch.stack([(e @ o) / (e.norm() * o.norm()) for o in other])
            else:
                scores = torch.stack([-((e - o) ** 2).sum() for o in other])
            weights = torch.softmax(scores / temperature, 0)
            row.append(torch.stack([weights[ys == k].sum() for k in range(CLASSES)]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("network", [PrototypeNetwork, HeadNetwork])
def test_predictions_are_equation_one(float64, options, network):
    learner, e = make(network, **options), episode()
    posterior = learner.adapt(e.support)
    x = torch.randn(3, 7, 2)
    predictive = posterior.predict(x)
    wanted = probs_by_loops(learner, e.support, x, **options).detach()
    torch.testing.assert_close(predictive.probs, wanted, rtol=0, atol=1e-12)
    labels = torch.randint(0, CLASSES, (3, 7))
    torch.testing.assert_close(predictive.log_prob(labels), wanted.gather(-1, labels[..., None])[..., 0].log(), rtol=0, atol=1e-10)
    assert posterior.is_point and not posterior.has_phi and posterior.num_tasks == 3
    chosen = posterior.select([2, 0]).predict(x[[2, 0]]).probs
    torch.testing.assert_close(chosen, wanted[[2, 0]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradient_are_those_of_the_loops(float64, options):
    learner, e = make(**options), episode()
    learner.materialise(e)
    loss = learner.meta_loss(e)
    tau = learner.log_temperature.value.exp() if options.get("learn_temperature") else options.get("temperature", 1.0)
    probs = probs_by_loops(learner, e.support, e.query.x, options.get("attention", "cosine"), tau)
    nll = -probs.gather(-1, e.query.y[..., None])[..., 0].log()
    direct = torch.stack([nll[t][e.query.mask[t]].mean() for t in range(3)])
    torch.testing.assert_close(loss, direct, rtol=0, atol=1e-10)
    parameters = learner.trained_parameters()
    for a, b in zip(*(torch.autograd.grad(v.sum(), parameters) for v in (loss, direct)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS)
def test_exactly_the_embedding_and_its_temperature_are_trained(options):
    learner, e = make(HeadNetwork, **options), episode()
    learner.materialise(e)
    learner.meta_loss(e).sum().backward()
    touched = {name for name, p in learner.named_parameters() if p.grad is not None}
    trained = {id(p) for p in learner.trained_parameters()}
    assert touched == {name for name, p in learner.named_parameters() if id(p) in trained}
    embedding = {f"model.program.network.features.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert touched == embedding | ({"log_temperature.value"} if options.get("learn_temperature") else set())


def test_with_distances_and_one_shot_it_is_a_prototypical_network(float64):
    model = HierarchicalModel.from_network(PrototypeNetwork(features(), FEATURES, CLASSES), Categorical(CLASSES))
    matching, proto = MatchingNet(model, attention="squared_distance"), ProtoNet(model)
    e = Episode(classes([(1, 1, 1)] * 4), classes([(2, 1, 3)] * 4, seed=1))
    torch.testing.assert_close(matching.meta_loss(e), proto.meta_loss(e), rtol=0, atol=1e-12)
    x = torch.randn(4, 9, 2)
    torch.testing.assert_close(matching.adapt(e.support).predict(x).probs, proto.adapt(e.support).predict(x).probs, rtol=0, atol=1e-12)


def test_cosines_bound_how_sure_it_can_be(float64):
    """The bound of the module's docstring, reached where the other classes lie opposite."""
    network = PrototypeNetwork(nn.Identity(), 2, CLASSES)
    learner = MatchingNet(HierarchicalModel.from_network(network, Categorical(CLASSES)))
    support = Points.of(torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]]]), torch.tensor([[0, 1, 2]]))
    sure = learner.adapt(support).predict(torch.tensor([[[3.0, 0.0]]])).probs[0, 0, 0].item()
    assert sure == pytest.approx(math.e**2 / (math.e**2 + CLASSES - 1), abs=1e-12)


def test_a_class_far_away_has_a_small_probability_and_not_zero():
    network = PrototypeNetwork(nn.Identity(), 1, 2)
    learner = MatchingNet(HierarchicalModel.from_network(network, Categorical(2)), attention="squared_distance")
    support = Points.of(torch.tensor([[[0.0], [30.0]]]), torch.tensor([[0, 1]]))
    query = Points.of(torch.tensor([[[0.0]]]), torch.tensor([[1]]))
    torch.testing.assert_close(learner.meta_loss(Episode(support, query)), torch.tensor([900.0]))


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_padding_changes_nothing_to_the_last_bit(float64, value):
    learner, e = make(), episode()

    def padded(points, filler, label):
        x = torch.cat([points.x, torch.zeros(3, 2, 2)], 1)
        y = torch.cat([points.y, torch.zeros(3, 2, dtype=torch.long)], 1)
        mask = torch.cat([points.mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
        return Points(x.masked_fill(~mask[..., None], filler), y.masked_fill(~mask, label), mask)

    zero, odd = (Episode(*(padded(p, *f) for p in e)) for f in ((0.0, 0), (value, 10**6)))
    x = torch.randn(3, 4, 2)
    assert torch.equal(*(learner.adapt(v.support).predict(x).probs for v in (zero, odd)))
    losses = [learner.meta_loss(v) for v in (zero, odd)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss.sum(), learner.trained_parameters()) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.testing.assert_close(losses[0], learner.meta_loss(e), rtol=0, atol=1e-12)


def test_the_order_of_points_and_tasks_does_not_matter(float64):
    learner, e = make(), episode()
    x = torch.randn(3, 4, 2)
    probs = learner.adapt(e.support).predict(x).probs
    for task, (xs, ys) in enumerate(e.support.to_tasks()):
        shuffle = torch.randperm(len(ys))
        alone = learner.adapt(Points.from_tasks([(xs[shuffle], ys[shuffle])])).predict(x[[task]]).probs
        torch.testing.assert_close(alone[0], probs[task], rtol=0, atol=1e-12)


def test_there_is_no_phi_to_draw():
    posterior = make().adapt(episode().support)
    for refused in (posterior.draws, posterior.sites, posterior.guide, lambda: posterior.log_prob(torch.zeros(1))):
        with pytest.raises(NotImplementedError, match="no φ of fixed size"):
            refused()


def test_float32_labels_as_floats_and_nothing_random(float64):
    torch.set_default_dtype(torch.float32)
    learner, e = make(), episode()
    before = torch.get_rng_state()
    column = Episode(*(p._replace(y=p.y[..., None].float()) for p in e))
    assert torch.equal(learner.meta_loss(e), learner.meta_loss(column))
    x = e.query.x
    assert torch.equal(learner.adapt(e.support).predict(x).probs, learner.adapt(column.support).predict(x).probs)
    assert learner.meta_loss(e).dtype == torch.float32
    assert torch.equal(before, torch.get_rng_state())


def test_a_class_without_a_support_point_is_named():
    learner = make()
    lacking = classes([(1, 1, 1), (2, 0, 1)])
    message = r"MatchingNet: support: task 1 has no point of class 1: expected one or more of each of the 3 classes"
    with pytest.raises(ValueError, match=message):
        learner.adapt(lacking)
    with pytest.raises(ValueError, match=message):
        learner.meta_loss(Episode(lacking, classes([(1, 1, 1), (1, 1, 1)])))


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (lambda: HierarchicalModel(radon_program), "a user's program"),
        (lambda: HierarchicalModel.from_network(WeightNetwork(features()), Categorical(4)), "a WeightNetwork and Categorical"),
        (lambda: HierarchicalModel.from_network(HeadNetwork(features(), 4, 1), Gaussian()), "a HeadNetwork and Gaussian"),
    ],
)
def test_other_models_are_refused(model, got):
    with pytest.raises(ValueError, match=rf"MatchingNet: expected a model from_network.*Categorical.*got {got}"):
        MatchingNet(model())


def test_wrong_options():
    with pytest.raises(ValueError, match="attention: expected one of 'cosine', 'squared_distance', got 'cosin'; did you mean 'cosine'"):
        make(attention="cosin")
    with pytest.raises(ValueError, match=r"temperature: expected a positive number, got 0\.0"):
        make(temperature=0.0)
