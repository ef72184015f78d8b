"""`evaluate`: the same tasks for everyone, every number worked out again by hand, and in the units that the data came in."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import nn

from bayesmeta import AbstractAdapter, Episode, HierarchicalModel, Particles, Points, TaskPosterior, evaluate, meta_train
from bayesmeta.learners import ABML, LLAMA, MAML, NUTS, CompletePooling, Exact, NoPooling
from bayesmeta.likelihoods import Bernoulli, Categorical, Gaussian
from bayesmeta.networks import WeightNetwork
from bayesmeta.tasks import Circles, LinearGaussian, Panel, SineOrLine, Sinusoid

from .conftest import episode, linear_program, positive_program, radon_program, ragged


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def radon_maml(dtype=torch.float64, **options):
    return MAML(HierarchicalModel(radon_program, example=ragged((2, 2)).to(dtype)), inner_steps=3, inner_lr=0.1, **options)


def real(points):
    """x ``(n, I)`` and y ``(n,)`` of each task as numpy, without padding."""
    return [(x.double().numpy(), y.double().numpy()) for x, y in points.to_tasks()]


def as_dict(result):
    """All that a result holds, flat, but for the time it took."""
    facts = {f"metric {k}": v for k, v in result.metrics.items()} | {f"site {k}": v for k, v in result.sites.items()}
    facts |= {"pit": result.pit, "probs": result.probs, "labels": result.labels, "gradients": result.gradient_evaluations}
    for i, band in enumerate(result.bands):
        for when in ("before", "after"):
            facts |= {f"band {i} {when} {k}": getattr(getattr(band, when), k) for k in ("grid", "mean", "upper90", "draws")}
    return {k: v for k, v in facts.items() if v is not None}


def assert_same_result(a, b):
    one, two = as_dict(a), as_dict(b)
    assert list(one) == list(two)
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


class Fixed(AbstractAdapter):
    """Its posterior is given particles ``(M, T, D)``, whatever the support: with M draws the predictive is their equal mixture."""

    def __init__(self, model, values):
        super().__init__(model)
        self._values = values

    def adapt(self, support, *, generator=None):
        self.prepared(support)
        return TaskPosterior(self.model, Particles(self._values[:, : support.num_tasks]))


# --- every number, by hand


@pytest.fixture(scope="module")
def held_out():
    torch.manual_seed(0)
    return episode((3, 0, 5, 8, 1), (4, 6, 1, 2, 3), features=2).to(torch.float64)


def root(centre, sd, q):
    """The q quantile of an equal mixture of Normals, by Brent's method."""
    return scipy.optimize.brentq(lambda v: scipy.stats.norm(centre, sd).cdf(v).mean() - q, -1e3, 1e3, xtol=1e-12)


def checked_against(result, held_out, loc, sd, samples_tolerance, scale=1.0):
    """The metrics of ``result`` against those of an equal mixture of N(loc (S, T, N), sd), worked out with scipy in original units."""
    for task, (_, y) in enumerate(real(held_out.query)):
        y, centre = y * scale, loc[:, task, : len(y)] * scale
        mix = scipy.stats.norm(centre, sd * scale)
        assert result.metrics["nll"][task] == pytest.approx(-np.log(mix.pdf(y).mean(0)).mean(), abs=1e-8)
        assert result.metrics["rmse"][task] == pytest.approx(np.sqrt(((centre.mean(0) - y) ** 2).mean()), abs=1e-8)
        np.testing.assert_allclose(result.pit[task, : len(y)], mix.cdf(y).mean(0), atol=1e-9)
        assert np.isnan(result.pit[task, len(y) :]).all()
        ends = np.array([[root(centre[:, j], sd * scale, q) for j in range(len(y))] for q in (0.05, 0.25, 0.75, 0.95)])
        for level, (low, high) in (("50", ends[1:3]), ("90", ends[[0, 3]])):
            assert result.metrics["width" + level][task] == pytest.approx((high - low).mean(), rel=1e-5)
            assert result.metrics["coverage" + level][task] == pytest.approx(((low <= y) & (y <= high)).mean(), abs=1e-12)
        # CRPS = ∫ (F − [y ≤ v])² dv
        grid = np.linspace(-30 * scale, 30 * scale, 20_001)
        cdf = np.stack([scipy.stats.norm(centre[:, j], sd * scale).cdf(grid[:, None]).mean(1) for j in range(len(y))])
        crps = np.trapezoid((cdf - (y[:, None] <= grid)) ** 2, grid, axis=1).mean()
        assert result.metrics["crps"][task] == pytest.approx(crps, abs=samples_tolerance * scale)


