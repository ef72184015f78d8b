"""Which of a family's groups or classes are there to train on, to validate on and to test on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bayesmeta.tasks.tables import did_you_mean

SPLITS = ("train", "val", "test")
NONE = -1  # of no split
# Three fractions, or lists of names (or of groups) by split.
Splits = tuple[float, float, float] | Mapping[str, Iterable[object]]


def checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Raises ValueError where they are not three numbers >= 0 that sum to 1."""
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions: expected three numbers >= 0 that sum to 1, got {fractions}")
    return (fractions[0], fractions[1], fractions[2])


def by_fractions(number: int, fractions: Sequence[float], seed: int) -> Tensor:
    """The split of each of ``number`` things, an index into `SPLITS`; sizes to within one thing of the fractions."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    first, second = round(fractions[0] * number), round((fractions[0] + fractions[1]) * number)
    split = torch.zeros(number, dtype=torch.long)
    split[order[first:]] = 1
    split[order[second:]] = 2
    return split


def by_names(
    splits: Mapping[str, Iterable[object]], names: Sequence[str], groups: Sequence[str] | None = None, *, where: str = "splits"
) -> Tensor:
    """The split of each of ``names``, or `NONE`, from lists of names, or of groups, by split.

    Raises ValueError where a split or a name is not known, a name is in two splits, or none is in any.
    """
    split = torch.full((len(names),), NONE)
    members: dict[str, list[int]] = {name: [i] for i, name in enumerate(names)}
    for i, group in enumerate(groups or ()):
        members.setdefault(group, []).append(i)
    for key, listed in splits.items():
        part = index_of(key, where)
        if isinstance(listed, str):
            raise TypeError(f"{where}[{key!r}]: expected a list of classes, got the text {listed!r}")
        for name in map(str, listed):
            if name not in members:
                raise ValueError(f"{where}[{key!r}]: no class {name!r}{did_you_mean(name, members)}")
            for i in members[name]:
                if split[i] not in (NONE, part):
                    raise ValueError(f"{where}: class {names[i]!r} is in {SPLITS[int(split[i])]!r} and in {SPLITS[part]!r}")
                split[i] = part
    if bool((split == NONE).all()):
        raise ValueError(f"{where}: expected classes in 'train', 'val' or 'test', got none")
    return split


def index_of(name: str, where: str = "split") -> int:
    """The place in `SPLITS` of a name, "validation" among them. Raises ValueError where there is none such."""
    short = "val" if name == "validation" else name
    if short not in SPLITS:
        raise ValueError(f"{where}: expected one of {SPLITS} (or 'validation'), got {name!r}")
    return SPLITS.index(short)
