"""Batch norm by a stated policy: whose statistics, what leaks from one point to another and what does not."""

import copy

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.networks import HeadNetwork, PrototypeNetwork, WeightNetwork

WAYS = 3


def features() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 8), nn.BatchNorm1d(8))


def convolutional() -> nn.Sequential:
    return nn.Sequential(*features(), nn.Linear(8, WAYS))


def network(kind: str, batch_norm: str):
    if kind == "weights":
        return WeightNetwork(convolutional(), batch_norm=batch_norm)
    return {"head": HeadNetwork, "prototypes": PrototypeNetwork}[kind](features(), 8, WAYS, batch_norm=batch_norm)


def model(kind: str, batch_norm: str) -> bm.HierarchicalModel:
    return bm.HierarchicalModel.from_network(network(kind, batch_norm), bm.likelihoods.Categorical(WAYS)).double()


def episode(tasks: int = 4, points: int = 6, seed: int = 0) -> bm.Episode:
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for _ in range(2):
        y = torch.arange(points) % WAYS
        x = torch.randn(tasks, points, 1, 8, 8, generator=generator, dtype=torch.float64)
        x = x * torch.linspace(0.5, 2.0, tasks, dtype=torch.float64).view(-1, 1, 1, 1, 1) + y.view(1, -1, 1, 1, 1)  # tasks differ in scale
        sets += [x, y.expand(tasks, -1)]
    return bm.Episode.from_tuple(sets)


def padded(episode: bm.Episode) -> bm.Episode:
    """The same tasks with points more that are none."""
    def more(points: bm.Points) -> bm.Points:
        x = torch.cat([points.x, torch.full_like(points.x[:, :2], 1e6)], 1)
        y = torch.cat([points.y, points.y[:, :2]], 1)
        return bm.Points(x, y, torch.cat([points.mask, torch.zeros_like(points.mask[:, :2])], 1))

    return bm.Episode(*(more(points) for points in episode))


LEARNERS = {
    "weights": {
        "MAML": lambda m: bm.learners.MAML(m, inner_steps=2),
        "BMAML": lambda m: bm.learners.BMAML(m, num_particles=3, objective="predictive"),
        "ABML": lambda m: bm.learners.ABML(m, inner_steps=2), "LLAMA": lambda m: bm.learners.LLAMA(m, curvature="last_layer"),
    },
    "head": {
        "MAML": bm.learners.MAML, "BayesianBlackBox": bm.learners.BayesianBlackBox,
        "BlackBox": lambda m: bm.learners.BlackBox(m, predictive_head=True),
    },
    "prototypes": {"ProtoNet": bm.learners.ProtoNet, "MatchingNet": bm.learners.MatchingNet},
}  # fmt: skip
PAIRS = [(kind, name) for kind, of_kind in LEARNERS.items() for name in of_kind]


# --- "task": the set at hand


def test_task_statistics_are_what_torch_has_in_training_on_each_task_alone():
    module = convolutional().double()
    mine = WeightNetwork(module, batch_norm="task")
    x = episode().support.x
    found = mine(mine.initial().expand(len(x), -1), x)
    module.train()
    assert torch.allclose(found, torch.stack([copy.deepcopy(module)(one) for one in x]), atol=1e-10)


@pytest.mark.parametrize("kind", ["weights", "head", "prototypes"])
def test_a_task_sees_its_own_points_alone_and_no_padding(kind):
    own = model(kind, "task").network
    x, mask = padded(episode()).support.x, padded(episode()).support.mask
    phi = own.initial().double().expand(len(x), -1) + 0.1
    out = own(phi, x, mask)
    assert torch.equal(out[:, :6], own(phi, torch.where(mask[..., None, None, None], x, -7.0), mask)[:, :6])  # whatever the padding is
    assert torch.allclose(out[:, :6], own(phi, x[:, :6]), atol=1e-12)
    other = x.clone()
    other[1] += 5 * torch.randn_like(other[1])
    again = own(phi, other, mask)
    assert torch.equal(again[[0, 2, 3]], out[[0, 2, 3]])  # nothing comes over from another task


@pytest.mark.parametrize("batch_norm", ["task", "running"])
@pytest.mark.parametrize("kind", ["weights", "head", "prototypes"])
def test_what_leaks_from_one_query_point_to_another(kind, batch_norm):
    own = model(kind, batch_norm).network
    assert own.is_transductive == (batch_norm == "task")
    x = episode().query.x
    phi = own.initial().double().expand(len(x), -1) + 0.1
    other = x.clone()
    other[:, 0] *= 3
    moved = (own(phi, other)[:, 1:] - own(phi, x)[:, 1:]).abs().amax()
    assert (moved > 1e-3) if batch_norm == "task" else (moved == 0)


@pytest.mark.parametrize("batch_norm", ["task", "running"])
@pytest.mark.parametrize("kind, name", PAIRS)
def test_padding_changes_no_loss_and_no_prediction(kind, name, batch_norm):
    torch.manual_seed(0)
    learner = LEARNERS[kind][name](model(kind, batch_norm))
    learner.materialise(episode())
    losses = [learner.meta_loss(e, generator=torch.Generator().manual_seed(1)) for e in (episode(), padded(episode()))]
    assert torch.allclose(*losses, rtol=1e-9)
    predictions = []
    for e in (episode(), padded(episode())):
        posterior = learner.adapt(e.support, generator=torch.Generator().manual_seed(1))
        predictions.append(posterior.predict(e.query.x, generator=torch.Generator().manual_seed(2), mask=e.query.mask).probs[:, :6])
    assert torch.allclose(*predictions, rtol=1e-9)