def test_metrics_of_a_point_estimate(float64, held_out):
    """The predictive of a Delta is one Normal."""
    learner = MAML(HierarchicalModel(linear_program, example=held_out), inner_steps=3, inner_lr=0.1)
    report = evaluate({"one": learner}, held_out)
    phi = learner.adapt(held_out.support).mean.numpy()
    loc = np.einsum("td,tnd->tn", phi, held_out.query.x.numpy())[None]
    checked_against(report.results["one"], held_out, loc, 0.7, samples_tolerance=0.15)
    assert report.support_sizes.tolist() == [3, 0, 5, 8, 1] and report.query_sizes.tolist() == [4, 6, 1, 2, 3]
    assert report.results["one"].gradient_evaluations == 3
    assert report.results["one"].settings["inner_steps"] == 3 and report.results["one"].seconds > 0


def test_metrics_of_a_mixture_over_draws(float64, held_out):
    """The average is over densities, not over log densities."""
    draws = torch.randn(12, 5, 2, generator=seeded())
    learner = Fixed(HierarchicalModel(linear_program, example=held_out), draws)
    report = evaluate({"it": learner}, held_out, num_draws=12, seed=3)
    loc = np.einsum("std,tnd->stn", draws.numpy(), held_out.query.x.numpy())
    checked_against(report.results["it"], held_out, loc, 0.7, samples_tolerance=0.25)


def test_a_learners_own_draws_are_what_is_scored(float64, held_out):
    """Under the seed: adaptation first, then its draws, on one stream."""
    learner = ABML(HierarchicalModel(linear_program, example=held_out), inner_steps=3)
    (result,) = evaluate(learner, held_out, num_draws=12, seed=3).results.values()
    generator = seeded(3)
    predictive = learner.adapt_over_theta(held_out.support, generator=generator).predict(held_out.query.x, 12, generator=generator)
    loc = predictive.means.numpy()
    for task, (_, y) in enumerate(real(held_out.query)):
        density = scipy.stats.norm(loc[:, task, : len(y)], 0.7).pdf(y).mean(0)
        assert result.metrics["nll"][task] == pytest.approx(-np.log(density).mean(), abs=1e-8)


def test_metrics_are_means_over_tasks(float64, held_out):
    report = evaluate(radon_maml(), episode((3, 5, 2), (4, 1, 6)))
    (result,) = report.results.values()
    rows = {row["metric"]: row["estimate"] for row in report.summary()}
    for name, values in result.metrics.items():
        assert rows[name] == pytest.approx(values.mean(), abs=1e-12)


# --- calibration where the truth is known


@pytest.fixture(scope="module")
def known():
    """A linear-Gaussian family, and the model that has its θ."""
    mean, sd = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    family = LinearGaussian(weight_mean=mean, weight_cov=torch.diag(sd**2), noise=0.5, num_support=(0, 8), num_query=10)

    def program(points):
        m, s = pyro.param("mean", mean), pyro.param("sd", sd, constraint=dist.constraints.positive)
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.Normal(m, s).to_event(1))
            y_hat = (w[..., None, :] * points.x).sum(-1)
            pyro.sample("y", dist.Normal(y_hat, 0.5).mask(points.mask).to_event(1), obs=points.y)

    return family, HierarchicalModel(program, example=family.sample(1, generator=seeded()).query)


def test_the_exact_posterior_is_calibrated_and_as_good_as_the_truth(known):
    family, model = known
    report = evaluate({"Exact": Exact(model), "NoPooling": NoPooling(model)}, family, num_tasks=400, num_draws=200, seed=1, examples=0)
    exact, alone = report.results["Exact"], report.results["NoPooling"]
    assert exact.metrics["coverage90"].mean() == pytest.approx(0.9, abs=0.015)
    assert exact.metrics["coverage50"].mean() == pytest.approx(0.5, abs=0.025)
    assert alone.metrics["coverage90"].mean() < 0.85  # knows nothing of what it does not know
    pit = exact.pit[~np.isnan(exact.pit)]
    assert len(pit) == 4_000 and np.abs(np.quantile(pit, [0.1, 0.3, 0.5, 0.7, 0.9]) - [0.1, 0.3, 0.5, 0.7, 0.9]).max() < 0.03
    # the distance to the family's own predictive, on the very same tasks
    e = family.sample(400, generator=seeded(1))
    best = -family.exact_predictive(e.support, e.query.x).log_prob(e.query.y).mean(1).numpy()
    gap = exact.metrics["nll"] - best
    assert abs(gap.mean()) < 0.01 and np.median(np.abs(gap)) < 0.03
    assert alone.metrics["nll"].mean() - best.mean() > 0.1


