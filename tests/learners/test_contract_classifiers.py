"""The contract for learners made for classification alone, whose support sets must show every class: one line here for a new one."""

import pickle

import pyro
import pytest
import torch
from torch import nn

from bayesmeta import Episode, FunctionPosterior, HierarchicalModel, Points, TaskPosterior, evaluate, meta_train
from bayesmeta.learners import MAML, BayesianBlackBox, BlackBox, MatchingNet, ProtoNet
from bayesmeta.likelihoods import Categorical
from bayesmeta.networks import HeadNetwork, PrototypeNetwork

from .test_contract import seeded, with_padding

CLASSES = 3


def features():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))


def prototypes():
    return HierarchicalModel.from_network(PrototypeNetwork(features(), 4, CLASSES), Categorical(CLASSES))


def head():
    return HierarchicalModel.from_network(HeadNetwork(features(), 4, CLASSES), Categorical(CLASSES))


LEARNERS = {
    "ProtoNet": lambda: ProtoNet(prototypes()),
    "MatchingNet": lambda: MatchingNet(prototypes()),
    "MatchingNet on a head": lambda: MatchingNet(head(), attention="squared_distance", temperature=0.5, learn_temperature=True),
    "ANIL": lambda: MAML(head(), inner_steps=2, inner_lr=0.3),
    "BlackBox, predictive head": lambda: BlackBox(head(), hidden=8, predictive_head=True),
    "BlackBox, class by class": lambda: BlackBox(prototypes(), encoder="per_class", hidden=8),
    "BayesianBlackBox": lambda: BayesianBlackBox(head(), hidden=8, objective="predictive"),
    "VERSA": lambda: BayesianBlackBox(head(), encoder="per_class", hidden=8, objective="predictive"),
    "VERSA on prototypes, elbo": lambda: BayesianBlackBox(prototypes(), encoder="per_class", hidden=8),
    "VERSA, lecture": lambda: BayesianBlackBox(head(), encoder="per_class", hidden=8, objective="lecture"),
    "VERSA, neural process": lambda: BayesianBlackBox(head(), encoder="per_class", hidden=8, objective="neural_process"),
}
NEEDS_EVERY_CLASS = {"ProtoNet", "MatchingNet", "MatchingNet on a head"}
NO_PHI = {"MatchingNet", "MatchingNet on a head", "BlackBox, predictive head"}
every_learner = pytest.mark.parametrize("name", LEARNERS)


def data(counts=(3, 5, 4), queries=(4, 1, 6)):
    generator = torch.Generator().manual_seed(2)

    def points(sizes, shown):
        tasks = []
        for n in sizes:
            y = torch.randint(CLASSES, (n,), generator=generator)
            y[: len(shown)] = torch.tensor(shown)[: n]
            tasks.append((torch.randn(n, 2, generator=generator) + y[:, None], y))
        return Points.from_tasks(tasks)

    return Episode(points(counts, [0, 1, 2]), points(queries, []))


@pytest.fixture(autouse=True)
def _double(float64):
    """Tight tolerances need float64."""


def make(name):
    learner, e = LEARNERS[name](), data()
    learner.materialise(e.support)
    return learner, e


def probs(learner, support, x):
    """At the mean of q: draws of several tasks at once are not those of one at a time."""
    posterior = learner.adapt(support, generator=seeded())
    if posterior.has_phi:
        return learner.model.predict(posterior.mean[None], x).probs[0].detach()
    return posterior.predict(x).probs


@every_learner
def test_shapes(name):
    learner, e = make(name)
    posterior = learner.adapt(e.support, generator=seeded())
    assert isinstance(posterior, FunctionPosterior if name in NO_PHI else TaskPosterior)
    if name in NO_PHI:
        with pytest.raises(NotImplementedError, match="no φ of fixed size"):
            posterior.draws(3)
    else:
        assert posterior.draws(3).shape == (3, 3, learner.model.dim)
    p = probs(learner, e.support, e.query.filled().x)
    assert p.shape == (3, 6, CLASSES)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 6))
    loss = learner.meta_loss(e, generator=seeded())
    assert loss.shape == (3,) and loss.isfinite().all()


@every_learner
def test_a_batch_is_its_tasks_one_at_a_time(name):
    learner, e = make(name)
    x = e.query.filled().x
    together = probs(learner, e.support, x)
    for task in range(3):
        n = int(e.support.counts[task])
        alone = Points(*(v[[task], :n] for v in e.support))
        torch.testing.assert_close(probs(learner, alone, x[[task]])[0], together[task], rtol=0, atol=1e-10)