@pytest.mark.parametrize("kind, name", PAIRS)
def test_evaluation_hands_the_mask_on(kind, name):
    torch.manual_seed(0)
    learner = LEARNERS[kind][name](model(kind, "task"))
    learner.materialise(episode())
    reports = [bm.evaluate({name: learner}, e, num_draws=20) for e in (episode(), padded(episode()))]
    nll = [report.results[name].metrics["nll"] for report in reports]
    assert nll[0] == pytest.approx(nll[1], rel=1e-6)
    assert reports[0].notes == (f"Transductive, batch norm by the query set's own statistics: {name}.",)


# --- "running": the training tasks


def test_running_statistics_are_torchs_own():
    """After one step from 0 and 1: a tenth of the way to the moments of all points, as `nn.BatchNorm2d` moves (its variance unbiased)."""
    own = model("weights", "running")
    own.materialise(episode())
    data = episode().union()
    own.renew_statistics(data)
    first = nn.BatchNorm2d(6).double()
    first.train()
    seen = own.network.module[0].double()(data.x.flatten(0, 1))
    first(seen)
    n = seen.numel() / 6
    norms = own.network.batch_norms
    assert torch.allclose(norms.mean[:6], first.running_mean, atol=1e-12)
    assert torch.allclose((norms.variance[:6] - 0.9) * n / (n - 1) + 0.9, first.running_var, atol=1e-12)


@pytest.mark.parametrize("kind", ["weights", "head"])
def test_training_moves_them_and_nothing_else_does(kind):
    learner = bm.learners.MAML(model(kind, "running"))
    learner.materialise(episode())
    norms = learner.model.network.batch_norms
    start = norms.mean.clone()
    bm.evaluate({"MAML": learner}, episode())
    learner.meta_loss(episode())
    assert torch.equal(norms.mean, start)
    bm.meta_train(learner, episode(), steps=2, compile=False)
    assert (norms.mean - start).abs().max() > 1e-3
    assert any("batch_norms" in name for name in learner.state_dict())
    assert not any("batch_norms" in name for name, _ in learner.named_parameters())


def test_two_convolutions_behind_each_other():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, WAYS)]
    network = WeightNetwork(nn.Sequential(*layers), batch_norm="running")
    learner = bm.learners.MAML(bm.HierarchicalModel.from_network(network, bm.likelihoods.Categorical(WAYS)).double())
    bm.meta_train(learner, episode(), steps=2, compile=False)
    assert (learner.model.network.batch_norms.variance - 1).abs().min() > 1e-3


def test_running_statistics_settle_on_the_data():
    own = model("head", "running")
    own.materialise(episode())
    for _ in range(300):
        own.renew_statistics(episode())
    with torch.no_grad():
        out = own.network.embed(episode().union().x)
    assert out.mean((0, 1)).abs().max() < 1e-6 and (out.var((0, 1), unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("batch_norm", ["task", "running"])
@pytest.mark.parametrize("kind", ["weights", "head"])
def test_a_traced_step_is_the_eager_one(kind, batch_norm, monkeypatch):
    monkeypatch.setattr("bayesmeta.compiling.inductor", lambda module, inputs: module)
    losses = []
    for mode in (False, True):
        learner = bm.learners.MAML(model(kind, batch_norm), inner_steps=2)
        losses.append(bm.meta_train(learner, episode(), steps=6, compile=mode).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_checkpoint_keeps_them(tmp_path):
    def run(steps: int, **options) -> bm.learners.MAML:
        learner = bm.learners.MAML(model("head", "running"))
        bm.meta_train(learner, episode(), steps=steps, compile=False, **options)
        return learner

    whole = run(6)
    run(3, checkpoint=tmp_path / "c")
    resumed = run(6, checkpoint=tmp_path / "c", resume=True)
    assert torch.equal(whole.model.network.batch_norms.variance, resumed.model.network.batch_norms.variance)


# --- "none", and none stated


def test_none_leaves_the_layers_out():
    own = WeightNetwork(convolutional(), batch_norm="none")
    assert own.dim == sum(p.numel() for i, part in enumerate(convolutional()) if i not in (1, 5) for p in part.parameters())
    assert not own.is_transductive


@pytest.mark.parametrize("kind", [WeightNetwork, HeadNetwork, PrototypeNetwork])
def test_batch_norm_without_a_policy_is_refused(kind):
    def make(module: nn.Module, **options: str) -> None:
        kind(module, *(() if kind is WeightNetwork else (8, WAYS)), **options)

    with pytest.raises(ValueError, match=r"module '1' is BatchNorm2d: .*batch_norm='task'.*'running'.*'none'.*GroupNorm"):
        make(features())
    with pytest.raises(ValueError, match="batch_norm: expected one of 'task', 'running', 'per_step', 'none' or None, got 'batch'"):
        make(features(), batch_norm="batch")
    assert isinstance(features()[1], nn.BatchNorm2d)


def test_the_callers_module_is_as_it_was():
    mine = features()
    HeadNetwork(mine, 8, WAYS, batch_norm="task")
    assert isinstance(mine[1], nn.BatchNorm2d) and mine[1].training


def test_a_new_start_forgets_them():
    own = model("head", "running")
    own.materialise(episode())
    own.renew_statistics(episode())
    own.reinitialise(3)
    assert torch.equal(own.network.batch_norms.mean, torch.zeros_like(own.network.batch_norms.mean))
