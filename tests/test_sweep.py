"""`bayesmeta.inner_loop` and `bayesmeta.sweep`: a step in pieces, swept backward over its inner steps, is the eager step."""

import warnings

import pytest
import torch
from torch import nn

from bayesmeta import AbstractMetaLearner, HierarchicalModel, traced_step
from bayesmeta.inner_loop import NotOneLoop, after, before, once, repeat
from bayesmeta.learners import ABML, BMAML, LLAMA, MAML, PLATIPUS, Ensemble, Reptile
from bayesmeta.learners.objectives import mean_nll
from bayesmeta.learners.steps import descend
from bayesmeta.likelihoods import Gaussian
from bayesmeta.meta_gradient import MetaGradient
from bayesmeta.networks import HeadNetwork
from bayesmeta.posteriors import delta
from bayesmeta.randomness import rng
from bayesmeta.sweep import Sweep

from .conftest import hyper_program
from .test_batch_norm import WAYS
from .test_batch_norm import episode as images
from .test_batch_norm_per_step import model as classifier
from .test_compiling import Tasks, as_traced, assert_same_training, network, radon, trained

LEARN_LR = ("scalar", "per_parameter", "per_step", "per_step_per_parameter")
MAMLS = {
    f"{'FO' if first_order else ''}MAML {learn_lr or ''}": lambda m, k, first_order=first_order, learn_lr=learn_lr: MAML(
        m, inner_steps=k, inner_lr=0.02, first_order=first_order, learn_lr=learn_lr
    )
    for first_order in (False, True)
    for learn_lr in (False, *LEARN_LR)
}
LEARNERS = {
    **MAMLS,
    "ABML": lambda m, k: ABML(m, inner_steps=k, inner_lr=0.01, step_units="plain"),
    "ABML first order": lambda m, k: ABML(m, inner_steps=k, inner_lr=0.01, step_units="plain", first_order=True),
    "ABML rank": lambda m, k: ABML(m, inner_steps=k, inner_lr=0.01, step_units="plain", rank=1),
    "ABML prior units": lambda m, k: ABML(m, inner_steps=k, inner_lr=0.01, step_units="prior"),
    "ABML prior units, rank, iid": lambda m, k: ABML(m, inner_steps=k, inner_lr=0.01, step_units="prior", rank=2, noise="iid"),
    "BMAML predictive": lambda m, k: BMAML(m, inner_steps=k, num_particles=3, inner_lr=1e-3, objective="predictive"),
    "BMAML predictive first order": lambda m, k: BMAML(
        m, inner_steps=k, num_particles=3, inner_lr=1e-3, objective="predictive", first_order=True
    ),
    "LLAMA": lambda m, k: LLAMA(m, inner_steps=k, inner_lr=0.02),
    "LLAMA evidence": lambda m, k: LLAMA(m, inner_steps=k, inner_lr=0.02, objective="evidence"),
}


@pytest.fixture(autouse=True)
def _always_swept(monkeypatch):
    """However few operations it spares."""
    monkeypatch.setattr(traced_step, "SWEPT_OPERATIONS", 0)


def gradient(learner, episode, mode):
    """One step's gradients, where the generator stands afterwards, and the step that was taken."""
    learner.materialise(episode)
    generator = torch.Generator().manual_seed(3)
    made = MetaGradient(learner, learner.trained_parameters(), 7, generator, compile=mode)
    evaluations = learner.model.gradient_evaluations
    found = made(episode, 1, 1)
    steps = list(made.compiler.graphs.values())
    return found, generator.get_state(), learner.model.gradient_evaluations - evaluations, steps[0] if steps else None


