"""What is wrong with images or options is said, with the file or class, what was expected and what was got."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from bayesmeta.tasks import FewShot

IMAGES, LABELS = torch.zeros(60, 1, 4, 4, dtype=torch.uint8), torch.arange(3).repeat_interleave(20)


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (IMAGES, LABELS.float(), TypeError, "images: labels: expected integers, or names of classes, got float32, such as 0.0"),
        (IMAGES, LABELS[:5], ValueError, r"labels: expected one for each of 60 images, got shape \(5,\)"),
        (torch.zeros(60, 5, 6, 3), LABELS, ValueError,
         r"1 to 4 channels, got \(60, 5, 6, 3\); channels come before height"),
        (torch.zeros(60, 7, 4, 9), LABELS, ValueError, r"expected images \(M, H, W\) or \(M, C, H, W\) with 1 to 4 channels, got \(60, 7"),
        (torch.zeros(60, 16), LABELS, ValueError, r"expected images \(M, H, W\) .* got \(60, 16\)"),
        (IMAGES[:0], LABELS[:0], ValueError, r"expected images with pixels, got shape \(0, 1, 4, 4\)"),
        (IMAGES.float() - 1, LABELS, ValueError, r"expected floats in \[0, 1\], or uint8, got values from -1 to -1"),
        (IMAGES.float() + torch.nan, LABELS, ValueError, "got values from nan to nan"),
        (IMAGES.int(), LABELS, TypeError, r"expected uint8 \(0 to 255\), bool, or floats in \[0, 1\], got torch.int32"),
    ],
)  # fmt: skip
def test_arrays(images, labels, error, message):
    with pytest.raises(error, match=message):
        FewShot(images, labels, ways=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "ways: expected at least 2 classes, got 1"),
        ({"ways": 2.5}, "ways: expected at least 2 classes, got 2.5"),
        ({"ways": 4}, "images has 3 classes: expected at least ways=4"),
        ({"shots": -1}, "shots: expected a number of points"),
        ({"shots": (3, 1)}, "shots: expected a number of points"),
        ({"test_shots": (0, 2)}, "test_shots: expected at least 1 of each class"),
        ({"num_tasks": 0}, r"num_tasks: expected None \(endless\) or at least 1, got 0"),
        ({"shots": (1, 6)}, r"class '0' has 20 images for support and query: expected at least 21 \(shots=\(1, 6\), test_shots=15\)"),
        ({"meta_train": True, "meta_test": True}, "at most one of meta_train, meta_val and meta_test to be True, got 2"),
        ({"meta_val": True}, "split: 'val' has 0 classes: expected at least ways=2"),
        ({"splits": (0.5, 0.5, 0.5)}, "fractions: expected three numbers >= 0 that sum to 1"),
        ({"splits": {"training": [0]}}, r"splits: expected one of \('train', 'val', 'test'\) .*, got 'training'"),
        ({"splits": {"train": [0, 3]}}, r"splits\['train'\]: no class '3'"),
        ({"splits": {"train": [0, 1], "test": [1, 2]}}, "splits: class '1' is in 'train' and in 'test'"),
        ({"splits": {}}, "splits: expected classes in 'train', 'val' or 'test', got none"),
        ({"groups": {0: "a", 1: "a"}}, "groups: expected the group of every class, got none for class '2'"),
        ({"sources": [1, 2]}, "sources: expected 60 integers, one an image"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        FewShot(IMAGES, LABELS, **{"ways": 2, **options})


def test_a_list_of_classes_is_no_text():
    with pytest.raises(TypeError, match=r"splits\['train'\]: expected a list of classes, got the text 'abc'"):
        FewShot(IMAGES, LABELS, ways=2, splits={"train": "abc"})


def test_splits_and_names():
    tasks = FewShot(IMAGES, LABELS, ways=2)
    with pytest.raises(ValueError, match="split: expected one of"):
        tasks.split("other")
    with pytest.raises(ValueError, match="split: this family is the 'train' split already"):
        tasks.split("train").split("train")
    with pytest.raises(ValueError, match="no class '7' among 3 classes"):
        tasks.images(7)
    with pytest.raises(ValueError, match="images has no groups of classes"):
        _ = tasks.group_names


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match=r"class '2' has 7 images for support and query: expected at least 16 \(shots=1, test_shots=15\)"):
        FewShot(IMAGES[:47], LABELS[:47], ways=2)
    assert FewShot(IMAGES[:47], LABELS[:47], ways=2, splits={"train": [0, 1]}).num_classes == 2  # unless it is left out


PICTURE = Image.new("L", (5, 4))


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "dataset: expected images, got none"),
        (3, TypeError, "expected len"),
        ([(PICTURE, 0), PICTURE], TypeError, r"dataset, item 1: expected \(image, label\), got Image"),
        ([(PICTURE, 0), (PICTURE, 0.5)], TypeError, "dataset, item 1: label: expected an integer, or the name of a class, got float 0.5"),
        ([(PICTURE, torch.tensor(1.0))], TypeError, "item 0: label: expected an integer"),
        ([(PICTURE, 0), (PICTURE, "a")], TypeError, "labels: expected all integers or all names, got both"),
        ([(PICTURE, 0), (Image.new("L", (4, 5)), 0)], ValueError,
         "dataset, item 1: expected 1 channel of 4 x 5 pixels as in item 0, got 1 channel of 5 x 4"),
        ([(PICTURE, 0), (Image.new("RGB", (5, 4)), 0)], ValueError, "item 1: expected 1 channel of 4 x 5 .* got 3 channels of 4 x 5"),
        ([(Image.new("I", (5, 4)), 0)], ValueError, "item 0: expected 8 bits a channel .* got mode 'I'"),
        ([(torch.zeros(4, 5, 3), 0), (torch.zeros(9, 5, 3), 0)], ValueError, r"item 1: expected an image \(H, W\) or \(C, H, W\) with"),
        ([(np.zeros((4, 5, 9)), 0)], ValueError, r"item 0: expected an image \(H, W\) or \(H, W, C\) with 1 to 4 channels, got shape"),
        ([(np.full((4, 5), 9.0), 0)], ValueError, r"item 0: expected floats in \[0, 1\], or uint8, got values from 9 to 9"),
    ],
)  # fmt: skip
def test_datasets(dataset, error, message):
    with pytest.raises(error, match=message):
        FewShot.from_dataset(dataset)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            PICTURE.save(tmp_path / name / f"{i}.png")
    return tmp_path


def reading(folder, **options):
    return FewShot.from_folder(folder, ways=2, test_shots=2, **options)


def test_folders(folder):
    assert reading(folder).class_names == ["cat", "dog"]
    broken = folder / "dog" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=re.escape(f"{broken}: expected an image, got {len(whole) // 2} bytes that cannot be read as one")):
        reading(folder)
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"{broken}: expected an image, got an empty file")):
        reading(folder)
    Image.new("L", (8, 9)).save(broken)
    message = f"{broken}: expected 1 channel of 4 x 5 pixels as in {folder / 'cat' / '0.png'}, got 1 channel of 9 x 8 pixels (size= and"
    with pytest.raises(ValueError, match=re.escape(message)):
        reading(folder)
    assert reading(folder, size=6).image_shape == (1, 6, 6)
    Image.new("RGB", (5, 4)).save(broken)
    with pytest.raises(ValueError, match=re.escape(f"{broken}: expected 1 channel of 4 x 5 pixels")):
        reading(folder)
    assert reading(folder, channels=3).image_shape == (3, 4, 5)
    broken.unlink()
    with pytest.raises(ValueError, match="class 'dog' has 2 images for support and query: expected at least 3"):
        reading(folder)
    (folder / "cow").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'cow'}: class 'cow' is empty: expected images (")):
        reading(folder)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / 'none'}: expected a folder with one folder of images for")):
        reading(folder / "none")
    with pytest.raises(ValueError, match="a folder without folders"):
        reading(folder / "cow")
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 2"):
        reading(folder, channels=2)


def test_npz_files(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path}: expected an npz file, got nothing there")):
        FewShot.from_npz(path)
    np.savez(path, images=np.zeros((60, 4, 4), np.uint8), label=LABELS.numpy())
    with pytest.raises(ValueError, match=re.escape(f"{path}: no array 'labels'; did you mean 'label'? (arrays: images, label)")):
        FewShot.from_npz(path)
    assert FewShot.from_npz(path, labels="label", ways=2).num_classes == 3
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected an npz file of arrays")):
        FewShot.from_npz(path)
    for content in (b"", b"PK\x03\x04", b"some text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}: expected an npz file of arrays")):
            FewShot.from_npz(path)
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected an npz file of arrays")):
        FewShot.from_npz(path)
    np.savez(path, images=np.zeros((60, 4, 4), np.uint8), labels=np.array([None] * 60))
    with pytest.raises(ValueError, match="expected an npz file of arrays: Object arrays cannot be loaded"):
        FewShot.from_npz(path)
