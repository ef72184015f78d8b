"""The encoder "per_class": weights, losses and guide by hand, one class at a time; equivariance; what a class may and may not depend on."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.distributions import Normal, kl_divergence

from bayesmeta import Compiled, Episode, HierarchicalModel, Points, compiling, evaluate, meta_train
from bayesmeta.learners import BayesianBlackBox, BlackBox, ProtoNet
from bayesmeta.learners.encoders import PerClass
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.networks import HeadNetwork, NormalPrior, PrototypeNetwork, WeightNetwork
from bayesmeta.randomness import rng
from bayesmeta.recipes import image_recipe
from bayesmeta.tasks import Glyphs

from ..conftest import radon_program

F, INPUTS = 4, 2
OBJECTIVES = ("elbo", "lecture", "neural_process", "predictive")


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def features():
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, F))


NETWORKS = {
    "head": lambda classes: HeadNetwork(features(), F, classes),
    "head without bias": lambda classes: HeadNetwork(features(), F, classes, bias=False),
    "prototypes": lambda classes: PrototypeNetwork(features(), F, classes),
}
every_network = pytest.mark.parametrize("kind", NETWORKS)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def model_of(kind, classes=3):
    torch.manual_seed(1)
    return HierarchicalModel.from_network(NETWORKS[kind](classes), Categorical(classes))


def points_of(labels, seed=2):
    """Tasks with points of these labels, ragged: ``labels``, a list of them for each task."""
    generator = seeded(seed)
    classes = [torch.tensor(one, dtype=torch.long) for one in labels]
    return Points.from_tasks([(torch.randn(len(y), INPUTS, generator=generator) + y[:, None], y) for y in classes])


def data(classes=3):
    """Unequal shots, a task where a class has no point, one where only one class has any, one without points."""
    last = classes - 1
    support = points_of([[0, last, 0, 1, last], [0, last, last], [1], []], seed=2)
    return Episode(support, points_of([[0, 1, last, last], [1, 1], [last, 0, 1], [0, 1]], seed=3))


def moved(learner, data, *, prior=True):
    """The learner with every weight moved off its start, the prior's too where ``prior``."""
    learner.materialise(data)
    generator = seeded(8)
    with torch.no_grad():
        for name, p in learner.named_parameters():
            if prior or not name.startswith("model."):
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return learner


def bayesian(kind="head", classes=3, **arguments):
    e = data(classes)
    return moved(BayesianBlackBox(model_of(kind, classes), encoder="per_class", hidden=8, **arguments), e), e


def black_box(kind="head", classes=3):
    e = data(classes)
    return moved(BlackBox(model_of(kind, classes), encoder="per_class", hidden=8), e), e


def nothing(points):
    """An empty set of points of the same tasks."""
    return Points(points.x[:, :0], points.y[:, :0], points.mask[:, :0])


def by_hand(learner, points, shift, scale=None):
    """Mean ``(T, D)`` and sd of u, class by class: from ``shift`` and ``scale``, heads of the learner."""
    network, classes = learner.model.network, learner.model.num_classes
    own = learner.model.dim // classes
    means, sds = torch.zeros(points.num_tasks, classes, own), torch.ones(points.num_tasks, classes, own)
    for task in range(points.num_tasks):
        x, y = points.x[task][points.mask[task]], points.y[task][points.mask[task]].flatten()
        for c in range(classes):
            if not (y == c).any():
                continue
            f = [network.features(one[None])[0] for one in x[y == c]]
            g = [learner.encoder.each(one) for one in f]
            n, mean_f = len(f), sum(f) / len(f)
            e = torch.cat([sum(g) / n, mean_f, torch.tensor([math.log(1 + n)])])
            means[task, c] = shift.linear.value @ mean_f + shift.network.network(e)
            if scale is not None:
                r = torch.log1p((math.e - 1) * scale.network.network(e).exp())
                sds[task, c] = (1e-6 + (1 - 1e-6) * r**2).sqrt()
    return tuple(packed(v) for v in (means, sds))


def packed(rows):
    """Rows of each class ``(T, C, F + bias)`` as a `HeadNetwork` has them: all weights, then all biases."""
    return torch.cat([rows[..., :F].flatten(1), rows[..., F:].flatten(1)], -1)


def rows_of(phi, classes):
    """`packed` undone."""
    weights, biases = phi[:, : classes * F], phi[:, classes * F :]
    return torch.cat([weights.unflatten(1, (classes, F)), biases.unflatten(1, (classes, -1))], -1)


