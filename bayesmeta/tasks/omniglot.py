"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people (Lake, Salakhutdinov & Tenenbaum 2015)."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Unpack, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bayesmeta.tasks.base import Size
from bayesmeta.tasks.image_tasks import AbstractFewShot, FewShotOptions
from bayesmeta.tasks.images import ImageSet, load_npz, opened, resized
from bayesmeta.tasks.splits import NONE, SPLITS, Splits, by_fractions, by_names, checked_fractions

VARIABLE = "BAYESMETA_DATA"
PARTS = ("images_background", "images_evaluation")
URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
MD5 = {"images_background": "68d2efa1b9178cc56df9314c21c6e718", "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811"}
DRAWING = re.compile(r"(?:.*/)?(images_background|images_evaluation)/([^/]+)/(character\d+)/(\d+)_(\d+)\.png")
LARGEST_DOWNLOAD = 2**26


@final
class Omniglot(AbstractFewShot):
    """Few-shot tasks from Omniglot, ink 1 on ground 0, ``(T, N, 1, 28, 28)``; options as in `AbstractFewShot`.

    ============ =====================================================================================================
    argument
    ============ =====================================================================================================
    root         where the data are: a folder with the two original zips, with the folders in them, or with an npz of all images
                 at 28 x 28; or one of these. Told by what is in them. None: the folder that the environment variable
                 BAYESMETA_DATA names, or "omniglot" in it
    splits       "lake": the 30 alphabets of images_background to train on, the 20 of images_evaluation to test on, none to validate.
                 "vinyals": 1,028, 172 and 423 characters (Vinyals et al. 2016), from the files train.txt, val.txt and test.txt
                 of a folder "splits" beside the data; or the path of a folder with these files. Three fractions of the
                 characters; or lists of characters ("Greek/character01") or of whole alphabets by split
    rotations    True: each character turned by 90, 180 and 270 degrees anticlockwise is a class of its own, in the same split
    size         height and width, 28 as usual, or 105 as drawn; bilinear, from the drawings
    download     True: fetches the original zips (14 MB) into ``root`` where they are missing, and checks their MD5 sums
    ============ =====================================================================================================

    Groups are alphabets, each with its own rotations apart: ``within_groups=True`` makes tasks within an alphabet. Sources are the
    drawers 1 … 20 of each alphabet, who are others in another one: ``across_sources(range(1, 11), range(11, 21))``.

    Raises FileNotFoundError saying what was looked for where there are no data, ValueError naming the file where one is broken.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        splits: Splits | str | os.PathLike[str] = "lake",
        rotations: bool = False,
        size: int = 28,
        download: bool = False,
        **options: Unpack[FewShotOptions],
    ) -> None:
        drawings = _drawings(root, size, download)
        split = _split_of(drawings, splits, options.get("seed", 0))
        data, split = (_turned(drawings), split.repeat(4)) if rotations else (drawings.data, split)
        super().__init__(data, split, **options)

    @classmethod
    def small(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        ways: int = 5,
        shots: Size = 5,
        test_shots: Size = 15,
        seed: int = 0,
        size: int = 28,
        transform: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Omniglot:
        """Few tasks, one for each alphabet, of 5 of its characters: 30 to train on and 20 to test on (Rothfuss et al. 2021).

        ``seed`` draws the characters; ``transform`` as in `AbstractFewShot`. No rotations, and no task across alphabets.
        """
        drawings = _drawings(root, size, False)
        family = cls.__new__(cls)
        AbstractFewShot.__init__(
            family, drawings.data, _split_of(drawings, "lake", seed), ways=ways, shots=shots, test_shots=test_shots, seed=seed,
            one_task_per_group=True, transform=transform, dtype=dtype,
        )  # fmt: skip
        return family


@final
@dataclass(frozen=True, eq=False)
class _Drawings:
    """The images, the part of each class, and the folder they were found in."""

    data: ImageSet
    parts: tuple[str, ...]
    folder: Path


# --- finding and reading


def _drawings(root: str | os.PathLike[str] | None, size: int, download: bool) -> _Drawings:
    if not (isinstance(size, int) and size >= 1):
        raise ValueError(f"size: expected a number of pixels, got {size!r}")
    if root is None and not os.environ.get(VARIABLE):
        raise FileNotFoundError(f"Omniglot: expected root=, or a folder of data in the environment variable {VARIABLE}, got neither")
    base = Path(root if root is not None else os.environ[VARIABLE])
    if download:
        _download(base)
    places = [base, base / "omniglot", base / "omniglot" / "python", base / "python", base / "omniglot-py"]
    for folder in places:
        if files := _files(folder, size):
            return _read(tuple(files), tuple(_stamp(file) for file in files), size, folder if folder.is_dir() else folder.parent)
    raise FileNotFoundError(
        f"{base}: expected {PARTS[0]}.zip and {PARTS[1]}.zip, folders of these names, or an npz with images, part, alphabet and character; "
        + (f"found none of them there or in {', '.join(p.name for p in places[1:4:2])}" if base.exists() else "there is nothing")
    )


def _files(place: Path, size: int) -> list[Path]:
    """What to read: an npz of that size, or for each part a folder or a zip."""
    inside = sorted(place.iterdir()) if place.is_dir() else [place] if place.is_file() else []
    for file in inside:
        if file.suffix == ".npz" and _pixels_of_npz(file, _stamp(file)) == (size, size):
            return [file]
    if place.is_dir() and place.name in PARTS:
        return [place]
    found = {file.name: file for file in inside if file.name in PARTS and file.is_dir()}
    for file in (file for file in inside if file.suffix == ".zip"):
        for part in _parts_of_zip(file):
            found.setdefault(part, file)
    return list(dict.fromkeys(found[part] for part in PARTS if part in found))


@lru_cache(maxsize=8)
def _pixels_of_npz(file: Path, stamp: float) -> tuple[int, ...]:
    """Height and width of the images in an npz of Omniglot; () where it is one of something else."""
    arrays = load_npz(file)
    return arrays["images"].shape[2:] if {"images", "part", "alphabet", "character"} <= set(arrays) else ()


def _parts_of_zip(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return sorted({match[1] for name in archive.namelist() if (match := DRAWING.fullmatch(name))})
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file}: expected a zip file, got {file.stat().st_size} bytes that are not one ({error})") from error


def _stamp(file: Path) -> float:
    """When a file, or anything in a folder, was last changed."""
    return max(path.stat().st_mtime for path in (file, *file.rglob("*"))) if file.is_dir() else file.stat().st_mtime


@lru_cache(maxsize=2)
def _read(files: tuple[Path, ...], stamps: tuple[float, ...], size: int, folder: Path) -> _Drawings:
    """The images in some files, kept for the next call."""
    if files[0].suffix == ".npz":
        return _read_npz(files[0], folder)
    pixels: list[np.ndarray] = []
    classes: dict[tuple[str, str, str], int] = {}
    labels, drawers, first = [], [], ("", (0, 0))
    for file in files:
        for where, name, data in _members(file):
            match = DRAWING.fullmatch(name)
            if match is None:
                continue
            part, alphabet, character, _, drawer = match.groups()
            image = opened(data, where)
            first = first if first[0] else (where, image.size)
            if image.size != first[1]:
                (w, h), (w0, h0) = image.size, first[1]
                raise ValueError(f"{where}: expected {h0} x {w0} pixels as in {first[0]}, got {h} x {w}")
            pixels.append(255 - np.asarray(_resized(image, size)))
            labels.append(classes.setdefault((part, alphabet, character), len(classes)))
            drawers.append(int(drawer))
    return _of(np.stack(pixels)[:, None], np.array(labels), np.array(drawers), list(classes), folder)


def _resized(image: Image.Image, size: int) -> Image.Image:
    return resized(image.convert("L"), (size, size))


def _members(file: Path) -> Iterator[tuple[str, str, bytes]]:
    """Where each image is, its path from the part on, and its bytes; in order of the paths."""
    if file.is_dir():
        for path in sorted(file.glob("*/*/*.png")):
            yield str(path), path.relative_to(file.parent).as_posix(), path.read_bytes()
        return
    with zipfile.ZipFile(file) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".png"):
                try:
                    data = archive.read(name)
                except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
                    raise ValueError(f"{file}: {name}: expected an image, got a part of the zip file that is broken ({error})") from error
                yield f"{file}: {name}", name, data


def _read_npz(file: Path, folder: Path) -> _Drawings:
    arrays = load_npz(file)
    images = arrays["images"]
    if images.ndim != 4 or images.dtype != np.uint8 or any(arrays[k].shape != images.shape[:1] for k in ("part", "alphabet", "character")):
        raise ValueError(f"{file}: images: expected uint8 (classes, drawers, height, width), got {images.dtype} {images.shape}")
    number, drawers = images.shape[:2]
    classes = list(zip(*(arrays[k].tolist() for k in ("part", "alphabet", "character")), strict=True))
    label, drawer = np.repeat(np.arange(number), drawers), np.tile(np.arange(1, drawers + 1), number)
    return _of(images.reshape(-1, 1, *images.shape[2:]), label, drawer, classes, folder)


def _of(pixels: np.ndarray, labels: np.ndarray, drawers: np.ndarray, classes: list[tuple[str, str, str]], folder: Path) -> _Drawings:
    data = ImageSet(
        images=torch.from_numpy(pixels), labels=torch.from_numpy(labels).long(), sources=torch.from_numpy(drawers).long(),
        names=tuple(f"{alphabet}/{character}" for _, alphabet, character in classes), groups=tuple(a for _, a, _ in classes),
        source="Omniglot",
    )  # fmt: skip
    return _Drawings(data, tuple(part for part, _, _ in classes), folder)


# --- classes and splits


@lru_cache(maxsize=1)
def _turned(drawings: _Drawings) -> ImageSet:
    """Four classes of each: all characters as drawn, then all turned by 90, 180 and 270 degrees anticlockwise."""
    d, angles = drawings.data, ("rot000", "rot090", "rot180", "rot270")
    assert d.groups is not None and d.sources is not None
    return replace(
        d, images=torch.cat([torch.rot90(d.images, k, (-2, -1)) for k in range(4)]),
        labels=torch.cat([d.labels + k * len(d.names) for k in range(4)]), sources=d.sources.repeat(4),
        names=tuple(f"{name}/{angle}" for angle in angles for name in d.names),
        groups=tuple(f"{group}/{angle}" for angle in angles for group in d.groups),
    )  # fmt: skip


def _split_of(drawings: _Drawings, splits: Splits | str | os.PathLike[str], seed: int) -> Tensor:
    data = drawings.data
    if isinstance(splits, Mapping):
        return by_names(splits, data.names, data.groups)
    if isinstance(splits, tuple | list):
        return by_fractions(len(data.names), checked_fractions(splits), seed)
    if splits == "lake":
        return torch.tensor([{PARTS[0]: 0, PARTS[1]: 2}.get(part, NONE) for part in drawings.parts])
    folder = drawings.folder / "splits" if splits == "vinyals" else Path(splits)
    listed = {name: _listed(folder / f"{name}.txt") for name in SPLITS}
    return by_names(listed, data.names, where=str(folder))


def _listed(file: Path) -> list[str]:
    """The characters of a split file, one ``Alphabet/characterNN/rotDDD`` a line."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: expected the characters of a split, got nothing there; splits: 'lake' needs no files, 'vinyals' those of a folder "
            "'splits' beside the data, any other text is the path of a folder with train.txt, val.txt and test.txt"
        )
    lines = file.read_text(encoding="utf-8").split()
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"[^/]+/character\d+(/rot\d+)?", line):
            raise ValueError(f"{file}, line {number}: expected Alphabet/characterNN/rotDDD, got {line!r}")
    return list(dict.fromkeys("/".join(line.split("/")[:2]) for line in lines))


def _download(root: Path) -> None:
    """The two original zips, those that are not there. Raises ValueError where what comes is not the original."""
    root.mkdir(parents=True, exist_ok=True)
    for part, md5 in MD5.items():
        file = root / f"{part}.zip"
        if file.exists() or (root / part).is_dir():
            continue
        with urllib.request.urlopen(f"{URL}{part}.zip") as response:
            data = response.read(LARGEST_DOWNLOAD)
        got = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if got != md5:
            raise ValueError(f"{URL}{part}.zip: expected a file with MD5 {md5}, got {len(data)} bytes with {got}; nothing was kept")
        partial = file.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(file)
