"""Few-shot episodes, held to what the pixels themselves say: each image is looked up among all of the set."""

import numpy as np
import pytest
import torch
from PIL import Image

import bayesmeta as bm
from bayesmeta.tasks import FewShot, TaskFamily

CLASSES, EACH = 12, 20


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(classes=CLASSES, each=EACH, shape=(1, 6, 5), seed=3):
    """Random images, all different, and their labels, out of order."""
    images = torch.randint(256, (classes * each, *shape), dtype=torch.uint8, generator=seeded(seed))
    order = torch.randperm(len(images), generator=seeded(seed))
    return images[order], (torch.arange(classes).repeat_interleave(each) * 10)[order]  # labels 0, 10, 20, ...


def family(**options):
    return FewShot(*pictures(), **options)


def looked_up(x, images):
    """Which image of the set each of ``x (..., C, H, W)`` is, found by its bytes."""
    known = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    flat = (x * 255).round().to(torch.uint8).flatten(0, -4)
    return torch.tensor([known[image.numpy().tobytes()] for image in flat]).view(x.shape[:-3])


@pytest.mark.parametrize(("ways", "shots", "test_shots"), [(5, 1, 15), (3, 5, 4), (12, 2, 3)])
def test_labels_are_the_classes_of_the_pixels_in_one_order_a_task(ways, shots, test_shots):
    images, labels = pictures()
    tasks = family(ways=ways, shots=shots, test_shots=test_shots)
    episode = tasks.sample(30, generator=seeded(1))
    classes = tasks.sample_tasks(30, generator=seeded(1))["classes"]
    assert tasks.ways == ways and episode.support.x.shape == (30, ways * shots, 1, 6, 5)
    seen, asked = (looked_up(points.x, images) for points in episode)
    for rows, points, each in ((seen, episode.support, shots), (asked, episode.query, test_shots)):
        assert points.mask.all() and points.y.dtype == torch.int64
        named = torch.tensor([int(name) for name in tasks.class_names])[classes.gather(1, points.y)]
        assert torch.equal(labels[rows], named)
        counts = torch.nn.functional.one_hot(points.y, ways).sum(1)
        assert (counts == each).all()
    for task in range(30):
        assert len(set(seen[task].tolist()) | set(asked[task].tolist())) == ways * (shots + test_shots)  # no image twice
        assert len(set(classes[task].tolist())) == ways


def test_a_class_gets_every_label_and_points_stand_in_no_order_of_class():
    tasks = family(ways=4, shots=3)
    classes = tasks.sample_tasks(3000, generator=seeded())["classes"]
    for label in range(4):
        share = torch.bincount(classes[:, label], minlength=CLASSES) / 3000
        assert (share - 1 / CLASSES).abs().max() < 0.025
    first = tasks.sample(3000, generator=seeded()).support.y[:, 0]
    assert (torch.bincount(first) / 3000 - 0.25).abs().max() < 0.04
    used = looked_up(tasks.sample(400, generator=seeded()).support.x, pictures()[0]).flatten()
    assert len(used.unique()) == CLASSES * EACH  # every image is drawn


def test_unequal_shots_by_mask():
    images, labels = pictures()
    tasks = family(ways=4, shots=(1, 8), test_shots=(2, 12))
    support, query = tasks.sample(200, generator=seeded())
    for points, low, high in ((support, 1, 8), (query, 2, 12)):
        assert points.mask.shape == (200, 4 * high)
        assert not (points.mask[:, 1:] & ~points.mask[:, :-1]).any()  # the padding stands last
        counts = (torch.nn.functional.one_hot(points.y, 4) * points.mask[..., None]).sum(1)
        assert set(counts.flatten().tolist()) == set(range(low, high + 1))
        assert not points.x[~points.mask].any() and not points.y[~points.mask].any()
        share = torch.bincount(counts.flatten())[low:] / 800
        assert (share - 1 / (high - low + 1)).abs().max() < 0.05
    for task in range(20):
        seen, asked = (looked_up(p.x[task, p.mask[task]], images).tolist() for p in (support, query))
        assert len(set(seen + asked)) == len(seen) + len(asked)
        named = {int(y): int(labels[i]) for i, y in zip(seen, support.y[task], strict=False)}
        assert all(named[int(y)] == int(labels[i]) for i, y in zip(asked, query.y[task], strict=False))


