"""`bayesmeta.Compiled`: the adapter's own posterior, from the same random numbers, whatever the learner."""

import copy
import gc
import inspect
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import bayesmeta.compiled
from bayesmeta import Compiled, HierarchicalModel, evaluate
from bayesmeta.learners import ABML, BMAML, LLAMA, MAML, PLATIPUS, BayesianBlackBox, BlackBox, Ensemble, NoPooling, Reptile
from bayesmeta.learners.base import AbstractAdapter
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import NormalPrior, WeightNetwork
from bayesmeta.posteriors import delta

from .conftest import episode, hyper_program, radon_program

LEARNERS = {
    "MAML": lambda m: MAML(m, inner_steps=2, inner_lr=0.02),
    "ABML": lambda m: ABML(m, inner_steps=2, inner_lr=0.01),
    "BMAML": lambda m: BMAML(m, inner_steps=2, num_particles=4, inner_lr=1e-3),
    "LLAMA": lambda m: LLAMA(m, inner_steps=2, inner_lr=0.02),
    "PLATIPUS": lambda m: PLATIPUS(m, inner_steps=2),
    "Reptile": lambda m: Reptile(m, inner_steps=2),
    "BayesianBlackBox": lambda m: BayesianBlackBox(m, hidden=8),
    "BayesianBlackBox full": lambda m: BayesianBlackBox(m, hidden=8, posterior="full"),
    "BlackBox": lambda m: BlackBox(m, hidden=8),
}


def network():
    torch.manual_seed(0)
    net = WeightNetwork(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)))
    return HierarchicalModel.from_network(net, Gaussian(), NormalPrior.of(net, 0.5))


def as_traced(module, inputs):
    return module


def seeded():
    return torch.Generator().manual_seed(3)


class OwnEnsemble(Ensemble):
    def adapt(self, support, *, generator=None):
        return super().adapt(support, generator=generator)


def test_of_an_ensemble_each_member_is_compiled(float64, monkeypatch):
    graphs = []
    monkeypatch.setattr(bayesmeta.compiled, "inductor", lambda module, inputs: graphs.append(module) or module)
    ensemble = Ensemble(network(), lambda m: ABML(m, inner_steps=2, inner_lr=0.01), size=2, seed=1)
    support = episode().support
    wanted = ensemble.adapt(support, generator=seeded())
    found = [ensemble.adapt(support, generator=seeded(), compile=True) for _ in range(2)]
    for one in (*found, Compiled(ensemble).adapt(support, generator=seeded())):
        for ours, eager in zip(one.components, wanted.components, strict=True):
            torch.testing.assert_close(ours.draws(5, generator=seeded()), eager.draws(5, generator=seeded()), rtol=1e-9, atol=1e-9)
    assert len(graphs) == 2
    assert not torch.equal(*(part.mean for part in wanted.components))
    own = OwnEnsemble(network(), lambda m: ABML(m, inner_steps=2, inner_lr=0.01), size=2, seed=1)
    with pytest.warns(RuntimeWarning, match="adaptation is not compiled"):  # what it makes of its members nobody knows
        assert len(own.adapt(support, compile=True).components) == 2
    with pytest.raises(ValueError, match="compile: expected True, False or 'auto', got 1"):
        ensemble.adapt(support, compile=1)


@pytest.mark.parametrize("model", [lambda: HierarchicalModel(radon_program), network], ids=["radon", "network"])
@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
def test_it_is_the_adapters_own_posterior(make, model, float64):
    """On new data of the same shape, with moved parameters, draws and all; the graph is traced once."""
    torch.manual_seed(1)
    graphs = []
    learner = make(model())
    compiled = Compiled(learner, backend=lambda module, inputs: graphs.append(module) or module)
    for k in range(3):
        support = episode(seed=k).support
        found, wanted = compiled.adapt(support, generator=seeded()), learner.adapt(support, generator=seeded())
        torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.draws(5, generator=seeded()), wanted.draws(5, generator=seeded()), rtol=0, atol=1e-12)
        assert type(found.distribution) is type(wanted.distribution)
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter += 0.01
    assert len(graphs) == 1
    compiled.adapt(episode((2, 2)).support)
    assert len(graphs) == 2


def test_it_is_compiled(float64):
    learner = MAML(HierarchicalModel(radon_program))
    compiled, support = Compiled(learner), episode().support
    torch.testing.assert_close(compiled.adapt(support).mean, learner.adapt(support).mean, rtol=0, atol=1e-12)


def test_it_stands_beside_other_learners():
    learner = MAML(HierarchicalModel(radon_program), inner_lr=0.05)
    report = evaluate({"eager": learner, "compiled": Compiled(learner, backend=as_traced)}, episode())
    assert report.results["compiled"].metrics["nll"] == pytest.approx(report.results["eager"].metrics["nll"], abs=1e-6)


