"""Gaussian-process draws, and the exact answers against dense computations with numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from scipy.special import gamma, kv
from scipy.stats import multivariate_normal

from bayesmeta.episodes import Points
from bayesmeta.tasks import GaussianProcess


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(**options):
    return GaussianProcess(**{"num_support": (0, 9), "num_query": 5, "dtype": torch.float64, **options})


def kernel(name, x, other, length, amplitude):
    """Written another way than the family does: Matérn by its Bessel function, the periodic one on the circle."""
    d = np.abs(x[:, None] - other[None])
    if name == "rbf":
        k = np.exp(-((d / length) ** 2) / 2)
    elif name == "matern52":
        z = np.maximum(math.sqrt(5) * d / length, 1e-6)
        k = 2 ** (1 - 2.5) / gamma(2.5) * z**2.5 * kv(2.5, z)
    else:
        on_circle = (np.stack([np.cos(2 * np.pi * v), np.sin(2 * np.pi * v)], -1) for v in (x, other))
        u, v = on_circle
        k = np.exp(-((u[:, None] - v[None]) ** 2).sum(-1) / (2 * length**2))
    return amplitude**2 * k


@pytest.fixture(params=["rbf", "matern52", "periodic"])
def scene(request):
    """Family, its tasks and a ragged episode with NaN in the padding; the last task has no support."""
    family = make(kernel=request.param)
    tasks = family.sample_tasks(7, generator=seeded())
    support, query = family.sample(7, generator=seeded())
    support.mask[-1] = False
    hidden = (v.masked_fill(~m, torch.nan) for v, m in ((support.x, support.mask[..., None]), (support.y, support.mask)))
    return family, tasks, Points(*hidden, support.mask), query


def test_given_the_hyperparameters_it_is_the_dense_conditional(scene):
    family, tasks, support, query = scene
    predictive = family.exact_predictive(support, query.x, tasks=tasks)
    evidence = family.log_evidence(support, tasks=tasks)
    assert predictive.batch_shape == (7, 5) and evidence.shape == (7,)
    for i, (x, y) in enumerate(support.to_tasks()):
        x, y, new = x[:, 0].numpy(), y.numpy(), query.x[i, :, 0].numpy()
        at = (tasks["length_scale"][i].item(), tasks["amplitude"][i].item())
        k = kernel(family.kernel, x, x, *at) + 0.02**2 * np.eye(len(x))
        cross, prior = kernel(family.kernel, new, x, *at), kernel(family.kernel, new, new, *at)
        gain = np.linalg.solve(k, cross.T).T
        np.testing.assert_allclose(predictive.mean[i], gain @ y, rtol=0, atol=1e-9)
        np.testing.assert_allclose(predictive.variance[i], np.diag(prior - gain @ cross.T) + 0.02**2, rtol=0, atol=1e-9)
        truth = multivariate_normal(np.zeros(len(x)), k).logpdf(y) if len(x) else 0.0
        assert evidence[i].item() == pytest.approx(truth, abs=1e-7)
        function = family.exact_posterior(support, query.x, tasks=tasks)
        assert function.batch_shape == (7,) and function.event_shape == (5,)
        np.testing.assert_allclose(function.mean[i], gain @ y, rtol=0, atol=1e-9)
        np.testing.assert_allclose(function.covariance_matrix[i], prior - gain @ cross.T + 1e-8 * at[1] ** 2 * np.eye(5), rtol=0, atol=1e-9)


def test_the_functions_posterior_has_the_marginals_of_the_predictive(scene):
    """Hyperparameters integrated out: mean and variance of f are those of y without its noise; and it can be drawn and scored."""
    family, _, support, query = scene
    function, predictive = family.exact_posterior(support, query.x), family.exact_predictive(support, query.x)
    torch.testing.assert_close(function.mean, predictive.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(function.variance, predictive.variance - 0.02**2, rtol=0, atol=2e-8)
    torch.manual_seed(0)
    assert function.log_prob(function.sample()).isfinite().all()


def test_hyperparameters_are_integrated_out(scene):
    """Against scipy's adaptive quadrature over both, for one task."""
    family, _, support, query = scene
    task = int(support.counts.argmin() if support.counts.min() > 2 else (support.counts - 4).abs().argmin())
    x, y, new = support.to_tasks()[task][0][:, 0].numpy(), support.to_tasks()[task][1].numpy(), query.x[task, :1, 0].numpy()

    def at(amplitude, length):
        k = kernel(family.kernel, x, x, length, amplitude) + 0.02**2 * np.eye(len(x))
        cross = kernel(family.kernel, new, x, length, amplitude)
        return multivariate_normal(np.zeros(len(x)), k).pdf(y), (cross @ np.linalg.solve(k, y))[0]

    options = {"epsabs": 0, "epsrel": 1e-6}
    mass = dblquad(lambda a, length: at(a, length)[0], 0.6, 1.0, 0.1, 1.0, **options)[0]
    mean = dblquad(lambda a, length: math.prod(at(a, length)), 0.6, 1.0, 0.1, 1.0, **options)[0]
    predictive = family.exact_predictive(support, query.x)
    assert predictive.batch_shape == (7, 5)
    assert family.log_evidence(support)[task].item() == pytest.approx(math.log(mass / 0.36), abs=1e-4)
    assert predictive.mean[task, 0].item() == pytest.approx(mean / mass, abs=1e-5)