def q_by_hand(learner, points):
    mean, sd = learner.model.prior_moments(points)
    loc, scale = by_hand(learner, points, learner.shift, learner.head)
    return Normal(mean + sd * loc, sd * scale)


def log_probs(learner, phi, points):
    """log p(y_j | φ) of every point and draw, ``(M, T, N)``, 0 in the padding: the network by its formula."""
    network, classes = learner.model.network, learner.model.num_classes
    draws = []
    for one in phi:
        rows, f = rows_of(one, classes), network.features(points.x)
        if isinstance(network, PrototypeNetwork):
            logits = -(f[:, :, None] - rows[:, None]).square().sum(-1)
        else:
            logits = f @ rows[..., :F].mT + (rows[..., F] if network.bias else torch.zeros(1, 1))[:, None]
        each = logits.log_softmax(-1).gather(-1, points.y.long()[..., None])[..., 0]
        draws.append(torch.where(points.mask, each, 0.0))
    return torch.stack(draws)


# --- by hand


@every_network
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_phi_is_its_formula(float64, kind, classes):
    learner, e = black_box(kind, classes)
    mean, sd = learner.model.prior_moments(e.support)
    wanted = mean + sd * by_hand(learner, e.support.filled(), learner.head)[0]
    torch.testing.assert_close(learner.adapt(e.support).mean, wanted.detach(), rtol=0, atol=1e-13)
    query = e.query.filled()
    nll = -log_probs(learner, wanted[None], query)[0].sum(-1) / query.counts
    torch.testing.assert_close(learner.meta_loss(e), nll, rtol=0, atol=1e-12)


