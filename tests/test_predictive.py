"""The predictive is the equal mixture over draws: every number of it against scipy, or against a loop over the components."""

import math
import signal

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch

from bayesmeta import Predictive
from bayesmeta.predictive import cdf

S, T, N = 4, 2, 3


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _double(float64):
    """All of this file is in float64, but where a test says otherwise."""


def uniform(low, high, shape=(S, T, N), seed=0):
    return low + (high - low) * torch.rand(shape, generator=seeded(seed))


# name -> (components (S, T, N), the same as frozen scipy distributions, targets to ask about)
def normal():
    loc, scale = uniform(-3, 3), uniform(0.2, 2, seed=1)
    return dist.Normal(loc, scale), scipy.stats.norm(loc.numpy(), scale.numpy())


def student():
    df, loc, scale = uniform(2.1, 9), uniform(-3, 3, seed=1), uniform(0.2, 2, seed=2)
    return dist.StudentT(df, loc, scale), scipy.stats.t(df.numpy(), loc.numpy(), scale.numpy())


def poisson():
    rate = uniform(0.05, 9)
    return dist.Poisson(rate), scipy.stats.poisson(rate.numpy())


def negative_binomial():
    count, probs = uniform(0.5, 6), uniform(0.1, 0.8, seed=1)
    return dist.NegativeBinomial(count, probs), scipy.stats.nbinom(count.numpy(), 1 - probs.numpy())


CONTINUOUS = {"Normal": normal, "StudentT": student}
COUNTS = {"Poisson": poisson, "NegativeBinomial": negative_binomial}
every_number = pytest.mark.parametrize("make", [*CONTINUOUS.values(), *COUNTS.values()], ids=[*CONTINUOUS, *COUNTS])
every_continuous = pytest.mark.parametrize("make", CONTINUOUS.values(), ids=CONTINUOUS)
every_count = pytest.mark.parametrize("make", COUNTS.values(), ids=COUNTS)


def targets(make):
    """``(T, N)``, whole numbers for counts."""
    return torch.tensor([[0.0, 3.0, 1.0], [7.0, 2.0, 20.0]]) if make in COUNTS.values() else uniform(-6, 6, (T, N), seed=3)


def log_density(truth, y):
    return truth.logpmf(y) if hasattr(truth.dist, "pmf") else truth.logpdf(y)


# --- density, distribution function, moments


