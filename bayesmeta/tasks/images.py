"""Labelled images out of arrays, datasets, folders and npz files, checked one by one; every complaint says which image or class."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bayesmeta.tasks.tables import did_you_mean

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "CMYK": "RGB", "LA": "RGBA", "RGBA": "RGBA"}


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """``M`` images of one size, of ``K`` classes.

    ================= ========= ==================================================================================
    field             shape
    ================= ========= ==================================================================================
    images            (M, C, H, W) uint8, 0 … 255
    labels            (M,)      int64, the class of each image
    names             K         of the classes
    groups            K         the group that each class is of (an alphabet, say); None: there are none
    sources           (M,)      int64, who or what an image came from (a drawer, a typeface); None: not known
    source                      what it was read from, for messages
    ================= ========= ==================================================================================
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    sources: Tensor | None = None
    source: str = "images"


def of_arrays(
    images: Any, labels: Any, *, groups: Mapping[Any, str] | None = None, sources: Any = None, source: str = "images"
) -> ImageSet:
    """From ``images (M, H, W)`` or ``(M, C, H, W)``, uint8, bool or floats in [0, 1], and ``labels (M,)``, integers or names.

    ``groups``: the group of each class. ``sources (M,)``: integers. Raises ValueError or TypeError where they are anything else.
    """
    pixels, codes = _pixels_of_array(images, source), _array(labels)
    if codes.dtype.kind not in "iuU":
        some = f", such as {codes.flat[0]}" if codes.size else ""
        raise TypeError(f"{source}: labels: expected integers, or names of classes, got {codes.dtype}{some}")
    if codes.shape != pixels.shape[:1]:
        raise ValueError(f"{source}: labels: expected one for each of {len(pixels)} images, got shape {codes.shape}")
    kinds, label = np.unique(codes, return_inverse=True)
    names = tuple(str(kind) for kind in kinds.tolist())
    return ImageSet(
        images=pixels, labels=torch.from_numpy(label.astype(np.int64)), names=names, groups=_groups_of(names, groups, source),
        sources=None if sources is None else _sources_of(sources, len(pixels), source), source=source,
    )  # fmt: skip


def read_dataset(dataset: Any, *, source: str = "dataset") -> ImageSet:
    """From anything with ``len(dataset)`` and ``dataset[i] -> (image, label)``, such as torchvision's datasets.

    An image is a PIL image, a tensor ``(C, H, W)`` or ``(H, W)``, or an array ``(H, W)`` or ``(H, W, C)``; its values as in `of_arrays`.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"{source}: expected len(dataset) and dataset[i] -> (image, label), got {type(dataset).__name__}")
    pixels: list[np.ndarray] = []
    labels: list[int | str] = []
    for i in range(len(dataset)):
        item = dataset[i]
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise TypeError(f"{source}, item {i}: expected (image, label), got {type(item).__name__}")
        image, label = item
        pixels.append(_alike(_pixels_of_item(image, f"{source}, item {i}"), pixels, f"{source}, item {i}", "item 0"))
        labels.append(_label_of_item(label, f"{source}, item {i}"))
    if not pixels:
        raise ValueError(f"{source}: expected images, got none")
    if len({type(label) for label in labels}) > 1:
        raise TypeError(f"{source}: labels: expected all integers or all names, got both")
    return of_arrays(np.stack(pixels), np.array(labels), source=source)


def read_folder(root: str | os.PathLike[str], *, size: int | tuple[int, int] | None = None, channels: int | None = None) -> ImageSet:
    """From a folder with one folder a class, whose images are its files; names of classes are the folders'.

    ``size``: height and width that all are resized to (bilinear). ``channels``: 1 (grey) or 3 (colour), that all are turned into.
    Raises ValueError naming the file that cannot be read or has another size or number of channels than the first, or the folder
    without images; FileNotFoundError where there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder with one folder of images for each class, got {_what_is(root)}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(f"{root}: expected one folder of images for each class, got a folder without folders")
    pixels: list[np.ndarray] = []
    labels, first = [], ""
    for folder in folders:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not paths:
            raise ValueError(f"{folder}: class {folder.name!r} is empty: expected images ({', '.join(sorted(SUFFIXES))}), got none")
        for path in paths:
            image = opened(path.read_bytes(), str(path))
            image = image if channels is None else image.convert("L" if channels == 1 else "RGB")
            here = _pixels_of_item(image, str(path), size)
            first = first or str(path)
            pixels.append(_alike(here, pixels, str(path), first, "size= and channels= make them alike"))
        labels += [folder.name] * len(paths)
    return of_arrays(np.stack(pixels), np.array(labels), source=str(root))