def test_splits_have_no_class_in_common():
    tasks = family(splits=(0.5, 0.25, 0.25), ways=3)
    parts = {name: tasks.split(name) for name in ("train", "val", "test")}
    names = {name: set(part.class_names) for name, part in parts.items()}
    assert [len(n) for n in names.values()] == [6, 3, 3] and len(set().union(*names.values())) == CLASSES
    images, labels = pictures()
    for name, part in parts.items():
        drawn = labels[looked_up(part.sample(50, generator=seeded()).query.x, images)]
        assert set(map(str, drawn.flatten().tolist())) == names[name]
    again = family(splits=(0.5, 0.25, 0.25), ways=3, shots=2)
    assert set(again.split("test").class_names) == names["test"]  # by seed alone
    assert set(family(splits=(0.5, 0.25, 0.25), ways=3, seed=1).split("test").class_names) != names["test"]
    assert parts["val"].class_names == tasks.split("validation").class_names
    assert family(splits=(0.5, 0.25, 0.25), ways=3, meta_test=True).class_names == parts["test"].class_names


def test_lists_of_classes_and_of_groups_are_splits():
    tasks = family(splits={"train": range(0, 60, 10), "test": ["60", 70, 80]}, ways=3)
    assert tasks.num_classes == 9  # the others are left out
    assert tasks.split("test").class_names == ["60", "70", "80"]
    groups = {10 * k: "abc"[k // 4] for k in range(CLASSES)}
    tasks = family(groups=groups, splits={"train": ["a", "b"], "test": ["c"]}, ways=3)
    assert tasks.split("test").class_names == ["80", "90", "100", "110"] and tasks.split("test").group_names == ["c"] * 4


def test_within_groups_tasks_are_of_one_group():
    groups = {10 * k: "abc"[min(k // 5, 2)] for k in range(CLASSES)}  # 5, 5 and 2 classes
    tasks = family(groups=groups, within_groups=True, ways=3)
    classes = tasks.sample_tasks(400, generator=seeded())["classes"]
    names = [{tasks.group_names[k] for k in task} for task in classes.tolist()]
    assert all(len(n) == 1 for n in names)
    shares = [sum(n == {group} for n in names) / 400 for group in "abc"]
    assert shares[2] == 0 and abs(shares[0] - 0.5) < 0.1
    with pytest.raises(ValueError, match="the largest group has 5 classes: expected at least ways=6"):
        family(groups=groups, within_groups=True, ways=6)
    with pytest.raises(ValueError, match="images has no groups"):
        family(within_groups=True)


def test_a_fixed_set_of_tasks():
    tasks = family(num_tasks=7, ways=3, shots=2, test_shots=4)
    images, labels = pictures()

    def named(episode):
        tasks = zip(looked_up(episode.query.x, images), episode.query.y, strict=True)
        return [sorted({(int(y), int(labels[i])) for i, y in zip(rows, ys, strict=True)}) for rows, ys in tasks]

    first, second = (tasks.episodes(generator=seeded(s)) for s in (0, 1))
    assert tasks.num_tasks == first.num_tasks == 7 and named(first) == named(second)  # the same classes with the same labels,
    assert not torch.equal(first.support.x, second.support.x)  # other images
    assert named(tasks.episodes(generator=seeded())) == named(family(num_tasks=7, ways=3).episodes(generator=seeded()))
    assert tasks.task_names()[0] == ", ".join(str(label) for _, label in named(first)[0])
    drawn = named(tasks.sample(7, generator=seeded(5)))
    assert sorted(drawn) == sorted(named(first)) and drawn != named(first)
    with pytest.raises(ValueError, match="episodes: this family is endless; give num_tasks"):
        family().episodes(generator=seeded())


def test_evaluation_episodes_are_fixed_by_seed_and_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    first, second = (family().sample(5, generator=seeded(9)) for _ in range(2))
    assert all(torch.equal(u, v) for u, v in zip([*first.support, *first.query], [*second.support, *second.query], strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_of_one_class_and_values():
    images, labels = pictures()
    tasks = family(dtype=torch.float64)
    assert sorted(map(bytes, tasks.images("30").numpy())) == sorted(map(bytes, images[labels == 30].numpy()))
    assert tasks.image_shape == (1, 6, 5) and tasks.num_classes == CLASSES
    x = tasks.sample(50, generator=seeded()).query.x
    assert x.dtype == torch.float64 and x.min() == 0 and x.max() == 1
    assert isinstance(tasks, TaskFamily)
    floats = FewShot(images.double() / 255, labels)
    assert torch.equal(floats.sample(3, generator=seeded()).query.x, family().sample(3, generator=seeded()).query.x)
    assert FewShot(images[:, 0] > 127, labels.numpy()).sample(3, generator=seeded()).query.x.unique().tolist() == [0, 1]


def test_transforms_see_whole_sets_and_follow_the_generator():
    shapes = []

    def noisy(x):
        shapes.append(tuple(x.shape))
        return x.flatten(1) + 5 + torch.randn(x.shape[0], 1)

    tasks = family(ways=3, shots=(1, 4), test_shots=2, transform=noisy, target_transform=lambda y: y.float() + 0.5)
    first, second = (tasks.sample(6, generator=seeded(2)) for _ in range(2))
    assert shapes[:2] == [(72, 1, 6, 5), (36, 1, 6, 5)] and first.support.x.shape == (6, 12, 30)
    assert torch.equal(first.support.x, second.support.x)
    assert not first.support.x[~first.support.mask].any() and not first.support.y[~first.support.mask].any()
    assert set(first.query.y.unique().tolist()) == {0.5, 1.5, 2.5}
    with pytest.raises(ValueError, match=r"transform: expected a tensor \(20, \.\.\.\), got \(1, 6, 5\)"):
        family(ways=5, shots=2, transform=lambda x: x[0]).sample(2, generator=seeded())
    with pytest.raises(ValueError, match=r"target_transform: expected a tensor \(2, 5, \.\.\.\), got list"):
        family(target_transform=lambda y: y.tolist()).sample(2, generator=seeded())


def test_sources_keep_support_and_query_apart():
    images, labels = pictures()
    sources = torch.arange(len(labels))
    for label in labels.unique():
        sources[labels == label] = torch.arange(EACH)
    tasks = FewShot(images, labels, sources=sources, ways=4, shots=3, test_shots=5).across_sources(range(8), range(8, 20))
    support, query = tasks.sample(40, generator=seeded())
    assert set(sources[looked_up(support.x, images)].flatten().tolist()) == set(range(8))
    asked = looked_up(query.x, images)
    assert set(sources[asked].flatten().tolist()) == set(range(8, 20))
    assert len({int(i) for i in asked[0]}) == 20
    outside = tasks.detection(10, generator=seeded()).query.x
    assert set(sources[looked_up(outside, images)].flatten().tolist()) == set(range(8, 20))
    with pytest.raises(ValueError, match=r"different sources for support and query, got \[3\] in both"):
        tasks.across_sources([1, 2, 3], [3, 4])
    with pytest.raises(ValueError, match="class '0' has 2 images for support: expected at least 3"):
        tasks.across_sources([1, 2], range(5, 20))
    with pytest.raises(ValueError, match="does not say where each image is from"):
        family().across_sources([1], [2])


def test_detection_asks_as_many_questions_from_outside():
    images, labels = pictures()
    tasks = family(ways=5)
    found = tasks.detection(20, generator=seeded(4))
    plain = tasks.sample(20, generator=seeded(4))
    assert torch.equal(found.support.x, plain.support.x) and torch.equal(found.query.x[:, :75], plain.query.x)
    assert found.query.x.shape[:2] == (20, 150) and torch.equal(found.inside, (torch.arange(150) < 75).expand(20, -1))
    seen, asked = looked_up(found.support.x, images), looked_up(found.query.x, images)
    for task in range(20):
        known = set(labels[seen[task]].tolist())
        assert {int(labels[i]) in known for i in asked[task, :75]} == {True}
        assert {int(labels[i]) in known for i in asked[task, 75:]} == {False}
        assert len(set(asked[task].tolist())) == 150
    assert (found.query.y[~found.inside] == -1).all() and (found.query.y[found.inside] >= 0).all()
    episode = found.episode
    episode.check()
    assert episode.query.counts.unique().tolist() == [75]
    # a score that knows the classes tells all apart; one that knows nothing is at chance
    area = bm.metrics.bootstrap_statistic(
        lambda s, m, i: bm.metrics.auroc(s, s, mask_in=m & i, mask_out=m & ~i), found.inside.double(), found.query.mask, found.inside,
        resamples=20,
    )  # fmt: skip
    assert area == (1, 1, 1)


def test_detection_with_another_data_set_and_its_errors():
    tasks, other = family(ways=3), FewShot(*pictures(6, 20, seed=8))
    found = tasks.detection(5, num_out=11, outside=other, generator=seeded())
    assert found.query.num_points == 45 + 11
    looked_up(found.query.x[:, 45:], pictures(6, 20, seed=8)[0])  # all are found there
    with pytest.raises(ValueError, match=r"outside: expected images of shape \(1, 6, 5\), got \(3, 6, 5\)"):
        tasks.detection(5, outside=FewShot(*pictures(shape=(3, 6, 5))), generator=seeded())
    with pytest.raises(ValueError, match="expected more classes than ways=12, got 12"):
        family(ways=12).detection(5, generator=seeded())
    with pytest.raises(ValueError, match="expected at most 40 images of 2 other classes, got 41"):
        family(ways=10).detection(5, num_out=41, generator=seeded())
    assert family(ways=10).detection(2, num_out=40, generator=seeded()).query.num_points == 190
    with pytest.raises(ValueError, match="num_out: expected at least 1, got 0"):
        tasks.detection(5, num_out=0, generator=seeded())


# --- where images come from


def test_datasets_folders_and_npz_hold_the_same_images(tmp_path):
    images, labels = pictures(shape=(3, 6, 5))
    pixels = images.movedim(1, -1).numpy()
    dataset = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, labels, strict=True)]
    for i, (image, label) in enumerate(dataset):
        folder = tmp_path / "folder" / f"{label:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:04d}.png")
    (tmp_path / "folder" / "notes.txt").write_text("no class")
    (tmp_path / "folder" / "000" / "notes.txt").write_text("no image")
    np.savez(tmp_path / "a.npz", images=images.numpy(), labels=labels.numpy(), other=np.zeros(3))
    whole = FewShot(images, labels).sample(5, generator=seeded())
    tensors = [(image, label) for image, label in zip(images, labels, strict=True)]
    arrays = [(image, np.int64(label)) for image, label in zip(pixels, labels, strict=True)]
    for other in (
        FewShot.from_dataset(dataset), FewShot.from_dataset(tensors), FewShot.from_dataset(arrays),
        FewShot.from_folder(tmp_path / "folder"), FewShot.from_npz(tmp_path / "a.npz"),
    ):  # fmt: skip
        assert torch.equal(other.sample(5, generator=seeded()).query.x, whole.query.x)
        assert [int(name) for name in other.class_names] == sorted(labels.unique().tolist())
    grey = FewShot.from_folder(tmp_path / "folder", size=(8, 9), channels=1, ways=3, meta_train=True)
    assert grey.image_shape == (1, 8, 9) and grey.num_classes == 7


def test_meta_train_and_evaluate_take_images():
    tasks = family(splits=(0.5, 0.0, 0.5), ways=3, test_shots=4)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(30, 4))
    model = bm.HierarchicalModel.from_network(bm.networks.PrototypeNetwork(network, 4, tasks.ways), bm.likelihoods.Categorical(tasks.ways))
    learner = bm.learners.ProtoNet(model)
    bm.meta_train(learner, tasks.split("train"), steps=3, progress=False)
    report = bm.evaluate({"ProtoNet": learner}, tasks.split("test"), num_tasks=10)
    assert report.results["ProtoNet"].probs.shape == (10, 12, 3)
