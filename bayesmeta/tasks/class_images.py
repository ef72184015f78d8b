"""Images by class: how many there are of each, and different ones of it drawn, as places in one tensor of them all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bayesmeta.tasks.images import ImageSet


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ClassImages:
    """``K`` classes, and where the images of each stand among ``M``.

    ================= ================ ===========================================================================
    field             shape
    ================= ================ ===========================================================================
    images            (M, C, H, W)     uint8, those of classes that were left out among them
    sources           (M,)             int64, as in `ImageSet`; None: not known
    names             K                of the classes
    groups            K                the group of each class; None: there are none
    index             (K, most)        int64, the images of each class; what stands behind ``counts`` means nothing
    counts            (K,)             int64, how many each class has
    ================= ================ ===========================================================================
    """

    images: Tensor
    sources: Tensor | None
    names: list[str]
    groups: list[str] | None
    index: Tensor
    counts: Tensor

    @property
    def real(self) -> Tensor:
        """Which entries of ``index`` are images, ``(K, most)`` bool."""
        return torch.arange(self.index.shape[1]) < self.counts[:, None]

    def select(self, classes: Tensor) -> ClassImages:
        """Only these classes, in that order; the images stay where they are."""
        chosen = classes.tolist()
        return replace(
            self, names=[self.names[k] for k in chosen], groups=self.groups and [self.groups[k] for k in chosen],
            index=self.index[classes], counts=self.counts[classes],
        )  # fmt: skip

    def of(self, name: str) -> Tensor:
        """All images of one class, ``(n, C, H, W)`` uint8. Raises ValueError where there is no such class."""
        if name not in self.names:
            raise ValueError(f"no class {name!r} among {len(self.names)} classes")
        k = self.names.index(name)
        return self.images[self.index[k, : self.counts[k]]]

    def counts_among(self, allowed: Tensor | None) -> Tensor:
        """Images of each class ``(K,)``, of those ``allowed (M,)``; None: of all."""
        if allowed is None:
            return self.counts
        return (allowed[self.index] & self.real).sum(1)

    def draw(self, classes: Tensor, number: int, allowed: Tensor | None) -> Tensor:
        """Different images of each class, ``(*classes, number)``, of those ``allowed (M,)``; None: of all."""
        index = self.index[classes]
        wrong = torch.arange(index.shape[-1]) >= self.counts[classes][..., None]
        wrong = wrong if allowed is None else wrong | ~allowed[index]
        key = torch.rand(index.shape).masked_fill_(wrong, 2.0)
        return index.gather(-1, key.topk(number, largest=False).indices)


def by_class(data: ImageSet) -> ClassImages:
    """The images of a set, found by their labels."""
    counts = torch.bincount(data.labels, minlength=len(data.names))
    index = torch.zeros(len(data.names), int(counts.max()), dtype=torch.long)
    index[torch.arange(index.shape[1]) < counts[:, None]] = data.labels.argsort(stable=True)
    return ClassImages(
        images=data.images, sources=data.sources, names=list(data.names), groups=None if data.groups is None else list(data.groups),
        index=index, counts=counts,
    )  # fmt: skip