def read_npz(path: str | os.PathLike[str], *, images: str = "images", labels: str = "labels") -> ImageSet:
    """From two arrays of an npz file, by name; their shapes as in `of_arrays`.

    Raises ValueError where it is no such file or lacks an array, FileNotFoundError where there is none.
    """
    arrays = load_npz(Path(path))
    for name in (images, labels):
        if name not in arrays:
            raise ValueError(f"{path}: no array {name!r}{did_you_mean(name, arrays)} (arrays: {', '.join(arrays)})")
    return of_arrays(arrays[images], arrays[labels], source=str(path))


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file. Raises as `read_npz`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an npz file, got {_what_is(path)}")
    try:
        with path.open("rb") as stream:  # which numpy leaves open where it finds something else
            arrays = np.load(stream)
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an npz file of arrays: {error}") from error


def opened(data: bytes, where: str) -> Image.Image:
    """The image in the bytes of a file. Raises ValueError naming ``where`` they come from, where they are no whole image."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        what = "an empty file" if not data else f"{len(data)} bytes that cannot be read as one ({type(error).__name__})"
        raise ValueError(f"{where}: expected an image, got {what}") from error
    return image


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """To height and width ``size``, bilinear over all pixels that a new one covers."""
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)


def _pixels_of_array(images: Any, source: str) -> Tensor:
    """uint8 ``(M, C, H, W)``."""
    array = torch.from_numpy(np.ascontiguousarray(_array(images))) if not isinstance(images, Tensor) else images.detach().cpu()
    if array.dim() == 3:
        array = array[:, None]
    if array.dim() != 4 or not 1 <= array.shape[1] <= 4:
        hint = "; channels come before height and width" if array.dim() == 4 and 1 <= array.shape[-1] <= 4 else ""
        raise ValueError(f"{source}: expected images (M, H, W) or (M, C, H, W) with 1 to 4 channels, got {tuple(array.shape)}{hint}")
    if 0 in array.shape:
        raise ValueError(f"{source}: expected images with pixels, got shape {tuple(array.shape)}")
    return _bytes(array, source)


def _bytes(array: Tensor, where: str) -> Tensor:
    if array.dtype == torch.uint8:
        return array
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    if not array.is_floating_point():
        raise TypeError(f"{where}: expected uint8 (0 to 255), bool, or floats in [0, 1], got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{where}: expected floats in [0, 1], or uint8, got values from {low:g} to {high:g}")
    return (array * 255).round().to(torch.uint8)


def _pixels_of_item(image: Any, where: str, size: int | tuple[int, int] | None = None) -> np.ndarray:
    """uint8 ``(C, H, W)``."""
    if isinstance(image, Image.Image):
        if image.mode not in MODES:
            raise ValueError(f"{where}: expected 8 bits a channel (modes {', '.join(MODES)}), got mode {image.mode!r}")
        image = image if image.mode == MODES[image.mode] else image.convert(MODES[image.mode])
        image = image if size is None else resized(image, (size, size) if isinstance(size, int) else size)
        image = np.asarray(image)
    channels_last = not isinstance(image, Tensor)
    array = torch.from_numpy(np.array(image)) if channels_last else image.detach().cpu()
    if array.dim() == 2:
        array = array[None]
    elif array.dim() == 3 and channels_last:
        array = array.movedim(-1, 0)
    if array.dim() != 3 or not 1 <= array.shape[0] <= 4:
        wanted = "(H, W) or (H, W, C)" if channels_last else "(H, W) or (C, H, W)"
        raise ValueError(f"{where}: expected an image {wanted} with 1 to 4 channels, got shape {tuple(image.shape)}")
    return _bytes(array, where).numpy()


def _alike(pixels: np.ndarray, before: list[np.ndarray], where: str, first: str, remedy: str = "") -> np.ndarray:
    if before and pixels.shape != before[0].shape:
        shapes = [f"{c} channel{'s' * (c > 1)} of {h} x {w} pixels" for c, h, w in (before[0].shape, pixels.shape)]
        raise ValueError(f"{where}: expected {shapes[0]} as in {first}, got {shapes[1]}{remedy and f' ({remedy})'}")
    return pixels


def _label_of_item(label: Any, where: str) -> int | str:
    if isinstance(label, Tensor) and label.dim() == 0 and not label.is_floating_point():
        label = label.item()
    if isinstance(label, str):
        return label
    if not isinstance(label, Integral):
        raise TypeError(f"{where}: label: expected an integer, or the name of a class, got {type(label).__name__} {label!r}")
    return int(label)


def _groups_of(names: tuple[str, ...], groups: Mapping[Any, str] | None, source: str) -> tuple[str, ...] | None:
    if groups is None:
        return None
    by_name = {str(key): str(group) for key, group in groups.items()}
    for name in names:
        if name not in by_name:
            raise ValueError(f"{source}: groups: expected the group of every class, got none for class {name!r}")
    return tuple(by_name[name] for name in names)


def _sources_of(sources: Any, number: int, source: str) -> Tensor:
    codes = _array(sources)
    if codes.dtype.kind not in "iu" or codes.shape != (number,):
        raise ValueError(f"{source}: sources: expected {number} integers, one an image, got {codes.dtype} {codes.shape}")
    return torch.from_numpy(codes.astype(np.int64))


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _what_is(path: Path) -> str:
    return "a file" if path.is_file() else "a folder" if path.is_dir() else "nothing there"
