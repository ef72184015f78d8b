"""Packing: bijections with the right log determinant, moments against quadrature, wrappers peeled off."""

import math

import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import torch
from torch.distributions import constraints, kl_divergence
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform

from bayesmeta.packing import (
    CholeskyToPositiveDefinite,
    VectorToCholesky,
    elementwise,
    is_identity,
    log_det,
    packed_moments,
    packing_transform,
    peel,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("float64")


def lower(matrix):
    return matrix[..., *torch.tril_indices(*matrix.shape[-2:])]


def strictly_lower(matrix):
    return matrix[..., *torch.tril_indices(*matrix.shape[-2:], offset=-1)]


SUPPORTS = {  # support, packed size, and coordinates of a value in which its density is stated
    "real": (constraints.real_vector, 3, lambda v: v),
    "independent reals": (constraints.independent(constraints.real, 1), 3, lambda v: v),
    "positive": (constraints.independent(constraints.positive, 1), 3, lambda v: v),
    "nonnegative": (constraints.independent(constraints.nonnegative, 1), 3, lambda v: v),
    "greater than": (constraints.independent(constraints.greater_than(2.0), 1), 3, lambda v: v),
    "less than": (constraints.independent(constraints.less_than(-1.0), 1), 3, lambda v: v),
    "interval": (constraints.independent(constraints.interval(-1.0, 3.0), 1), 3, lambda v: v),
    "unit interval": (constraints.independent(constraints.unit_interval, 1), 3, lambda v: v),
    "simplex": (constraints.simplex, 3, lambda v: v[..., :-1]),
    "ordered": (dist.constraints.ordered_vector, 3, lambda v: v),
    "positive ordered": (dist.constraints.positive_ordered_vector, 3, lambda v: v),
    "Cholesky": (constraints.lower_cholesky, 6, lower),
    "positive definite": (constraints.positive_definite, 6, lower),
    "Cholesky of correlations": (constraints.corr_cholesky, 6, strictly_lower),
    "correlations": (dist.constraints.corr_matrix, 6, strictly_lower),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_every_transform_is_a_bijection_with_its_log_determinant(name):
    support, size, coordinates = SUPPORTS[name]
    transform = packing_transform(support)
    u = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    value = transform(u)
    assert support.check(value).all()
    torch.testing.assert_close(transform.inv(value), u, rtol=0, atol=1e-10)
    assert transform.forward_shape(u.shape) == value.shape
    assert transform.inverse_shape(value.shape) == u.shape
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda x: coordinates(transform(x)), row) for row in u])
    assert jacobian.shape == (5, size, size)
    torch.testing.assert_close(log_det(transform, u, value, 1), torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_matrices_of_any_size(n):
    u = torch.randn(4, n * (n + 1) // 2)
    to_cholesky, square = VectorToCholesky(), CholeskyToPositiveDefinite()
    factor = to_cholesky(u)
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(square.inv(square(factor)), factor, rtol=0, atol=1e-9)
    torch.testing.assert_close(square(factor), factor @ factor.mT, rtol=0, atol=0)


def test_large_entries_off_the_diagonal_leave_the_gradient_alone():
    u = torch.tensor([0.1, 800.0, 0.2], requires_grad=True)  # exp(800) overflows: it must not be looked at
    (gradient,) = torch.autograd.grad(VectorToCholesky()(u).sum(), u)
    torch.testing.assert_close(gradient, torch.tensor([math.exp(0.1), 1.0, math.exp(0.2)]), rtol=1e-14, atol=0)


def test_a_number_of_reals_that_makes_no_triangle_is_refused():
    with pytest.raises(ValueError, match="expected a triangular number of reals, got 4"):
        VectorToCholesky()(torch.zeros(4))


@pytest.mark.parametrize("name", ["sphere", "symmetric", "positive_semidefinite", "softplus_lower_cholesky", "unit_lower_cholesky"])
def test_supports_without_a_bijection_are_refused(name):
    with pytest.raises(NotImplementedError):
        packing_transform(getattr(dist.constraints, name))


def test_identities_are_known_through_their_wrappers():
    assert is_identity(packing_transform(constraints.real))
    assert is_identity(packing_transform(constraints.independent(constraints.real, 2)))
    assert not is_identity(packing_transform(constraints.positive))
    assert isinstance(elementwise(packing_transform(constraints.independent(constraints.positive, 1))), ExpTransform)


def test_the_kl_of_a_packed_normal_to_a_lognormal_is_known():
    guide = dist.TransformedDistribution(dist.Normal(0.6, 0.7), [packing_transform(dist.LogNormal(0.5, 0.8).support)])
    wanted = kl_divergence(dist.Normal(0.6, 0.7), dist.Normal(0.5, 0.8))
    torch.testing.assert_close(kl_divergence(guide, dist.LogNormal(torch.tensor(0.5), 0.8)), wanted, rtol=0, atol=1e-14)


# --- moments


def moments(fn):
    transform = packing_transform(fn.support)
    return packed_moments(fn, transform, transform.inverse_shape(fn.event_shape))


def log_gamma_moments(a, rate=1.0):
    return scipy.special.digamma(a) - math.log(rate), math.sqrt(scipy.special.polygamma(1, a))


def logit_beta_moments(a, b):
    psi, trigamma = scipy.special.digamma, lambda v: scipy.special.polygamma(1, v)
    return psi(a) - psi(b), math.sqrt(trigamma(a) + trigamma(b))


t = torch.tensor
HALF_NORMAL = ((scipy.special.digamma(0.5) + math.log(2)) / 2, math.pi / math.sqrt(8))  # log |Z| is half of log χ²₁
LOGISTIC = math.pi / math.sqrt(3)
KNOWN = {  # fn, mean, sd: closed forms
    "Normal": (lambda: dist.Normal(t(1.5), 2.0), 1.5, 2.0),
    "LogNormal": (lambda: dist.LogNormal(t(1.5), 2.0), 1.5, 2.0),
    "Laplace": (lambda: dist.Laplace(t(1.5), 2.0), 1.5, 2.0 * math.sqrt(2)),
    "StudentT": (lambda: dist.StudentT(t(4.0), 1.5, 2.0), 1.5, 2.0 * math.sqrt(2)),
    "StudentT without variance": (lambda: dist.StudentT(t(1.5), 1.5, 2.0), 1.5, 2.0),
    "Cauchy": (lambda: dist.Cauchy(t(1.5), 2.0), 1.5, 2.0),
    "Delta": (lambda: dist.Delta(t(1.5)), 1.5, 0.0),
    "flat": (lambda: dist.ImproperUniform(constraints.positive, (), ()), 0.0, 1.0),
    "HalfNormal": (lambda: dist.HalfNormal(t(3.0)), HALF_NORMAL[0] + math.log(3), HALF_NORMAL[1]),
    "HalfCauchy": (lambda: dist.HalfCauchy(t(3.0)), math.log(3), math.pi / 2),
    "tiny HalfNormal": (lambda: dist.HalfNormal(t(1e-8)), HALF_NORMAL[0] + math.log(1e-8), HALF_NORMAL[1]),
    "Exponential": (lambda: dist.Exponential(t(2.0)), *log_gamma_moments(1.0, 2.0)),
    "Gamma": (lambda: dist.Gamma(t(2.5), 3.0), *log_gamma_moments(2.5, 3.0)),
    "wide Gamma": (lambda: dist.Gamma(t(0.1), 1.0), *log_gamma_moments(0.1)),
    "narrow Gamma": (lambda: dist.Gamma(t(1e6), 1e-6), *log_gamma_moments(1e6, 1e-6)),
    "InverseGamma": (lambda: dist.InverseGamma(t(2.5), 3.0), -log_gamma_moments(2.5, 3.0)[0], log_gamma_moments(2.5)[1]),
    "InverseGamma without mean": (lambda: dist.InverseGamma(t(0.5), 3.0), -log_gamma_moments(0.5, 3.0)[0], log_gamma_moments(0.5)[1]),
    "Chi2": (lambda: dist.Chi2(t(3.0)), *log_gamma_moments(1.5, 0.5)),
    "Beta": (lambda: dist.Beta(t(2.0), 5.0), *logit_beta_moments(2.0, 5.0)),
    "Beta at both ends": (lambda: dist.Beta(t(0.3), 0.7), *logit_beta_moments(0.3, 0.7)),
    "Uniform": (lambda: dist.Uniform(t(-1.0), 3.0), 0.0, LOGISTIC),
    "Pareto": (lambda: dist.Pareto(t(1.5), 3.0), None, None),
    "Weibull": (lambda: dist.Weibull(t(2.0), 3.0), math.log(2) - 0.5772156649015329 / 3, math.pi / math.sqrt(6) / 3),
    "Gumbel": (lambda: dist.Gumbel(t(1.0), 2.0), 1 + 2 * 0.5772156649015329, 2 * math.pi / math.sqrt(6)),
    "Logistic": (lambda: dist.Logistic(t(1.0), t(2.0)), 1.0, 2 * LOGISTIC),
    "an affine map": (lambda: dist.TransformedDistribution(dist.Normal(t(0.3), 0.5), [AffineTransform(1.0, 2.0)]), 1.6, 1.0),
    "a logit-normal": (lambda: dist.TransformedDistribution(dist.Normal(t(0.3), 0.5), [SigmoidTransform()]), 0.3, 0.5),
    "a folded normal": (lambda: dist.FoldedDistribution(dist.Normal(t(0.0), 2.0)), HALF_NORMAL[0] + math.log(2), HALF_NORMAL[1]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_moments_of_univariate_priors(name):
    make, mean, sd = KNOWN[name]
    fn = make()
    if mean is None:  # by quadrature of the packed density
        transform = packing_transform(fn.support)

        def density(u):
            v = transform(t(u))
            return math.exp(fn.log_prob(v) + transform.log_abs_det_jacobian(t(u), v))

        mean = scipy.integrate.quad(lambda u: u * density(u), -40, 40, limit=200)[0]
        sd = math.sqrt(scipy.integrate.quad(lambda u: (u - mean) ** 2 * density(u), -40, 40, limit=200)[0])
    got = moments(fn)
    assert got[0].shape == got[1].shape == ()
    assert (got[0].item(), got[1].item()) == pytest.approx((mean, sd), rel=1e-7, abs=1e-7)


def test_moments_in_float32_are_as_good_as_float32():
    for name in ("HalfNormal", "HalfCauchy", "Gamma", "Beta", "InverseGamma without mean", "Weibull"):
        torch.set_default_dtype(torch.float32)
        fn = KNOWN[name][0]()
        if isinstance(fn, dist.InverseGamma):
            fn = dist.InverseGamma(t(0.5), 3.0)
        mean, sd = moments(fn)
        assert mean.dtype == torch.float32
        assert (mean.item(), sd.item()) == pytest.approx(KNOWN[name][1:], rel=1e-4, abs=1e-4)


def test_moments_of_batches_are_those_of_each():
    rates, concentrations = t([[1.0], [2.0]]), t([0.5, 3.0, 40.0])
    mean, sd = moments(dist.Gamma(concentrations, rates).to_event(1))
    assert mean.shape == sd.shape == (2, 3)
    wanted = [[log_gamma_moments(a, r) for a in concentrations.tolist()] for r in rates[:, 0].tolist()]
    torch.testing.assert_close(torch.stack([mean, sd], -1), t(wanted), rtol=1e-7, atol=1e-7)


def test_moments_look_through_masks():
    fn = dist.HalfNormal(t([1.0, 2.0])).mask(t([True, False])).to_event(1)
    mean, sd = moments(fn)
    assert mean.tolist() == pytest.approx([HALF_NORMAL[0], HALF_NORMAL[0] + math.log(2)], abs=1e-7)
    assert sd.tolist() == pytest.approx([HALF_NORMAL[1]] * 2, abs=1e-7)


MULTIVARIATE = {
    "Dirichlet": lambda: dist.Dirichlet(t([[0.5, 2.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]])),
    "MultivariateNormal": lambda: dist.MultivariateNormal(t([1.0, -2.0]), t([[2.0, 0.6], [0.6, 1.0]])),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(t([1.0, -2.0]), t([[1.0], [0.5]]), t([0.3, 0.4])),
    "LKJCholesky": lambda: dist.LKJCholesky(3, t(2.0)),
    "LKJ": lambda: dist.LKJ(3, t(2.0)),
    "Wishart": lambda: dist.Wishart(t(6.0), torch.eye(2)),
    "vectors in a row": lambda: dist.Dirichlet(t([[0.5, 2.0, 3.0], [1.0, 1.0, 1.0]])).to_event(1),
}
OF_DRAWS = {"LKJCholesky", "LKJ", "Wishart"}  # these moments are of 4,096 draws, but for the mean of an LKJ


@pytest.mark.filterwarnings("ignore:Singular sample")
@pytest.mark.parametrize("name", MULTIVARIATE)
def test_moments_of_multivariate_priors_are_those_of_draws(name):
    fn = MULTIVARIATE[name]()
    state = torch.get_rng_state()
    mean, sd = moments(fn)
    assert torch.equal(torch.get_rng_state(), state)
    draws = packing_transform(fn.support).inv(fn.sample((40_000,)))
    assert mean.shape == sd.shape == draws.shape[1:]
    n = 40_000 if name not in OF_DRAWS else 3_700
    assert ((draws.mean(0) - mean).abs() < 5 * sd / n**0.5).all()
    assert ((draws.std(0) / sd).log().abs() < 5 / (n / 4) ** 0.5).all()  # logits of small sticks have long tails
    if "LKJ" in name:
        assert (mean == 0).all()


def test_dirichlet_moments_are_digammas():
    a = [0.5, 2.0, 3.0]
    mean, sd = moments(dist.Dirichlet(t(a)))
    wanted = [logit_beta_moments(0.5, 5.0), logit_beta_moments(2.0, 3.0)]
    assert mean.tolist() == pytest.approx([wanted[0][0] + math.log(2), wanted[1][0]], abs=1e-12)
    assert sd.tolist() == pytest.approx([w[1] for w in wanted], abs=1e-9)  # torch's trigamma is not exact to more
    assert moments(dist.Dirichlet(torch.full((3,), 1e6)))[0].tolist() == pytest.approx([0, 0], abs=1e-5)  # the uniform point is at 0


def test_moments_are_differentiable():
    a = t(2.5, requires_grad=True)
    mean, sd = moments(dist.Gamma(a, 3.0))
    slopes = [torch.autograd.grad(v, a, retain_graph=True)[0].item() for v in (mean, sd)]
    trigamma, tetragamma = (float(scipy.special.polygamma(k, 2.5)) for k in (1, 2))
    assert slopes == pytest.approx([trigamma, tetragamma / (2 * math.sqrt(trigamma))], abs=1e-7)


# --- peeling


def test_peel_takes_wrappers_off_and_says_where_masks_stood():
    base = dist.Normal(torch.zeros(2, 3, 4), 1.0)
    outer, inner = torch.ones(2, 3) > 0, torch.ones(2, 3, 4) > 0
    assert peel(base) == (base, 0, [])
    got, axes, masks = peel(base.mask(inner).to_event(1).mask(outer).to_event(1))
    assert got is base
    assert axes == 2
    assert [(m is outer, m is inner, at) for m, at in masks] == [(True, False, 1), (False, True, 2)]
    assert peel(base.mask(False))[2] == [(False, 0)]
