"""Batch norm with running statistics of its own for each inner step: held to a loop in plain torch, and to itself in every mode."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bayesmeta as bm
from bayesmeta import traced_step
from bayesmeta.batch_norm import MOMENTUM
from bayesmeta.inner_loop import step_now
from bayesmeta.networks import WeightNetwork
from bayesmeta.sweep import Sweep
from bayesmeta.traced_step import StepTracer
from bayesmeta.training_run import predictive_nll

from .test_batch_norm import WAYS, convolutional, network, padded
from .test_batch_norm import episode as images
from .test_compiling import as_traced

K, ALPHA, LR = 2, 0.3, 0.05


def model(batch_norm: str = "per_step", module: nn.Module | None = None) -> bm.HierarchicalModel:
    """A small classifier of vectors, in float64."""
    torch.manual_seed(0)
    module = module or nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, WAYS))
    return bm.HierarchicalModel.from_network(WeightNetwork(module, batch_norm=batch_norm), bm.likelihoods.Categorical(WAYS)).double()


def episode(seed: int = 0, tasks: int = 4, points: int = 6) -> bm.Episode:
    generator, sets = torch.Generator().manual_seed(seed), []
    for scale in (1.0, 1.7):  # support and query differ
        y = (torch.arange(points) % WAYS).expand(tasks, -1)
        x = torch.randn(tasks, points, 2, generator=generator, dtype=torch.float64) * scale + y[..., None]
        sets += [x * torch.linspace(0.5, 2.0, tasks, dtype=torch.float64).view(-1, 1, 1), y]
    return bm.Episode.from_tuple(sets)


def sgd(parameters):
    return torch.optim.SGD(parameters, LR)


def trained(learner, data=None, steps=3, **options):
    options = {"compile": False, "optimizer": sgd, "generator": torch.Generator().manual_seed(5)} | options
    history = bm.meta_train(learner, episode() if data is None else data, steps=steps, **options)
    return learner, history


def norms(learner) -> bm.batch_norm.BatchNorms:
    return learner.model.network.batch_norms


def assert_same(one, other, tolerance=1e-10):
    """The same training, and the same statistics."""
    assert one[1].loss == pytest.approx(other[1].loss, rel=tolerance)
    for name, value in one[0].state_dict().items():
        torch.testing.assert_close(value, other[0].state_dict()[name], rtol=tolerance, atol=tolerance)


LEARNERS = {
    "MAML": lambda m: bm.learners.MAML(m, inner_steps=K, inner_lr=ALPHA),
    "MAML, its step sizes learned": lambda m: bm.learners.MAML(m, inner_steps=K, inner_lr=ALPHA, learn_lr="per_step"),
    "FOMAML": lambda m: bm.learners.MAML(m, inner_steps=K, inner_lr=ALPHA, first_order=True),
    "Reptile": lambda m: bm.learners.Reptile(m, inner_steps=K, inner_lr=ALPHA),
    "LLAMA": lambda m: bm.learners.LLAMA(m, inner_steps=K, inner_lr=ALPHA, curvature="last_layer", hessian="gauss_newton"),
    "LLAMA, evidence": lambda m: bm.learners.LLAMA(
        m, inner_steps=K, inner_lr=1e-3, objective="evidence", curvature="last_layer", hessian="gauss_newton"
    ),
    "ABML": lambda m: bm.learners.ABML(m, inner_steps=K, inner_lr=0.1),
    "BMAML": lambda m: bm.learners.BMAML(m, inner_steps=K, num_particles=3, inner_lr=1e-4, leader_steps=2),
    "BMAML, predictive": lambda m: bm.learners.BMAML(m, inner_steps=K, num_particles=3, inner_lr=1e-4, objective="predictive"),
    "PLATIPUS": lambda m: bm.learners.PLATIPUS(m, inner_steps=K, inner_lr=ALPHA),
}  # fmt: skip
SWEPT = [
    name if name == "MAML" else pytest.param(name, marks=pytest.mark.slow)
    for name in ("MAML", "MAML, its step sizes learned", "FOMAML", "LLAMA", "ABML", "BMAML, predictive")
]
every_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)


# --- by hand


def by_hand(w, x, statistics):
    """`convolutional` in plain torch, and what its two batch norms are shown; ``statistics``: a mean and a variance for each."""
    (m1, v1), (m2, v2) = statistics
    one = F.conv2d(x, w[0], w[1], stride=2)
    two = F.linear(F.relu(F.batch_norm(one, m1, v1, w[2], w[3], training=False)).flatten(1), w[4], w[5])
    return F.linear(F.batch_norm(two, m2, v2, w[6], w[7], training=False), w[8], w[9]), (one, two)


class Hand:
    """MAML on `convolutional`, one task after the other, with running statistics of each step."""

    def __init__(self, first_order):
        self.w = [p.detach().double().requires_grad_() for p in convolutional().parameters()]
        zeros, ones = torch.zeros, torch.ones
        self.rows = [[[zeros(n).double(), ones(n).double()] for n in (6, 8)] for _ in range(K + 1)]
        self.first_order = first_order

    def adapted(self, x, y, steps=K):
        w, seen = self.w, []
        for k in range(steps):
            out, shown = by_hand(w, x, self.rows[min(k, K)])
            seen.append(shown)
            gradients = torch.autograd.grad(F.cross_entropy(out, y), w, create_graph=not self.first_order)
            w = [v - ALPHA * g for v, g in zip(w, gradients, strict=True)]
        return w, seen

    def gradients(self, data):
        losses = []
        for task in range(data.num_tasks):
            w, _ = self.adapted(data.support.x[task], data.support.y[task])
            losses.append(F.cross_entropy(by_hand(w, data.query.x[task], self.rows[K])[0], data.query.y[task]))
        loss = torch.stack(losses).mean()
        return loss.item(), torch.autograd.grad(loss, self.w)

    def train(self, data):
        loss, gradients = self.gradients(data)
        self.w = [(v - LR * g).detach().requires_grad_() for v, g in zip(self.w, gradients, strict=True)]
        shown = []  # of every task, of every step, of every layer
        for task in range(data.num_tasks):
            w, seen = self.adapted(data.support.x[task], data.support.y[task])
            shown.append([*seen, by_hand(w, data.query.x[task], self.rows[K])[1]])
        for k, row in enumerate(self.rows):
            for layer, statistics in enumerate(row):
                values = torch.cat([of_task[k][layer] for of_task in shown]).detach().movedim(1, 0).flatten(1)
                row[layer] = [
                    (1 - MOMENTUM) * old + MOMENTUM * new
                    for old, new in zip(statistics, (values.mean(1), values.var(1, unbiased=False)), strict=True)
                ]
        return loss


@pytest.mark.parametrize("first_order", [False, True])
def test_training_is_a_plain_loop(first_order):
    """Losses, statistics and gradients of two steps on two episodes; predictions after as many inner steps as in training, and more."""
    hand, learner = Hand(first_order), bm.learners.MAML(
        model(module=convolutional()), inner_steps=K, inner_lr=ALPHA, first_order=first_order, adapt_steps=K + 2
    )  # fmt: skip
    for seed in range(2):
        data = images(seed=seed)
        loss = hand.train(data)
        assert trained(learner, data, steps=1)[1].loss == pytest.approx([loss], rel=1e-10)
        for which, found in enumerate((norms(learner).mean, norms(learner).variance)):
            wanted = torch.stack([torch.cat([row[0][which], row[1][which]]) for row in hand.rows])
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert len({tuple(row.tolist()) for row in norms(learner).mean}) == K + 1
    data = images(seed=7)
    loss, gradients = hand.gradients(data)
    own = learner.meta_loss(data).mean()
    (found,) = torch.autograd.grad(own, learner.model.program.prior.loc)
    assert own.item() == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in gradients]), rtol=1e-10, atol=1e-10)
    for steps in (K, K + 2):
        learner.adapt_steps = steps
        probs = learner.adapt(data.support).predict(data.query.x).probs
        for task in range(data.num_tasks):
            w, _ = hand.adapted(data.support.x[task], data.support.y[task], steps)
            wanted = by_hand(w, data.query.x[task], hand.rows[K])[0].softmax(-1)
            torch.testing.assert_close(probs[task], wanted.detach(), rtol=1e-10, atol=1e-10)


# --- at which step a learner is


STEPS = {
    "MAML": [0, 1, None], "FOMAML": [0, 1, None], "Reptile": [0, 1, None], "ABML": [0, 1, None],
    "LLAMA": [0, 1, None],
    "BMAML": [0, 1, 2, 3, None],  # its leader goes on from the follower
    "PLATIPUS": [0, 0, 1, 2, None],  # a shift of q, one of p, and K steps
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_the_network_is_run_at_the_steps_of_the_loop(name, monkeypatch):
    learner, seen = LEARNERS[name](model()), []
    learner.materialise(episode())
    run = WeightNetwork.forward
    monkeypatch.setattr(WeightNetwork, "forward", lambda *inputs: (seen.append(step_now()), run(*inputs))[1])
    learner.meta_loss(episode(), generator=torch.Generator().manual_seed(1))
    assert seen == STEPS[name]
    seen.clear()
    posterior = learner.adapt(episode().support, generator=torch.Generator().manual_seed(1))
    steps = [k for k in seen if k is not None]
    assert steps == ([0, 1, 2] if name == "PLATIPUS" else [0, 1])
    seen.clear()
    posterior.predict(episode().query.x)
    assert seen == [None] and step_now() is None


@every_learner
def test_training_renews_every_step_of_every_learner(make):
    learner, _ = trained(make(model()))
    assert len(norms(learner).mean) == learner.loop_steps + 1 == learner.inner_steps + 1 + isinstance(learner, bm.learners.PLATIPUS)
    statistics = torch.cat([norms(learner).mean, norms(learner).variance], -1)
    assert (statistics - torch.tensor([0.0] * 4 + [1.0] * 4)).abs().amin(0).min() > 1e-4
    assert (statistics.diff(dim=0).abs().amax(1) > 1e-6).all()  # no step has another's
    before = statistics.clone()
    bm.evaluate({"it": learner}, episode(1), num_draws=3)
    learner.meta_loss(episode(1))
    assert torch.equal(torch.cat([norms(learner).mean, norms(learner).variance], -1), before)


# --- what leaks


@pytest.mark.parametrize("batch_norm", ["task", "per_step"])
def test_what_leaks_from_one_query_point_to_another(batch_norm):
    learner, _ = trained(bm.learners.MAML(model(batch_norm), inner_steps=K, inner_lr=ALPHA))
    assert learner.model.network.is_transductive == (batch_norm == "task")
    posterior, x = learner.adapt(episode().support), episode().query.x
    other = x.clone()
    other[:, 1:] *= 3
    moved = (posterior.predict(other).probs - posterior.predict(x).probs)[:, 0].abs().max()
    assert (moved > 1e-3) if batch_norm == "task" else (moved == 0)


@every_learner
def test_padding_changes_nothing(make):
    whole, more = (trained(make(model()), data, steps=2) for data in (episode(), padded_vectors(episode())))
    assert_same(whole, more, 1e-9)


def padded_vectors(data):
    def images(points):
        return points._replace(x=points.x[..., None, None])

    return bm.Episode(*(points._replace(x=points.x[..., 0, 0]) for points in padded(bm.Episode(*map(images, data)))))


# --- the same numbers in every mode


@pytest.mark.slow
@every_learner
def test_a_traced_step_is_the_eager_one(make, monkeypatch):
    as_traced(monkeypatch)
    assert_same(trained(make(model()), steps=4), trained(make(model()), steps=4, compile=True))


@pytest.mark.parametrize("name", SWEPT)
def test_a_swept_step_is_the_eager_one(name, monkeypatch):
    """One graph of all steps, which is handed the step's number."""
    graphs = as_traced(monkeypatch)
    monkeypatch.setattr(traced_step, "SWEPT_OPERATIONS", 0)
    made = []
    traced = StepTracer.__call__
    monkeypatch.setattr(StepTracer, "__call__", lambda *inputs: (made.append(traced(*inputs)), made[-1])[1])
    assert_same(trained(LEARNERS[name](model()), steps=4), trained(LEARNERS[name](model()), steps=4, compile=True))
    assert made and all(isinstance(step.module, Sweep) for step in made) and graphs


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one(monkeypatch):
    monkeypatch.setattr(traced_step, "SWEPT_OPERATIONS", 0)
    make = lambda: LEARNERS["MAML"](model())  # noqa: E731
    assert_same(trained(make(), steps=4), trained(make(), steps=4, compile=True))


