"""Half sines, half lines."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from scipy.stats import norm

from bayesmeta.episodes import Points
from bayesmeta.tasks import SineOrLine


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_half_are_lines_and_parameters_keep_their_ranges():
    tasks = SineOrLine().sample_tasks(20_000, generator=seeded())
    assert tasks["is_line"].dtype == torch.bool
    assert tasks["is_line"].float().mean().item() == pytest.approx(0.5, abs=0.02)
    for name, low, high in (("amplitude", 0.1, 5), ("phase", 0, math.pi), ("slope", -3, 3), ("intercept", -3, 3)):
        values = tasks[name]
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_lines_are_straight_and_sines_are_sines():
    family = SineOrLine(noise=0.0)
    tasks = family.sample_tasks(200, generator=seeded())
    support = family.sample(200, generator=seeded()).support
    assert support.x.shape == (200, 5, 1)
    x, line = support.x[..., 0], tasks["is_line"]
    straight = tasks["slope"][:, None] * x + tasks["intercept"][:, None]
    sine = tasks["amplitude"][:, None] * torch.sin(x - tasks["phase"][:, None])
    assert 0 < line.sum() < 200
    assert torch.allclose(support.y[line], straight[line], atol=1e-5)
    assert torch.allclose(support.y[~line], sine[~line], atol=1e-5)


@pytest.mark.parametrize("noise_free", [False, True])
def test_noise(noise_free):
    family = SineOrLine(num_query=50, noise_free_query=noise_free)
    tasks = family.sample_tasks(400, generator=seeded())
    support, query = family.sample(400, generator=seeded())
    assert (support.y - family.evaluate(tasks, support.x)).std().item() == pytest.approx(0.3, rel=0.05)
    gap = query.y - family.evaluate(tasks, query.x)
    assert gap.abs().max() < 1e-5 if noise_free else gap.std().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"slope": (3.0, -3.0)}, "slope"), ({"noise": -0.1}, "noise"), ({"num_query": (2, 1)}, "num_query")],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SineOrLine(**options)


@pytest.fixture(scope="module")
def few_points():
    """Ragged tasks in float64 with NaN in the padding; 0 to 4 points each."""
    family = SineOrLine(num_support=(0, 4), dtype=torch.float64)
    support = family.sample(8, generator=seeded(3)).support
    mask = support.mask
    return family, Points(support.x.masked_fill(~mask[..., None], torch.nan), support.y.masked_fill(~mask, torch.nan), mask)


def evidence(curve, x, y, first, second, at, noise=0.3):
    """log of the mean likelihood over a grid of midpoints, and the mean curve under it; two grids, extrapolated to none."""
    answers = []
    for nodes in (800, 1600):
        a, b = (low + (high - low) * (np.arange(nodes) + 0.5) / nodes for low, high in (first, second))
        log_like = np.zeros((nodes, nodes))
        for xj, yj in zip(x, y, strict=True):
            log_like += norm.logpdf(yj, curve(a[:, None], b[None], xj), noise)
        weights = np.exp(log_like - log_like.max())
        means = [(weights * curve(a[:, None], b[None], v)).sum() / weights.sum() for v in at]
        answers.append(np.array([np.log(weights.mean()) + log_like.max(), *means]))
    log_evidence, *means = (4 * answers[1] - answers[0]) / 3  # a midpoint rule's error is of second order
    return log_evidence, means


def sine(a, phase, x):
    return a * np.sin(x - phase)


def line(b, c, x):
    return b * x + c


def test_probability_evidence_and_curves_by_a_dense_grid(few_points):
    family, support = few_points
    probability, log_evidence = family.probability_of_line(support), family.log_evidence(support)
    x_new = torch.linspace(-4, 5, 2, dtype=torch.float64)[:, None]
    curves = family.explanations(support, x_new)
    assert curves.shape == (2, 8, 2)
    for task, (x, y) in enumerate(support.to_tasks()):
        x, y, at = x[:, 0].numpy(), y.numpy(), x_new[:, 0].numpy()
        log_sine, mean_sine = evidence(sine, x, y, (0.1, 5), (0, math.pi), at)
        log_line, mean_line = evidence(line, x, y, (-3, 3), (-3, 3), at)
        assert probability[task].item() == pytest.approx(1 / (1 + np.exp(log_sine - log_line)), abs=1e-7)
        assert log_evidence[task].item() == pytest.approx(np.logaddexp(log_sine, log_line) - np.log(2), abs=1e-7)
        np.testing.assert_allclose(curves[:, task], [mean_sine, mean_line], rtol=0, atol=1e-5)
    assert ((probability > 0.05) & (probability < 0.95)).sum() >= 2  # the family is ambiguous


def test_probability_by_adaptive_quadrature():
    """The closest check: scipy's adaptive rule, where the grid above has only its own error."""
    family = SineOrLine(dtype=torch.float64)
    x, y = np.array([-1.0, 2.5]), np.array([0.4, -1.1])
    got = family.probability_of_line(Points.of(torch.as_tensor(x)[None, :, None], torch.as_tensor(y)[None])).item()

    def mean_likelihood(curve, first, second):
        density = lambda b, a: math.prod(norm.pdf(v, curve(a, b, u), 0.3) for u, v in zip(x, y, strict=True))  # noqa: E731
        area = (first[1] - first[0]) * (second[1] - second[0])
        steps = np.linspace(*first, 7)
        return sum(dblquad(density, *steps[i : i + 2], *second, epsabs=1e-11, epsrel=1e-9)[0] for i in range(6)) / area

    from_sine, from_line = mean_likelihood(sine, (0.1, 5), (0, math.pi)), mean_likelihood(line, (-3, 3), (-3, 3))
    assert got == pytest.approx(from_line / (from_line + from_sine), abs=1e-8)