def test_widths_are_those_of_the_exact_predictive(known):
    family, model = known
    report = evaluate(Exact(model), family, num_tasks=8, num_draws=2_000, seed=1, examples=0)
    e = family.sample(8, generator=seeded(1))
    wanted = 2 * 1.6448536 * family.exact_predictive(e.support, e.query.x).stddev.mean(1).numpy()
    np.testing.assert_allclose(report.results["Exact"].metrics["width90"], wanted, rtol=0.05)


# --- who sees what


class Spy(AbstractAdapter):
    """Hands on to another adapter and remembers what it was shown."""

    def __init__(self, inner):
        super().__init__(inner.model)
        self.inner, self.seen = inner, []

    def adapt(self, support, *, generator=None):
        torch.randn(100, generator=generator)  # takes more of its randomness than others do
        self.seen.append(support)
        return self.inner.adapt(support, generator=generator)


def test_everyone_sees_the_same_tasks(known):
    family, model = known
    spies = {name: Spy(Exact(model)) for name in ("a", "b")}
    report = evaluate(spies, family, num_tasks=6, seed=4)
    wanted = family.sample(6, generator=seeded(4))
    for spy in spies.values():
        assert all(torch.equal(a, b) for a, b in zip(spy.seen[0], wanted.support, strict=True))
    assert_same_result(report.results["a"], report.results["b"])


@pytest.mark.parametrize("make", [MAML, ABML, Exact, CompletePooling])
def test_company_changes_nothing(known, make):
    family, model = known
    together = evaluate({"Spy": Spy(Exact(model)), "it": make(model), "other": NoPooling(model)}, family, num_tasks=5, num_draws=7)
    alone = evaluate({"it": make(model)}, family, num_tasks=5, num_draws=7)
    assert_same_result(together.results["it"], alone.results["it"])
    assert list(together.results) == ["Spy", "it", "other"]


def test_a_single_adapter_goes_by_the_name_of_its_class(known):
    family, model = known
    assert list(evaluate(ABML(model), family, num_tasks=2).results) == ["ABML"]


def test_the_seed_fixes_everything(known):
    family, model = known
    torch.manual_seed(5)
    one = evaluate(ABML(model), family, num_tasks=5, seed=1)
    torch.manual_seed(6)  # the caller's stream plays no part
    two, other = evaluate(ABML(model), family, num_tasks=5, seed=1), evaluate(ABML(model), family, num_tasks=5, seed=2)
    assert_same_result(one.results["ABML"], two.results["ABML"])
    assert not np.allclose(one.results["ABML"].metrics["nll"], other.results["ABML"].metrics["nll"])


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_tasks_in_chunks_have_the_same_scores(chunk):
    """A point estimate and the exact posterior's mean draw nothing: to rounding. Pictures are of the same tasks in the same order."""
    family = SineOrLine(num_support=(2, 5), num_query=4)
    torch.manual_seed(0)
    net = WeightNetwork(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)))
    learner = MAML(HierarchicalModel.from_network(net, Gaussian()))
    one, other = (evaluate(learner, family, num_tasks=20, task_chunk=size) for size in (None, chunk))
    a, b = one.results["MAML"], other.results["MAML"]
    assert a.metrics.keys() == b.metrics.keys() and "mode_coverage" in a.metrics
    for name in a.metrics:
        if name != "crps":  # by draws
            np.testing.assert_allclose(a.metrics[name], b.metrics[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a.pit, b.pit, atol=1e-5)
    assert [band.name for band in a.bands] == [band.name for band in b.bands] and len(a.bands) == 3
    for left, right in zip(a.bands, b.bands, strict=True):
        np.testing.assert_allclose(left.after.mean, right.after.mean, atol=1e-4)
        assert len(left.explanations) == len(right.explanations)
    assert a.gradient_evaluations == b.gradient_evaluations == 1


def test_maps_and_classes_in_chunks():
    family = Circles(num_positive=(1, 3))
    torch.manual_seed(0)
    net = WeightNetwork(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)))
    learner = MAML(HierarchicalModel.from_network(net, Bernoulli()))
    one, other = (evaluate(learner, family, num_tasks=9, task_chunk=size).results["MAML"] for size in (None, 4))
    np.testing.assert_allclose(one.probs, other.probs, atol=1e-6)
    np.testing.assert_allclose(one.metrics["nll_gap"], other.metrics["nll_gap"], atol=1e-6)
    np.testing.assert_allclose(one.maps[-1].probs, other.maps[-1].probs, atol=2e-3)
    assert [m.task for m in one.maps] == sorted([m.task for m in one.maps], key=[m.task for m in one.maps].index)
    assert {m.task for m in one.maps} == {m.task for m in other.maps}


