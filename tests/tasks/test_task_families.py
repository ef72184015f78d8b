"""What every family promises: one protocol test over all of them."""

import numpy as np
import pytest
import torch

from bayesmeta.tasks import (
    Circles,
    FewShot,
    GaussianProcess,
    Glyphs,
    LinearGaussian,
    Panel,
    Shifted,
    SineOrLine,
    Sinusoid,
    TaskFamily,
)


def images(**options):
    """Twelve classes of random images, of which every task takes three."""
    pictures = torch.randint(256, (240, 5, 5), dtype=torch.uint8, generator=seeded(7))
    return FewShot(pictures, torch.arange(12).repeat_interleave(20), ways=3, **options)



FAMILIES = {
    "linear_gaussian": lambda: LinearGaussian(weight_mean=torch.zeros(3), weight_cov=torch.eye(3), noise=0.5),
    "linear_gaussian_ragged": lambda: LinearGaussian(
        weight_mean=torch.zeros(2), weight_cov=torch.eye(2), noise=0.5, num_support=(0, 6), num_query=(1, 4)
    ),
    "maml": Sinusoid.maml,
    "maml_ragged": lambda: Sinusoid.maml(num_support=(0, 6), num_query=(1, 4)),
    "bmaml": Sinusoid.bmaml,
    "bmaml_endless": lambda: Sinusoid.bmaml(num_tasks=None),
    "fixed_tasks": lambda: Sinusoid(num_tasks=20),
    "pacoh": Sinusoid.pacoh,
    "sine_or_line": SineOrLine,
    "circles": Circles,
    "circles_ragged": lambda: Circles(num_positive=(0, 3), num_negative=(0, 2), num_query=(1, 6), balanced_query=True),
    "gaussian_process": GaussianProcess,
    "gaussian_process_periodic": lambda: GaussianProcess(kernel="periodic", num_support=(0, 6), num_query=(1, 4)),
    "radon": Panel.radon,
    "radon_ragged": lambda: Panel.radon(num_support=(0, 6), standardize=True),
    "radon_train": lambda: Panel.radon(num_support=0.5).split("train"),
    "images": images,
    "images_ragged": lambda: images(shots=(0, 4), test_shots=(1, 5)),
    "images_fixed": lambda: images(num_tasks=9),
    "images_train": lambda: images(shots=(1, 3)).split("train"),
    "images_shifted": lambda: Shifted(images(shots=(0, 4), num_tasks=9), "noise", severity=0.3, on="both"),
    "glyphs": lambda: Glyphs(shots=(1, 5)),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(episode):
    return [*episode.support, *episode.query]


def equal(a, b):
    return all(torch.equal(u, v) for u, v in zip(flat(a), flat(b), strict=True))


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request):
    return request.param()


def test_is_a_family_and_its_episodes_are_usable(family):
    assert isinstance(family, TaskFamily)
    episode = family.sample(12, generator=seeded())
    episode.check()
    assert episode.num_tasks == 12
    for points in episode:
        assert points.x.dim() in (3, 5) and points.y.shape == points.mask.shape
        assert not points.x[~points.mask].any() and not points.y[~points.mask].any()
    assert (episode.query.counts >= 1).all()


def test_padded_width_does_not_depend_on_the_draw(family):
    shapes = {tuple(tuple(v.shape) for v in flat(family.sample(4, generator=seeded(s)))) for s in range(5)}
    assert len(shapes) == 1


def test_same_seed_same_tasks_and_the_generator_moves_on(family):
    generator = seeded(3)
    first, second = family.sample(8, generator=generator), family.sample(8, generator=generator)
    assert equal(first, family.sample(8, generator=seeded(3)))
    assert not equal(first, second)
    assert not equal(first, family.sample(8, generator=seeded(4)))


def test_global_random_state_is_neither_read_nor_moved(family):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = family.sample(8, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    torch.manual_seed(2)
    assert equal(first, family.sample(8, generator=seeded()))


def test_sample_complains_of_no_tasks_and_no_generator(family):
    with pytest.raises(ValueError, match="num_tasks: expected at least 1, got 0"):
        family.sample(0, generator=seeded())
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator, got NoneType"):
        family.sample(1, generator=None)
    with pytest.raises(TypeError, match="generator"):
        family.sample(1)


def test_the_optional_attributes(family):
    assert family.num_tasks is None or family.num_tasks >= 1
    assert family.target_scale > 0


FINITE = ["bmaml", "pacoh", "radon", "radon_ragged", "radon_train"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith(("radon", "gaussian_process", "images", "glyphs"))])
def test_true_curves_are_those_of_sample(name):
    family = FAMILIES[name]()
    num_tasks = family.num_tasks or 50
    tasks = family.sample_tasks(num_tasks, generator=seeded(5))
    query = family.sample(num_tasks, generator=seeded(5)).query
    gap = (query.y - family.evaluate(tasks, query.x))[query.mask]
    noise = 0.05 if name.startswith("bmaml") else getattr(family, "noise", 0)  # 1% of the largest amplitude; labels have none
    assert gap.abs().max() <= 5 * noise + 1e-5


def signature(episode):
    """Tells a task by its points, in whatever order and split."""
    points = episode.union()
    return [round(v, 4) for v in torch.where(points.mask, points.y.double(), 0).sum(1).tolist()]


@pytest.mark.parametrize("name", FINITE)
def test_a_finite_family_gives_each_task_once(name):
    family = FAMILIES[name]()
    everything = signature(family.episodes(generator=seeded()))
    assert len(everything) == family.num_tasks
    drawn = signature(family.sample(family.num_tasks, generator=seeded(1)))
    assert sorted(drawn) == sorted(everything) and drawn != everything
    few = signature(family.sample(7, generator=seeded(2)))
    assert len(few) == 7 and all(few.count(task) <= everything.count(task) for task in few)
    assert len(signature(family.sample(2 * family.num_tasks, generator=seeded(1)))) == 2 * family.num_tasks


@pytest.mark.parametrize("name", FINITE)
def test_episodes_keep_their_order_whatever_the_generator(name):
    family = FAMILIES[name]()
    assert signature(family.episodes(generator=seeded(0))) == signature(family.episodes(generator=seeded(1)))


def test_tasks_fixed_without_their_points_come_once_each():
    family = FAMILIES["fixed_tasks"]()
    drawn = family.sample_tasks(20, generator=seeded())["phase"].tolist()
    assert len(set(drawn)) == 20
    assert set(family.sample_tasks(7, generator=seeded(9))["phase"].tolist()) < set(drawn)