@pytest.mark.parametrize("name", ["MAML", "FOMAML", "Reptile", "LLAMA", "BMAML"])
def test_chunks_of_tasks_change_nothing(name):
    whole, chunked = (trained(LEARNERS[name](model()), task_chunk=chunk) for chunk in (None, 3))
    assert_same(whole, chunked)


def test_compiled_adaptation_is_the_eager_one():
    learner, _ = trained(bm.learners.MAML(model(), inner_steps=K, inner_lr=ALPHA, adapt_steps=K + 1))
    compiled = bm.Compiled(learner, backend=lambda module, inputs: module)
    torch.testing.assert_close(compiled.adapt(episode().support).mean, learner.adapt(episode().support).mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["MAML", "ABML"])
def test_a_checkpoint_resumes_to_the_same_numbers(name, tmp_path):
    make = lambda: LEARNERS[name](model())  # noqa: E731
    whole = trained(make(), steps=6)
    trained(make(), steps=3, checkpoint=tmp_path / "c")
    resumed = trained(make(), steps=6, checkpoint=tmp_path / "c", resume=True)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[key])
    fresh = make()
    fresh.load_state_dict(whole[0].state_dict())
    assert torch.equal(norms(fresh).mean, norms(whole[0]).mean)


def test_a_checkpoint_of_other_steps_is_refused(tmp_path):
    trained(LEARNERS["MAML"](model()), checkpoint=tmp_path / "c")
    with pytest.raises(bm.CheckpointError, match=r"batch_norms\.mean is \(3, 4\), expected \(5, 4\)"):
        trained(bm.learners.MAML(model(), inner_steps=4), checkpoint=tmp_path / "c", resume=True)