def test_evidence_is_the_chain_of_predictives(scene):
    """log p(y) = Σ_n log p(y_n | y_<n), hyperparameters integrated out in each."""
    family, _, support, _ = scene
    total, seen = torch.zeros(7, dtype=torch.float64), torch.zeros_like(support.mask)
    for n in range(support.num_points):
        new = support.x[:, n : n + 1].nan_to_num()
        gain = family.exact_predictive(support._replace(mask=seen.clone()), new).log_prob(support.y[:, n : n + 1].nan_to_num())[:, 0]
        total += torch.where(support.mask[:, n], gain, 0)
        seen[:, n] = support.mask[:, n]
    torch.testing.assert_close(family.log_evidence(support), total, rtol=0, atol=1e-8)


def test_without_points_it_is_the_prior(scene):
    family, tasks, support, query = scene
    assert family.log_evidence(support)[-1].item() == pytest.approx(0, abs=1e-12)
    predictive = family.exact_predictive(support, query.x)
    assert predictive.mean[-1].abs().max() == 0
    assert predictive.variance[-1, 0].item() == pytest.approx((1 - 0.1**3) / 2.7 + 0.02**2, abs=1e-12)  # E[a²] + σ²
    told = family.exact_predictive(support, query.x, tasks=tasks)
    torch.testing.assert_close(told.variance[-1], (tasks["amplitude"][-1] ** 2 + 0.02**2).expand(5), rtol=0, atol=1e-12)
    none = Points.of(torch.zeros(2, 0, 1, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.float64))
    assert family.exact_predictive(none, query.x[:2]).mean.abs().max() == 0


def test_padding_changes_nothing_and_tasks_are_alone(scene):
    family, _, support, query = scene
    other = Points(support.x.nan_to_num(1e6), support.y.nan_to_num(-1e6), support.mask)
    predictive = family.exact_predictive(support, query.x)
    assert torch.equal(predictive.mean, family.exact_predictive(other, query.x).mean)
    assert torch.equal(family.log_evidence(support), family.log_evidence(other))
    for i, (x, y) in enumerate(support.to_tasks()):
        alone = Points(x[None], y[None], torch.ones(1, len(y), dtype=torch.bool))
        torch.testing.assert_close(family.log_evidence(alone)[0], family.log_evidence(support)[i], rtol=0, atol=1e-8)
        one = family.exact_predictive(alone, query.x[[i]])
        torch.testing.assert_close(one.mean[0], predictive.mean[i], rtol=0, atol=1e-9)
        torch.testing.assert_close(one.variance[0], predictive.variance[i], rtol=0, atol=1e-9)