def test_nothing_outside_is_changed(known):
    family, model = known
    before, theta = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    evaluate({"ABML": ABML(model), "Exact": Exact(model)}, family, num_tasks=4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(theta, model.parameters(), strict=True))
    assert not pyro.get_param_store().keys()


class Endless:
    def __init__(self):
        self.asked = []

    def sample(self, num_tasks, *, generator):
        self.asked.append(num_tasks)
        x = torch.randn(num_tasks, 2, 1, generator=generator)
        return Episode.from_tuple([x, x[..., 0], x, x[..., 0]])


def test_how_many_tasks():
    family = Endless()
    assert len(evaluate(radon_maml(torch.float32), family, examples=0).query_sizes) == 1_000
    assert len(evaluate(radon_maml(torch.float32), family, num_tasks=7, examples=0).query_sizes) == 7
    assert family.asked == [1_000, 7]
    finite = Sinusoid.bmaml(num_tasks=30)
    assert len(evaluate(radon_maml(torch.float32), finite, examples=0).query_sizes) == 30
    assert len(evaluate(radon_maml(torch.float32), finite, num_tasks=9, examples=0).query_sizes) == 9
    assert len(evaluate(radon_maml(), episode(), num_tasks=3).query_sizes) == 3


def test_a_finite_family_shows_every_task_once_in_order_by_name():
    panel = Panel.radon(num_support=2, dtype=torch.float64).split("val")
    spy = Spy(radon_maml())
    report = evaluate({"spy": spy}, panel, seed=3)
    assert list(report.task_names) == panel.task_names()
    assert all(torch.equal(a, b) for a, b in zip(spy.seen[0], panel.episodes(generator=seeded(3)).support, strict=True))
    assert report.target == "log_radon" and report.feature == "floor"
    named = evaluate(radon_maml(), panel, target="radon", feature="storey", title="Homes", notes=("A note.",))
    assert (named.target, named.feature, named.title, named.notes) == ("radon", "storey", "Homes", ("A note.",))


# --- units


