"""Few-shot tasks from any labelled images: arrays, a dataset, a folder or an npz file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Unpack, final

from torch import Tensor

from bayesmeta.tasks.image_tasks import AbstractFewShot, FewShotOptions
from bayesmeta.tasks.images import ImageSet, of_arrays, read_dataset, read_folder, read_npz
from bayesmeta.tasks.splits import Splits, by_fractions, by_names, checked_fractions

FRACTIONS = (0.6, 0.2, 0.2)


@final
class FewShot(AbstractFewShot):
    """Few-shot tasks from any labelled images: ``FewShot(images, labels)``, `from_dataset`, `from_folder`, `from_npz`.

    ``images (M, H, W)`` or ``(M, C, H, W)``: uint8, bool, or floats in [0, 1], which are held in steps of 1/255. ``labels (M,)``:
    integers, or names. ``splits``: three fractions of the classes for "train", "val" and "test", drawn by ``seed``; or lists of classes
    (or of groups) by split, ``{"train": [...], "test": [...]}``, classes of no list being left out. ``groups``: the group of each class,
    ``{class: group}``. ``sources (M,)``: integers that say where an image is from, for `across_sources`. The other options are those of
    `AbstractFewShot`.

    Raises ValueError or TypeError, naming the image or class, where data are not as they should be.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        *,
        splits: Splits = FRACTIONS,
        groups: Mapping[Any, str] | None = None,
        sources: Any = None,
        **options: Unpack[FewShotOptions],
    ) -> None:
        data = of_arrays(images, labels, groups=groups, sources=sources)
        super().__init__(data, _splits_of(data, splits, options), **options)

    @classmethod
    def from_dataset(cls, dataset: Any, *, splits: Splits = FRACTIONS, **options: Unpack[FewShotOptions]) -> FewShot:
        """From ``dataset[i] -> (image, label)``, read once: PIL images, arrays or tensors ``(C, H, W)``; labels integers or names."""
        return cls._of(read_dataset(dataset), splits, options)

    @classmethod
    def from_folder(
        cls,
        root: str | os.PathLike[str],
        *,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        splits: Splits = FRACTIONS,
        **options: Unpack[FewShotOptions],
    ) -> FewShot:
        """From a folder with one folder of images for each class, named by it.

        ``size``: height and width to resize to; ``channels``: 1 (grey) or 3 (colour). Without them all images must be alike. Raises
        ValueError naming the file that is broken or unlike the first, or the class without images.
        """
        return cls._of(read_folder(root, size=size, channels=channels), splits, options)

    @classmethod
    def from_npz(
        cls,
        path: str | os.PathLike[str],
        *,
        images: str = "images",
        labels: str = "labels",
        splits: Splits = FRACTIONS,
        **options: Unpack[FewShotOptions],
    ) -> FewShot:
        """From two arrays of an npz file, called ``images`` and ``labels`` in it."""
        return cls._of(read_npz(path, images=images, labels=labels), splits, options)

    @classmethod
    def _of(cls, data: ImageSet, splits: Splits, options: FewShotOptions) -> FewShot:
        family = cls.__new__(cls)
        AbstractFewShot.__init__(family, data, _splits_of(data, splits, options), **options)
        return family


def _splits_of(data: ImageSet, splits: Splits, options: FewShotOptions) -> Tensor:
    if isinstance(splits, Mapping):
        return by_names(splits, data.names, data.groups)
    return by_fractions(len(data.names), checked_fractions(splits), options.get("seed", 0))
