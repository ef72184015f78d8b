"""Likelihoods against scipy.stats: values, what is learned, exposure, and what a network must put out."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from bayesmeta import HierarchicalModel, Points
from bayesmeta.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, NegativeBinomial, Poisson, StudentT
from bayesmeta.networks import WeightNetwork

pytestmark = pytest.mark.usefixtures("float64")
S, T, N = 2, 3, 4


def softplus(v):
    return np.log1p(np.exp(v))


def negative_binomial(mean, concentration):
    return scipy.stats.nbinom(concentration, concentration / (concentration + mean))


CASES = {  # likelihood, outputs a point, outputs to a scipy distribution, y
    "Gaussian": (lambda: Gaussian(0.7), 1, lambda o: scipy.stats.norm(o[..., 0], 0.7), "real"),
    "HeteroscedasticGaussian": (
        lambda: HeteroscedasticGaussian(floor=0.01), 2, lambda o: scipy.stats.norm(o[..., 0], 0.01 + softplus(o[..., 1])), "real",
    ),
    "StudentT": (lambda: StudentT(0.7, 3.0), 1, lambda o: scipy.stats.t(3.0, o[..., 0], 0.7), "real"),
    "Bernoulli": (lambda: Bernoulli(), 1, lambda o: scipy.stats.bernoulli(1 / (1 + np.exp(-o[..., 0]))), "bit"),
    "Poisson": (lambda: Poisson(), 1, lambda o: scipy.stats.poisson(np.exp(o[..., 0])), "count"),
    "NegativeBinomial": (lambda: NegativeBinomial(2.5), 1, lambda o: negative_binomial(np.exp(o[..., 0]), 2.5), "count"),
}  # fmt: skip


def targets(kind):
    y = torch.randn(T, N, generator=torch.Generator().manual_seed(1))
    return {"real": y, "bit": (y > 0).to(y), "count": torch.floor(y.abs() * 4)}[kind]


@pytest.mark.parametrize("name", CASES)
def test_the_density_is_scipys(name):
    make, outputs, wanted, kind = CASES[name]
    output, y = torch.randn(S, T, N, outputs), targets(kind)
    fn = make()(output)
    assert fn.batch_shape == (S, T, N)
    assert fn.event_shape == ()
    reference = wanted(output.numpy())
    log_prob = reference.logpdf(y) if kind == "real" else reference.logpmf(y)
    np.testing.assert_allclose(fn.log_prob(y).detach(), log_prob, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(fn.mean.detach(), np.broadcast_to(reference.mean(), (S, T, N)), rtol=1e-12)
    np.testing.assert_allclose(fn.variance.detach(), np.broadcast_to(reference.var(), (S, T, N)), rtol=1e-10)


def test_classes():
    output, y = torch.randn(S, T, N, 3), torch.arange(T * N).reshape(T, N) % 3
    fn = Categorical(3)(output)
    assert fn.batch_shape == (S, T, N)
    wanted = torch.log_softmax(output, -1).gather(-1, y.expand(S, T, N)[..., None])[..., 0]
    torch.testing.assert_close(fn.log_prob(y), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: Gaussian(0.7), lambda: StudentT(0.7, 3.0), lambda: HeteroscedasticGaussian()])
def test_several_outputs_are_independent(make):
    likelihood = make()
    each = 2 if isinstance(likelihood, HeteroscedasticGaussian) else 1
    output, y = torch.randn(S, T, N, 3 * each), torch.randn(T, N, 3)
    fn = likelihood(output)
    assert (fn.batch_shape, fn.event_shape) == ((S, T, N), (3,))
    columns = [torch.stack([output[..., k + 3 * j] for j in range(each)], -1) for k in range(3)]
    alone = torch.stack([likelihood(columns[k]).log_prob(y[..., k]) for k in range(3)]).sum(0)
    torch.testing.assert_close(fn.log_prob(y), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [lambda e: Poisson(exposure=e), lambda e: NegativeBinomial(2.5, exposure=e)])
def test_exposure_multiplies_the_mean(make):
    output, exposure, y = torch.randn(S, T, N, 1), torch.rand(T, N) * 10, targets("count")
    mean = exposure * output[..., 0].exp()
    fn = make(True)(output, exposure.log())
    torch.testing.assert_close(fn.mean, mean, rtol=1e-12, atol=0)
    reference = scipy.stats.poisson(mean) if isinstance(make(True), Poisson) else negative_binomial(mean.numpy(), 2.5)
    np.testing.assert_allclose(fn.log_prob(y).detach(), reference.logpmf(y), rtol=1e-9)


@pytest.mark.parametrize("make", [lambda e: Poisson(exposure=e), lambda e: NegativeBinomial(2.5, exposure=e)])
def test_a_network_is_not_shown_the_exposure(make):
    x, exposure = torch.randn(T, N, 2), torch.rand(T, N) * 10
    points = Points.of(torch.cat([x, exposure.log()[..., None]], -1), targets("count"))
    with_exposure = HierarchicalModel.from_network(WeightNetwork(nn.Linear(2, 1)), make(True), example=points)
    without = HierarchicalModel.from_network(WeightNetwork(nn.Linear(2, 1)), make(False), example=points._replace(x=x))
    assert with_exposure.dim == without.dim == 3
    phi = torch.randn(S, T, 3)
    torch.testing.assert_close(with_exposure.predict(phi, points.x).mean, exposure * without.predict(phi, x).mean, rtol=1e-12, atol=0)


def test_what_is_learned_and_what_is_kept():
    learned = {
        Gaussian: {"log_noise"}, StudentT: {"log_scale", "log_df_above_1"}, NegativeBinomial: {"log_concentration"},
        HeteroscedasticGaussian: set(), Bernoulli: set(), Poisson: set(),
    }  # fmt: skip
    for kind, names in learned.items():
        assert {n for n, p in kind().named_parameters() if p.requires_grad} == names
        if names:
            assert not any(p.requires_grad for p in kind(learn=False).parameters())
    assert Gaussian(0.3).noise.item() == pytest.approx(0.3)


def test_degrees_of_freedom_stay_above_one():
    likelihood = StudentT(df=1.5)
    with torch.no_grad():
        likelihood.log_df_above_1.fill_(-30.0)
    assert likelihood(torch.zeros(T, N, 1)).df.min() >= 1


def test_huge_rates_stay_finite_and_so_do_their_gradients():
    output = torch.full((T, N, 1), 800.0, requires_grad=True)
    for likelihood in (Poisson(), NegativeBinomial()):
        log_prob = likelihood(output).log_prob(torch.ones(T, N)).sum()
        assert log_prob.isfinite()
        assert torch.autograd.grad(log_prob, output)[0].isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0), "noise: expected a positive number, got 0.0"),
        (lambda: StudentT(-1.0), "scale: expected a positive number"),
        (lambda: StudentT(df=1.0), "df must be above 1, got 1.0"),
        (lambda: NegativeBinomial(0.0), "concentration: expected a positive number"),
        (lambda: Categorical(1), "at least 2 classes, got 1"),
        (lambda: Categorical(3)(torch.zeros(T, N, 2)), "puts out 2 logits, expected 3"),
        (lambda: Bernoulli()(torch.zeros(T, N, 2)), "Bernoulli: the network must put out one number a point, got 2"),
        (lambda: Poisson()(torch.zeros(T, N, 2)), "Poisson: the network must put out one number a point, got 2"),
        (lambda: NegativeBinomial()(torch.zeros(T, N, 2)), "NegativeBinomial: the network must put out one number a point, got 2"),
        (lambda: HeteroscedasticGaussian()(torch.zeros(T, N, 3)), "2 numbers for each target, got 3"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_trailing_axis_of_one_in_y_is_dropped():
    x, y, phi = torch.randn(T, N, 2), torch.randn(T, N), torch.randn(T, 3)
    model = HierarchicalModel.from_network(WeightNetwork(nn.Linear(2, 1)), Gaussian(0.5), example=Points.of(x, y))
    assert torch.equal(model.log_likelihood(phi, Points.of(x, y)), model.log_likelihood(phi, Points.of(x, y[..., None])))