def test_a_draw_of_theta_is_followed(float64):
    """Under a variational θ each of its draws is another posterior: the graph must not keep the first."""
    model = HierarchicalModel(hyper_program, theta="variational", example=episode())
    with torch.no_grad():
        model.theta_log_scale.fill_(0.0)
    learner, support = ABML(model, inner_steps=1, inner_lr=0.01), episode().support
    compiled = Compiled(learner, backend=as_traced)
    found, wanted = (one.adapt_over_theta(support, num_theta=3, generator=seeded()) for one in (compiled, learner))
    for a, b in zip(found.components, wanted.components, strict=True):
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-12)
    assert not torch.allclose(found.components[0].mean, found.components[1].mean)


def test_what_cannot_be_traced_stays_eager_and_says_why():
    learner = NoPooling(HierarchicalModel(radon_program))
    torch.testing.assert_close(Compiled(learner).adapt(episode().support).mean, learner.adapt(episode().support).mean)
    flow, support = BayesianBlackBox(HierarchicalModel(radon_program), hidden=8, posterior="flow"), episode().support
    with pytest.warns(RuntimeWarning, match=r"BayesianBlackBox: adaptation is not compiled"):
        found = Compiled(flow).adapt(support, generator=seeded())
    assert torch.equal(found.draws(2, generator=seeded()), flow.adapt(support, generator=seeded()).draws(2, generator=seeded()))
    learner = MAML(HierarchicalModel(radon_program))
    compiled = Compiled(learner, backend=lambda module, inputs: (lambda *values: [v + 1 for v in module(*values)]))
    with pytest.warns(RuntimeWarning, match=r"MAML: adaptation is not compiled: .*differs from the eager one"):
        found = compiled.adapt(episode().support)
    torch.testing.assert_close(found.mean, learner.adapt(episode().support).mean)
    compiled.adapt(episode().support)  # once is enough


def test_a_task_that_diverges_is_told():
    """φ overflows in the second task alone, of the same shape as the data that the graph was traced on."""
    compiled, support = Compiled(MAML(HierarchicalModel(radon_program)), backend=as_traced), episode().support
    compiled.adapt(support)
    x = support.x.clone()
    x[1] *= 1e30
    with pytest.warns(RuntimeWarning, match="MAML: the adaptation of 1 of 4 tasks diverged"):
        compiled.adapt(support._replace(x=x))


@pytest.mark.parametrize("make", [LEARNERS["MAML"], LEARNERS["ABML"]], ids=["MAML", "ABML"])
def test_an_evaluation_of_many_chunks(make, monkeypatch):
    """The same scores and the same count of gradients; "auto" compiles where what is to come is worth it."""
    graphs = []
    monkeypatch.setattr("bayesmeta.compiled.inductor", lambda module, inputs: graphs.append(module) or module)
    learner, data = make(network()), episode((4,) * 12, (3,) * 12)
    learner.materialise(data)

    def result(mode):
        return evaluate(learner, data, task_chunk=3, num_draws=10, compile=mode).results[type(learner).__name__]

    found = [result(mode) for mode in (False, "auto", True)]
    assert len(graphs) == 1
    monkeypatch.setattr("bayesmeta.evaluation.COMPILING_PAYS", 0.0)
    found.append(result("auto"))
    assert len(graphs) == 2
    for other in found[1:]:
        assert other.metrics["nll"] == pytest.approx(found[0].metrics["nll"], rel=1e-4)
        assert other.gradient_evaluations == found[0].gradient_evaluations and other.settings == found[0].settings
    with pytest.raises(ValueError, match="compile: expected"):
        result("always")


# --- adapt(compile=)


@pytest.fixture
def traced(monkeypatch):
    """Graphs run as they were traced; which ones there were."""
    graphs = []
    monkeypatch.setattr(bayesmeta.compiled, "inductor", lambda module, inputs: graphs.append(module) or module)
    return graphs


@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
def test_adapt_takes_it_as_an_argument(make, float64, traced):
    """The graph is kept for later calls, and is no part of the learner."""
    learner = make(HierarchicalModel(radon_program))
    for k in range(3):
        support = episode(seed=k).support
        found, wanted = learner.adapt(support, generator=seeded(), compile=True), learner.adapt(support, generator=seeded())
        torch.testing.assert_close(found.draws(5, generator=seeded()), wanted.draws(5, generator=seeded()), rtol=0, atol=1e-12)
    assert len(traced) == 1 and not any(isinstance(module, Compiled) for module in learner.modules())
    pickle.loads(pickle.dumps(copy.deepcopy(learner)))


def test_a_learner_changed_since_has_another_graph(float64, traced):
    learner, support = MAML(HierarchicalModel(radon_program), inner_steps=2, inner_lr=0.02), episode().support
    before = learner.adapt(support, compile=True).mean
    learner.inner_steps = learner.adapt_steps = 4
    after = learner.adapt(support, compile=True).mean
    assert len(traced) == 2 and not torch.allclose(before, after)
    torch.testing.assert_close(after, learner.adapt(support).mean, rtol=0, atol=1e-12)
    learner.inner_lr = np.float64(0.05)
    torch.testing.assert_close(learner.adapt(support, compile=True).mean, learner.adapt(support).mean, rtol=0, atol=1e-12)
    with learner.model.in_precision(torch.bfloat16):
        learner.adapt(support, compile=True)
    assert len(traced) == 4