def test_probabilities_of_explanations(few_points):
    family, support = few_points
    likely = family.probabilities_of_explanations(support)
    assert family.explanation_names == ("sine", "line") and likely.shape == (2, 8)
    assert torch.equal(likely[1], family.probability_of_line(support))
    assert torch.allclose(likely.sum(0), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-15)
    for unknown in (SineOrLine(noise=0.0), SineOrLine(phase=torch.distributions.Normal(0.0, 1.0))):
        assert unknown.probabilities_of_explanations(support).isnan().all()


@pytest.mark.parametrize(("points", "share"), [(5, 0.02), (3, 0.09), (2, 0.25)])
def test_how_many_tasks_are_ambiguous(points, share):
    """As the docstring says."""
    family = SineOrLine(num_support=points)
    likely = family.probabilities_of_explanations(family.sample(1000, generator=seeded(7)).support)
    assert (likely >= 0.2).all(0).float().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share / 1000))


def test_padding_and_tasks_of_other_sizes_change_nothing(few_points):
    family, support = few_points
    other = Points(support.x.nan_to_num(1e6), support.y.nan_to_num(-1e6), support.mask)
    assert torch.equal(family.probability_of_line(support), family.probability_of_line(other))
    for task, (x, y) in enumerate(support.to_tasks()):
        alone = Points.from_tasks([(x, y)])
        gap = (family.probability_of_line(alone) - family.probability_of_line(support)[task]).abs()
        assert gap < 1e-12
        assert (family.log_evidence(alone) - family.log_evidence(support)[task]).abs() < 1e-10


def test_no_points_is_the_prior():
    family = SineOrLine(dtype=torch.float64)
    none = Points.of(torch.zeros(2, 0, 1, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.float64))
    assert torch.allclose(family.probability_of_line(none), torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(family.log_evidence(none), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.tensor([[1.0]], dtype=torch.float64)
    # E[A] E[sin(x − φ)] over a uniform phase, and E[b] x + E[c] = 0
    expected = torch.tensor([2.55 * (math.cos(1 - math.pi) - math.cos(1)) / math.pi, 0.0], dtype=torch.float64)
    assert torch.allclose(family.explanations(none, x)[:, 0, 0], expected, rtol=0, atol=1e-12)


def test_the_probability_is_calibrated():
    """Of the tasks that are lines with probability p a fraction p are lines."""
    family = SineOrLine(num_support=2)
    truth = family.sample_tasks(1000, generator=seeded(4))["is_line"]
    p = family.probability_of_line(family.sample(1000, generator=seeded(4)).support)
    for low, high in ((0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.01)):
        here = (p >= low) & (p < high)
        sd = (p[here] * (1 - p[here])).sum().sqrt() / here.sum()
        assert here.sum() > 25 and abs(truth[here].float().mean() - p[here].mean()) < 4 * sd


@pytest.mark.parametrize("noise", [0.02, 3.0])
def test_other_noises_and_many_points(noise):
    """As many points as settle it: one curve stands out, and it is the true one."""
    family = SineOrLine(num_support=60, noise=noise, num_query=30, noise_free_query=True, dtype=torch.float64)
    tasks = family.sample_tasks(6, generator=seeded(2))
    support, query = family.sample(6, generator=seeded(2))
    p = family.probability_of_line(support)
    curves = family.explanations(support, query.x)
    mine = torch.where(tasks["is_line"][:, None], curves[1], curves[0])
    assert ((p > 0.5) == tasks["is_line"]).all() or noise > 1
    assert (mine - query.y).square().mean().sqrt() < 4 * noise * math.sqrt(2 / 60)


def test_degenerate_bounds_are_point_masses():
    family = SineOrLine(slope=(1.0, 1.0), intercept=(0.5, 0.5), amplitude=(2.0, 2.0), phase=(0.3, 0.3), dtype=torch.float64)
    support = family.sample(5, generator=seeded()).support
    x, y = support.x[..., 0], support.y
    normal = torch.distributions.Normal
    log_line = normal(x + 0.5, 0.3).log_prob(y).sum(1)
    log_sine = normal(2 * torch.sin(x - 0.3), 0.3).log_prob(y).sum(1)
    assert torch.allclose(family.probability_of_line(support), torch.sigmoid(log_line - log_sine), rtol=0, atol=1e-12)
    assert torch.allclose(family.explanations(support, support.x)[0], 2 * torch.sin(x - 0.3), rtol=0, atol=1e-12)


def test_what_is_not_known_exactly():
    support = SineOrLine().sample(2, generator=seeded()).support
    with pytest.raises(ValueError, match="expected noise > 0, got 0"):
        SineOrLine(noise=0.0).probability_of_line(support)
    with pytest.raises(ValueError, match=r"slope: the exact answer is known for uniform priors"):
        SineOrLine(slope=torch.distributions.Normal(0.0, 1.0)).probability_of_line(support)
    with pytest.raises(ValueError, match="expected targets"):
        SineOrLine().probability_of_line(support._replace(y=None))
    assert SineOrLine().probability_of_line(support).dtype == torch.float32