def rows(groups=12, size=9, seed=0):
    """A table far from standard: targets near 300 with sd about 40, a feature near 5."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), size)
    x = 5 + 2 * rng.normal(size=(groups * size, 1))
    y = 300 + 30 * rng.normal(size=groups)[group] + 8 * (x[:, 0] - 5) + 10 * rng.normal(size=groups * size)
    return group, x, y


def test_a_standardised_panel_is_scored_in_its_original_units():
    """The same learner's predictive, turned back into original units by hand before it is scored."""
    group, x, y = rows()
    panel = Panel.from_arrays(group, x, y, standardize=True, num_support=4, dtype=torch.float64).split("test")
    mean, sd = panel.scaling.y.mean.item(), panel.target_scale
    assert 250 < mean < 350 and 25 < sd < 60
    learner = radon_maml()
    (result,) = evaluate(learner, panel, seed=2).results.values()
    e = panel.episodes(generator=seeded(2))
    phi, noise = learner.adapt(e.support).mean.numpy(), 1.0
    for task, (xs, ys) in enumerate(real(e.query)):
        original = ys * sd + mean
        assert np.abs(original[:, None] - y).min(1).max() < 1e-9  # these are rows of the table
        normal = scipy.stats.norm(mean + sd * (phi[task, 0] + phi[task, 1] * xs[:, 0]), sd * noise)
        assert result.metrics["nll"][task] == pytest.approx(-normal.logpdf(original).mean(), abs=1e-9)
        assert result.metrics["rmse"][task] == pytest.approx(np.sqrt(((normal.mean() - original) ** 2).mean()), abs=1e-8)
        assert result.metrics["width90"][task] == pytest.approx(2 * 1.6448536 * sd, rel=1e-6)
        assert result.metrics["width50"][task] == pytest.approx(2 * 0.67448975 * sd, rel=1e-6)
        low, high = normal.ppf(0.05), normal.ppf(0.95)
        assert result.metrics["coverage90"][task] == pytest.approx(((low <= original) & (original <= high)).mean(), abs=1e-12)
        np.testing.assert_allclose(result.pit[task, : len(ys)], normal.cdf(original), atol=1e-9)
        z = (original - normal.mean()) / sd
        closed = sd * (z * (2 * scipy.stats.norm.cdf(z) - 1) + 2 * scipy.stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
        assert result.metrics["crps"][task] == pytest.approx(closed.mean(), abs=0.15 * sd)


def test_pictures_are_in_original_units_too():
    group, x, y = rows()
    panel = Panel.from_arrays(group, x, y, standardize=True, num_support=4, dtype=torch.float64).split("test")
    learner = radon_maml()
    (result,) = evaluate(learner, panel, seed=2, examples=2).results.values()
    e = panel.episodes(generator=seeded(2))
    phi = learner.adapt(e.support).mean.numpy()
    mx, sx, my, sy = (float(v.squeeze()) for s in (panel.scaling.x, panel.scaling.y) for v in (s.mean, s.sd))
    assert len(result.bands) == 2
    for band in result.bands:
        for sx_, sy_ in zip(np.r_[band.support_x, band.query_x], np.r_[band.support_y, band.query_y], strict=True):
            assert np.hypot(x[:, 0] - sx_, y - sy_).min() < 1e-9  # every point drawn is a row of the table
        assert band.name == panel.task_names()[band.task]
        z = (band.after.grid - mx) / sx
        a, b = phi[band.task]
        np.testing.assert_allclose(band.after.mean, my + sy * (a + b * z), atol=1e-8)
        np.testing.assert_allclose(band.after.upper90, my + sy * (a + b * z + 1.6448536), atol=1e-4)
        np.testing.assert_allclose(band.before.mean, my + sy * (1.0 - 0.5 * z), atol=1e-8)  # the prior's mean
        np.testing.assert_allclose(band.before.lower50, my + sy * (1.0 - 0.5 * z - 0.67448975), atol=1e-4)
        np.testing.assert_allclose(band.after.draws, band.after.mean[None], atol=1e-9)


def test_examples_go_from_the_smallest_support_set_to_the_largest():
    e = episode((6, 0, 3, 9, 2, 4), (2, 2, 2, 2, 0, 2))
    bands = evaluate(radon_maml(), e, examples=3).results["MAML"].bands
    # tasks 1 and 4 lack a set; the others are 2, 5, 0, 3 in order of size, and 5 and 0 are equally far from the middle
    assert [band.task for band in bands] in ([2, 5, 3], [2, 0, 3])
    assert evaluate(radon_maml(), e, examples=0).results["MAML"].bands == ()


# --- classes and counts


def network(likelihood, outputs):
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, outputs))
    return HierarchicalModel.from_network(WeightNetwork(body), likelihood).double()


def labelled(classes, dtype=torch.int64):
    e = episode((3, 5, 2), (4, 1, 6)).to(torch.float64)
    return Episode(*(p._replace(y=(p.y.abs() * 2).floor().clamp(max=classes - 1).to(dtype)) for p in e))


