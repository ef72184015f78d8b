"""Explicit randomness round code that draws from torch's global stream (Pyro, torch.distributions)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def rng(generator: torch.Generator | None = None) -> Iterator[None]:
    """Inside, torch's global stream *is* ``generator``'s; afterwards the generator has moved on and the caller's stream is as it was.

    Without a generator the caller's stream is replayed from where it stands, and put back: the same call gives
    the same draws until the caller moves the stream (``torch.manual_seed``, or any draw of their own).
    """
    generator = checked_generator(generator)
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        if generator is not None:
            torch.set_rng_state(generator.get_state())
            if cuda is not None:
                torch.cuda.manual_seed_all(int(torch.randint(2**62, ())))
        yield
    finally:
        if generator is not None:
            generator.set_state(torch.get_rng_state())
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def checked_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """``generator`` where it is None or a generator on the CPU, else TypeError."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        got = f"{type(generator).__name__} {generator!r}"
        raise TypeError(f"generator: expected a torch.Generator, say torch.Generator().manual_seed(3), got {got}")
    if generator.device.type != "cpu":
        raise TypeError(f"generator: expected one on the CPU (it seeds every device), got one on {generator.device}")
    return generator