@every_network
@pytest.mark.parametrize("classes", [2, 3])
def test_q_is_its_formula(float64, kind, classes):
    learner, e = bayesian(kind, classes)
    found, wanted = learner.adapt(e.support).distribution.base_dist, q_by_hand(learner, e.support.filled())
    torch.testing.assert_close(found.loc, wanted.loc.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(found.scale, wanted.scale.detach(), rtol=0, atol=1e-13)
    assert (found.scale / learner.model.prior_moments(e.support)[1] - 1)[0].abs().min() > 1e-4


def test_the_encoding_is_its_formula(float64):
    learner, e = black_box()
    points, network = e.support.filled(), learner.model.network
    encoding = learner.encoder(points)
    assert encoding.shape == (4, 3, learner.encoder.size) and learner.encoder.size == 8 + F + 1
    f = network.features(points.x[0, [1, 4]])  # the points of class 2 in task 0
    torch.testing.assert_close(encoding[0, 2], torch.cat([learner.encoder.each(f).mean(0), f.mean(0), torch.tensor([math.log(3.0)])]))
    assert not encoding[3].any() and not encoding[2, [0, 2]].any()


@every_network
@every_objective
def test_the_objectives_are_their_formulas(float64, kind, objective):
    learner, e = bayesian(kind, objective=objective, num_draws=3, kl_weight=0.7, subsets=False)
    support, query, both = e.support.filled(), e.query.filled(), e.union().filled()
    seen = {"elbo": both, "neural_process": both}.get(objective, support)
    q = q_by_hand(learner, seen)
    with rng(seeded()):
        noise = torch.stack([torch.randn(4, learner.model.dim) for _ in range(3)])
    phi = q.loc + q.scale * noise
    if objective == "predictive":
        wanted = -(log_probs(learner, phi, query).logsumexp(0) - math.log(3)).masked_fill(~query.mask, 0.0).sum(-1)
    else:
        prior = q_by_hand(learner, support) if objective == "neural_process" else Normal(*learner.model.prior_moments(support))
        served = both if objective == "elbo" else query
        wanted = -log_probs(learner, phi, served).sum(-1).mean(0) + 0.7 * kl_divergence(q, prior).sum(-1)
    torch.testing.assert_close(learner.meta_loss(e, generator=seeded()), wanted, rtol=0, atol=1e-11)


@every_network
def test_the_loss_on_points_is_pyros_mean_field_elbo(float64, kind):
    learner, e = bayesian(kind, num_draws=2)
    pyro.set_rng_seed(7)
    wanted = TraceMeanField_ELBO(num_particles=2).loss(learner.model, learner.guide, e.support)
    got = learner.meta_loss(Episode(e.support, nothing(e.support)), generator=seeded(7)).sum() + learner.global_loss()
    assert got.item() == pytest.approx(wanted, abs=1e-9)


def test_the_guide_sees_the_support_alone(float64):
    learner, e = bayesian(objective="lecture")
    draws = []
    for data in (e, e._replace(query=e.query._replace(y=2 - e.query.y)), e.support):
        pyro.set_rng_seed(1)
        trace = pyro.poutine.trace(learner.guide).get_trace(data)
        draws.append(next(site["value"] for site in trace.stochastic_nodes for site in [trace.nodes[site]] if site["value"].dim() == 2))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    with rng(seeded(1)):
        noise = torch.randn(4, learner.model.dim)
    q = q_by_hand(learner, e.support.filled())
    torch.testing.assert_close(draws[0], q.loc + q.scale * noise, rtol=0, atol=1e-13)


# --- what a class's weights depend on


@every_network
@pytest.mark.parametrize("order", [[1, 0, 2], [2, 0, 1]])
def test_permuting_the_classes_permutes_u_and_nothing_else(float64, kind, order):
    """Relabelled by ``order``, class ``order[c]`` has the part that c had: of u under any prior."""
    for make in (black_box, bayesian):
        learner, e = make(kind)
        relabelled = e.support._replace(y=torch.tensor(order)[e.support.y.long()])
        us = []
        for points in (e.support, relabelled):
            q, (mean, sd) = learner.adapt(points), learner.model.prior_moments(points)
            us.append([rows_of((q.mean - mean) / sd, 3)] + ([] if q.is_point else [rows_of(q.distribution.base_dist.scale / sd, 3)]))
        assert all((before[0] - before[0][:, [0]]).abs().max() > 0.1 for before in us[0])
        for before, after in zip(*us, strict=True):
            torch.testing.assert_close(after[:, order], before, rtol=0, atol=1e-13)


@every_objective
@pytest.mark.parametrize("policy", [None, "task"])
def test_permuting_the_classes_leaves_the_loss(float64, objective, policy):
    """Under the prior of the start, which is the same for all classes, with noise that is permuted along; batch norm or not."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(INPUTS, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, F)) if policy else features()
    model, e = HierarchicalModel.from_network(HeadNetwork(net, F, 3, batch_norm=policy), Categorical(3)), data()
    learner = moved(BayesianBlackBox(model, encoder="per_class", hidden=8, objective=objective, subsets=False), e, prior=False)
    order = torch.tensor([2, 0, 1])
    other = Episode(*(p._replace(y=order[p.y.long()]) for p in e))
    noise = torch.randn(learner.num_draws, 4, model.dim)
    permuted = torch.stack([packed(rows_of(one, 3)[:, order.argsort()]) for one in noise])
    losses = []
    for episode, drawn in ((e, noise), (other, permuted), (other, noise)):
        learner._noise = lambda tasks, drawn=drawn: drawn
        losses.append(learner.meta_loss(episode))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    assert (losses[0] - losses[2]).abs().max() > 1e-3


@every_network
def test_a_classs_weights_do_not_move_with_another_classs_points(float64, kind):
    for make in (black_box, bayesian):
        learner, e = make(kind)
        x, other = e.support.x.clone(), e.support.y == 2
        x[other] += 3.0
        before, after = (learner.adapt(points) for points in (e.support, e.support._replace(x=x)))
        one, two = (rows_of(q.mean, 3) for q in (before, after))
        assert torch.equal(one[:, :2], two[:, :2]) and (one[0, 2] - two[0, 2]).abs().max() > 0.1
        if not before.is_point:
            one, two = (rows_of(q.distribution.base_dist.scale, 3) for q in (before, after))
            assert torch.equal(one[:, :2], two[:, :2]) and (one[0, 2] - two[0, 2]).abs().max() > 1e-4


@every_network
@every_objective
def test_a_class_without_points_has_the_prior_exactly(float64, kind, objective):
    learner, e = bayesian(kind, objective=objective)
    q, (mean, sd) = learner.adapt(e.support).distribution.base_dist, learner.model.prior_moments(e.support)
    for task, missing in ((1, [1]), (2, [0, 2]), (3, [0, 1, 2])):
        for found, wanted in ((q.loc, mean), (q.scale, sd)):
            found, wanted = (rows_of(v.detach(), 3)[task, missing] for v in (found, wanted))
            torch.testing.assert_close(found, wanted, rtol=3e-16, atol=0)
    assert torch.equal(q.loc[3], mean[3])


@every_network
def test_black_box_keeps_the_priors_mean_without_points(float64, kind):
    learner, e = black_box(kind)
    found, mean = rows_of(learner.adapt(e.support).mean, 3), rows_of(learner.model.initial(e.support), 3)
    assert torch.equal(found[1, 1], mean[1, 1]) and torch.equal(found[2, [0, 2]], mean[2, [0, 2]]) and torch.equal(found[3], mean[3])
    empty = Points(torch.zeros(2, 0, INPUTS), None, torch.zeros(2, 0, dtype=torch.bool))
    assert torch.equal(learner.adapt(empty).mean, learner.model.initial(nothing(e.support.select(torch.tensor([0, 1])))))


def test_an_empty_support_set_is_the_prior(float64):
    learner, e = bayesian()
    q, (mean, sd) = learner.adapt(nothing(e.support)).distribution.base_dist, learner.model.prior_moments(e.support)
    assert torch.equal(q.loc, mean)
    torch.testing.assert_close(q.scale, sd.detach(), rtol=3e-16, atol=0)


def test_unequal_shots_are_the_same_without_padding(float64):
    for make in (black_box, bayesian):
        learner, e = make()
        together = learner.adapt(e.support)
        x = torch.where(e.support.mask[..., None], e.support.x, torch.nan)
        odd = learner.adapt(Points(x, torch.where(e.support.mask, e.support.y, 77), e.support.mask))
        assert torch.equal(odd.mean, together.mean)
        for task in range(3):
            alone = learner.adapt(Points(*(v[[task]][:, e.support.mask[task]] for v in e.support)))
            torch.testing.assert_close(alone.mean[0], together.mean[task], rtol=0, atol=1e-13)
            if not alone.is_point:
                pair = (q.distribution.base_dist.scale for q in (alone, together))
                torch.testing.assert_close(next(pair)[0], next(pair)[task], rtol=0, atol=1e-13)


def test_targets_may_have_an_axis_of_their_own(float64):
    learner, e = bayesian(objective="lecture")
    wide = Episode(*(p._replace(y=p.y[..., None]) for p in e))
    assert torch.equal(learner.encoder(wide.support), learner.encoder(e.support))


# --- the start, and learning


def test_prototypes_start_as_the_prototypical_network(float64):
    """To the network ν, whose last layer starts a hundredth its size; without it exactly."""
    model, e = model_of("prototypes"), data()
    support = e.support.select(torch.tensor([0]))
    learner, wanted = BlackBox(model, encoder="per_class"), ProtoNet(model).adapt(support).mean
    assert 0 < (learner.adapt(support).mean - wanted).abs().max() < 0.02
    with torch.no_grad():
        learner.head.network.network[-1].weight.zero_()
    torch.testing.assert_close(learner.adapt(support).mean, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [BlackBox, lambda model, **options: BayesianBlackBox(model, objective="predictive", **options)])
def test_it_learns_where_labels_are_drawn_anew_for_every_task(make):
    """Three of eight fixed places in the plane are a task's classes, in any order: chance is a third."""
    places = 2 * torch.randn(8, INPUTS, generator=seeded(0))

    class Places:
        def sample(self, num_tasks, *, generator):
            chosen = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(num_tasks)])
            sets = []
            for shots in (1, 5):
                y = torch.arange(3).repeat(shots).expand(num_tasks, -1)
                sets += [places[chosen.gather(1, y)] + 0.2 * torch.randn(*y.shape, INPUTS, generator=generator), y]
            return Episode.from_tuple(sets)

    torch.manual_seed(0)
    net = HeadNetwork(nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, 16)), 16, 3)
    learner = make(HierarchicalModel.from_network(net, Categorical(3), NormalPrior.of(net, 1.0)), encoder="per_class")
    meta_train(learner, Places(), steps=150, tasks_per_step=8, optimizer=lambda p: torch.optim.Adam(p, 5e-3), generator=seeded())
    (result,) = evaluate(learner, Places(), num_tasks=100).results.values()
    assert result.metrics["accuracy"].mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BlackBox", "BayesianBlackBox"])