def test_blocks_of_tasks_are_one_batch(monkeypatch):
    family = make()
    support, query = family.sample(9, generator=seeded())
    whole = family.exact_predictive(support, query.x), family.log_evidence(support)
    monkeypatch.setattr("bayesmeta.tasks.gaussian_process.BLOCK", 10_000)
    assert len(family._blocks(support, None, 5)) > 1
    torch.testing.assert_close(family.exact_predictive(support, query.x).mean, whole[0].mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(family.log_evidence(support), whole[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["rbf", "matern52", "periodic"])
def test_draws_have_the_kernel_s_covariance(name):
    """Support and query of a task are one function, given l and a."""
    family = make(kernel=name, length_scale=(0.7, 0.7), amplitude=(0.8, 0.8), num_support=1, num_query=1, x_range=(-1.0, 1.0))
    support, query = family.sample(40_000, generator=seeded())
    d = (support.x - query.x)[:, 0, 0].numpy()
    product = (support.y * query.y)[:, 0].numpy()
    for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 1.0), (1.0, 2.0)):
        here = (np.abs(d) >= low) & (np.abs(d) < high)
        wanted = kernel(name, d[here], np.zeros(1), 0.7, 0.8).mean()
        assert product[here].mean() == pytest.approx(wanted, abs=4 * product[here].std() / math.sqrt(here.sum()))
    assert support.y.std().item() == pytest.approx(math.hypot(0.8, 0.02), rel=0.02)


def test_hyperparameters_keep_their_ranges_and_are_those_of_sample():
    family = make(num_support=40, num_query=1)
    tasks = family.sample_tasks(3000, generator=seeded(3))
    for name, low, high in (("length_scale", 0.6, 1.0), ("amplitude", 0.1, 1.0)):
        assert low <= tasks[name].min() < low + 0.01 and high - 0.01 < tasks[name].max() < high
        assert tasks[name].mean().item() == pytest.approx((low + high) / 2, abs=0.02)
    few = {name: v[:200] for name, v in tasks.items()}
    support = family.sample(3000, generator=seeded(3)).support.select(slice(0, 200))
    true, other = (family.log_evidence(support, tasks=t).sum() for t in (few, {name: v.flip(0) for name, v in few.items()}))
    assert true > other + 100


def test_exact_predictive_is_calibrated_and_best():
    """Its cdf at new y is uniform; its log density, averaged over tasks, is below that of a learner told l and a, by little."""
    family = make(num_support=(3, 15), num_query=10)
    tasks = family.sample_tasks(300, generator=seeded(1))
    support, query = family.sample(300, generator=seeded(1))
    predictive, told = family.exact_predictive(support, query.x), family.exact_predictive(support, query.x, tasks=tasks)
    pit = predictive.cdf(query.y)
    inside = ((pit > 0.05) & (pit < 0.95)).double().mean(1)
    assert inside.mean().item() == pytest.approx(0.9, abs=4 * inside.std().item() / math.sqrt(300))
    gap = (told.log_prob(query.y) - predictive.log_prob(query.y)).mean()
    assert 0 < gap < 0.3


def test_float32_episodes():
    family = make(dtype=None)
    support, query = family.sample(3, generator=seeded())
    assert support.x.dtype == query.y.dtype == torch.float32
    predictive = family.exact_predictive(support, query.x)
    assert predictive.mean.dtype == torch.float32 and family.log_evidence(support).dtype == torch.float32
    exact = family.exact_predictive(support.to(torch.float64), query.x.double())
    torch.testing.assert_close(predictive.mean.double(), exact.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "matern"}, "kernel: expected one of 'rbf', 'matern52', 'periodic', got 'matern'"),
        ({"length_scale": (0.0, 1.0)}, "length_scale: expected positive bounds"),
        ({"amplitude": (1.0, 0.1)}, "amplitude: expected finite bounds"),
        ({"amplitude": torch.distributions.Uniform(0.1, 1.0)}, r"amplitude: expected bounds \(low, high\)"),
        ({"noise": 0.0}, "noise: expected a positive number"),
        ({"period": -1.0}, "period: expected a positive number"),
        ({"num_support": (4, 3)}, "num_support"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcess(**options)


def test_no_targets():
    with pytest.raises(ValueError, match="expected targets"):
        make().log_evidence(Points.of(torch.zeros(1, 2, 1)))