@every_number
def test_mean_and_variance_are_the_mixtures(make):
    components, truth = make()
    p = Predictive(components)
    mean = truth.mean().mean(0)
    # E[Y²] − E[Y]², not the sum of parts that the code adds up
    variance = (truth.var() + truth.mean() ** 2).mean(0) - mean**2
    np.testing.assert_allclose(p.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(p.variance.numpy(), variance, rtol=1e-11)
    np.testing.assert_allclose(p.stddev.numpy(), np.sqrt(variance), rtol=1e-11)
    assert p.num_draws == S and p.is_discrete == (make in COUNTS.values()) and not p.is_classification


@every_number
def test_log_prob_is_the_log_of_the_mean_density(make):
    components, truth = make()
    y = targets(make)
    each = log_density(truth, y.numpy())
    got = Predictive(components).log_prob(y).numpy()
    np.testing.assert_allclose(got, np.log(np.exp(each).mean(0)), rtol=0, atol=1e-11)
    assert (got > each.mean(0) + 1e-3).all()  # the mean of the logs is another, smaller number


def test_log_prob_does_not_underflow():
    """Densities far below the smallest float: only log-mean-exp gets them."""
    p = Predictive(dist.Normal(torch.tensor([0.0, 1.0]).view(2, 1, 1), 1.0))
    y = torch.tensor([[60.0, -1e8]])
    each = scipy.stats.norm(np.array([0.0, 1.0])[:, None]).logpdf(y.numpy())
    np.testing.assert_allclose(p.log_prob(y)[0].numpy(), scipy.special.logsumexp(each, 0) - math.log(2), rtol=1e-14)


@every_number
def test_cdf_is_the_mean_of_the_components(make):
    components, truth = make()
    p, y = Predictive(components), targets(make)
    np.testing.assert_allclose(p.cdf(y).numpy(), truth.cdf(y.numpy()).mean(0), rtol=0, atol=1e-12)
    below = truth.cdf(y.numpy() - 1).mean(0) if p.is_discrete else truth.cdf(y.numpy()).mean(0)
    np.testing.assert_allclose(p.cdf_below(y).numpy(), below, rtol=0, atol=1e-12)


@every_count
def test_counts_between_and_below_the_whole_numbers(make):
    components, _ = make()
    p = Predictive(components)
    whole = p.cdf(torch.full((T, N), 2.0))
    assert torch.equal(p.cdf(torch.full((T, N), 2.9)), whole)
    assert (p.cdf(torch.full((T, N), -1.0)) == 0).all() and (p.cdf_below(torch.zeros(T, N)) == 0).all()


@every_count
def test_targets_may_be_integers(make):
    components, _ = make()
    p, y = Predictive(components), targets(make)
    for f in (p.log_prob, p.cdf, p.cdf_below):
        torch.testing.assert_close(f(y.long()), f(y), rtol=0, atol=0)


def test_a_trailing_axis_of_one_in_y_is_dropped():
    components, _ = normal()
    y = uniform(-6, 6, (T, N), seed=3)
    assert torch.equal(Predictive(components).log_prob(y[..., None]), Predictive(components).log_prob(y))
    assert torch.equal(Predictive(components).cdf(y[..., None]), Predictive(components).cdf(y))


def test_several_outputs():
    loc = uniform(-1, 1, (S, T, N, 2))
    p = Predictive(dist.Normal(loc, 0.5).to_event(1))
    y = uniform(-1, 1, (T, N, 2), seed=1)
    truth = scipy.stats.norm(loc.numpy(), 0.5)
    np.testing.assert_allclose(p.log_prob(y).numpy(), np.log(np.exp(truth.logpdf(y.numpy()).sum(-1)).mean(0)), atol=1e-12)
    np.testing.assert_allclose(p.cdf(y).numpy(), truth.cdf(y.numpy()).mean(0), atol=1e-12)
    assert p.mean.shape == p.variance.shape == p.quantile(0.2).shape == (T, N, 2)
    np.testing.assert_allclose(p.cdf(p.quantile(0.2)).numpy(), 0.2, atol=1e-6)


@pytest.mark.parametrize("df", [1.0, 1.5, 2.0, 4.0, 30.0, 1e3, 1e5, 1e7])
def test_student_cdf_everywhere(df):
    t = torch.tensor([-1e6, -200.0, -50.0, -5.0, -1.0, -1e-3, 0.0, 0.3, 2.0, 10.0, 200.0, 1e5])
    got = cdf(dist.StudentT(torch.tensor(df).expand(12), torch.tensor(1.0), 2.0), 1 + 2 * t)
    np.testing.assert_allclose(got.numpy(), scipy.stats.t(df).cdf(t.numpy()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.7, 40.0, 1e4, 1e6])
def test_poisson_cdf_everywhere(rate):
    y = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.5, 39.0, 60.0, 9_900.0, 10_050.0, 1e6, 1_001_500.0])
    got = cdf(dist.Poisson(torch.tensor(rate).expand(11)), y)
    np.testing.assert_allclose(got.numpy(), scipy.stats.poisson(rate).cdf(y.numpy()), atol=1e-9)