def test_the_recipe_of_glyphs_learns_in_three_hundred_steps(name):
    torch.manual_seed(0)
    recipe = image_recipe("Glyphs", Glyphs(ways=5, shots=1, test_shots=5))
    learner = recipe.learners[name](recipe.model)
    meta_train(
        learner, recipe.train, steps=recipe.steps, tasks_per_step=recipe.tasks_per_step, clip=10.0, generator=seeded(), compile=False,
        optimizer=lambda p: torch.optim.Adam(p, recipe.learning_rate),
    )  # fmt: skip
    (result,) = evaluate(learner, recipe.test, num_tasks=300, task_chunk=50).results.values()
    print(f"{name}: accuracy {result.metrics['accuracy'].mean():.3f}")
    assert result.metrics["accuracy"].mean() > 0.8


# --- as a graph


def steps(objective, compile):
    """Five steps on new tasks each, of the same shape and other class counts; ``objective``: None for BlackBox."""
    model = model_of("head")
    if objective is None:
        learner = BlackBox(model, encoder="per_class", hidden=8)
    else:
        learner = BayesianBlackBox(model, encoder="per_class", hidden=8, objective=objective)

    class Ragged:
        def sample(self, num_tasks, *, generator):
            sets = []
            for n in (6, 5):
                y = torch.randint(3, (num_tasks, n), generator=generator)
                x = torch.randn(num_tasks, n, INPUTS, generator=generator) + y[..., None]
                sets.append(Points(x, y, torch.arange(n) < torch.randint(1, n + 1, (num_tasks, 1), generator=generator)))
            return Episode(*sets)

    history = meta_train(
        learner, Ragged(), steps=5, tasks_per_step=4, optimizer=lambda p: torch.optim.SGD(p, 1e-2), generator=seeded(), compile=compile
    )
    return learner, history


