"""What the families of images share: a task is a few classes of an image set, a few images of each to see and others to ask."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, Self, TypedDict

import torch
from torch import Tensor

from bayesmeta.episodes import Episode, Points
from bayesmeta.randomness import rng
from bayesmeta.tasks.base import Size, check_request, check_size, choose_tasks, draw_mask
from bayesmeta.tasks.class_images import by_class
from bayesmeta.tasks.images import ImageSet
from bayesmeta.tasks.splits import NONE, SPLITS, index_of

OUTSIDE = -1  # the label of a point of no class of its episode


class FewShotOptions(TypedDict, total=False):
    """Options of every family of images, however it is made; their meanings stand with `AbstractFewShot`."""

    ways: int
    shots: Size
    test_shots: Size
    num_tasks: int | None
    within_groups: bool
    seed: int
    meta_train: bool
    meta_val: bool
    meta_test: bool
    transform: Callable[[Tensor], Tensor] | None
    target_transform: Callable[[Tensor], Tensor] | None
    dtype: torch.dtype | None


class Detection(NamedTuple):
    """Episodes with questions that none of their classes answers: does a learner know what it has not seen?

    ``support``; ``query``: the points of the episodes' classes, then as many others or more, whose y is −1; ``inside (T, N)`` bool:
    which are of the classes. With a confidence ``(T, N)`` for each, `auroc` of ``confidence`` against itself with the masks
    ``query.mask & inside`` and ``query.mask & ~inside``, in `bootstrap_statistic`, says how well it tells them apart.
    """

    support: Points
    query: Points
    inside: Tensor

    @property
    def episode(self) -> Episode:
        """The same tasks without the questions from outside: these are padding."""
        return Episode(self.support, self.query._replace(mask=self.query.mask & self.inside))


class AbstractFewShot(ABC):
    """What the families of images share: images in memory as uint8, episodes gathered by index.

    An episode's x is ``(T, N, C, H, W)`` in [0, 1], its y ``(T, N)`` int64 in 0 … ways − 1. Each task draws its classes, in random
    order: a class has another label in each task. Support and query of a task have no image in common; the points of a set stand in
    random order, the padding last.

    ====================== ==========================================================================================
    option
    ====================== ==========================================================================================
    ways=5                 classes in a task
    shots=1                support images of each class; ``(low, high)``: drawn anew for each class of each task
    test_shots=15          query images of each class, in the same way
    num_tasks=None         None: endless. Else a fixed set of so many tasks (classes with their labels), drawn by ``seed``; which
                           images are support and which query is drawn at each call
    within_groups=False    True: the classes of a task are of one group (alphabet, script), drawn evenly among the groups with
                           enough classes; the others are left out
    seed=0                 of the split by fractions, and of fixed tasks
    meta_train, meta_val,  one of them True: only that split, as `split` gives it
    meta_test
    transform              of the images of a set, ``(M, C, H, W)`` floats in [0, 1], to ``(M, *I)``, all at once (as modules do,
                           and torchvision's transforms of version 2); its draws follow the generator
    target_transform       of the labels of a set, ``(T, N)`` int64
    dtype                  of x; default torch's
    ====================== ==========================================================================================

    Splits are of classes: no class to train on is ever one to test on. `sample` with the same seed gives the same episodes, so
    evaluation on a seed is evaluation on a fixed set.

    Raises ValueError naming the class where it has too few images, and where an option is out of its range.
    """

    target_scale: ClassVar[float] = 1.0

    @abstractmethod
    def __init__(
        self,
        data: ImageSet,
        split_of: Tensor,
        *,
        ways: int = 5,
        shots: Size = 1,
        test_shots: Size = 15,
        num_tasks: int | None = None,
        one_task_per_group: bool = False,
        within_groups: bool = False,
        seed: int = 0,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        transform: Callable[[Tensor], Tensor] | None = None,
        target_transform: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (isinstance(ways, int) and ways >= 2):
            raise ValueError(f"ways: expected at least 2 classes, got {ways!r}")
        check_size("shots", shots)
        check_size("test_shots", test_shots)
        if _bounds(test_shots)[0] < 1:
            raise ValueError(f"test_shots: expected at least 1 of each class, got {test_shots}")
        if num_tasks is not None and num_tasks < 1:
            raise ValueError(f"num_tasks: expected None (endless) or at least 1, got {num_tasks}")
        if (within_groups or one_task_per_group) and data.groups is None:
            raise ValueError(f"within_groups: {data.source} has no groups of classes")
        self.ways, self.shots, self.test_shots = ways, shots, test_shots
        self.within_groups, self.one_task_per_group, self.seed = within_groups or one_task_per_group, one_task_per_group, seed
        self.transform, self.target_transform, self.dtype = transform, target_transform, dtype
        self.source = data.source
        self.part: str | None = None
        self._wanted_tasks = num_tasks
        self._support_from: Tensor | None = None  # which images may be support and which query, (M,) bool; None: all
        self._query_from: Tensor | None = None
        self._by_class, self._split_of = by_class(data), split_of
        wanted = [name for name, asked in zip(SPLITS, (meta_train, meta_val, meta_test), strict=True) if asked]
        if len(wanted) > 1:
            raise ValueError(f"expected at most one of meta_train, meta_val and meta_test to be True, got {len(wanted)}")
        if wanted:
            self._keep_split(wanted[0])
        else:
            self._keep((split_of != NONE).nonzero()[:, 0], self.source)

    # --- what there is

    @property
    def num_tasks(self) -> int | None:
        """Number of tasks of a fixed set; None where they are endless."""
        return None if self._tasks is None else len(self._tasks)

    @property
    def num_classes(self) -> int:
        """Number of classes that tasks are made of; each task has `ways`."""
        return len(self._by_class.names)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes."""
        return list(self._by_class.names)

    @property
    def group_names(self) -> list[str]:
        """The group of each class. Raises ValueError where there are no groups."""
        if self._by_class.groups is None:
            raise ValueError(f"{self.source} has no groups of classes")
        return list(self._by_class.groups)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images as they are held."""
        channels, height, width = self._by_class.images.shape[1:]
        return channels, height, width

    def images(self, name: str) -> Tensor:
        """All images of one class, ``(n, C, H, W)`` uint8."""
        return self._by_class.of(str(name))

    def split(self, name: str) -> Self:
        """The family of the classes in one split, "train", "val" (or "validation") or "test".

        Raises ValueError where there is no such split, where it has fewer classes than a task, or where this is a split already.
        """
        part = copy.copy(self)
        part._keep_split(SPLITS[index_of(name)])
        return part

    def across_sources(self, support: Iterable[int], query: Iterable[int]) -> Self:
        """The same tasks with support images from some sources and query images from others: drawers, typefaces.

        Raises ValueError where sources are not known, where one is in both lists, or where a class has too few images from them.
        """
        sources = self._by_class.sources
        if sources is None:
            raise ValueError(f"across_sources: {self.source} does not say where each image is from")
        here, there = (torch.tensor(list(listed), dtype=torch.long) for listed in (support, query))
        if both := sorted(set(here.tolist()) & set(there.tolist())):
            raise ValueError(f"across_sources: expected different sources for support and query, got {both} in both")
        part = copy.copy(self)
        part._support_from, part._query_from = torch.isin(sources, here), torch.isin(sources, there)
        part._check_counts()
        return part

    # --- tasks

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Random tasks; a fixed set gives each at most once while they last. Zeros in the padding."""
        check_request(num_tasks, generator)
        with rng(generator):
            return self._episode(self._choose(num_tasks))

    def sample_tasks(self, num_tasks: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """``classes (T, ways)`` of the tasks of `sample` from the same generator state, indices into `class_names` in order of label."""
        check_request(num_tasks, generator)
        with rng(generator):
            return {"classes": self._choose(num_tasks)}

    def episodes(self, *, generator: torch.Generator) -> Episode:
        """Every task of a fixed set once, in order; the generator draws which images are support and which query."""
        tasks = self._fixed("episodes")
        check_request(len(tasks), generator)
        with rng(generator):
            return self._episode(tasks)

    def task_names(self) -> list[str]:
        """Names of the tasks of a fixed set, in the order of `episodes`: the group's where each has one task, else all the classes'."""
        tasks = self._fixed("task_names")
        if self.one_task_per_group:
            return [self.group_names[k] for k in tasks[:, 0].tolist()]
        return [", ".join(self._by_class.names[k] for k in task) for task in tasks.tolist()]

    def detection(
        self, num_tasks: int, *, num_out: int | None = None, outside: AbstractFewShot | None = None, generator: torch.Generator
    ) -> Detection:
        """The tasks of `sample` from the same generator state, with more questions, from classes that are not in the task.

        ``num_out``: how many a task; default as many as the query set is wide. They are of as many other classes of the family as there
        are, no image twice. ``outside``: another family, whose images they are instead (say, of clothes: far from all that was seen).

        Raises ValueError where there are not enough images outside of a task, or where those of ``outside`` have another shape.
        """
        check_request(num_tasks, generator)
        if outside is not None and outside.image_shape != self.image_shape:
            raise ValueError(f"outside: expected images of shape {self.image_shape}, got {outside.image_shape}")
        with rng(generator):
            classes = self._choose(num_tasks)
            support, query = self._episode(classes)
            number = query.num_points if num_out is None else num_out
            if number < 1:
                raise ValueError(f"num_out: expected at least 1, got {num_out}")
            if outside is None:
                x = self._x(self._outsiders(classes, number))
            else:
                others = outside._by_class
                every = others.index[others.real]
                x = self._x(every[torch.randint(len(every), (num_tasks, number))], others.images)
        assert query.y is not None
        y = query.y.new_full((num_tasks, number, *query.y.shape[2:]), OUTSIDE)
        mask = torch.ones(num_tasks, number, dtype=torch.bool)
        inside = torch.cat([torch.ones_like(query.mask), torch.zeros_like(mask)], 1)
        return Detection(support, query.union(Points(x, y, mask)), inside)

    # --- helpers

    def _fixed(self, what: str) -> Tensor:
        if self._tasks is None:
            raise ValueError(f"{what}: this family is endless; give num_tasks for a fixed set of tasks")
        return self._tasks

    def _keep_split(self, name: str) -> None:
        if self.part is not None:
            raise ValueError(f"split: this family is the {self.part!r} split already")
        self._keep((self._split_of == SPLITS.index(name)).nonzero()[:, 0], f"split: {name!r}")
        self.part = name

    def _keep(self, index: Tensor, what: str) -> None:
        """Only the classes ``index``; makes the table of groups and the fixed tasks."""
        if len(index) < self.ways:
            raise ValueError(f"{what} has {len(index)} classes: expected at least ways={self.ways}")
        self._by_class, self._split_of = self._by_class.select(index), self._split_of[index]
        self._check_counts()
        self._members = torch.arange(len(index))[None]  # classes of each group, (G, most); one group where groups do not matter
        self._sizes = torch.tensor([len(index)])
        if self.within_groups:
            by_group: dict[str, list[int]] = {}
            for k, group in enumerate(self._by_class.groups or ()):
                by_group.setdefault(group, []).append(k)
            rows = [torch.tensor(row) for row in by_group.values() if len(row) >= self.ways]
            if not rows:
                most = max(map(len, by_group.values()))
                raise ValueError(f"{what}: the largest group has {most} classes: expected at least ways={self.ways}")
            self._members = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            self._sizes = torch.tensor([len(row) for row in rows])
        self._tasks: Tensor | None = None
        if self.one_task_per_group or self._wanted_tasks is not None:
            with rng(torch.Generator().manual_seed(self.seed)):
                groups = torch.arange(len(self._sizes)) if self.one_task_per_group else self._draw_groups(self._wanted_tasks or 0)
                self._tasks = self._draw_classes(groups)

    def _check_counts(self) -> None:
        support, query = _bounds(self.shots)[1], _bounds(self.test_shots)[1]
        apart = self._support_from is not None
        for wanted, allowed, what in (
            (support + query * (not apart), self._support_from, "support" if apart else "support and query"),
            (query * apart, self._query_from, "query"),
        ):
            count = self._by_class.counts_among(allowed)
            if bool((count < wanted).any()):
                k = int((count < wanted).long().argmax())
                raise ValueError(
                    f"{self.source}: class {self._by_class.names[k]!r} has {int(count[k])} images for {what}: expected at least {wanted} "
                    f"(shots={self.shots}, test_shots={self.test_shots})"
                )

    def _choose(self, num_tasks: int) -> Tensor:
        """Classes ``(T, ways)``, in order of label."""
        if self._tasks is not None:
            return self._tasks[choose_tasks(len(self._tasks), num_tasks)]
        return self._draw_classes(self._draw_groups(num_tasks))

    def _draw_groups(self, num_tasks: int) -> Tensor:
        return torch.randint(len(self._sizes), (num_tasks,))

    def _draw_classes(self, groups: Tensor) -> Tensor:
        key = torch.rand(len(groups), self._members.shape[1])
        if self.within_groups:
            key.masked_fill_(torch.arange(key.shape[1]) >= self._sizes[groups, None], 2.0)
        return self._members[groups].gather(1, key.topk(self.ways, largest=False).indices)

    def _episode(self, classes: Tensor) -> Episode:
        tasks = len(classes)
        support, query = (draw_mask(size, tasks * self.ways).view(tasks, self.ways, -1) for size in (self.shots, self.test_shots))
        first, last = support.shape[-1], query.shape[-1]
        if self._support_from is None:
            seen, asked = self._by_class.draw(classes, first + last, None).split([first, last], -1)
        else:  # from other sources, which have no image in common
            seen = self._by_class.draw(classes, first, self._support_from)
            asked = self._by_class.draw(classes, last, self._query_from)
        return Episode(self._points(seen, support), self._points(asked, query))

    def _points(self, image: Tensor, mask: Tensor) -> Points:
        """From images and mask ``(T, ways, shots)``, shuffled within each task, the padding last."""
        label = torch.arange(self.ways)[:, None].expand(image.shape)
        image, mask, label = (v.flatten(1) for v in (image, mask, label))
        order = torch.rand(mask.shape).masked_fill_(~mask, 2.0).argsort(1)
        image, mask, label = (v.gather(1, order) for v in (image, mask, label))
        x, y, full = self._x(image), label, bool(mask.all())
        if self.target_transform is not None:
            y = self.target_transform(label)
            _check_leading("target_transform", y, mask.shape)
        if not full:
            x = x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.dim() - 2)), 0)
            y = y.masked_fill(~mask.view(*mask.shape, *(1,) * (y.dim() - 2)), 0)
        return Points(x, y, mask)

    def _x(self, image: Tensor, images: Tensor | None = None) -> Tensor:
        """Images by index ``(T, N)``, of this family's by default, as they stand in an episode."""
        pixels = (self._by_class.images if images is None else images).index_select(0, image.flatten())
        x = pixels.to(self.dtype or torch.get_default_dtype()).div_(255)
        if self.transform is not None:
            x = self.transform(x)
            _check_leading("transform", x, (image.numel(),))
        return x.unflatten(0, image.shape)

    def _outsiders(self, classes: Tensor, number: int) -> Tensor:
        """Images ``(T, number)`` of classes other than ``classes (T, ways)``, none twice."""
        others = self.num_classes - self.ways
        if others < 1:
            raise ValueError(f"detection: expected more classes than ways={self.ways}, got {self.num_classes}")
        few = min(number, others)
        key = torch.rand(len(classes), self.num_classes).scatter_(1, classes, 2.0)
        other = key.topk(few, largest=False).indices  # (T, few)
        each, there = -(-number // few), int(self._by_class.counts_among(self._query_from).min())
        if there < each:
            raise ValueError(f"num_out: expected at most {few * there} images of {others} other classes, got {number}")
        return self._by_class.draw(other, each, self._query_from).mT.flatten(1)[:, :number]


def _bounds(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _check_leading(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape[: len(shape)]) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor {(*shape, ...)}, got {got}".replace("Ellipsis", "..."))
