"""NUTS for θ against quadrature over the exact evidence."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesmeta import HierarchicalModel, sample_theta
from bayesmeta.learners import MAML, Exact

from .conftest import episode, radon_program

pytestmark = pytest.mark.filterwarnings("ignore:NUTS:RuntimeWarning")  # a short run; its accuracy is what is tested


def hierarchical(points):
    """y = level + noise; the level's mean is θ, with a Normal hyperprior: all Gaussian, so p(θ | y) is known."""
    mean = pyro.sample("mean", dist.Normal(torch.tensor(0.5), 1.0))
    with pyro.plate("tasks", points.num_tasks):
        level = pyro.sample("level", dist.Normal(mean, 0.8))
        y_hat = level[..., None].expand(level.shape + points.mask.shape[1:])
        pyro.sample("y", dist.Normal(y_hat, 0.5).to_event(1), obs=points.y)


def test_theta_draws_have_the_exact_posteriors_moments(float64):
    e = episode()
    model = HierarchicalModel(hierarchical, theta="nuts")
    diagnostics = sample_theta(model, e, num_draws=1500, warmup=300, chains=1, generator=torch.Generator().manual_seed(0))
    both = e.union()
    # a task's mean of y is N(mean, 0.8² + 0.5² / n)
    n = both.counts
    ybar = torch.where(both.mask, both.y, 0.0).sum(-1) / n
    precision = 1 / (0.8**2 + 0.25 / n)
    total = 1 + precision.sum()
    mean, sd = (0.5 + (precision * ybar).sum()) / total, total**-0.5
    draws = model.theta_draws[:, 0]
    assert draws.shape == (1500,)
    assert abs(draws.mean() - mean) < 4 * sd / diagnostics["min_effective_draws"] ** 0.5
    assert draws.std().item() == pytest.approx(sd.item(), rel=0.1)
    assert model.theta()["mean"].item() == pytest.approx(draws.mean().item())


def test_a_draw_of_theta_moves_every_learner(float64):
    e = episode()
    model = HierarchicalModel(hierarchical, example=e, theta="nuts")
    model.theta_draws = torch.tensor([[-3.0], [3.0]])
    seen = set()
    for seed in range(6):
        theta = model.draw_theta(torch.Generator().manual_seed(seed))
        with model.theta_at(theta):
            assert MAML(model, inner_steps=0).adapt(e.support).mean[0].item() == theta.item()
            assert Exact(model).adapt(e.support).mean[0, 0] != Exact(model).adapt(e.support).mean[1, 0]
        seen.add(theta.item())
    assert seen == {-3.0, 3.0}
    assert model.initial(e.support)[0].item() == 0.0


def test_draws_of_theta_are_loaded_however_many_there_are(float64):
    e = episode()
    model, twin = (HierarchicalModel(hierarchical, example=e, theta="nuts") for _ in range(2))
    model.theta_draws = torch.tensor([[-3.0], [3.0], [1.0]])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.theta_draws, model.theta_draws)
    with pytest.raises(RuntimeError, match="theta_draws"):
        HierarchicalModel(hierarchical, example=e).load_state_dict(model.state_dict())


def test_models_of_another_kind_are_refused(float64):
    e = episode()
    with pytest.raises(ValueError, match=r"theta='nuts'.*got theta='map'"):
        sample_theta(HierarchicalModel(hierarchical), e)
    with pytest.raises(ValueError, match=r"global sites \[\]"):
        sample_theta(HierarchicalModel(radon_program, theta="nuts"), e)