@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
def test_a_traced_step_is_the_eager_one(float64, monkeypatch, objective):
    graphs = []
    monkeypatch.setattr(compiling, "inductor", lambda module, inputs: graphs.append(module) or module)
    (one, history), (two, eager) = steps(objective, True), steps(objective, False)
    assert len(graphs) == 1
    torch.testing.assert_close(torch.tensor(history.loss), torch.tensor(eager.loss), rtol=0, atol=1e-10)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [None, "predictive"])
def test_a_compiled_step_is_the_eager_one(float64, objective):
    (one, history), (two, eager) = steps(objective, True), steps(objective, False)
    torch.testing.assert_close(torch.tensor(history.loss), torch.tensor(eager.loss), rtol=0, atol=1e-10)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_traced_adaptation_is_the_eager_one(float64):
    """On other classes than it was traced with."""
    for make in (black_box, bayesian):
        learner, e = make()
        graphs = []
        compiled = Compiled(learner, backend=lambda module, inputs, graphs=graphs: graphs.append(module) or module)
        for support in (e.support, e.support._replace(y=2 - e.support.y)):
            found, wanted = (one.adapt(support, generator=seeded()) for one in (compiled, learner))
            torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-13)
            draws = (q.draws(5, generator=seeded()) for q in (found, wanted))
            torch.testing.assert_close(next(draws), next(draws), rtol=0, atol=1e-13)
        assert len(graphs) == 1


# --- arguments


def test_an_encoder_of_ones_own_and_copies(float64):
    e = data()
    one = BayesianBlackBox(model_of("head"), encoder=PerClass(5), hidden=8)
    two = pickle.loads(pickle.dumps(copy.deepcopy(one)))
    for learner in (one, two):
        learner.materialise(e.support)
    assert one.encoder.size == 5 + F + 1
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    assert torch.equal(one.adapt(e.support).mean, two.adapt(e.support).mean)
    two.load_state_dict(moved(one, e.support).state_dict())
    assert torch.equal(one.adapt(e.support).mean, two.adapt(e.support).mean)


@pytest.mark.parametrize("make", [BlackBox, BayesianBlackBox])
def test_models_of_another_kind_are_refused_where_the_learner_is_made(make):
    expected = r"encoder='per_class': expected a model from_network\(HeadNetwork.* or PrototypeNetwork.*, Categorical\(...\)\), got "
    whole = HierarchicalModel.from_network(WeightNetwork(nn.Linear(2, 3)), Categorical(3))
    regression = HierarchicalModel.from_network(HeadNetwork(features(), F, 1), Gaussian())
    for model, got in (
        (HierarchicalModel(radon_program), "a user's program"), (whole, "a WeightNetwork and Categorical"),
        (regression, "a HeadNetwork and Gaussian"),
    ):  # fmt: skip
        for encoder in ("per_class", PerClass(4)):
            with pytest.raises(ValueError, match=expected + got):
                make(model, encoder=encoder)


def test_what_has_no_part_for_each_class_is_refused():
    for kind in ("full", "flow"):
        with pytest.raises(ValueError, match=f"posterior: expected 'diagonal' with encoder='per_class', .*got '{kind}'"):
            BayesianBlackBox(model_of("head"), encoder="per_class", posterior=kind)
    with pytest.raises(ValueError, match=r"predictive_head: expected False with encoder='per_class'.*got True"):
        BlackBox(model_of("head"), encoder="per_class", predictive_head=True)
    with pytest.raises(ValueError, match=r"encoder: expected one of .*'per_class', got 'perclass'; did you mean 'per_class'"):
        BlackBox(model_of("head"), encoder="perclass")
    with pytest.raises(ValueError, match="hidden: expected a whole number of at least 1, got 0"):
        BlackBox(model_of("head"), encoder="per_class", hidden=0)