@pytest.mark.parametrize(("classes", "dtype"), [(2, torch.int64), (2, torch.float64), (3, torch.int64)])
def test_classes(float64, classes, dtype):
    """Probabilities averaged over draws, then scored; y may be 0.0 and 1.0 or 0 and 1."""
    e = labelled(classes, dtype)
    model = network(Bernoulli() if classes == 2 else Categorical(classes), 1 if classes == 2 else classes)
    model.materialise(e)
    draws = torch.randn(9, 3, model.dim, generator=seeded())
    (result,) = evaluate({"it": Fixed(model, draws)}, e, num_draws=9).results.values()
    with torch.no_grad():
        output = model.program.network(draws, e.query.x)
        probs = torch.cat([1 - output.sigmoid(), output.sigmoid()], -1) if classes == 2 else output.softmax(-1)
    probs = probs.mean(0).numpy()
    for task, (_, y) in enumerate(real(e.query)):
        p, y = probs[task, : len(y)], y.astype(int)
        assert result.metrics["nll"][task] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), abs=1e-7)
        assert result.metrics["accuracy"][task] == pytest.approx((p.argmax(-1) == y).mean(), abs=1e-12)
        assert result.metrics["brier"][task] == pytest.approx(((p - np.eye(classes)[y]) ** 2).sum(-1).mean(), abs=1e-9)
        np.testing.assert_allclose(result.probs[task, : len(y)], p, atol=1e-9)
        assert result.labels[task].tolist() == y.tolist() + [-1] * (e.query.num_points - len(y))
    assert set(result.metrics) == {"nll", "accuracy", "brier"} and result.pit is None and result.bands == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_counts(float64, dtype):
    """A Poisson program; counts that come as integers are scored as those that come as floats."""
    e = episode((3, 5, 2), (40, 10, 60), counts_as_targets=True)
    e = Episode(*(p._replace(y=p.y.to(dtype)) for p in e))
    learner = MAML(HierarchicalModel(positive_program, example=e), inner_lr=0.02)
    (result,) = evaluate(learner, e, seed=3).results.values()
    sites = learner.adapt(e.support).sites()
    shares = []
    for task, (x, y) in enumerate(real(e.query)):
        rate = sites["rate"][0, task].item() * np.exp(0.3 * sites["slope"][0, task].item() * x[:, 0])
        poisson = scipy.stats.poisson(rate)
        assert result.metrics["nll"][task] == pytest.approx(-poisson.logpmf(y).mean(), abs=1e-8)
        assert result.metrics["rmse"][task] == pytest.approx(np.sqrt(((rate - y) ** 2).mean()), abs=1e-8)
        low, high = poisson.ppf(0.05), poisson.ppf(0.95)
        assert result.metrics["coverage90"][task] == pytest.approx(((low <= y) & (y <= high)).mean(), abs=1e-12)
        assert result.metrics["width90"][task] == pytest.approx((high - low).mean(), abs=1e-9)
        pit, below, at = result.pit[task, : len(y)], poisson.cdf(y - 1), poisson.cdf(y)
        assert ((below - 1e-9 <= pit) & (pit <= at + 1e-9)).all()
        shares += ((pit - below) / (at - below)).tolist()
    # somewhere at random between F(y − 1) and F(y): without that, counts look miscalibrated
    assert scipy.stats.kstest(shares, "uniform").pvalue > 1e-3


def test_counts_in_a_panel_are_not_scaled():
    group, x, _ = rows()
    y = np.random.default_rng(1).poisson(np.exp(0.3 * (x[:, 0] - 5)))
    panel = Panel.from_arrays(group, x, y, standardize=True, target_type="int", num_support=4, dtype=torch.float64)
    learner = MAML(HierarchicalModel(positive_program), inner_lr=0.02)
    meta_train(learner, panel.split("train"), steps=2)
    report = evaluate(learner, panel.split("test"))
    assert np.isfinite(report.results["MAML"].metrics["nll"]).all() and np.isfinite(report.results["MAML"].metrics["crps"]).all()
    assert (report.results["MAML"].metrics["width90"] == np.round(report.results["MAML"].metrics["width90"] * 5) / 5).all()


def lognormal_program(points):
    """Positive targets: a user's own likelihood, with a support that is not the whole line."""
    mean = pyro.param("mean", torch.tensor(0.2))
    with pyro.plate("tasks", points.num_tasks):
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        y_hat = level[..., None] + 0.3 * points.x[..., 0]
        pyro.sample("y", dist.LogNormal(y_hat, 0.5).mask(points.mask).to_event(1), obs=points.y)


