"""Omniglot: made-up drawings in the layout of the original, and the real ones where BAYESMETA_DATA, or ../shared/data, has them."""

import io
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bayesmeta.tasks import Omniglot, omniglot

ROOT = Path(os.environ.get("BAYESMETA_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "omniglot"
real = pytest.mark.skipif(
    not (ROOT / "omniglot28.npz").exists(), reason=f"Omniglot is not at {ROOT}: name the folder of data in BAYESMETA_DATA"
)
SIZES = {"images_background": {"Latin": 6, "Greek": 5, "Korean": 3}, "images_evaluation": {"Tengwar": 5, "Oriya": 6}}
SMALL = {"shots": 1, "test_shots": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawing(generator):
    """105 x 105 pixels, ink False on ground True, with thick strokes."""
    coarse = generator.random((7, 7)) < 0.7
    return np.kron(coarse, np.ones((15, 15))).astype(bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders, with drawers 1 … 5."""
    root, generator, number = tmp_path_factory.mktemp("omniglot"), np.random.default_rng(0), 0
    for part, alphabets in SIZES.items():
        for alphabet, characters in alphabets.items():
            for character in range(1, characters + 1):
                number += 1
                place = root / part / alphabet / f"character{character:02d}"
                place.mkdir(parents=True)
                for drawer in range(1, 6):
                    Image.fromarray(drawing(generator)).save(place / f"{number:04d}_{drawer:02d}.png")
    (root / "splits").mkdir()
    for name, listed in {"train": ["Latin/character01", "Tengwar/character02"], "val": ["Greek/character01", "Greek/character03"],
                         "test": ["Oriya/character06", "Oriya/character01"]}.items():  # fmt: skip
        lines = [f"{character}/rot{angle:03d}\n" for character in listed for angle in (0, 90, 180, 270)]
        (root / "splits" / f"{name}.txt").write_text("".join(lines))
    return root


@pytest.fixture
def zips(folder, tmp_path):
    for part in SIZES:
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for path in sorted((folder / part).rglob("*")):
                archive.write(path, path.relative_to(folder))
            archive.writestr(f"__MACOSX/{part}/Latin/character01/._0001_01.png", b"of no interest")
    return tmp_path


def same(a, b):
    first, second = (family.sample(6, generator=seeded(1)) for family in (a, b))
    return a.class_names == b.class_names and torch.equal(first.query.x, second.query.x) and torch.equal(first.query.y, second.query.y)


def test_folders_and_zips_hold_the_same(folder, zips):
    tasks = Omniglot(folder, **SMALL)
    assert tasks.num_classes == 25 and tasks.image_shape == (1, 28, 28) and tasks.class_names[0] == "Greek/character01"
    assert same(tasks, Omniglot(zips, **SMALL))
    shutil.copytree(folder / "images_evaluation", zips / "data" / "images_evaluation")
    shutil.copy(zips / "images_background.zip", zips / "data" / "renamed.zip")  # told by what is in it
    assert same(tasks, Omniglot(zips / "data", **SMALL))
    only = Omniglot(folder / "images_evaluation", **SMALL)
    assert only.num_classes == 11 and same(only, Omniglot(zips / "images_evaluation.zip", **SMALL))


def test_the_environment_says_where(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("BAYESMETA_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="expected root=, or a folder of data in the environment variable BAYESMETA_DATA"):
        Omniglot()
    (tmp_path / "omniglot").symlink_to(folder)
    monkeypatch.setenv("BAYESMETA_DATA", str(tmp_path))
    assert same(Omniglot(**SMALL), Omniglot(folder, **SMALL))


def test_ink_is_one_and_images_are_the_files_resized(folder):
    path = folder / "images_background" / "Korean" / "character02"
    grey = [Image.open(file).convert("L") for file in sorted(path.iterdir())]
    pixels = [255 - np.asarray(image.resize((28, 28), Image.Resampling.BILINEAR)) for image in grey]
    assert np.array_equal(Omniglot(folder, **SMALL).images("Korean/character02")[:, 0], np.stack(pixels))
    whole = Omniglot(folder, size=105, **SMALL).images("Korean/character02")
    assert np.array_equal(whole[0, 0] == 255, ~np.asarray(Image.open(sorted(path.iterdir())[0])))


def test_rotations_are_classes_of_the_same_split(folder):
    tasks = Omniglot(folder, rotations=True, **SMALL)
    assert tasks.num_classes == 100
    upright = tasks.images("Latin/character01/rot000")
    assert torch.equal(upright, Omniglot(folder, **SMALL).images("Latin/character01"))
    for angle in (90, 180, 270):
        turned = tasks.images(f"Latin/character01/rot{angle:03d}")[2, 0].numpy()
        assert np.array_equal(turned, np.asarray(Image.fromarray(upright[2, 0].numpy()).rotate(angle)))  # anticlockwise, as pillow's
    for splits in ("lake", "vinyals", (0.5, 0.0, 0.5)):
        parts = {name: Omniglot(folder, splits=splits, rotations=True, **SMALL).split(name).class_names for name in ("train", "test")}
        bases = {name: {c.rsplit("/", 1)[0] for c in names} for name, names in parts.items()}
        assert bases["train"].isdisjoint(bases["test"])
        assert all(len(names) == 4 * len(bases[name]) for name, names in parts.items())
        without = Omniglot(folder, splits=splits, ways=2, **SMALL).split("test")
        assert set(without.class_names) == bases["test"]


def test_splits(folder, tmp_path):
    lake = Omniglot(folder, **SMALL)
    assert set(lake.split("train").group_names) == {"Latin", "Greek", "Korean"}
    assert set(lake.split("test").group_names) == {"Tengwar", "Oriya"}
    with pytest.raises(ValueError, match="split: 'val' has 0 classes"):
        lake.split("val")
    vinyals = Omniglot(folder, splits="vinyals", ways=2, **SMALL)
    assert vinyals.num_classes == 6 and vinyals.split("val").class_names == ["Greek/character01", "Greek/character03"]
    assert same(vinyals, Omniglot(folder, splits=folder / "splits", ways=2, **SMALL))
    alphabets = Omniglot(folder, splits={"train": ["Latin", "Oriya"], "test": ["Greek"]}, **SMALL)
    assert set(alphabets.split("test").group_names) == {"Greek"} and alphabets.num_classes == 17
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'train.txt'}: expected the characters of a split")):
        Omniglot(folder, splits=tmp_path)
    for name in ("train", "val", "test"):
        shutil.copy(folder / "splits" / f"{name}.txt", tmp_path)
    (tmp_path / "val.txt").write_text("Greek/character01/rot000\nGreek\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'val.txt'}, line 2: expected Alphabet/characterNN/rotDDD, got 'Greek'")):
        Omniglot(folder, splits=tmp_path)
    (tmp_path / "val.txt").write_text("Greek/character09/rot000\n")
    with pytest.raises(ValueError, match=r"\['val'\]: no class 'Greek/character09'; did you mean 'Greek/character0"):
        Omniglot(folder, splits=tmp_path)
    (tmp_path / "val.txt").write_text("Latin/character01/rot000\n")
    with pytest.raises(ValueError, match="class 'Latin/character01' is in 'train' and in 'val'"):
        Omniglot(folder, splits=tmp_path)


def test_tasks_within_an_alphabet_and_of_other_drawers(folder):
    tasks = Omniglot(folder, within_groups=True, **SMALL)
    classes = tasks.sample_tasks(200, generator=seeded())["classes"]
    alphabets = [{tasks.group_names[k] for k in task} for task in classes.tolist()]
    assert {frozenset(a) for a in alphabets} == {frozenset([a]) for a in ("Latin", "Greek", "Tengwar", "Oriya")}  # Korean has 3 of 5
    turned = Omniglot(folder, within_groups=True, rotations=True, **SMALL)
    task = turned.sample_tasks(1, generator=seeded())["classes"][0].tolist()
    assert len({turned.class_names[k].split("/")[2] for k in task}) == 1  # the alphabet as a whole is turned
    support, query = tasks.across_sources([1, 2], [3, 4, 5]).sample(20, generator=seeded())
    images = torch.stack([tasks.images(name) for name in tasks.class_names])  # (K, drawer, 1, 28, 28)
    known = {image.numpy().tobytes(): d for of_class in images for d, image in enumerate(of_class, 1)}
    for points, drawers in ((support, {1, 2}), (query, {3, 4, 5})):
        drawn = (points.x * 255).round().to(torch.uint8).flatten(0, 1)
        assert {known[image.numpy().tobytes()] for image in drawn} == drawers


def test_small_omniglot_has_one_task_for_each_alphabet(folder):
    tasks = Omniglot.small(folder, ways=3, **SMALL)
    train, test = tasks.split("train"), tasks.split("test")
    assert (train.num_tasks, test.num_tasks) == (3, 2) and test.task_names() == ["Oriya", "Tengwar"]
    first, second = (train.episodes(generator=seeded(s)) for s in (0, 1))
    assert first.num_tasks == 3 and not torch.equal(first.support.x, second.support.x)
    classes = train.sample_tasks(3, generator=seeded())["classes"]
    assert sorted(train.group_names[k] for k in classes[:, 0].tolist()) == ["Greek", "Korean", "Latin"]


# --- what may be wrong


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}: expected images_background.zip and images_evaluation.zip")):
        Omniglot(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is nothing"):
        Omniglot(tmp_path / "none")
    with pytest.raises(ValueError, match="size: expected a number of pixels, got 0"):
        Omniglot(tmp_path, size=0)


def test_broken_files_are_named(zips):
    file = zips / "images_evaluation.zip"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    message = f"{file}: expected a zip file, got {len(whole) // 2} bytes that are not one"
    with pytest.raises(ValueError, match=re.escape(message)):
        Omniglot(zips)
    middle = whole.index(b"PNG", len(whole) // 3)
    file.write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    with pytest.raises(ValueError, match=re.escape(f"{file}: images_evaluation/") + r"\S+\.png: expected an image, got"):
        Omniglot(zips)
    (zips / "omniglot28.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=re.escape(f"{zips / 'omniglot28.npz'}: expected an npz file of arrays")):
        Omniglot(zips)


def with_image(folder, root, data):
    shutil.copytree(folder / "images_background" / "Greek", root / "images_background" / "Greek")
    file = sorted((root / "images_background" / "Greek" / "character02").iterdir())[2]
    file.write_bytes(data)
    return file


def test_a_broken_or_other_image_in_a_folder_is_named(folder, tmp_path):
    file = with_image(folder, tmp_path, b"no image")
    with pytest.raises(ValueError, match=re.escape(f"{file}: expected an image, got 8 bytes that cannot be read as one")):
        Omniglot(tmp_path)
    other = io.BytesIO()
    Image.new("1", (50, 60)).save(other, "png")
    file.write_bytes(other.getvalue())
    with pytest.raises(ValueError, match=re.escape(f"{file}: expected 105 x 105 pixels as in ") + r".*, got 60 x 50"):
        Omniglot(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="Omniglot: class 'Greek/character02' has 4 images for support and query: expected at least 5"):
        Omniglot(tmp_path, test_shots=4)


def test_npz_of_another_shape(tmp_path):
    arrays = {"part": ["images_background"], "alphabet": ["Greek"], "character": ["character01"]}
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 28, 28), np.uint8), **arrays)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a.npz'}: images: expected uint8 (classes, drawers, height, width), got")):
        Omniglot(tmp_path)


def test_a_download_that_is_not_the_original_is_not_kept(tmp_path, monkeypatch):
    served = tmp_path / "server"
    served.mkdir()
    (served / "images_background.zip").write_bytes(b"something else")
    monkeypatch.setattr(omniglot, "URL", f"{served.as_uri()}/")
    with pytest.raises(ValueError, match=r"images_background\.zip: expected a file with MD5 68d2efa1b9178cc56df9314c21c6e718, got 14"):
        Omniglot(tmp_path / "here", download=True)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_download_is_kept_and_not_repeated(zips, tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(omniglot, "URL", f"{zips.as_uri()}/")
    monkeypatch.setattr(omniglot, "MD5", {part: hashlib.md5((zips / f"{part}.zip").read_bytes()).hexdigest() for part in SIZES})
    here = tmp_path / "here"
    assert same(Omniglot(here, download=True, **SMALL), Omniglot(zips, **SMALL))
    monkeypatch.setattr(omniglot, "URL", "file:///nowhere/")
    assert Omniglot(here, download=True, **SMALL).num_classes == 25
    assert sorted(p.name for p in here.iterdir()) == ["images_background.zip", "images_evaluation.zip"]


# --- the real data


@real
def test_the_real_classes_and_splits():
    tasks = Omniglot(ROOT)
    assert tasks.num_classes == 1623 and len(set(tasks.group_names)) == 50
    assert (tasks.split("train").num_classes, tasks.split("test").num_classes) == (964, 659)
    sizes = {name: Omniglot(ROOT, splits="vinyals", rotations=True).split(name).num_classes for name in ("train", "val", "test")}
    assert sizes == {"train": 4112, "val": 688, "test": 1692}
    small = Omniglot.small(ROOT)
    assert (small.split("train").num_tasks, small.split("test").num_tasks) == (30, 20)
    assert small.split("test").sample(20, generator=seeded()).support.x.shape == (20, 25, 1, 28, 28)
    inked = tasks.sample(50, generator=seeded()).query.x.mean().item()
    assert 0.05 < inked < 0.12  # ink, not ground, is 1


@real
def test_every_real_image_is_of_the_class_that_its_label_says():
    """Each image of an episode is looked up in the file itself, turned by numpy."""
    arrays = np.load(ROOT / "omniglot28.npz")
    whole = {}
    for k, (alphabet, character, drawn) in enumerate(zip(arrays["alphabet"], arrays["character"], arrays["images"], strict=True)):
        if arrays["part"][k] == "images_evaluation":
            for turn in range(4):
                for image in np.rot90(drawn, turn, (1, 2)):
                    whole.setdefault(image.tobytes(), set()).add(f"{alphabet}/{character}/rot{90 * turn:03d}")
    tasks = Omniglot(ROOT, rotations=True, ways=20, shots=(1, 5)).split("test")
    episode, classes = tasks.sample(6, generator=seeded(2)), tasks.sample_tasks(6, generator=seeded(2))["classes"]
    for points in episode:
        pixels = (points.x * 255).round().to(torch.uint8).numpy()
        for task, point in points.mask.nonzero().tolist():
            name = tasks.class_names[classes[task, points.y[task, point]]]
            assert name in whole[pixels[task, point].tobytes()]


@real
@pytest.mark.slow
def test_the_real_zips_give_the_same_images_as_the_npz(tmp_path):
    for part in SIZES:
        (tmp_path / f"{part}.zip").symlink_to(ROOT / f"{part}.zip")
    zipped, packed = Omniglot(tmp_path), Omniglot(ROOT)
    assert zipped.class_names == packed.class_names
    assert all(torch.equal(zipped.images(name), packed.images(name)) for name in zipped.class_names)
