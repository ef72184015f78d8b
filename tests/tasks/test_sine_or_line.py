"""Half sines, half lines."""

import math

import pytest
import torch

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