def test_the_random_stream_is_as_with_running_statistics():
    """Renewal takes nothing from it."""
    ends = []
    for batch_norm in ("running", "per_step"):
        generator = torch.Generator().manual_seed(5)
        trained(LEARNERS["ABML"](model(batch_norm)), generator=generator)
        ends.append(generator.get_state())
    assert torch.equal(*ends)


# --- where it is "running", and what is refused


@pytest.mark.parametrize("make", [
    bm.learners.CompletePooling, lambda m: bm.learners.NoPooling(m, inner_steps=3, newton_dim=1),
    lambda m: bm.learners.MAML(m, inner_steps=0),
], ids=["CompletePooling", "NoPooling", "MAML without steps"])  # fmt: skip
def test_without_inner_steps_it_is_running(make):
    running, per_step = (trained(make(model(batch_norm))) for batch_norm in ("running", "per_step"))
    assert running[1].loss == per_step[1].loss
    assert torch.equal(norms(running[0]).variance[None], norms(per_step[0]).variance)


@pytest.mark.parametrize("kind", ["head", "prototypes"])
def test_shared_features_refuse_it(kind):
    with pytest.raises(ValueError, match="the same at every inner step: expected 'running', got 'per_step'"):
        network(kind, "per_step")


@pytest.mark.parametrize("make", [bm.learners.MAML, bm.learners.Reptile, bm.learners.LLAMA, bm.learners.BMAML, bm.learners.PLATIPUS])
def test_fewer_steps_at_test_are_refused(make):
    with pytest.raises(ValueError, match=r"adapt_steps: batch_norm='per_step' has .* got 2 fewer"):
        make(model(), inner_steps=3, adapt_steps=1)
    make(model("running"), inner_steps=3, adapt_steps=1)


