"""Data parallelism over tasks: every process takes its share of a step's tasks, gradients are added up, all take the same step.

Under ``torchrun`` nothing in a script changes: `meta_train` and `evaluate` see the group of processes by its environment (``WORLD_SIZE``,
``RANK``) or by ``torch.distributed`` itself, and open it where nobody has yet, with gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
GONE, PATIENCE = "bayesmeta/gone", 5.0  # how many have left, and for how many seconds the first process waits for them


class Ranks(NamedTuple):
    """This process's number and how many there are. Alone (``size`` 1) nothing is exchanged."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> slice:
        """Which of ``count`` tasks are this process's: as even as can be, one after the other."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The sums of ``values`` over all processes, which give equal shapes, in one exchange."""
        if self.size == 1:
            return list(values)
        flat = torch.cat([v.detach().flatten() for v in values])
        dist.all_reduce(flat)
        parts = flat.split([v.numel() for v in values])
        return [part.view(v.shape) for part, v in zip(parts, values, strict=True)]

    def same(self, values: Sequence[Tensor]) -> None:
        """Sets ``values``, in place, to the first process's."""
        if self.size > 1:
            for value in values:
                dist.broadcast(value.detach(), 0)

    def gathered(self, value: Value) -> list[Value]:
        """Every process's ``value``, in their order."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value)
        return every

    def agreed(self, value: Value) -> Value:
        """The first process's ``value``."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]


def ranks(device: str | torch.device | None = None) -> Ranks:
    """The group of processes that this one belongs to, opened where the environment asks for one and nobody has."""
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
            return Ranks()
        on_gpu = device is not None and torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(_close)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _close() -> None:
    """Leaves the group, the first process last: the others would abort where it closes its connections while they close theirs."""
    if not dist.is_initialized():
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(Exception):  # of what is lost by now
        if rank:
            dist.destroy_process_group()
            store.add(GONE, 1)
            return
        deadline = time.monotonic() + PATIENCE
        while store.add(GONE, 0) < size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    if dist.is_initialized():
        dist.destroy_process_group()