def assert_swept(make, *, inner_steps=None, tolerance=1e-12):
    """A sweep, with losses, gradients, random stream and count of gradients of the eager step."""
    episode = Tasks().sample(4, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, after_it, evaluations, step = gradient(make(), episode, True)
    wanted, after_eager, eager_evaluations, _ = gradient(make(), episode, False)
    assert isinstance(step.module, Sweep) and inner_steps in (None, step.module.inner_steps)
    assert torch.equal(after_it, after_eager) and evaluations == eager_evaluations
    torch.testing.assert_close((found.losses, found.loss), (wanted.losses, wanted.loss), rtol=tolerance, atol=tolerance)
    for one, other in zip(found.gradients, wanted.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


# --- the same numbers


@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
def test_a_sweep_is_the_eager_step(make, float64, monkeypatch):
    as_traced(monkeypatch)
    assert_swept(lambda: make(radon(), 3), inner_steps=3)


@pytest.mark.parametrize("name", ["MAML ", "FOMAML scalar", "ABML prior units", "BMAML predictive"])
def test_on_a_network_of_weights(name, float64, monkeypatch):
    as_traced(monkeypatch)
    assert_swept(lambda: LEARNERS[name](network(), 2), inner_steps=2)


def test_under_a_draw_of_theta(float64, monkeypatch):
    """That noise comes first, and is the same in every piece."""
    as_traced(monkeypatch)
    assert_swept(lambda: LEARNERS["ABML"](HierarchicalModel(hyper_program, theta="variational"), 2), inner_steps=2)


@pytest.mark.parametrize(
    ("name", "inner_steps"), [("MAML per_step", 1), ("MAML per_step", 20), ("ABML prior units", 20), ("BMAML predictive", 1)]
)
def test_one_step_and_many(name, inner_steps, float64, monkeypatch):
    as_traced(monkeypatch)
    assert_swept(lambda: LEARNERS[name](radon(), inner_steps), inner_steps=inner_steps)


def test_shared_features_have_their_gradient_from_every_step(float64, monkeypatch):
    as_traced(monkeypatch)

    def make():
        torch.manual_seed(0)
        net = HeadNetwork(nn.Sequential(nn.Linear(1, 4), nn.Tanh()), 4, 1)
        return MAML(HierarchicalModel.from_network(net, Gaussian()), inner_steps=4, inner_lr=0.02)

    assert_swept(make, inner_steps=4)


class Anchored(AbstractMetaLearner):
    """MAML pulled towards a point that is computed from θ before the loop, and is used within it and after it."""

    def __init__(self, model, spoil=None):
        super().__init__(model)
        self.weight, self.spoil = nn.Parameter(torch.tensor(0.3)), spoil

    def adapt(self, support, *, generator=None):
        return self.posterior(delta(self.model.initial(self.prepared(support))))

    def meta_loss(self, episode, *, generator=None):
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        with rng(generator):
            anchor = self.weight * self.model.initial(support) + 0.1 * torch.randn(support.num_tasks, self.model.dim)
            loss = lambda phi: mean_nll(self.model, phi, support) + (phi - anchor).square().sum(-1)  # noqa: E731
            (phi,) = descend(loss, (self.model.initial(support),), [0.02, 0.05, 0.02])
            if self.spoil is not None:
                anchor = self.spoil(anchor, phi)
            return mean_nll(self.model, phi, query) + (phi - anchor + 0.1 * torch.randn(())).square().sum(-1)


def test_what_stands_before_the_loop_has_its_gradient_from_within_and_after(float64, monkeypatch):
    """Noise drawn before the loop is the same in every piece; step sizes that are different numbers are followed."""
    as_traced(monkeypatch)
    assert_swept(lambda: Anchored(radon()), inner_steps=3)


@pytest.mark.parametrize(("name", "clip"), [("MAML per_step", None), ("ABML prior units", 0.1)])
def test_training_goes_as_eagerly(name, clip, float64, monkeypatch):
    """New parameters, data, masks and noise at every step, and Adam's steps among the outputs."""
    graphs = as_traced(monkeypatch)
    make = lambda: LEARNERS[name](radon(), 3)  # noqa: E731
    options = {"optimizer": lambda p: torch.optim.Adam(p, 0.01), "clip": clip, "steps": 6}
    one = trained(make, True, **options)
    assert len(graphs) == 5
    assert_same_training(one, trained(make, False, **options), rtol=1e-10, atol=1e-11)


def test_members_of_an_ensemble_share_the_graphs(float64, monkeypatch):
    graphs = as_traced(monkeypatch)
    make = lambda: Ensemble(radon(), lambda one: MAML(one, inner_steps=3, inner_lr=0.02), size=2)  # noqa: E731
    one = trained(make, True)
    assert len(graphs) == 5
    assert_same_training(one, trained(make, False), rtol=1e-12, atol=1e-13)


def test_convolutions_are_taken_once_there_and_back(float64, monkeypatch):
    as_traced(monkeypatch)
    layers = lambda n: [nn.Conv2d(n, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU()]  # noqa: E731
    module = nn.Sequential(*layers(1), *layers(8), *layers(8), nn.Flatten(), nn.Linear(8, WAYS))
    make = lambda: MAML(classifier("task", module), inner_steps=3, inner_lr=0.05)  # noqa: E731
    found, _, _, step = gradient(make(), images(), True)
    wanted, *_ = gradient(make(), images(), False)
    torch.testing.assert_close(found.gradients, wanted.gradients, rtol=1e-12, atol=1e-13)
    convolutions = {
        name: {node.name for node in graph.graph.nodes if node.op == "call_function" and "convolution" in str(node.target)}
        for name, graph in step.module.graphs.items()
    }
    assert convolutions["step"] and convolutions["back"] and not convolutions["step"] & convolutions["back"]


# --- a single graph instead


@pytest.mark.parametrize(
    "make",
    [lambda m: PLATIPUS(m, inner_steps=2), lambda m: Reptile(m, inner_steps=2), lambda m: BMAML(m, inner_steps=2, num_particles=3)],
    ids=["PLATIPUS", "Reptile", "BMAML chaser"],
)
def test_what_is_not_one_loop_is_one_graph(make, float64, monkeypatch):
    graphs = as_traced(monkeypatch)
    one = trained(lambda: make(radon()), True)
    assert len(graphs) == 1
    assert_same_training(one, trained(lambda: make(radon()), False))


def draws_by_values(anchor, phi):
    return anchor + 0.01 * torch.poisson(phi.detach().abs())


def looks_through_the_loop(anchor, phi):
    """The gradient of the loop's result in what stands before it: pieces do not have it, and here that is no error."""
    (slope,) = torch.autograd.grad(phi.sum(), anchor, retain_graph=True, allow_unused=True)
    return anchor if slope is None else anchor + slope.detach()


@pytest.mark.parametrize("spoil", [draws_by_values, looks_through_the_loop])
def test_a_loss_that_pieces_do_not_make_up_is_one_graph(spoil, float64, monkeypatch):
    graphs = as_traced(monkeypatch)
    one = trained(lambda: Anchored(radon(), spoil), True)
    assert len(graphs) == 1
    assert_same_training(one, trained(lambda: Anchored(radon(), spoil), False))


def test_few_steps_are_one_graph_and_many_a_sweep(monkeypatch):
    monkeypatch.undo()  # as it is by default
    as_traced(monkeypatch)
    episode = Tasks().sample(4, generator=torch.Generator().manual_seed(1))
    swept = {k: isinstance(gradient(MAML(radon(), inner_steps=k, inner_lr=0.02), episode, True)[3].module, Sweep) for k in (1, 5, 100)}
    assert swept == {1: False, 5: False, 100: True}


# --- compiled


@pytest.mark.slow
@pytest.mark.parametrize("model", [radon, network], ids=["radon", "network"])
@pytest.mark.parametrize("name", ["MAML ", "FOMAML per_step_per_parameter", "ABML prior units", "BMAML predictive"])
def test_a_compiled_sweep_is_the_eager_step(name, model, float64):
    assert_swept(lambda: LEARNERS[name](model(), 12), tolerance=1e-9)


# --- the loop itself


def test_a_loop_in_pieces():
    x = torch.tensor(2.0)

    def function(loops=1, *, whole=False):
        start = (x + 1,)
        for _ in range(loops):
            start = repeat(lambda v, size: (v[0] * size,), start, [3.0, 5.0], whole=whole)
        return start[0] - x

    assert function() == 43
    assert before(function) == ((torch.tensor(3.0),), [3.0, 5.0])
    assert once(function, (torch.tensor(7.0),)) == (torch.tensor(21.0),)
    assert once(function, (torch.tensor(7.0),), 10.0) == (torch.tensor(70.0),)
    assert after(function, (torch.tensor(7.0),)) == 5
    for loops in (0, 2):
        with pytest.raises(NotOneLoop, match=f"it has {loops} inner loops"):
            after(lambda loops=loops: function(loops), (torch.tensor(7.0),))
    with pytest.raises(NotOneLoop, match="no inner loop"):
        before(lambda: function(whole=True))
    assert function() == 43  # nothing is left behind


def test_a_loop_within_a_step_is_a_part_of_it():
    def step(values, size):
        return repeat(lambda v, s: (v[0] + s,), values, [size, size])

    function = lambda: repeat(step, (torch.tensor(1.0),), [1.0, 2.0, 3.0])  # noqa: E731
    assert function() == (torch.tensor(13.0),)
    assert once(function, (torch.tensor(5.0),), 4.0) == (torch.tensor(13.0),)
