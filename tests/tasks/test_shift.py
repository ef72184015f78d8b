"""Shifts: what each does to an image, against other ways to compute it; the same tasks whatever the severity."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

import bayesmeta as bm
from bayesmeta.tasks import FewShot, Shifted, Sinusoid, TaskFamily, shifted
from bayesmeta.tasks.shift import SHIFTS, blurred, rotated


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def family(**options):
    images = torch.rand(160, 1, 12, 12, generator=seeded(1))
    return FewShot(images, torch.arange(8).repeat_interleave(20), **{"ways": 4, "shots": 2, "test_shots": 5, **options})


def equal(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("kind", SHIFTS)
def test_only_what_is_asked_for_changes_and_the_tasks_stay(kind):
    tasks = family(shots=(1, 4), test_shots=(1, 5))
    plain = tasks.sample(6, generator=seeded(2))
    for on in ("query", "support", "both"):
        for severity in (0.0, 0.3, 1.0):
            moved = Shifted(tasks, kind, severity=severity, on=on).sample(6, generator=seeded(2))
            for name in ("support", "query"):
                before, after = getattr(plain, name), getattr(moved, name)
                assert torch.equal(before.y, after.y) and torch.equal(before.mask, after.mask)
                assert equal(before, after) == (severity == 0 or on not in (name, "both"))
                assert not after.x[~after.mask].any() and after.x.min() >= 0 and after.x.max() <= 1
    same = [Shifted(tasks, kind, severity=0.7).sample(6, generator=seeded(2)).query for _ in range(2)]
    assert equal(*same)


@pytest.mark.parametrize("degrees", [90, 180, 270, 31.0, -45.0])
def test_rotation_is_pillow_s(degrees):
    smooth = scipy.ndimage.gaussian_filter(np.random.default_rng(0).random((40, 40)), 3).astype(np.float32)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    turned = rotated(torch.from_numpy(smooth)[None, None], torch.tensor([float(degrees)]))[0, 0].numpy()
    other = np.asarray(Image.fromarray(smooth).rotate(degrees, Image.Resampling.BILINEAR))
    if degrees in (90, 180, 270):
        np.testing.assert_allclose(turned, other, atol=2e-5)
    inner = np.s_[12:28, 12:28]
    np.testing.assert_allclose(turned[inner], other[inner], atol=0.02)


def test_rotation_of_images_that_are_no_squares():
    image = torch.zeros(1, 1, 9, 21)
    image[..., 4, 10:14] = 1  # a bar to the right of the middle
    turned = rotated(image, torch.tensor([90.0]))
    assert turned[0, 0, 1:5, 10].tolist() == pytest.approx([1] * 4, abs=1e-5)  # anticlockwise it points up
    assert turned.sum() == pytest.approx(4, abs=1e-3)


@pytest.mark.parametrize("sd", [0.3, 1.0, 2.5])
def test_blur_is_scipy_s(sd):
    images = torch.rand(3, 2, 12, 15, generator=seeded(), dtype=torch.float64)
    other = np.stack([[scipy.ndimage.gaussian_filter(c, sd, radius=max(1, int(np.ceil(3 * sd))), mode="nearest") for c in image]
                      for image in images.numpy()])  # fmt: skip
    np.testing.assert_allclose(blurred(images, sd).numpy(), other, atol=1e-12)


def test_severity_is_what_it_says():
    tasks = family()
    before = tasks.sample(300, generator=seeded()).query.x

    def query(kind, severity):
        return Shifted(tasks, kind, severity=severity).sample(300, generator=seeded()).query.x

    inverted = query("inversion", 0.3)
    changed = (inverted != before).flatten(2).any(-1)
    assert changed.double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(inverted[changed], 1 - before[changed])
    inner = (before > 0.4) & (before < 0.6)
    noise = (query("noise", 0.1) - before)[inner]
    assert noise.std().item() == pytest.approx(0.05, abs=0.001) and abs(noise.mean()) < 0.001
    turned = query("rotation", 1.0)
    ways = [torch.isclose(turned, torch.rot90(before, k, (-2, -1)), atol=1e-5).flatten(2).all(-1) for k in (1, 3)]
    assert (ways[0] ^ ways[1]).all() and ways[0].double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert query("blur", 1.0).std() < query("blur", 0.5).std() < before.std()


def test_an_episode_alone_and_a_fixed_set():
    tasks = family(num_tasks=3)
    wrapped = Shifted(tasks, "blur", severity=0.5, on="both")
    assert isinstance(wrapped, TaskFamily) and (wrapped.num_tasks, wrapped.ways, wrapped.target_scale) == (3, 4, 1.0)
    generator = seeded(4)
    by_hand = shifted(tasks.episodes(generator=generator), "blur", severity=0.5, on="both", generator=generator)
    episode = wrapped.episodes(generator=seeded(4))
    assert equal(episode.support, by_hand.support) and equal(episode.query, by_hand.query)
    assert wrapped.task_names() == tasks.task_names()
    assert Shifted(family(), "blur", severity=0.5).num_tasks is None


def test_evaluation_of_a_shifted_family():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 4))
    model = bm.HierarchicalModel.from_network(bm.networks.PrototypeNetwork(network, 4, 4), bm.likelihoods.Categorical(4))
    report = bm.evaluate({"ProtoNet": bm.learners.ProtoNet(model)}, Shifted(family(), "noise", severity=0.5), num_tasks=5)
    assert report.results["ProtoNet"].probs.shape == (5, 20, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fog", 0.5, "query"), r"kind: expected one of \('rotation', 'blur', 'noise', 'inversion'\), got 'fog'"),
        (("blur", 1.5, "query"), "severity: expected a number from 0 to 1, got 1.5"),
        (("blur", float("nan"), "query"), "severity: expected a number from 0 to 1, got nan"),
        (("blur", 0.5, "all"), "on: expected 'query', 'support' or 'both', got 'all'"),
    ],
)
def test_wrong_arguments(arguments, message):
    kind, severity, on = arguments
    with pytest.raises(ValueError, match=message):
        Shifted(family(), kind, severity=severity, on=on)
    with pytest.raises(ValueError, match=message):
        shifted(family().sample(1, generator=seeded()), kind, severity=severity, on=on, generator=seeded())


def test_points_that_are_no_images():
    wrapped = Shifted(Sinusoid.maml(), "blur", severity=0.5)
    with pytest.raises(ValueError, match=r"x: expected images \(T, N, C, H, W\), got torch.float32 of shape \(2, 10, 1\)"):
        wrapped.sample(2, generator=seeded())
    with pytest.raises(ValueError, match="Sinusoid has no ways"):
        _ = wrapped.ways