def test_positive_targets(float64):
    e = episode((3, 5, 2), (4, 1, 6))
    e = Episode(*(p._replace(y=p.y.exp()) for p in e))
    learner = MAML(HierarchicalModel(lognormal_program, example=e), inner_lr=0.05)
    (result,) = evaluate(learner, e).results.values()
    level = learner.adapt(e.support).mean.numpy()[:, 0]
    for task, (x, y) in enumerate(real(e.query)):
        truth = scipy.stats.lognorm(0.5, scale=np.exp(level[task] + 0.3 * x[:, 0]))
        assert result.metrics["nll"][task] == pytest.approx(-truth.logpdf(y).mean(), abs=1e-8)
        assert result.metrics["width90"][task] == pytest.approx((truth.ppf(0.95) - truth.ppf(0.05)).mean(), rel=1e-5)


def test_several_outputs_have_their_nll():
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 1), torch.randn(3, 4, 2)
    model = HierarchicalModel.from_network(WeightNetwork(nn.Linear(1, 2)), Gaussian(0.5))
    learner = MAML(model, inner_lr=0.01)
    (result,) = evaluate(learner, Episode.from_tuple([x, y, x, y])).results.values()
    with torch.no_grad():
        output = model.program.network(learner.adapt(Points.of(x, y)).mean, x)
    wanted = -dist.Normal(output, 0.5).log_prob(y).sum(-1).mean(-1)
    np.testing.assert_allclose(result.metrics["nll"], wanted.numpy(), rtol=1e-5)


# --- sizes


def test_a_task_without_query_points_is_scored_by_nobody(float64):
    e = episode((3, 5, 2), (4, 0, 6))
    report = evaluate({"MAML": radon_maml(), "Exact": Exact(HierarchicalModel(radon_program, example=e))}, e)
    for result in report.results.values():
        assert all(np.isnan(v).tolist() == [False, True, False] for v in result.metrics.values())
        assert np.isnan(result.pit[1]).all()
    rest = evaluate(radon_maml(), e.select([0, 2]))
    nll = next(r["estimate"] for r in report.summary() if (r["learner"], r["metric"]) == ("MAML", "nll"))
    assert nll == pytest.approx(rest.results["MAML"].metrics["nll"].mean(), abs=1e-12)
    assert "no finite score" not in report.table()