@every_learner
@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_padding_changes_nothing(name, value):
    """Values not to the last bit, gradients included; the amount not to 1e-6."""
    learner, e = make(name)
    zero, odd, more = (Episode(*(with_padding(p, n, v) for p in e)) for n, v in ((2, 0.0), (2, value), (7, 3.0)))
    x = e.query.filled().x
    assert torch.equal(probs(learner, zero.support, x), probs(learner, odd.support, x))
    torch.testing.assert_close(probs(learner, zero.support, x), probs(learner, more.support, x), rtol=0, atol=1e-6)
    losses = [learner.meta_loss(one, generator=seeded()) for one in (zero, odd, more)]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2], rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(loss.sum(), learner.trained_parameters()) for loss in losses[:2]]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_learner
def test_the_order_of_points_and_tasks(name):
    learner, _ = make(name)
    e = data((5, 5, 5), (4, 4, 4))
    order, turn = torch.randperm(5), torch.tensor([2, 0, 1])
    shuffled = e._replace(support=Points(e.support.x[:, order], e.support.y[:, order], e.support.mask))
    torch.testing.assert_close(probs(learner, shuffled.support, e.query.x), probs(learner, e.support, e.query.x), rtol=0, atol=1e-9)
    turned = probs(learner, e.support.select(turn), e.query.x[turn])
    torch.testing.assert_close(turned, probs(learner, e.support, e.query.x)[turn], rtol=0, atol=1e-10)


@every_learner
def test_exactly_the_trained_parameters_get_a_gradient(name):
    """And it is the finite difference along a random direction."""
    learner, e = make(name)
    parameters = learner.trained_parameters()
    learner.meta_loss(e, generator=seeded()).sum().backward()
    assert {id(p) for p in learner.parameters() if p.grad is not None} == {id(p) for p in parameters}
    direction = [torch.randn_like(p) for p in parameters]
    slope, values = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True)), []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
        values.append(learner.meta_loss(e, generator=seeded()).sum().item())
    assert abs(slope) > 1e-3
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@every_learner
def test_a_class_without_a_support_point(name):
    learner, e = make(name)
    y = torch.where(e.support.y == 1, 0, e.support.y)
    y[0] = e.support.y[0]
    support = e.support._replace(y=y)
    if name in NEEDS_EVERY_CLASS:
        with pytest.raises(ValueError, match=f"{name.split()[0]}: support: task 1 has no point of class 1"):
            learner.adapt(support)
        with pytest.raises(ValueError, match="task 1 has no point of class 1"):
            learner.meta_loss(e._replace(support=support))
    else:
        assert probs(learner, support, e.query.filled().x).isfinite().all()


@every_learner
def test_bad_input_is_named_and_randomness_is_explicit(name):
    learner, e = make(name)
    before = torch.get_rng_state()
    x = e.support.x.clone()
    x[2, 1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"support\.x: task 2, point 1: expected a finite number"):
        learner.adapt(e.support._replace(x=x))
    y = e.support.y.clone()
    y[1, 0] = CLASSES
    with pytest.raises(ValueError, match=r"support\.y: task 1, point 0: the likelihood expects"):
        learner.adapt(e.support._replace(y=y))
    one, two = (probs(learner, e.support, e.query.filled().x) for _ in range(2))
    assert torch.equal(one, two)
    learner.meta_loss(e)
    assert torch.equal(before, torch.get_rng_state())
    assert not pyro.get_param_store().keys()


@every_learner
def test_a_pickled_learner_adapts_as_before(name):
    learner, e = make(name)
    pickle.loads(pickle.dumps(LEARNERS[name]()))  # one that has seen no data
    twin, x = pickle.loads(pickle.dumps(learner)), e.query.filled().x
    assert torch.equal(probs(learner, e.support, x), probs(twin, e.support, x))


@every_learner
def test_trains_and_is_scored(name):
    learner, e = make(name)
    history = meta_train(learner, e, steps=60, optimizer=lambda p: torch.optim.Adam(p, 0.02))
    assert history.loss[-1] < history.loss[0]
    (result,) = evaluate(learner, e).results.values()
    assert set(result.metrics) >= {"nll", "accuracy", "brier"}
