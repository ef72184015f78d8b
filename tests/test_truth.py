"""What a family knows of its tasks, and what each learner lacks of it: worked out again by hand."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bayesmeta import AbstractAdapter, Episode, HierarchicalModel, Particles, TaskPosterior, evaluate, truth
from bayesmeta.learners import ABML, MAML, Ensemble, Exact
from bayesmeta.likelihoods import Bernoulli, Categorical, Gaussian
from bayesmeta.metrics import label_coverage
from bayesmeta.networks import WeightNetwork
from bayesmeta.posteriors import delta
from bayesmeta.report import Report
from bayesmeta.tasks import Circles, GaussianProcess, LinearGaussian, SineOrLine, Sinusoid, TaskFamily
from bayesmeta.truth import truth_of

from .report.test_report_serial import same


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def waves_and_lines(points):
    """y = a sin x + b cos x + c x + d + noise: every sine and every line of the family is some φ."""
    x = points.x[..., 0]
    with pyro.plate("tasks", points.num_tasks):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 3.0).to_event(1))
        features = torch.stack([x.sin(), x.cos(), x, torch.ones_like(x)], -1)
        y_hat = (w[..., None, :] * features).sum(-1)
        pyro.sample("y", dist.Normal(y_hat, 0.3).mask(points.mask).to_event(1), obs=points.y)


class Fixed(AbstractAdapter):
    """Its posterior is given: particles ``(M, T, D)``, or a point ``(T, D)``."""

    def __init__(self, model, values):
        super().__init__(model)
        self._values = values

    def adapt(self, support, *, generator=None):
        values = self._values[..., : self.prepared(support).num_tasks, :]
        return TaskPosterior(self.model, Particles(values) if values.dim() == 3 else delta(values))


@pytest.fixture(scope="module")
def family():
    return SineOrLine(num_support=(2, 4), num_query=6, dtype=torch.float64)


@pytest.fixture
def known(float64, family):
    """Model, held-out episode of 40 tasks, and the coefficients of both explanations of each ``(2, T, 4)``, by least squares."""
    model = HierarchicalModel(waves_and_lines, example=family.sample(2, generator=seeded()).query)
    e = family.sample(40, generator=seeded(1))
    x = torch.linspace(-5, 5, 9)[:, None]
    features = torch.stack([x.sin(), x.cos(), x, torch.ones_like(x)], -1)[:, 0]
    curves = family.explanations(e.support, x)
    return model, e, torch.linalg.lstsq(features.expand(2, 40, -1, -1), curves[..., None]).solution[..., 0]


# --- explanations


def test_who_holds_both_explanations(known, family):
    """All draws at both, at one, in between, near enough, too far, and too few."""
    model, e, both = known
    assert isinstance(family, TaskFamily)
    likely = family.probabilities_of_explanations(e.support)
    ambiguous = ((likely >= 0.2).all(0)).numpy()
    assert 5 <= ambiguous.sum() <= 35
    middle = both.mean(0)
    cases = {
        "both": (both, 1.0),
        "sine": (both[:1], 0.5),
        "point": (both[1], 0.5),
        "middle": (middle, 0.0),
        "near": (both + 0.39 * (both.flip(0) - both), 1.0),
        "far": (both + 0.41 * (both.flip(0) - both), 0.0),
        "few": (both[[0] * 24 + [1]], 0.5),
        "enough": (both[[0] * 19 + [1]], 1.0),
    }
    report = evaluate({name: Fixed(model, phi) for name, (phi, _) in cases.items()}, family, num_tasks=40, seed=1)
    assert np.array_equal(report.scored_tasks["mode_coverage"], ambiguous) and report.explanation_names == ("sine", "line")
    rows = {row["learner"]: row for row in report.summary() if row["metric"] == "mode_coverage"}
    for name, (_, wanted) in cases.items():
        values = report.results[name].metrics["mode_coverage"]
        assert (values[ambiguous] == wanted).all() and np.isnan(values[~ambiguous]).all(), name
        assert rows[name]["estimate"] == wanted and rows[name]["tasks"] == ambiguous.sum()
    text = report.table()
    assert f"in the {ambiguous.sum()} of 40 tasks whose support leaves sine and line open, each at least 20% likely" in text
    assert "no finite score" not in text


def test_a_learner_that_fails_finds_nothing(known, family):
    model, _, both = known
    (result,) = evaluate({"lost": Fixed(model, both * torch.nan)}, family, num_tasks=40, seed=1, examples=0).results.values()
    assert set(result.metrics["mode_coverage"][~np.isnan(result.metrics["mode_coverage"])]) == {0.0}


def test_the_exact_posteriors_draws_hold_nearly_all(float64, family):
    """By importance: 100 draws of the exact posterior of each ambiguous task, from 50,000 of the prior."""
    e = family.sample(150, generator=seeded(2))
    t = truth_of(family, e)
    tasks = family.sample_tasks(50_000, generator=seeded(3))
    few, columns = e.support.select(t.ambiguous.nonzero()[:, 0]), []
    for i in range(few.num_tasks):
        gap = (few.y[i] - family.evaluate(tasks, few.x[i])) * few.mask[i]
        chosen = torch.multinomial((-0.5 * (gap / 0.3).square().sum(-1)).softmax(0), 100, replacement=True, generator=seeded(i))
        line = tasks["is_line"][chosen]
        amplitude, phase = (tasks[name][chosen] * ~line for name in ("amplitude", "phase"))
        straight = [tasks[name][chosen] * line for name in ("slope", "intercept")]
        columns.append(torch.stack([amplitude * phase.cos(), -amplitude * phase.sin(), *straight], -1))
    values = torch.zeros(100, 150, 4)
    values[:, t.ambiguous] = torch.stack(columns, 1)
    model = HierarchicalModel(waves_and_lines, example=e.query)
    posterior = TaskPosterior(model, Particles(values))
    predictive = posterior.predict(e.query.x)
    found = t.scores(posterior, predictive, torch.zeros(150), e.query.mask, num_draws=100, generator=seeded())["mode_coverage"]
    assert t.ambiguous.sum() > 15 and found.nanmean() > 0.93


def test_ambiguous_tasks_are_shown_first_with_their_explanations(known, family):
    model, e, both = known
    ambiguous = (family.probabilities_of_explanations(e.support) >= 0.2).all(0)
    report = evaluate(Fixed(model, both), family, num_tasks=40, seed=1, examples=int(ambiguous.sum()) + 2)
    bands = report.results["Fixed"].bands
    shown = [band.task for band in bands]
    assert all(ambiguous[shown[:-2]]) and not any(ambiguous[shown[-2:]]) and len(set(shown)) == len(shown)
    sizes = e.support.counts[shown[:-2]]
    assert (sizes.diff() >= 0).all()
    for band in bands[:-2]:
        assert [one.name for one in band.explanations] == ["sine", "line"]
        assert sum(one.probability for one in band.explanations) == pytest.approx(1, abs=1e-12)
        for one, draw in zip(band.explanations, band.after.draws, strict=True):  # the learner's two draws are those curves
            np.testing.assert_allclose(draw, one.curve, atol=1e-8)
    assert bands[-1].explanations == bands[-2].explanations == ()


def test_explanations_are_in_original_units(known, family):
    class Scaled:
        """The same tasks, said to be standardised: y = (original − 7) / 10, x = (original − 1) / 2."""

        target_scale = 10.0
        explanation_names = ("wavy", "straight")

        class scaling:
            x = type("x", (), {"mean": torch.tensor([1.0]), "sd": torch.tensor([2.0])})
            y = type("y", (), {"inverse": staticmethod(lambda y: 10 * y + 7)})

        sample, explanations, probabilities_of_explanations = (
            family.sample, family.explanations, family.probabilities_of_explanations,
        )  # fmt: skip

    model, _, both = known
    plain, scaled = (evaluate(Fixed(model, both), f, num_tasks=40, seed=1) for f in (family, Scaled()))
    assert scaled.explanation_names == ("wavy", "straight")
    for one, other in zip(plain.results["Fixed"].bands, scaled.results["Fixed"].bands, strict=True):
        np.testing.assert_allclose(other.after.grid, 2 * one.after.grid + 1, atol=1e-12)
        for a, b in zip(one.explanations, other.explanations, strict=True):
            np.testing.assert_allclose(b.curve, 10 * a.curve + 7, atol=1e-12)
    assert np.array_equal(*(r.results["Fixed"].metrics["mode_coverage"] for r in (plain, scaled)), equal_nan=True)


def test_a_family_that_does_not_know_is_as_one_without(known):
    for family in (SineOrLine(noise=0.0, num_support=2), SineOrLine(amplitude=torch.distributions.Normal(2.0, 1.0), num_support=2)):
        report = evaluate(Fixed(known[0], known[2]), family, num_tasks=10)
        assert report.explanation_names == () and "mode_coverage" not in report.results["Fixed"].metrics


def test_no_ambiguous_task_is_said(known):
    report = evaluate(Fixed(known[0], known[2]), SineOrLine(num_support=30), num_tasks=8)
    assert "mode_coverage" not in report.results["Fixed"].metrics and report.explanation_names == ("sine", "line")
    assert all(band.explanations == () for band in report.results["Fixed"].bands)


def test_families_without_a_truth_are_unchanged(float64):
    family = Sinusoid.maml(num_support=4)
    torch.manual_seed(1)
    model = HierarchicalModel.from_network(WeightNetwork(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))), Gaussian())
    learner = MAML(model, inner_steps=1, inner_lr=0.01)
    for given in (family, SineOrLine(num_support=2).sample(6, generator=seeded())):
        report = evaluate(learner, given, num_tasks=6)
        assert set(report.results["MAML"].metrics) == {"nll", "rmse", "crps", "coverage50", "coverage90", "width50", "width90"}
        assert report.scored_tasks == {} and report.explanation_names == () and report.exact_maps == ()
        assert "exact" not in report.table() and report.results["MAML"].maps == ()


def test_a_report_of_tiny_networks(float64, tmp_path):
    """A point, an ensemble and a distribution over weights; there and back through JSON; the page shows who sees what."""
    family = SineOrLine(num_support=2, num_query=5, dtype=torch.float64)
    body = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    learners = {
        "MAML": MAML(HierarchicalModel.from_network(WeightNetwork(body), Gaussian()), inner_steps=2, inner_lr=0.01),
        "Ensemble": Ensemble(
            HierarchicalModel.from_network(WeightNetwork(body), Gaussian()), lambda m: MAML(m, inner_steps=2, inner_lr=0.01), size=3
        ),
        "ABML": ABML(HierarchicalModel.from_network(WeightNetwork(body), Gaussian()), inner_steps=2, inner_lr=0.01, step_units="prior"),
    }
    report = evaluate(learners, family, num_tasks=30, num_draws=20)
    scored = report.scored_tasks["mode_coverage"]
    assert scored.sum() >= 3
    for name, result in report.results.items():
        values = result.metrics["mode_coverage"]
        assert np.array_equal(np.isnan(values), ~scored), name
        assert set(values[scored]) <= {0.0, 0.5, 1.0} and (name != "MAML" or values[scored].max() <= 0.5)
        assert all(len(band.explanations) == 2 for band in result.bands) and len(result.bands) == 3
    assert [len(r.bands[0].after.draws) for r in report.results.values()] == [1, 3, 20]
    again = Report.from_json(report.to_json(tmp_path / "metrics.json"))
    assert same(report, again) and again.table() == report.table()
    page = report.to_html(tmp_path / "report.html").read_text()
    assert "Ambiguous tasks: who sees both explanations?" in page
    assert f"{scored.sum()} of 30 tasks leave both explanations open (sine, line). The share of them in which draws find both:" in page


# --- the exact predictive


@pytest.mark.parametrize("chunk", [100, 7])
def test_the_gap_to_the_exact_predictive(float64, monkeypatch, chunk):
    monkeypatch.setattr(truth, "CHUNK", chunk)
    mean, sd = torch.tensor([1.0, -0.5]), torch.tensor([1.0, 0.5])
    family = LinearGaussian(weight_mean=mean, weight_cov=torch.diag(sd**2), noise=0.5, num_support=(0, 8), num_query=(1, 10))

    def program(points):
        m, s = pyro.param("mean", mean), pyro.param("sd", sd, constraint=dist.constraints.positive)
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.Normal(m, s).to_event(1))
            y_hat = (w[..., None, :] * points.x).sum(-1)
            pyro.sample("y", dist.Normal(y_hat, 0.5).mask(points.mask).to_event(1), obs=points.y)

    model = HierarchicalModel(program, example=family.sample(1, generator=seeded()).query)
    report = evaluate({"Exact": Exact(model), "MAML": MAML(model)}, family, num_tasks=20, num_draws=4_000, seed=1, examples=0)
    e = family.sample(20, generator=seeded(1))
    for i, (x, y) in enumerate(e.query.to_tasks()):
        q = family.exact_predictive(e.support.select(i), x[None])
        best = -dist.Normal(q.mean[0], q.stddev[0]).log_prob(y).mean().item()
        for result in report.results.values():
            assert result.metrics["nll_gap"][i] == pytest.approx(result.metrics["nll"][i] - best, abs=1e-10)
    rows = {row["learner"]: row for row in report.summary() if row["metric"] == "nll_gap"}
    assert abs(rows["Exact"]["estimate"]) < 0.02 < rows["MAML"]["estimate"] and rows["MAML"]["tasks"] == 20
    assert report.scored_tasks == {} and "label_coverage" not in report.results["MAML"].metrics
    assert "Gap to exact: NLL minus that of the exact predictive" in report.table() and "gap to exact" in report.table()


def test_the_gap_has_no_unit(float64):
    """Told that y is standardised by 10, NLLs move by log 10 and gaps not at all."""
    family = GaussianProcess(num_support=(1, 4), num_query=5, dtype=torch.float64)
    scaled = type("Scaled", (), {"target_scale": 10.0, "sample": family.sample, "exact_predictive": family.exact_predictive})()
    torch.manual_seed(1)
    model = HierarchicalModel.from_network(WeightNetwork(nn.Linear(1, 1)), Gaussian())
    learner = MAML(model, inner_steps=1, inner_lr=0.01)
    one, ten = (evaluate(learner, f, num_tasks=6).results["MAML"].metrics for f in (family, scaled))
    np.testing.assert_allclose(ten["nll"], one["nll"] + math.log(10), atol=1e-12)
    np.testing.assert_allclose(ten["nll_gap"], one["nll_gap"], atol=1e-12)
    e = family.sample(6, generator=seeded())
    best = -family.exact_predictive(e.support, e.query.x).log_prob(e.query.y).mean(1).numpy()
    np.testing.assert_allclose(one["nll_gap"], one["nll"] - best, atol=1e-12)


class Puzzle:
    """Circles whose exact answer is not known in some tasks."""

    def __init__(self, unknown=()):
        self.inner, self.unknown = Circles(num_positive=2, num_query=8, dtype=torch.float64), list(unknown)

    def sample(self, num_tasks, *, generator):
        e = self.inner.sample(num_tasks, generator=generator)
        return Episode(e.support, e.query._replace(mask=torch.arange(8) < torch.tensor([8, 3, 0, 5])[:, None]))

    def exact_predictive(self, support, x):
        probs = self.inner.exact_predictive(support, x).mean.clone()
        probs[self.unknown] = torch.nan
        return torch.distributions.Bernoulli(probs=probs, validate_args=False)


def classifier(likelihood, outputs):
    torch.manual_seed(1)
    return HierarchicalModel.from_network(WeightNetwork(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs))), likelihood)


@pytest.mark.parametrize("unknown", [[], [1]])
@pytest.mark.parametrize(("likelihood", "outputs"), [(Bernoulli, 1), (lambda: Categorical(2), 2)])
def test_open_labels_of_circles(float64, unknown, likelihood, outputs):
    family = Puzzle(unknown)
    model = classifier(likelihood(), outputs)
    e = family.sample(4, generator=seeded(2))
    model.materialise(e)
    values = 3 * torch.randn(12, 4, model.dim, generator=seeded(5))
    report = evaluate(Fixed(model, values), family, num_tasks=4, seed=2, num_draws=12, examples=0)
    (result,) = report.results.values()
    with torch.no_grad():
        output = model.program.network(values, e.query.x)
    draws = output[..., 0].sigmoid() if outputs == 1 else output.softmax(-1)[..., 1]
    exact = family.exact_predictive(e.support, e.query.x).mean
    wanted = label_coverage(draws, exact, e.query.mask)[0].numpy()
    for i in range(4):
        there, known = e.query.mask[i], i not in unknown
        assert result.metrics["label_coverage"][i] == pytest.approx(wanted[i], nan_ok=True, abs=1e-12)
        p, y = exact[i, there], e.query.y[i, there]
        best = -torch.where(y > 0.5, p, 1 - p).log().mean().item() if there.any() and known else math.nan
        assert result.metrics["nll_gap"][i] == pytest.approx(result.metrics["nll"][i] - best, nan_ok=True, abs=1e-9)
    scored = [i for i in range(4) if i != 2 and i not in unknown]
    for row in report.summary():
        if row["metric"] in ("nll_gap", "label_coverage"):
            values = result.metrics[row["metric"]]
            assert row["estimate"] == pytest.approx(values[scored].mean(), abs=1e-12) and row["tasks"] == len(scored)
    assert ("(2 of 3 tasks, where it is known)" in report.table()) == bool(unknown)
    assert "no finite score" not in report.table()


def test_maps_of_circles(float64, tmp_path):
    family = Puzzle()
    model = classifier(Bernoulli(), 1)
    e = family.sample(4, generator=seeded(2))
    model.materialise(e)
    values = 3 * torch.randn(5, 4, model.dim, generator=seeded(5))
    report = evaluate({"it": Fixed(model, values), "point": Fixed(model, values[0])}, family, num_tasks=4, seed=2, num_draws=5, examples=2)
    assert [m.task for m in report.exact_maps] == [0, 3] and [len(r.maps) for r in report.results.values()] == [2, 2]
    every = torch.cat([p.x[p.mask] for p in e])
    for k, exact in enumerate(report.exact_maps):
        task = exact.task
        for axis, own in enumerate((exact.first, exact.second)):
            np.testing.assert_allclose(own[[0, -1]], [every[:, axis].min(), every[:, axis].max()], atol=1e-12)
        assert np.array_equal(exact.support_x, e.support.x[task].numpy()) and (exact.support_y == 1).all() and len(exact.draws) == 0
        mine, point = (report.results[name].maps[k] for name in ("it", "point"))
        for i, j in ((0, 0), (7, 20), (39, 3)):  # second input down, first across
            x = torch.tensor([[[exact.first[j], exact.second[i]]]])
            assert exact.probs[i, j] == pytest.approx(family.exact_predictive(e.support.select(task), x).mean.item(), abs=5.1e-4)
            with torch.no_grad():
                p = model.program.network(values[:, task, None], x).sigmoid().flatten()
            assert mine.draws[:, i, j] == pytest.approx(p.numpy(), abs=5.1e-4)
            assert mine.probs[i, j] == pytest.approx(p.mean().item(), abs=5.1e-4)
            assert point.probs[i, j] == point.draws[0, i, j] == pytest.approx(p[0].item(), abs=5.1e-4)
    again = Report.from_json(report.to_json(tmp_path / "metrics.json"))
    assert same(report, again)
    assert evaluate(Fixed(model, values), family, num_tasks=4, examples=0).exact_maps == ()


def test_a_density_is_not_held_against_a_probability(float64):
    """A Gaussian likelihood for labels has an NLL of another kind: no gap."""
    model = HierarchicalModel.from_network(WeightNetwork(nn.Linear(2, 1)), Gaussian())
    report = evaluate(MAML(model, inner_steps=1, inner_lr=0.01), Circles(num_positive=2, dtype=torch.float64), num_tasks=2, examples=1)
    assert not {"nll_gap", "label_coverage"} & set(report.results["MAML"].metrics) and report.results["MAML"].maps == ()
