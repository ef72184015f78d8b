"""Circles: what is drawn, and the exact predictive against Monte Carlo over circles."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad

from bayesmeta.episodes import Points
from bayesmeta.tasks import Circles

SIZES = {"num_positive": (0, 3), "num_negative": (0, 3), "dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_circles_keep_their_ranges():
    tasks = Circles().sample_tasks(20_000, generator=seeded())
    assert tasks["centre"].shape == (20_000, 2)
    for values, low, high in ((tasks["centre"], 0, 5), (tasks["radius"], 0.1, 2)):
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03)


@pytest.mark.parametrize("balanced", [False, True])
def test_labels_are_the_circle_s_and_sizes_as_asked(balanced):
    family = Circles(**SIZES, num_query=(2, 9), balanced_query=balanced)
    tasks = family.sample_tasks(2000, generator=seeded())
    support, query = family.sample(2000, generator=seeded())
    for points in (support, query):
        distance = (points.x - tasks["centre"][:, None]).norm(dim=-1)
        assert ((points.y == 1) == (distance <= tasks["radius"][:, None]))[points.mask].all()
        inside = points.x[points.mask]
        assert ((inside >= 0) & (inside <= 5)).all()
    positive = (support.mask & (support.y == 1)).sum(1)
    negative = (support.mask & (support.y == 0)).sum(1)
    assert set(positive.tolist()) == set(negative.tolist()) == {0, 1, 2, 3}
    assert set(query.counts.tolist()) == set(range(2, 10))
    share = query.y[query.mask].mean().item()
    area = areas(tasks).mean().item() / 25
    assert share == pytest.approx(0.5 if balanced else area, abs=0.02)


def areas(tasks, samples=400):
    """Area of each circle inside the square, by a midpoint rule over the chords."""
    c, r = tasks["centre"], tasks["radius"][:, None]
    t = (torch.arange(samples, dtype=c.dtype) + 0.5) / samples
    left, right = (c[:, :1] - r).clamp(min=0), (c[:, :1] + r).clamp(max=5)
    half = (r.square() - (left + (right - left) * t - c[:, :1]).square()).clamp(min=0).sqrt()
    chord = (c[:, 1:] + half).clamp(max=5) - (c[:, 1:] - half).clamp(min=0)
    return chord.mean(1) * (right - left)[:, 0]


def test_points_of_a_class_are_uniform_over_it():
    """Chosen circles: at a corner, against a wall, free; each half of the area gets half of the points."""
    family = Circles(num_positive=1, dtype=torch.float64)
    tasks = {"centre": torch.tensor([[0.0, 0.0], [2.0, 4.5], [2.5, 2.5]]).double(), "radius": torch.tensor([2.0, 1.5, 1.0]).double()}
    wanted = torch.tensor([True, False]).repeat_interleave(20_000).expand(3, -1)
    torch.manual_seed(0)
    x = family._draw_points(tasks, wanted)
    inside = (x - tasks["centre"][:, None]).norm(dim=-1) <= tasks["radius"][:, None]
    assert torch.equal(inside, wanted)
    square = 5 * torch.rand(400_000, 2, dtype=torch.float64)
    for task in range(3):
        member = (square - tasks["centre"][task]).norm(dim=-1) <= tasks["radius"][task]
        for own, of_square in ((x[task, :20_000], square[member]), (x[task, 20_000:], square[~member])):
            for axis in (0, 1):
                median = of_square[:, axis].median()
                assert (own[:, axis] < median).double().mean().item() == pytest.approx(0.5, abs=0.015)


def test_the_area_inside_the_square():
    family = Circles()
    centres, log_area, log_rest = family._grid
    r = np.geomspace(0.1, 2.0, log_area.shape[1])
    for g in (0, 37, 64 * 10 + 3, 64 * 32 + 31, 4095):
        for k in (0, 40, 63):
            c = centres[g].numpy()
            low, high = max(0.0, c[0] - r[k]), min(5.0, c[0] + r[k])
            half = lambda u: math.sqrt(max(r[k] ** 2 - (u - c[0]) ** 2, 0))  # noqa: B023, E731
            area = dblquad(lambda v, u: 1.0, low, high, lambda u: max(0, c[1] - half(u)), lambda u: min(5, c[1] + half(u)))[0]  # noqa: B023
            assert log_area[g, k].exp().item() == pytest.approx(area, abs=1e-6)
            assert log_rest[g, k].exp().item() == pytest.approx(25 - area, abs=1e-6)


@pytest.mark.parametrize("balanced", [False, True])
def test_exact_predictive_by_monte_carlo(balanced):
    family = Circles(**SIZES, num_query=15, balanced_query=balanced)
    support, query = family.sample(6, generator=seeded(3))
    probs = family.exact_predictive(support, query.x).probs
    assert probs.shape == (6, 15)
    circles = family.sample_tasks(100_000, generator=seeded(9))
    area = areas(circles, 100)
    for task, (x, y) in enumerate(support.to_tasks()):
        weight = torch.ones_like(area)
        for point, label in zip(x, y, strict=True):
            inside = (point - circles["centre"]).norm(dim=-1) <= circles["radius"]
            weight *= torch.where(inside == (label == 1), 1 / area if label == 1 else 1 / (25 - area), 0.0)
        inside = (query.x[task, :, None] - circles["centre"]).norm(dim=-1) <= circles["radius"]
        ones, zeros = weight / area if balanced else weight, weight / (25 - area) if balanced else weight
        ones, zeros = (ones * inside).sum(1), (zeros * ~inside).sum(1)
        effective = (weight.sum() ** 2 / weight.square().sum()).item()
        truth = ones / (ones + zeros)
        assert (probs[task] - truth).abs().max() < 0.003 + 4 / math.sqrt(effective) * (0.5 if not balanced else 1)
    assert ((probs > 0.2) & (probs < 0.8)).any()


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [False, True])
def test_exact_predictive_is_calibrated(balanced):
    """Of the points that are inside with probability p a fraction p are inside."""
    family = Circles(num_positive=(1, 2), num_negative=(0, 2), num_query=10, balanced_query=balanced)
    support, query = family.sample(400, generator=seeded(1))
    p = family.exact_predictive(support, query.x).probs
    for low, high in ((0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 0.95), (0.95, 1.01)):
        here = (p >= low) & (p < high)
        gap = torch.where(here, query.y - p, 0).sum(1)  # points of a task are not independent
        assert here.sum() > 15 and abs(gap.sum()) < 4 * gap.square().sum().sqrt() + 0.003 * here.sum()


def test_one_positive_is_inside_itself_and_far_points_are_not():
    family = Circles(dtype=torch.float64)
    support = Points.of(torch.tensor([[[2.5, 2.5]]]).double(), torch.ones(1, 1).double())
    x = torch.tensor([[[2.5, 2.5], [2.6, 2.5], [2.5, 4.0], [0.0, 0.0], [5.0, 2.5]]]).double()
    p = family.exact_predictive(support, x).probs[0]
    assert p[0] == 1
    assert 1 > p[1] > p[2] > p[4] > p[3] >= 0
    # nothing is known without points: the probability is that of the family
    none = Points.of(torch.zeros(1, 0, 2).double(), torch.zeros(1, 0).double())
    circles = family.sample_tasks(200_000, generator=seeded(9))
    truth = ((x[0, :, None] - circles["centre"]).norm(dim=-1) <= circles["radius"]).double().mean(1)
    assert torch.allclose(family.exact_predictive(none, x).probs[0], truth, rtol=0, atol=0.004)


def test_padding_and_other_tasks_change_nothing(monkeypatch):
    family = Circles(**SIZES, num_query=4)
    support, query = family.sample(6, generator=seeded(3))
    probs = family.exact_predictive(support, query.x).probs
    odd = Points(support.x.masked_fill(~support.mask[..., None], torch.nan), support.y.masked_fill(~support.mask, torch.nan), support.mask)
    assert torch.equal(family.exact_predictive(odd, query.x).probs, probs)
    monkeypatch.setattr("bayesmeta.tasks.circles.BLOCK", 1)  # one task at a time
    torch.testing.assert_close(family.exact_predictive(support, query.x).probs, probs, rtol=0, atol=1e-12)


def test_finer_quadrature_says_the_same(monkeypatch):
    family = Circles(**SIZES, num_query=6)
    support, query = family.sample(3, generator=seeded(3))
    probs = family.exact_predictive(support, query.x).probs
    monkeypatch.setattr("bayesmeta.tasks.circles.CENTRES", 128)
    monkeypatch.setattr("bayesmeta.tasks.circles.RADII", 128)
    finer = Circles(**SIZES, num_query=6).exact_predictive(support, query.x).probs
    assert (probs - finer).abs().max() < 0.003


def test_what_no_circle_fits_is_nan():
    family = Circles(dtype=torch.float64)
    apart = Points.of(torch.tensor([[[0.0, 0.0], [5.0, 5.0]]]).double(), torch.ones(1, 2).double())
    assert family.exact_predictive(apart, apart.x).probs.isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centre": (-1.0, 5.0)}, r"centre: expected bounds within x_range = \(0.0, 5.0\), got \(-1.0, 5.0\)"),
        ({"radius": (0.0, 1.0)}, "radius: expected 0 < low < high"),
        ({"radius": (0.1, 3.0)}, "a circle of radius 3.0 could cover the square of side 5.0"),
        ({"radius": torch.distributions.Uniform(0.1, 1.0)}, r"radius: expected bounds \(low, high\)"),
        ({"num_positive": -1}, "num_positive"),
        ({"num_query": (3, 1)}, "num_query"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Circles(**options)


def test_no_targets():
    with pytest.raises(ValueError, match="expected targets"):
        Circles().exact_predictive(Points.of(torch.zeros(1, 2, 2)), torch.zeros(1, 1, 2))