def test_data_and_parameters_as_they_come():
    """Really compiled: a mask that is one row for all tasks, a first axis of θ's draws that has grown."""
    model = HierarchicalModel(hyper_program, theta="nuts")
    learner, support = MAML(model, inner_steps=1, inner_lr=0.01), episode((5, 5, 5)).support
    learner.materialise(support)
    masks = torch.ones(3, support.num_points, dtype=torch.bool), torch.ones(support.num_points, dtype=torch.bool).expand(3, -1)
    for rows in (1, 5):
        model.theta_draws = model.theta_draws[:1].expand(rows, -1).contiguous()
        for mask in masks:
            points = support._replace(mask=mask)
            torch.testing.assert_close(learner.adapt(points, compile=True).mean, learner.adapt(points).mean)


def test_a_call_that_fails_or_diverges_says_nothing_of_the_next(float64, traced):
    learner, support = MAML(HierarchicalModel(radon_program), inner_steps=60, inner_lr=1e30), episode().support
    with pytest.warns(RuntimeWarning, match="diverged") as told:
        learner.adapt(support, compile=True)
    assert all("not compiled" not in str(one.message) for one in told)
    with pytest.warns(RuntimeWarning, match="diverged") as told:
        learner.adapt(support)
    assert [one.filename for one in told] == [__file__]
    with pytest.raises(ValueError, match="finite"):
        learner.adapt(support._replace(y=support.y * torch.nan), compile=True)
    learner.inner_lr = 0.02
    learner.adapt(support, compile=True)
    assert len(traced) == 2


def test_a_learner_that_calls_its_parents_adapt(float64, traced):
    class Shifted:
        def adapt(self, support, *, generator=None):
            return super().adapt(support._replace(y=support.y + 1), generator=generator, compile=True)

    class Learner(Shifted, MAML):
        pass

    learner, plain = (make(HierarchicalModel(radon_program), inner_steps=2) for make in (Learner, MAML))
    support = episode().support
    wanted = plain.adapt(support._replace(y=support.y + 1)).mean
    for compile in (False, True):
        torch.testing.assert_close(learner.adapt(support, compile=compile).mean, wanted, rtol=0, atol=1e-12)
    assert len(traced) == 1


def test_auto_waits_until_eager_calls_have_taken_as_long(float64, traced, monkeypatch):
    learner, support = MAML(HierarchicalModel(radon_program), inner_steps=2), episode().support
    wanted = learner.adapt(support).mean
    for _ in range(3):
        torch.testing.assert_close(learner.adapt(support, compile="auto").mean, wanted, rtol=0, atol=0)
    assert not traced
    monkeypatch.setattr(bayesmeta.compiled, "COMPILING_TAKES", 1e-9)
    learner.adapt(episode((2, 2)).support, compile="auto")  # another shape, whose first call this is
    assert not traced
    torch.testing.assert_close(learner.adapt(support, compile="auto").mean, wanted, rtol=0, atol=1e-12)
    assert len(traced) == 1


def test_what_is_kept_goes_with_the_learner(traced):
    learner = MAML(HierarchicalModel(radon_program), inner_steps=2)
    learner.adapt(episode().support, compile=True)
    gone = weakref.ref(learner)
    del learner
    gc.collect()
    assert gone() is None


def test_what_cannot_be_compiled_says_so_once():
    model = HierarchicalModel(radon_program)
    learner, support = BayesianBlackBox(model, hidden=8, posterior="flow"), episode().support
    with pytest.warns(RuntimeWarning, match="adaptation is not compiled"):
        learner.adapt(support, compile=True, generator=seeded())
    learner.adapt(support, compile=True, generator=seeded())
    NoPooling(model).adapt(support, compile=True)  # says so itself
    with pytest.raises(ValueError, match="compile: expected True, False or 'auto', got 'always'"):
        learner.adapt(support, compile="always")


def test_a_learner_of_ones_own_takes_it_too(float64, traced):
    class Prior(AbstractAdapter):
        def adapt(self, support, *, generator=None):
            return self.posterior(delta(self.model.initial(self.prepared(support))))

    learner, support = Prior(HierarchicalModel(radon_program)), episode().support
    torch.testing.assert_close(learner.adapt(support, compile=True).mean, learner.adapt(support).mean)
    assert len(traced) == 1
    assert [*inspect.signature(Prior.adapt).parameters] == ["self", "support", "generator", "compile"]
    once = Compiled(learner)
    once.adapt(support, compile=True)
    once.adapt(support)
    assert len(traced) == 2
