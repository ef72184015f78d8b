"""The closed forms against dense computations on each task's own, unpadded points."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from bayesmeta.episodes import Points
from bayesmeta.tasks import LinearGaussian

MEAN = np.array([1.0, -0.5, 2.0])
ROOT = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 0.1]])
COV = ROOT @ ROOT.T


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(**options):
    return LinearGaussian(weight_mean=MEAN, weight_cov=COV, **{"noise": 0.3, **options})


@pytest.fixture
def episode():
    """Ragged, with NaN in the padding; the last task has no support."""
    episode = make(num_support=(1, 7), num_query=(0, 5)).sample(9, generator=seeded())
    support, query = episode
    support.mask[-1] = False
    support = Points(
        *(v.masked_fill(~support.mask.view(m), torch.nan) for v, m in ((support.x, (9, 7, 1)), (support.y, (9, 7)))),
        support.mask,
    )
    assert len(set(support.counts.tolist())) > 3
    return support, query


def test_posterior_is_the_joint_normal_conditioned_on_the_support(episode):
    support, _ = episode
    posterior = make().exact_posterior(support)
    assert posterior.batch_shape == (9,) and posterior.event_shape == (3,)
    assert posterior.mean.dtype == torch.float64
    for i, (x, y) in enumerate(support.to_tasks()):
        x, y = x.numpy(), y.numpy()
        gain = np.linalg.solve(x @ COV @ x.T + 0.09 * np.eye(len(x)), x @ COV).T
        np.testing.assert_allclose(posterior.mean[i], MEAN + gain @ (y - x @ MEAN), rtol=0, atol=1e-10)
        np.testing.assert_allclose(posterior.covariance_matrix[i], COV - gain @ x @ COV, rtol=0, atol=1e-10)


def test_posterior_of_no_support_is_the_prior(episode):
    support, _ = episode
    posterior = make().exact_posterior(support)
    np.testing.assert_allclose(posterior.mean[-1], MEAN, rtol=0, atol=1e-14)
    np.testing.assert_allclose(posterior.covariance_matrix[-1], COV, rtol=0, atol=1e-14)
    none = Points.of(torch.zeros(4, 0, 3, dtype=torch.float64), torch.zeros(4, 0, dtype=torch.float64))
    np.testing.assert_allclose(make().exact_posterior(none).mean, np.tile(MEAN, (4, 1)), rtol=0, atol=1e-14)
    assert torch.equal(make().log_evidence(none), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("noise", [0.3, 1e-3, 30.0])
def test_evidence_is_the_dense_normal_density(episode, noise):
    support, _ = episode
    evidence = make(noise=noise).log_evidence(support)
    assert evidence.shape == (9,) and evidence[-1] == 0
    for i, (x, y) in enumerate(support.to_tasks()[:-1]):
        x, y = x.numpy(), y.numpy()
        truth = multivariate_normal(x @ MEAN, x @ COV @ x.T + noise**2 * np.eye(len(x))).logpdf(y)
        # at noise 1e-3 the dense covariance itself is ill-conditioned (1e7): it has no more digits to compare
        assert evidence[i].item() == pytest.approx(truth, rel=1e-8 if noise < 0.01 else 1e-12, abs=1e-10)


def test_evidence_needs_no_second_look_at_the_data(episode):
    """Chain rule: log p(S, Q) = log p(S) + log p(Q | S), the last by one-point predictives."""
    support, query = episode
    both = support.union(query)
    family = make()
    total = torch.zeros(9, dtype=torch.float64)
    seen = both.mask.clone()
    for n in range(both.num_points):
        seen[:, n:] = False
        step = family.exact_predictive(Points(both.x, both.y, seen.clone()), both.x[:, n : n + 1].nan_to_num())
        gain = step.log_prob(both.y[:, n : n + 1].nan_to_num())[:, 0]
        total += torch.where(both.mask[:, n], gain, 0)
        seen = both.mask.clone()
    assert torch.allclose(family.log_evidence(both), total, rtol=0, atol=1e-10)


def test_predictive_is_the_dense_conditional(episode):
    support, _ = episode
    x_new = torch.randn(9, 4, 3, generator=seeded(1), dtype=torch.float64)
    predictive = make().exact_predictive(support, x_new)
    assert predictive.batch_shape == (9, 4)
    for i, (x, y) in enumerate(support.to_tasks()):
        x, y, new = x.numpy(), y.numpy(), x_new[i].numpy()
        gain = np.linalg.solve(x @ COV @ x.T + 0.09 * np.eye(len(x)), x @ COV @ new.T).T
        truth = norm(
            new @ MEAN + gain @ (y - x @ MEAN), np.sqrt(np.diag(new @ COV @ new.T - gain @ x @ COV @ new.T) + 0.09)
        )
        np.testing.assert_allclose(predictive.mean[i], truth.mean(), rtol=0, atol=1e-10)
        np.testing.assert_allclose(predictive.stddev[i], truth.std(), rtol=0, atol=1e-10)


def test_padding_changes_nothing_to_the_last_bit(episode):
    support, _ = episode
    other = Points(support.x.nan_to_num(1e6), support.y.nan_to_num(-1e6), support.mask)
    family = make()
    assert torch.equal(family.log_evidence(support), family.log_evidence(other))
    assert torch.equal(family.exact_posterior(support).mean, family.exact_posterior(other).mean)


def test_float32_with_tiny_noise_still_has_a_posterior():
    family = make(noise=1e-4, dtype=torch.float32)
    support = family.sample(50, generator=seeded()).support
    assert support.x.dtype == torch.float32
    posterior, truth = family.exact_posterior(support), make(noise=1e-4).exact_posterior(support.to(torch.float64))
    assert torch.allclose(posterior.mean.double(), truth.mean, atol=1e-2)
    assert torch.allclose(posterior.stddev.double(), truth.stddev, rtol=0.05)


def test_samples_have_the_family_s_distribution():
    family = make(num_support=4)
    weights = family.sample_tasks(20_000, generator=seeded())["weights"].numpy()
    np.testing.assert_allclose(weights.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(np.cov(weights.T), COV, atol=0.06)
    support = family.sample(20_000, generator=seeded()).support
    assert support.x.mean().abs() < 0.02 and abs(support.x.std() - 1) < 0.02
    residual = support.y - family.evaluate({"weights": torch.as_tensor(weights)}, support.x)
    assert residual.std().item() == pytest.approx(0.3, abs=0.005)


def test_exact_posterior_is_calibrated():
    """The whitened error of the true weights is standard normal, so its squared length averages D."""
    family = make(num_support=4)
    weights = family.sample_tasks(5000, generator=seeded(7))["weights"]
    posterior = family.exact_posterior(family.sample(5000, generator=seeded(7)).support)
    white = torch.linalg.solve_triangular(posterior.scale_tril, (weights - posterior.mean)[..., None], upper=False)
    assert white.square().sum((1, 2)).mean().item() == pytest.approx(3, abs=0.12)


def test_random_sizes_lie_between_their_bounds():
    counts = make(num_support=(2, 5)).sample(200, generator=seeded()).support.counts
    assert set(counts.tolist()) == {2, 3, 4, 5}


def test_intercept_is_the_first_feature():
    support, query = make(intercept=True).sample(3, generator=seeded())
    assert (support.x[..., 0] == 1).all() and (query.x[..., 0] == 1).all() and (support.x[..., 1] != 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise: expected a positive"),
        ({"weight_cov": np.ones((2, 3))}, r"weight_cov of shape \(D, D\), got \(3,\) and \(2, 3\)"),
        ({"weight_cov": -np.eye(3)}, "positive definite"),
        ({"weight_cov": np.eye(3) + np.eye(3, k=1)}, "symmetric"),
        ({"num_support": (3, 2)}, r"num_support: expected .* got \(3, 2\)"),
        ({"num_query": -1}, "num_query"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LinearGaussian(**{"weight_mean": MEAN, "weight_cov": COV, "noise": 0.3, **options})


def test_no_targets():
    with pytest.raises(ValueError, match="expected targets"):
        make().exact_posterior(Points.of(torch.zeros(1, 2, 3)))