def test_padding_changes_no_score(float64):
    e = episode((3, 5, 2), (4, 1, 6))

    def wide(points, value):
        mask = torch.cat([points.mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
        x, y = (torch.cat([v, v.new_zeros(3, 2, *v.shape[2:])], 1) for v in points[:2])
        return Points(torch.where(mask[..., None], x, value), torch.where(mask, y, value), mask)

    exact = Exact(HierarchicalModel(radon_program, example=e))
    plain, padded = (evaluate(exact, data) for data in (e, Episode(wide(e.support, 1e6), wide(e.query, 1e6))))
    for name in ("nll", "rmse", "coverage90", "width50"):
        np.testing.assert_allclose(padded.results["Exact"].metrics[name], plain.results["Exact"].metrics[name], rtol=0, atol=1e-12)


def test_empty_support_sets_are_the_prior(float64):
    e = episode((0, 0), (4, 3))
    (result,) = evaluate(radon_maml(), e).results.values()
    for task, (x, y) in enumerate(real(e.query)):
        assert result.metrics["nll"][task] == pytest.approx(-scipy.stats.norm(1.0 - 0.5 * x[:, 0], 1.0).logpdf(y).mean(), abs=1e-10)


# --- what else a report holds


def test_sites_are_posterior_means_by_name(float64):
    e = episode((3, 5, 2), (4, 1, 6))
    maml = radon_maml()
    (result,) = evaluate(maml, e).results.values()
    np.testing.assert_allclose(result.sites["level"], maml.adapt(e.support).mean[:, 0].numpy(), atol=1e-12)
    np.testing.assert_allclose(result.sites["effect"], maml.adapt(e.support).mean[:, 1].numpy(), atol=1e-12)
    exact = Exact(HierarchicalModel(radon_program, example=e))
    (result,) = evaluate(exact, e, num_draws=4_000, examples=0).results.values()
    q = exact.adapt(e.support).distribution
    assert (np.abs(result.sites["level"] - q.mean[:, 0].numpy()) < 4.5 * q.stddev[:, 0].numpy() / math.sqrt(4_000)).all()


def test_histories_and_environment_go_along():
    learner = radon_maml(torch.float32)
    history = meta_train(learner, episode(), steps=3)
    report = evaluate({"it": learner}, episode(), histories={"it": history}, seed=8)
    assert report.histories["it"]["loss"].tolist() == history.loss and report.histories["it"]["step"].tolist() == [1, 2, 3]
    assert report.seed == 8
    assert report.environment["torch"] == torch.__version__ and report.environment["pyro"] == pyro.__version__


@pytest.mark.filterwarnings("ignore:NUTS:RuntimeWarning")  # twenty draws are few, and NUTS says so
def test_particles_are_scored_as_they_are(float64):
    e = episode((3, 5), (4, 2))
    nuts = NUTS(HierarchicalModel(radon_program, example=e), num_draws=20, warmup=10, chains=1)
    (result,) = evaluate(nuts, e, num_draws=20, seed=3, examples=0).results.values()
    draws = nuts.adapt_over_theta(e.support, generator=seeded(3)).draws().numpy()
    loc = draws[..., :1] + draws[..., 1:] * e.query.x.numpy()[None, ..., 0]
    for task, (_, y) in enumerate(real(e.query)):
        nll = -np.log(scipy.stats.norm(loc[:, task, : len(y)], 1.0).pdf(y).mean(0)).mean()
        assert result.metrics["nll"][task] == pytest.approx(nll, abs=1e-9)
    assert {"divergences", "max_r_hat", "min_effective_draws"} <= set(result.diagnostics)


# --- errors


def test_what_is_no_adapter_is_named(known):
    family, model = known
    with pytest.raises(ValueError, match="adapters: expected at least one, got none"):
        evaluate({}, family)
    with pytest.raises(TypeError, match=r"adapters\['model'\]: expected a learner, got HierarchicalModel"):
        evaluate({"ok": Exact(model), "model": model}, family, num_tasks=2)
    with pytest.raises(TypeError, match=r"expected a learner, got .*(class|Exact)"):
        evaluate({"Exact": Exact}, family, num_tasks=2)


def test_bad_data_are_named():
    e = episode()
    for role in ("support", "query"):
        points = getattr(e, role)
        y = points.y.clone()
        y[2, 1] = float("nan")
        with pytest.raises(ValueError, match=rf"{role}\.y: task 2, point 1: expected a finite number.*got nan"):
            evaluate(radon_maml(), e._replace(**{role: points._replace(y=y)}))
    with pytest.raises(ValueError, match=r"query\.y: expected targets, got None"):
        evaluate(radon_maml(), e._replace(query=e.query._replace(y=None)))
    with pytest.raises(ValueError, match="support has 4 tasks, query 3: expected the same"):
        evaluate(radon_maml(), Episode(e.support, e.query.select([0, 1, 2])))
    with pytest.raises(ValueError, match="no task has a query point"):
        evaluate(radon_maml(), episode((2, 2), (0, 0)))


@pytest.mark.parametrize("num_tasks", [0, -1])
@pytest.mark.parametrize("family", [Endless(), Sinusoid.bmaml(num_tasks=30), episode()], ids=["endless", "finite", "episode"])
def test_no_tasks_are_refused(num_tasks, family):
    with pytest.raises(ValueError, match="task"):
        evaluate(radon_maml(torch.float32), family, num_tasks=num_tasks)


@pytest.mark.filterwarnings("ignore:.*diverged:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "make"),
    [("ABML", lambda m: ABML(m, inner_lr=50.0, inner_steps=60)), ("ABML rank=1", lambda m: ABML(m, inner_lr=50.0, inner_steps=60, rank=1)),
     ("LLAMA", lambda m: LLAMA(m, inner_lr=5.0, inner_steps=200)), ("MAML", lambda m: MAML(m, inner_lr=50.0, inner_steps=60))],
)  # fmt: skip
def test_a_task_that_diverges_costs_no_other_learner_its_report(name, make):
    """Steps that are far too large overflow tasks with much curvature; the others keep their scores, and so does everybody else."""
    e = episode((3, 5, 0), (4, 2, 3))
    model = HierarchicalModel(radon_program, example=e)
    report = evaluate({"wild": make(model), "fine": Exact(model)}, e, examples=2)
    assert np.isfinite(report.results["fine"].metrics["nll"]).all()
    wild = report.results["wild"].metrics["nll"]
    assert np.isnan(wild[:2]).any()
    if "rank=1" not in name:  # whose KL is taken at draws, also without data
        assert np.isfinite(wild[2])