def test_steps_that_were_changed_since_are_refused():
    data = episode()
    learner = bm.learners.MAML(model(), inner_steps=2, inner_lr=ALPHA)
    for name, value in (("adapt_steps", 1), ("inner_steps", 1), ("inner_steps", 4)):
        before = getattr(learner, name)
        setattr(learner, name, value)
        with pytest.raises(ValueError, match=r"statistics of 2 steps .* expected inner_steps=2 and as many adapt_steps or more"):
            learner.adapt(data.support)
        setattr(learner, name, before)
    learner.adapt_steps = 5
    learner.adapt(data.support)


@pytest.mark.parametrize("policy", ["running", "per_step"])
def test_the_best_statistics_are_kept_with_the_best_parameters(policy, tmp_path):
    """And in a checkpoint: a run that goes on ends with the same ones."""
    held_out = episode(seed=5)

    def trained_to(steps, **options):
        torch.manual_seed(0)
        learner = bm.learners.MAML(model(policy), inner_steps=K, inner_lr=ALPHA)
        history = bm.meta_train(
            learner, episode(), steps=steps, tasks_per_step=2, optimizer=lambda params: torch.optim.Adam(params, 0.2), compile=False,
            generator=torch.Generator().manual_seed(0), validation=held_out, validate_every=2, **options,
        )  # fmt: skip
        return learner, history

    learner, history = trained_to(20)
    assert history.best_step < 20
    found = float(predictive_nll(learner, held_out).nanmean())
    assert found == pytest.approx(min(history.validation), rel=1e-10)
    trained_to(10, checkpoint=tmp_path / "c")
    again, _ = trained_to(20, checkpoint=tmp_path / "c", resume=True)
    for name, value in learner.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_learners_that_share_a_model():
    own = model()
    trained(bm.learners.MAML(own, inner_steps=2, inner_lr=ALPHA))
    before = own.network.batch_norms.mean.clone()
    bm.learners.Reptile(own, inner_steps=4)
    assert torch.equal(own.network.batch_norms.mean, before[[0, 1, 2, 2, 2]])  # what is new goes on as the last did
    with pytest.raises(ValueError, match="statistics of 4 inner steps, another learner's, and this one takes 3"):
        bm.learners.MAML(own, inner_steps=3)
    with pytest.raises(ValueError, match="renewed by the learner that takes them"):
        own.renew_statistics(episode())


