"""Prototypical networks against a loop over tasks, classes and points; what padding and missing classes do."""

import copy
import math

import pytest
import torch
from torch import nn

from bayesmeta import Episode, HierarchicalModel, Points, evaluate, meta_train
from bayesmeta.learners.proto_net import ProtoNet
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.networks import HeadNetwork, PrototypeNetwork, WeightNetwork
from bayesmeta.tasks import Circles

from ..conftest import radon_program

CLASSES, FEATURES = 3, 4


def features():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, FEATURES))


def make(body=None, classes=CLASSES):
    return ProtoNet(HierarchicalModel.from_network(PrototypeNetwork(body or features(), FEATURES, classes), Categorical(classes)))


def classes(counts, seed=0, num_classes=CLASSES):
    """Tasks of two-dimensional points; ``counts[t][k]`` of class k, in random order."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for shots in counts:
        y = torch.cat([torch.full((n,), k) for k, n in enumerate(shots)])
        y = y[torch.randperm(len(y), generator=generator)]
        tasks.append((torch.randn(len(y), 2, generator=generator) + y[:, None], y))
    return Points.from_tasks(tasks)


def episode():
    return Episode(classes([(1, 1, 1), (2, 5, 1), (3, 1, 4)]), classes([(2, 0, 3), (1, 1, 1), (0, 4, 0)], seed=1))


def by_loops(learner, support):
    """Prototypes, one class of one task after the other."""
    body = learner.model.network.features
    rows = []
    for x, y in support.to_tasks():
        rows.append(torch.cat([torch.stack([body(x[j]) for j in range(len(y)) if y[j] == k]).mean(0) for k in range(CLASSES)]))
    return torch.stack(rows)


def loss_by_loops(learner, e):
    body = learner.model.network.features
    losses = []
    for c, (x, y) in zip(by_loops(learner, e.support).unflatten(-1, (CLASSES, FEATURES)), e.query.to_tasks(), strict=True):
        nll = 0
        for point, label in zip(x, y, strict=True):
            logits = torch.stack([-((body(point) - c[k]) ** 2).sum() for k in range(CLASSES)])
            nll = nll - torch.log_softmax(logits, 0)[label]
        losses.append(nll / len(y))
    return torch.stack(losses)


def test_prototypes_are_class_means_whatever_the_shots(float64):
    learner, e = make(), episode()
    posterior = learner.adapt(e.support)
    assert posterior.is_point and posterior.mean.shape == (3, CLASSES * FEATURES)
    assert not posterior.mean.requires_grad
    torch.testing.assert_close(posterior.mean, by_loops(learner, e.support).detach(), rtol=0, atol=1e-12)


def test_logits_are_squared_distances(float64):
    learner, e = make(), episode()
    x = torch.randn(3, 7, 2)
    logits = learner.model.network(learner.adapt(e.support).mean, x)
    body = learner.model.network.features
    c = by_loops(learner, e.support).unflatten(-1, (CLASSES, FEATURES))
    direct = -(body(x)[:, :, None] - c[:, None]).square().sum(-1)
    torch.testing.assert_close(logits, direct, rtol=0, atol=1e-10)
    probs = learner.adapt(e.support).predict(x).probs
    torch.testing.assert_close(probs, direct.softmax(-1).detach(), rtol=0, atol=1e-10)


def test_loss_and_gradient_are_those_of_the_loops(float64):
    learner, e = make(), episode()
    loss, direct = learner.meta_loss(e), loss_by_loops(learner, e)
    torch.testing.assert_close(loss, direct, rtol=0, atol=1e-10)
    parameters = list(learner.model.network.features.parameters())
    for a, b in zip(*(torch.autograd.grad(v.sum(), parameters) for v in (loss, direct)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_gradient_is_the_finite_difference(float64):
    learner, e = make(), episode()
    parameters = learner.trained_parameters() if learner.materialise(e) is None else []
    grads = torch.autograd.grad(learner.meta_loss(e).sum(), parameters)
    direction = [torch.randn_like(p) for p in parameters]
    values = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(learner)
        with torch.no_grad():
            for p, d in zip(moved.trained_parameters(), direction, strict=True):
                p += step * d
        values.append(moved.meta_loss(e).sum().item())
    slope = sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-7)


@pytest.mark.parametrize("num_classes", [2, 3, 9])  # more classes than made-up points by default
def test_exactly_the_features_are_trained(float64, num_classes):
    learner = make(classes=num_classes)
    points = classes([(2,) * num_classes] * 2)
    learner.materialise(points)
    learner.meta_loss(Episode(points, points)).sum().backward()
    touched = {name for name, p in learner.named_parameters() if p.grad is not None}
    trained = {id(p) for p in learner.trained_parameters()}
    assert touched == {name for name, p in learner.named_parameters() if id(p) in trained}
    assert touched == {f"model.program.network.features.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_padding_changes_nothing_to_the_last_bit(float64, value):
    learner, e = make(), episode()

    def padded(points, filler, label):
        x = torch.cat([points.x, torch.zeros(3, 2, 2)], 1)
        y = torch.cat([points.y, torch.zeros(3, 2, dtype=torch.long)], 1)
        mask = torch.cat([points.mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
        return Points(x.masked_fill(~mask[..., None], filler), y.masked_fill(~mask, label), mask)

    zero, odd = (Episode(*(padded(p, *f) for p in e)) for f in ((0.0, 0), (value, 10**6)))
    assert torch.equal(learner.adapt(zero.support).mean, learner.adapt(odd.support).mean)
    assert torch.equal(learner.meta_loss(zero), learner.meta_loss(odd))
    torch.testing.assert_close(learner.meta_loss(odd), learner.meta_loss(e), rtol=0, atol=1e-12)


def test_tasks_and_points_in_any_order(float64):
    learner, e = make(), episode()
    mean = learner.adapt(e.support).mean
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(learner.adapt(e.support.select(order)).mean, mean[order], rtol=0, atol=1e-12)
    for task, (x, y) in enumerate(e.support.to_tasks()):
        shuffle = torch.randperm(len(y))
        alone = Points.from_tasks([(x[shuffle], y[shuffle])])
        torch.testing.assert_close(learner.adapt(alone).mean[0], mean[task], rtol=0, atol=1e-12)


def test_labels_as_floats_or_in_a_column(float64):
    learner, e = make(), episode()
    column = Episode(*(p._replace(y=p.y[..., None].double()) for p in e))
    torch.testing.assert_close(learner.meta_loss(column), learner.meta_loss(e), rtol=0, atol=0)
    assert torch.equal(learner.adapt(column.support).mean, learner.adapt(e.support).mean)


def test_a_class_without_a_support_point_is_named():
    learner = make()
    lacking = classes([(1, 1, 1), (2, 0, 1)])
    message = r"ProtoNet: support: task 1 has no point of class 1: expected one or more of each of the 3 classes"
    with pytest.raises(ValueError, match=message):
        learner.adapt(lacking)
    with pytest.raises(ValueError, match=message):
        learner.meta_loss(Episode(lacking, classes([(1, 1, 1), (1, 1, 1)])))
    with pytest.raises(ValueError, match="task 0 has no point of class 0"):
        learner.adapt(Points(torch.zeros(2, 0, 2), None, torch.zeros(2, 0, dtype=torch.bool)))


def test_more_classes_in_training_than_at_test(float64):
    body = features()
    twenty, three = make(body, 20), make(body)
    e = episode()
    before = three.meta_loss(e)
    wide = classes([(1,) * 20] * 2)
    twenty.meta_loss(Episode(wide, wide)).sum().backward()
    with torch.no_grad():
        for p in twenty.trained_parameters():
            p -= 0.01 * p.grad
    assert not torch.allclose(three.meta_loss(e), before)  # θ is shared


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (lambda: HierarchicalModel(radon_program), "a user's program"),
        (lambda: HierarchicalModel.from_network(WeightNetwork(features()), Categorical(4)), "a WeightNetwork and Categorical"),
        (lambda: HierarchicalModel.from_network(HeadNetwork(features(), 4, 3), Categorical(3)), "a HeadNetwork and Categorical"),
        (lambda: HierarchicalModel.from_network(PrototypeNetwork(features(), 4, 1), Gaussian()), "a PrototypeNetwork and Gaussian"),
    ],
)
def test_other_models_are_refused(model, got):
    with pytest.raises(ValueError, match=rf"ProtoNet: expected a model from_network\(PrototypeNetwork.*Categorical.*got {got}"):
        ProtoNet(model())


def test_training_separates_the_classes():
    learner = make()
    e = Episode(classes([(3, 3, 3)] * 20), classes([(5, 5, 5)] * 20, seed=1))
    learner.materialise(e)
    optimiser = torch.optim.Adam(learner.trained_parameters(), 0.01)
    first = learner.meta_loss(e).mean().item()
    for _ in range(60):
        optimiser.zero_grad()
        learner.meta_loss(e).mean().backward()
        optimiser.step()
    assert learner.meta_loss(e).mean().item() < 0.7 * first


def test_made_up_points_go_through_the_classes():
    """What `trained_parameters` runs the loss on has a point of each."""
    learner = make()
    learner.materialise(classes([(1, 1, 1)])._replace(y=torch.tensor([[2.0, 2.0, 2.0]])))
    assert learner.model.num_classes == CLASSES
    assert learner.model.made_up_points(2, 5).y.tolist() == [[0.0, 1.0, 2.0, 0.0, 1.0]] * 2
    assert HierarchicalModel(radon_program, example=Points.of(torch.zeros(1, 1, 1), torch.ones(1, 1))).num_classes is None


def test_training_and_evaluation_run_on_it():
    """On circles, whose exact answer is the ceiling; the report asks nothing of an empty support set."""
    family = Circles(num_positive=4, num_negative=4, balanced_query=True)
    learner = make(classes=2)
    meta_train(learner, family, steps=60, tasks_per_step=8, generator=torch.Generator().manual_seed(0), progress=False)
    nll = evaluate({"ProtoNet": learner}, family, num_tasks=50).results["ProtoNet"].metrics["nll"].mean()
    support, query = family.sample(50, generator=torch.Generator().manual_seed(1))
    best = -family.exact_predictive(support, query.x).log_prob(query.y).mean().item()
    assert best < nll < math.log(2)
