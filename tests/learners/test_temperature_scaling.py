"""Temperature scaling: the definition on known probabilities, the optimum, and what it leaves alone."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bayesmeta import Episode, HierarchicalModel, Points, evaluate, meta_train
from bayesmeta.learners import ABML, MAML, BlackBox, Ensemble, MatchingNet, TemperatureScaling
from bayesmeta.likelihoods import Bernoulli, Categorical, Gaussian
from bayesmeta.networks import HeadNetwork, PrototypeNetwork, WeightNetwork
from bayesmeta.posteriors import FunctionPosterior, TemperedPosterior
from bayesmeta.tasks import Sinusoid

from ..conftest import episode

CLASSES = 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def classes(tasks=40, shots=2, queries=8, seed=0):
    """Points round one centre a class, another in each task, the clouds overlapping."""
    g = seeded(seed)
    centres = torch.randn(tasks, CLASSES, 2, generator=g)

    def points(each):
        y = torch.arange(CLASSES).repeat(each).expand(tasks, -1)
        x = centres.gather(1, y[..., None].expand(-1, -1, 2)) + 0.7 * torch.randn(tasks, y.shape[1], 2, generator=g)
        return Points(x, y.clone(), torch.ones(y.shape, dtype=torch.bool))

    return Episode(points(shots), points(queries))


def head():
    torch.manual_seed(0)
    return HierarchicalModel.from_network(HeadNetwork(nn.Sequential(nn.Linear(2, 6), nn.Tanh()), 6, CLASSES), Categorical(CLASSES))


def maml(steps=5, lr=2.0):
    return MAML(head(), inner_steps=steps, inner_lr=lr)


def told(logits):
    """A learner whose predicted logits ``(T, N, C)`` are given."""

    class Told(BlackBox):
        def adapt(self, support, *, generator=None):
            said = dist.Categorical(logits=logits[None], validate_args=False)
            return FunctionPosterior(self.model, lambda support, x, mask: said, self.prepared(support))

        def adapt_over_theta(self, support, *, num_theta=10, generator=None):
            return self.adapt(support)

    return Told(head())


def test_probabilities_to_the_power_one_over_t(float64):
    e = classes()
    plain = maml().adapt(e.support).predict(e.query.x)
    scaled = TemperatureScaling(maml(), temperature=2.5).adapt(e.support)
    power = plain.probs ** (1 / 2.5)
    torch.testing.assert_close(scaled.predict(e.query.x).probs, power / power.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    assert torch.equal(scaled.predict(e.query.x).probs.argmax(-1), plain.probs.argmax(-1))


def test_draws_are_averaged_first(float64):
    e = classes(tasks=4)
    learner = ABML(head(), inner_steps=2, inner_lr=0.1)
    plain = learner.adapt(e.support, generator=seeded()).predict(e.query.x, 20, generator=seeded(1))
    scaled = TemperatureScaling(learner, temperature=0.5).adapt(e.support, generator=seeded()).predict(e.query.x, 20, generator=seeded(1))
    power = plain.probs.square()
    torch.testing.assert_close(scaled.probs, power / power.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    decomposition = scaled.decompose()
    torch.testing.assert_close(decomposition.total, decomposition.aleatoric, rtol=0, atol=1e-12)


def test_finds_the_temperature_that_answers_were_drawn_at(float64):
    truth = 3.0
    e = classes(tasks=300, queries=40)
    logits = 4 * torch.randn(*e.query.y.shape, CLASSES, generator=seeded(3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = dist.Categorical(logits=logits / truth).sample()
    scaled = TemperatureScaling(told(logits))
    found = scaled.fit(Episode(e.support, e.query._replace(y=y)), task_chunk=300)
    assert found == scaled.temperature
    assert found == pytest.approx(truth, rel=0.03)


def test_the_optimum_is_where_the_derivative_of_the_nll_is_zero(float64):
    e = classes()
    e = Episode(e.support, e.query._replace(mask=torch.rand(e.query.mask.shape, generator=seeded()) < 0.6))
    learner = maml()
    t = torch.tensor(TemperatureScaling(learner).fit(e), requires_grad=True)
    log_probs = learner.adapt(e.support).predict(e.query.x).probs.log()
    nll = torch.nn.functional.cross_entropy((log_probs / t).movedim(-1, 1), e.query.y, reduction="none")
    weight = e.query.mask / e.query.mask.sum(1, keepdim=True)
    (slope,) = torch.autograd.grad((weight * nll).sum() / e.num_tasks, t)
    assert abs(float(slope)) < 1e-6


def test_improves_nll_and_leaves_accuracy_alone():
    learner, fitted_on, held_out = maml(lr=6.0), classes(200), classes(200, seed=1)
    scaled = TemperatureScaling(learner)
    scaled.fit(fitted_on)
    report = evaluate({"plain": learner, "scaled": scaled}, held_out, examples=0)
    rows = {(row["learner"], row["metric"]): row["estimate"] for row in report.summary()}
    assert rows["scaled", "nll"] < rows["plain", "nll"] - 0.01
    assert rows["scaled", "accuracy"] == rows["plain", "accuracy"]
    assert report.results["scaled"].diagnostics["temperature"] == scaled.temperature


def test_chunks_and_padding_change_nothing(float64):
    e = classes()
    padded = Episode(e.support, e.query.union(e.query._replace(mask=torch.zeros_like(e.query.mask), x=e.query.x * 1e6)))
    whole = TemperatureScaling(maml()).fit(e, task_chunk=1000)
    assert TemperatureScaling(maml()).fit(e, task_chunk=7) == pytest.approx(whole, rel=1e-10)
    assert TemperatureScaling(maml()).fit(padded) == pytest.approx(whole, rel=1e-10)


def test_probabilities_too_small_for_a_float_stay_finite():
    e = classes(tasks=2)
    logits = torch.full((*e.query.y.shape, CLASSES), -400.0)
    logits[..., 0] = 0.0
    posterior = TemperatureScaling(told(logits), temperature=4.0).adapt(e.support)
    torch.testing.assert_close(posterior.predict(e.query.x).log_prob(torch.full_like(e.query.y, 1)), torch.full(e.query.y.shape, -100.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MatchingNet(HierarchicalModel.from_network(PrototypeNetwork(nn.Linear(2, 4), 4, CLASSES), Categorical(CLASSES))),
        lambda: BlackBox(head(), predictive_head=True),
        lambda: Ensemble(head(), lambda model: MAML(model, inner_lr=0.5), size=2),
    ],
    ids=["function", "predictive head", "ensemble"],
)
def test_wraps_every_kind_of_posterior(make):
    e = classes(tasks=5)
    scaled = TemperatureScaling(make(), temperature=1.5)
    posterior = scaled.adapt(e.support)
    assert isinstance(posterior, TemperedPosterior) and posterior.num_tasks == 5
    part = posterior.select([3, 1]).predict(e.query.select([3, 1]).x).probs
    torch.testing.assert_close(part, posterior.predict(e.query.x).probs[[3, 1]])
    report = evaluate({"it": scaled}, e)
    assert "temperature" in report.results["it"].diagnostics


def test_two_classes_by_a_bernoulli(float64):
    torch.manual_seed(0)
    model = HierarchicalModel.from_network(WeightNetwork(nn.Linear(2, 1)), Bernoulli())
    e = classes()
    e = Episode(*(points._replace(y=(points.y == 0).to(points.x)) for points in e))
    learner = MAML(model, inner_steps=3, inner_lr=1.0)
    scaled = TemperatureScaling(learner, temperature=2.0)
    root = learner.adapt(e.support).predict(e.query.x).probs.sqrt()
    torch.testing.assert_close(scaled.adapt(e.support).predict(e.query.x).probs, root / root.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    assert evaluate({"it": scaled}, e).summary()


def test_what_is_saved_comes_back():
    e = classes()
    scaled = TemperatureScaling(maml())
    scaled.fit(e)
    other = TemperatureScaling(maml())
    other.materialise(e)
    other.load_state_dict(scaled.state_dict())
    assert other.temperature == scaled.temperature
    for one in (copy.deepcopy(scaled), pickle.loads(pickle.dumps(scaled))):
        assert one.temperature == scaled.temperature
    posterior = scaled.adapt(e.support)
    assert copy.deepcopy(posterior).temperature == posterior.temperature


def test_phi_is_the_wrapped_learners():
    e = classes()
    learner = maml()
    assert torch.equal(TemperatureScaling(learner, temperature=3.0).adapt(e.support).mean, learner.adapt(e.support).mean)


def test_bad_input_gets_a_clear_error():
    e = classes(tasks=3)
    with pytest.raises(TypeError, match="adapter: expected a learner, got HierarchicalModel"):
        TemperatureScaling(head())
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        TemperatureScaling(maml(), temperature=0)
    with pytest.raises(ValueError, match="expected query points with targets, got none"):
        TemperatureScaling(maml()).fit(Episode(e.support, e.query._replace(mask=torch.zeros_like(e.query.mask))))
    with pytest.raises(TypeError, match=r"tasks: expected an Episode, such as family\.sample"):
        TemperatureScaling(maml()).fit(Sinusoid())
    with pytest.raises(ValueError, match="task_chunk: expected a whole number of at least 1, got 0"):
        TemperatureScaling(maml()).fit(e, task_chunk=0)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 'a'"):
        TemperatureScaling(maml(), temperature="a")
    with pytest.raises(TypeError, match=r"it needs no training .* it has a fit of its own"):
        meta_train(TemperatureScaling(maml()), e, steps=1)
    torch.manual_seed(0)
    regression = MAML(HierarchicalModel.from_network(WeightNetwork(nn.Linear(1, 1)), Gaussian()))
    with pytest.raises(ValueError, match="expected a model of classes, got y of Normal"):
        TemperatureScaling(regression).fit(episode())


def test_a_task_that_diverged_stops_nobody():
    e = classes(tasks=6)
    logits = 3.0 * torch.randn(*e.query.y.shape, CLASSES, generator=seeded()) + 2.0 * torch.nn.functional.one_hot(e.query.y, CLASSES)
    whole = TemperatureScaling(told(logits[1:])).fit(e.select(slice(1, 6)), task_chunk=9)
    logits[0] = torch.nan
    learner = told(logits)
    scaled = TemperatureScaling(learner)
    report = evaluate({"plain": learner, "scaled": scaled}, e, examples=0)
    for name in ("plain", "scaled"):
        assert report.results[name].metrics["nll"][0] != report.results[name].metrics["nll"][0]
        assert not any(v != v for v in report.results[name].metrics["nll"][1:])
    with pytest.warns(RuntimeWarning, match="1 of 6 tasks have no prediction and are left out"):
        assert scaled.fit(e, task_chunk=9) == pytest.approx(whole, rel=1e-10)
    with pytest.warns(RuntimeWarning, match="1 of 1 tasks"), pytest.raises(ValueError, match="a query point and a prediction, got none"):
        TemperatureScaling(told(logits[:1])).fit(e.select(slice(0, 1)))


def test_says_where_there_is_no_best_temperature():
    e = classes()
    right = torch.nn.functional.one_hot(e.query.y, CLASSES)
    for logits, end in ((5.0 * right, "0.01"), (0.02 * right, "0.01"), (-5.0 * right, "100")):
        with pytest.warns(RuntimeWarning, match=f"still falls at T = {end}, the end of the range"):
            assert TemperatureScaling(told(logits)).fit(e) == pytest.approx(float(end))