def test_tasks_that_diverge_count_for_nothing():
    data = episode()
    support = data.support._replace(x=data.support.x.clone())
    support.x[1] = 1e200  # its variance is not finite, nor is any φ after a step
    module = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, WAYS))
    learner, fine = (bm.learners.MAML(model(module=module), inner_steps=K, inner_lr=ALPHA) for _ in range(2))
    for one, tasks in ((learner, bm.Episode(support, data.query)), (fine, data.select(torch.tensor([0, 2, 3])))):
        one.materialise(data)
        one.renew_statistics(tasks)
    assert torch.allclose(norms(learner).mean, norms(fine).mean, atol=1e-12)
    assert norms(learner).variance.isfinite().all()


def test_a_set_without_points_moves_nothing():
    data = episode()
    learner = LEARNERS["MAML"](model())
    learner.materialise(data)
    learner.renew_statistics(bm.Episode(data.support._replace(mask=torch.zeros_like(data.support.mask)), data.query))
    assert torch.equal(norms(learner).mean[:K], torch.zeros(K, 4).double()) and (norms(learner).mean[K] != 0).all()
    assert torch.equal(norms(learner).variance[:K], torch.ones(K, 4).double())


def test_copies_ensembles_and_a_new_start():
    learner, _ = trained(LEARNERS["MAML"](model()))
    twin = copy.deepcopy(learner)
    twin.model.reinitialise(3)
    assert torch.equal(norms(twin).mean, torch.zeros(K + 1, 4).double()) and (norms(learner).mean != 0).all()
    ensemble, _ = trained(bm.learners.Ensemble(model(), LEARNERS["MAML"], size=2))
    assert all(len(norms(member).mean) == K + 1 and (norms(member).mean != 0).all() for member in ensemble.members)