@pytest.mark.parametrize(("count", "mean"), [(0.1, 3.0), (2.0, 0.01), (1.0, 200.0), (100.0, 200.0), (2_000.0, 2_000.0), (1e5, 50.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_binomial_cdf_and_quantile_everywhere(count, mean, dtype):
    """P(0) underflows where many counts are sure to come: the sum must not start from it."""
    truth = scipy.stats.nbinom(count, count / (count + mean))
    fn = dist.NegativeBinomial(torch.tensor(count, dtype=dtype), logits=torch.full((1, 1, 5), mean / count, dtype=dtype).log())
    y = torch.tensor(truth.ppf([0.001, 0.1, 0.5, 0.9, 0.999]), dtype=dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    np.testing.assert_allclose(cdf(fn, y[None, None])[0, 0].numpy(), truth.cdf(y.numpy()), rtol=0, atol=tolerance)
    if dtype == torch.float64:
        assert Predictive(fn).quantile(0.9)[0, 0].item() == truth.ppf(0.9)


def test_large_counts_do_not_take_minutes():
    """Populations run to tens of thousands: a quantile there must not walk through every count below."""
    def too_slow(*_):
        raise TimeoutError("took more than 5 seconds")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(5)
    try:
        value = Predictive(dist.NegativeBinomial(2.0, logits=torch.full((1, 1, 1), 1e4).log())).quantile(0.9).item()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    truth = scipy.stats.nbinom(2.0, 1 / (1 + 1e4))
    assert value == pytest.approx(truth.ppf(0.9), abs=1)


# --- quantiles


LEVELS = (1e-6, 0.025, 0.5, 0.9, 1 - 1e-6)


@every_continuous
@pytest.mark.parametrize("q", LEVELS)
def test_the_quantile_inverts_the_cdf(make, q):
    components, truth = make()
    p = Predictive(components)
    value = p.quantile(q)
    # scipy's own cdf, not the package's
    reached = truth.cdf(value.numpy()).mean(0)
    np.testing.assert_allclose(reached, q, rtol=0, atol=1e-6)
    if make is normal:
        for task in range(T):
            for point in range(N):
                one = scipy.stats.norm(components.loc[:, task, point].numpy(), components.scale[:, task, point].numpy())
                wanted = scipy.optimize.brentq(lambda y, one=one: one.cdf(y).mean() - q, -50, 50, xtol=1e-13)
                assert value[task, point].item() == pytest.approx(wanted, abs=1e-6)


@every_count
@pytest.mark.parametrize("q", LEVELS)
def test_the_quantile_of_counts_is_the_smallest_that_reaches_q(make, q):
    components, truth = make()
    value = Predictive(components).quantile(q).numpy()
    assert (value == np.round(value)).all() and (value >= 0).all()
    assert (truth.cdf(value).mean(0) >= q).all()
    assert (truth.cdf(value - 1).mean(0) < q).all()


def mixture(*parts):
    """A mixture of Normals (mean, sd) at one point."""
    loc, scale = torch.tensor(parts).T
    return Predictive(dist.Normal(loc.view(-1, 1, 1), scale.view(-1, 1, 1))), scipy.stats.norm(loc.numpy(), scale.numpy())


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_quantiles_have_the_same_relative_error_at_every_scale(scale, shift):
    """Targets in metres or in nanometres: the coverage of an interval may not depend on the unit."""
    parts = [(shift * scale, scale), ((shift + 2) * scale, 0.5 * scale)]
    p, truth = mixture(*parts)
    for q in LEVELS:
        assert truth.cdf(p.quantile(q).item()).mean() == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        [(-1e6, 1e-3), (1e6, 1e-3)],  # far apart and narrow
        [(0.0, 1e-6), (0.0, 1e6)],  # one narrow, one wide
        [(0.0, 1.0), (1e4, 1.0), (1e8, 10.0)],
        [(5.0, 1e-4)] * 3,  # all the same
    ],
)
@pytest.mark.parametrize("q", [0.01, 0.2, 0.4, 0.7, 0.99])
def test_quantiles_of_extreme_mixtures(parts, q):
    p, truth = mixture(*parts)
    value = p.quantile(q).item()
    assert truth.cdf(value).mean() == pytest.approx(q, abs=1e-5)


def test_quantiles_in_a_gap_between_components_stay_in_it():
    """At exactly ½ every value between the two halves is a median."""
    value = mixture((-10.0, 0.1), (10.0, 0.1))[0].quantile(0.5).item()
    assert -9.3 < value < 9.3


@pytest.mark.parametrize("df", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("q", [1e-4, 0.3, 0.5, 0.999])
def test_quantiles_of_heavy_tails(df, q):
    """Without a variance, or a mean: bounds cannot come from moments."""
    loc = torch.tensor([0.0, 5.0]).view(2, 1, 1)
    value = Predictive(dist.StudentT(torch.tensor(df), loc, 2.0)).quantile(q).item()
    truth = scipy.stats.t(df, loc.flatten().numpy(), 2.0)
    assert truth.cdf(value).mean() == pytest.approx(q, rel=1e-3 if q < 0.01 else 1e-5)


def test_quantiles_of_a_cauchy():
    p = Predictive(dist.Cauchy(torch.tensor([0.0, 5.0]).view(2, 1, 1), 2.0))
    truth = scipy.stats.cauchy(np.array([0.0, 5.0]), 2.0)
    assert truth.cdf(p.quantile(0.9).item()).mean() == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "truth"),
    [
        (lambda a: dist.LogNormal(a, 1.0), lambda a: scipy.stats.lognorm(1.0, scale=np.exp(a))),
        (lambda a: dist.Gamma(a, 2.0), lambda a: scipy.stats.gamma(a, scale=0.5)),
        (lambda a: dist.Exponential(a), lambda a: scipy.stats.expon(scale=1 / a)),
    ],
    ids=["LogNormal", "Gamma", "Exponential"],
)
@pytest.mark.parametrize("q", [0.05, 0.5, 0.95])
def test_quantiles_of_positive_targets(make, truth, q):
    """The search must not leave the support, where `cdf` raises (Pyro validates by default)."""
    a = torch.tensor([0.5, 2.0])
    value = Predictive(make(a.view(2, 1, 1))).quantile(q).item()
    assert truth(a.numpy()).cdf(value).mean() == pytest.approx(q, abs=1e-6)


def test_quantiles_of_extreme_counts():
    rate = torch.tensor([1e-3, 1e5]).view(2, 1, 1)
    truth = scipy.stats.poisson(rate.flatten().numpy())
    for q in (0.3, 0.4999, 0.51, 0.75, 0.999):
        value = Predictive(dist.Poisson(rate)).quantile(q).item()
        assert truth.cdf(value).mean() >= q > truth.cdf(value - 1).mean()
    assert Predictive(dist.Poisson(torch.zeros(2, 1, 1))).quantile(0.9).item() == 0


def test_quantiles_in_float32():
    loc, scale = uniform(-3, 3).float(), uniform(0.2, 2, seed=1).float()
    for q in (0.05, 0.5, 0.95):
        value = Predictive(dist.Normal(loc, scale)).quantile(q)
        assert value.dtype == torch.float32
        np.testing.assert_allclose(scipy.stats.norm(loc.numpy(), scale.numpy()).cdf(value.numpy()).mean(0), q, atol=2e-6)


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_quantiles_outside_the_open_unit_interval_are_refused(q):
    with pytest.raises(ValueError, match=f"q: expected a number between 0 and 1, got {q}"):
        Predictive(normal()[0]).quantile(q)


@every_number
def test_the_interval_is_central(make):
    components, truth = make()
    p = Predictive(components)
    lower, upper = p.interval(0.9)
    assert torch.equal(lower, p.quantile((1 - 0.9) / 2)) and torch.equal(upper, p.quantile((1 + 0.9) / 2))
    inside = truth.cdf(upper.numpy()).mean(0) - truth.cdf(lower.numpy() - p.is_discrete).mean(0)
    if p.is_discrete:
        assert (inside >= 0.9 - 1e-12).all()
    else:
        np.testing.assert_allclose(inside, 0.9, atol=1e-6)


# --- samples


@every_number
def test_samples_have_the_mixtures_distribution(make):
    components, truth = make()
    p = Predictive(components)
    y = p.sample(4_000, generator=seeded())
    assert y.shape == (4_000, T, N)
    sd = np.sqrt((truth.var() + truth.mean() ** 2).mean(0) - truth.mean().mean(0) ** 2)
    assert (np.abs(y.numpy().mean(0) - truth.mean().mean(0)) < 4.5 * sd / math.sqrt(4_000)).all()
    for level in targets(make).unique().tolist():
        share = (y.numpy() <= level).mean(0)
        np.testing.assert_allclose(share, truth.cdf(level).mean(0), atol=4.5 * 0.5 / math.sqrt(4_000))


def steps(count=S, points=N):
    """Components told apart by their value: draw s is s at every point."""
    return Predictive(dist.Normal(torch.arange(float(count)).view(-1, 1, 1).expand(count, T, points), 1e-9))


def test_the_points_of_one_sample_are_of_one_draw():
    y = steps().sample(9, generator=seeded()).round()
    assert torch.equal(y, y[:, :1, :1].expand_as(y))


@pytest.mark.parametrize("n", [1, 3, 4, 6, 8, 11])
def test_every_draw_stands_for_its_share(n):
    """In turn, in random order: no draw is taken twice more often than another, and none has a fixed place."""
    generator = seeded()
    taken = torch.stack([torch.bincount(steps().sample(n, generator=generator)[:, 0, 0].round().long(), minlength=S) for _ in range(200)])
    assert (taken.amax(1) - taken.amin(1) <= 1).all()
    expected = 200 * n / S
    assert ((taken.sum(0) - expected).abs() <= 5 * math.sqrt(200 * (n % S) * (S - n % S)) / S + 1e-9).all()


def test_samples_come_from_the_generator_alone():
    p = Predictive(normal()[0])
    before = torch.get_rng_state()
    assert torch.equal(p.sample(7, generator=seeded(1)), p.sample(7, generator=seeded(1)))
    assert not torch.equal(p.sample(7, generator=seeded(1)), p.sample(7, generator=seeded(2)))
    p.sample(3)
    assert torch.equal(before, torch.get_rng_state())


# --- decomposition


@every_number
@pytest.mark.parametrize("num_theta", [1, 2, 4])
def test_variance_parts_are_the_hand_values_and_add_up(make, num_theta):
    components, truth = make()
    p = Predictive(components, num_theta=num_theta)
    total, aleatoric, phi, theta = (v.numpy() for v in p.decompose())
    means = truth.mean()
    size = S // num_theta
    groups = [means[g * size : (g + 1) * size] for g in range(num_theta)]
    np.testing.assert_allclose(aleatoric, truth.var().mean(0), rtol=1e-12)
    np.testing.assert_allclose(phi, np.mean([g.var(0) for g in groups], 0), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(theta, np.var([g.mean(0) for g in groups], 0), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(total, p.variance.numpy(), rtol=1e-11)
    np.testing.assert_allclose(total, aleatoric + phi + theta, rtol=1e-12)
    if num_theta == 1:
        assert (theta == 0).all()
    if num_theta == S:
        assert (phi == 0).all()


def entropy(p):
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


@pytest.mark.parametrize("num_theta", [1, 2, 4])
@pytest.mark.parametrize("kind", ["Bernoulli", "Categorical"])
def test_entropy_parts_are_the_hand_values_and_add_up(kind, num_theta):
    if kind == "Bernoulli":
        one = uniform(0, 1)
        one[0, 0, 0], one[1, 0, 0] = 0.0, 1.0  # 0 log 0 is 0
        components, probs = dist.Bernoulli(one), np.stack([1 - one.numpy(), one.numpy()], -1)
    else:
        p = torch.softmax(uniform(-2, 2, (S, T, N, 3)), -1)
        components, probs = dist.Categorical(p), p.numpy()
    total, aleatoric, phi, theta = (v.numpy() for v in Predictive(components, num_theta=num_theta).decompose())
    given_theta = probs.reshape(num_theta, S // num_theta, *probs.shape[1:]).mean(1)
    np.testing.assert_allclose(aleatoric, entropy(probs).mean(0), atol=1e-10)
    np.testing.assert_allclose(total, entropy(probs.mean(0)), atol=1e-10)
    np.testing.assert_allclose(phi, entropy(given_theta).mean(0) - entropy(probs).mean(0), atol=1e-10)
    np.testing.assert_allclose(theta, entropy(probs.mean(0)) - entropy(given_theta).mean(0), atol=1e-10)
    np.testing.assert_allclose(total, aleatoric + phi + theta, atol=1e-12)
    assert (phi > -1e-12).all() and (theta > -1e-12).all() and total.max() <= math.log(probs.shape[-1]) + 1e-12


@every_number
def test_components_behind_each_other_are_one_mixture(make):
    """Draws under different θ come as several distributions: the same predictive as in one."""
    components, _ = make()
    kind, y = type(components), targets(make)
    names = {dist.Normal: ("loc", "scale"), dist.StudentT: ("df", "loc", "scale"), dist.Poisson: ("rate",)}
    names[dist.NegativeBinomial] = ("total_count", "probs")
    parts = [kind(*(getattr(components, name)[part] for name in names[kind])) for part in (slice(0, 1), slice(1, 4))]
    one, several = Predictive(components), Predictive(parts)
    assert several.num_draws == S
    for a, b in zip(*([p.mean, p.variance, p.means, p.log_prob(y), p.cdf(y), p.quantile(0.3)] for p in (several, one)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(several.decompose(), one.decompose(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_draws_that_do_not_divide_into_thetas_are_refused():
    with pytest.raises(ValueError, match="4 draws do not divide into 3 draws of θ"):
        Predictive(normal()[0], num_theta=3)


# --- classes


def test_probabilities_and_log_prob_of_classes():
    one, three = uniform(0, 1), torch.softmax(uniform(-2, 2, (S, T, N, 3)), -1)
    yes, which = torch.tensor([[0, 1, 1], [1, 0, 1]]), torch.tensor([[0, 2, 1], [1, 0, 2]])
    bernoulli, categorical = Predictive(dist.Bernoulli(one)), Predictive(dist.Categorical(three))
    np.testing.assert_allclose(bernoulli.probs[..., 1].numpy(), one.numpy().mean(0), atol=1e-14)
    np.testing.assert_allclose(bernoulli.probs.sum(-1).numpy(), 1.0, atol=1e-14)
    np.testing.assert_allclose(bernoulli.mean.numpy(), one.numpy().mean(0), atol=1e-14)
    np.testing.assert_allclose(categorical.probs.numpy(), three.numpy().mean(0), atol=1e-14)
    p_yes, p_which = one.numpy().mean(0), three.numpy().mean(0)
    right = np.where(yes.numpy() == 1, p_yes, 1 - p_yes)
    np.testing.assert_allclose(bernoulli.log_prob(yes.double()).numpy(), np.log(right), atol=1e-7)
    right = np.take_along_axis(p_which, which.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(categorical.log_prob(which).numpy(), np.log(right), atol=1e-12)
    assert bernoulli.is_classification and categorical.is_classification and bernoulli.is_discrete
    draws = categorical.sample(2_000, generator=seeded())
    shares = np.stack([(draws.numpy() == c).mean(0) for c in range(3)], -1)
    np.testing.assert_allclose(shares, categorical.probs.numpy(), atol=4.5 * 0.5 / math.sqrt(2_000))


def test_integer_labels_of_a_bernoulli():
    p = Predictive(dist.Bernoulli(uniform(0.1, 0.9)))
    yes = torch.tensor([[0, 1, 1], [1, 0, 1]])
    torch.testing.assert_close(p.log_prob(yes), p.log_prob(yes.double()), rtol=0, atol=0)


def test_the_variance_of_a_bernoulli_mixture_is_a_bernoullis():
    one = uniform(0, 1)
    mean = one.mean(0)
    torch.testing.assert_close(Predictive(dist.Bernoulli(one)).variance, mean * (1 - mean), rtol=0, atol=1e-14)


def test_what_classes_do_not_have_is_refused():
    bernoulli, categorical = Predictive(dist.Bernoulli(uniform(0, 1))), Predictive(dist.Categorical(torch.ones(S, T, N, 3)))
    with pytest.raises(ValueError, match="classes have no mean: use probs"):
        categorical.mean  # noqa: B018
    for p in (bernoulli, categorical):
        with pytest.raises(ValueError, match="classes have no quantiles: use probs"):
            p.quantile(0.5)
        with pytest.raises(ValueError, match="classes have no quantiles: use probs"):
            p.interval(0.9)
    with pytest.raises(ValueError, match="classes have no"):
        categorical.variance  # noqa: B018
    with pytest.raises(ValueError, match="y is Normal: only classes have probs"):
        Predictive(normal()[0]).probs  # noqa: B018
