"""Sine curves: ranges, noise and fixed sets of the published settings."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from bayesmeta.tasks import Sinusoid


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_uniform(values, low, high):
    """Inside the bounds, and with a uniform's mean and quartiles."""
    assert values.min() >= low and values.max() <= high
    quartiles = values.quantile(torch.tensor([0.25, 0.5, 0.75]))
    expected = low + (high - low) * torch.tensor([0.25, 0.5, 0.75])
    assert torch.allclose(quartiles, expected, rtol=0, atol=0.02 * (high - low))


def test_maml_ranges():
    family = Sinusoid.maml()
    tasks = family.sample_tasks(20_000, generator=seeded())
    assert_uniform(tasks["amplitude"], 0.1, 5.0)
    assert_uniform(tasks["phase"], 0.0, math.pi)
    assert (tasks["frequency"] == 1).all() and not tasks["slope"].any() and not tasks["offset"].any()
    episode = family.sample(2000, generator=seeded())
    assert_uniform(episode.support.x.flatten(), -5.0, 5.0)
    assert episode.support.x.shape == (2000, 10, 1) and episode.query.y.shape == (2000, 10)


def test_maml_curve_is_amplitude_times_sine_of_x_minus_phase():
    tasks = Sinusoid.maml().sample_tasks(5, generator=seeded())
    support = Sinusoid.maml().sample(5, generator=seeded()).support
    expected = tasks["amplitude"][:, None] * torch.sin(support.x[..., 0] - tasks["phase"][:, None])
    assert torch.allclose(support.y, expected, atol=1e-6)


def test_evaluate_on_a_grid_shared_by_all_tasks():
    family = Sinusoid.pacoh()
    tasks = family.sample_tasks(4, generator=seeded())
    grid = torch.linspace(-5, 5, 7)[:, None]
    assert torch.equal(family.evaluate(tasks, grid), family.evaluate(tasks, grid.expand(4, 7, 1)))


@pytest.mark.parametrize("noise_free", [False, True])
def test_bmaml_noise_is_one_percent_of_the_amplitude(noise_free):
    family = Sinusoid.bmaml(num_tasks=None, num_support=100, noise_free_query=noise_free)
    tasks = family.sample_tasks(500, generator=seeded())
    support, query = family.sample(500, generator=seeded())
    assert query.num_points == 100
    ratio = (support.y - family.evaluate(tasks, support.x)) / tasks["amplitude"][:, None]
    assert ratio.std().item() == pytest.approx(0.01, rel=0.02)
    asked = (query.y - family.evaluate(tasks, query.x)) / tasks["amplitude"][:, None]
    if noise_free:
        assert asked.abs().max() < 1e-4
    else:
        assert asked.std().item() == pytest.approx(0.01, rel=0.02)


def test_bmaml_ranges():
    tasks = Sinusoid.bmaml(num_tasks=None).sample_tasks(20_000, generator=seeded())
    assert_uniform(tasks["amplitude"], 0.1, 5.0)
    assert_uniform(tasks["phase"], 0.0, 2 * math.pi)
    assert_uniform(tasks["frequency"], 0.5, 2.0)


def test_pacoh_is_a_sine_with_a_slope():
    family = Sinusoid.pacoh(num_tasks=None, num_support=5)
    tasks = family.sample_tasks(20_000, generator=seeded())
    assert_uniform(tasks["amplitude"], 0.7, 1.3)
    for name, mean, sd in (("phase", 0.0, 0.15), ("slope", 0.5, 0.2), ("offset", 5.0, 0.1)):
        assert tasks[name].mean().item() == pytest.approx(mean, abs=0.01)
        assert tasks[name].std().item() == pytest.approx(sd, rel=0.03)
    support = family.sample(20_000, generator=seeded()).support
    x, shift = support.x[..., 0], tasks["phase"][:, None] / 1.5
    curve = tasks["slope"][:, None] * x + tasks["amplitude"][:, None] * torch.sin(1.5 * (x - shift))
    assert (support.y - curve - tasks["offset"][:, None]).std().item() == pytest.approx(0.1, rel=0.02)
    assert Sinusoid.pacoh().sample(20, generator=seeded()).union().num_points == 5


@pytest.mark.parametrize("num_tasks", [100, 1000])
def test_a_fixed_set_is_the_seed_s(num_tasks):
    family, again, other = (Sinusoid.bmaml(num_tasks=num_tasks, seed=s) for s in (0, 0, 1))
    first, second = family.episodes(generator=seeded(0)), again.episodes(generator=seeded(1))
    assert first.num_tasks == num_tasks
    assert torch.equal(first.support.y, second.support.y) and torch.equal(first.query.x, second.query.x)
    assert not torch.equal(first.support.y, other.episodes(generator=seeded(0)).support.y)


def test_fixed_tasks_with_new_points():
    family = Sinusoid(num_tasks=6)
    first, second = family.episodes(generator=seeded(0)), family.episodes(generator=seeded(1))
    assert not torch.equal(first.support.x, second.support.x)
    phases = family.sample_tasks(6, generator=seeded(2))["phase"]
    assert sorted(phases.tolist()) == sorted(family.sample_tasks(6, generator=seeded(3))["phase"].tolist())


def test_more_tasks_than_there_are_come_again():
    drawn = Sinusoid(num_tasks=3).sample_tasks(50, generator=seeded())["phase"]
    assert len(drawn) == 50 and len(set(drawn.tolist())) == 3


def test_dtype_and_replaced_arguments():
    family = dataclasses.replace(Sinusoid.maml(), dtype=torch.float64, noise=0.5, slope=Normal(0.0, 1.0))
    support = family.sample(200, generator=seeded()).support
    assert support.x.dtype == support.y.dtype == torch.float64
    tasks = family.sample_tasks(200, generator=seeded())
    assert (support.y - family.evaluate(tasks, support.x)).std().item() == pytest.approx(0.5, rel=0.05)


def test_random_sizes():
    counts = Sinusoid(num_support=(0, 3)).sample(100, generator=seeded()).support.counts
    assert set(counts.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": (5.0, 0.1)}, r"amplitude: expected finite bounds .* got \(5.0, 0.1\)"),
        ({"phase": MultivariateNormal(torch.zeros(2), torch.eye(2))}, r"phase: expected a scalar .* \(2,\)"),
        ({"x_range": (0.0, math.inf)}, "x_range"),
        ({"noise": -1.0}, "noise >= 0"),
        ({"num_support": -1}, "num_support"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"fixed_points": True}, "endless"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Sinusoid(**options)


def test_an_endless_family_has_no_episodes():
    with pytest.raises(ValueError, match="endless"):
        Sinusoid.maml().episodes(generator=seeded())
