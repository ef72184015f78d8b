"""Explicit randomness round code that draws from torch's global stream (Pyro, torch.distributions): one stream, whatever the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

DRAWS = frozenset({
    "_sample_dirichlet", "_standard_gamma", "bernoulli", "bernoulli_", "binomial", "cauchy_", "exponential_", "geometric_", "log_normal_",
    "multinomial", "native_dropout", "normal", "normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like",
    "random", "random_", "randperm", "uniform_",
})  # fmt: skip


@contextmanager
def rng(generator: torch.Generator | None = None) -> Iterator[None]:
    """Inside, torch's global stream *is* ``generator``'s; afterwards the generator has moved on and the caller's stream is as it was.

    Without a generator the caller's stream is replayed from where it stands, and put back: the same call gives
    the same draws until the caller moves the stream (``torch.manual_seed``, or any draw of their own).

    What is drawn for a GPU inside is drawn on the CPU and moved there: a seed gives the same numbers on every device.
    """
    generator = checked_generator(generator)
    on_gpu = torch.cuda.is_initialized() and not isinstance(_get_current_dispatch_mode(), DrawnOnCPU)
    before = torch.get_rng_state()
    try:
        if generator is not None:
            torch.set_rng_state(generator.get_state())
        with DrawnOnCPU() if on_gpu else nullcontext():
            yield
    finally:
        if generator is not None:
            generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


class DrawnOnCPU(TorchDispatchMode):
    """Inside, random numbers for tensors on another device are drawn on the CPU, and moved; a generator of that device is left alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does one operation."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in DRAWS or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        places = [v.device if isinstance(v, Tensor) else v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor | torch.device)]
        device = next((place for place in places if place.type != "cpu"), None)
        if device is None:
            return func(*args, **kwargs)
        in_place = name.endswith("_")

        def here(value: Any) -> Any:
            if isinstance(value, Tensor):
                return torch.empty(value.shape, dtype=value.dtype) if in_place and value is args[0] else value.cpu()
            return torch.device("cpu") if isinstance(value, torch.device) else value

        drawn = func(*tree_map(here, args), **tree_map(here, kwargs))
        return args[0].copy_(drawn) if in_place else tree_map(lambda value: value.to(device), drawn)


def checked_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """``generator`` where it is None or a generator on the CPU, else TypeError."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        got = f"{type(generator).__name__} {generator!r}"
        raise TypeError(f"generator: expected a torch.Generator, say torch.Generator().manual_seed(3), got {got}")
    if generator.device.type != "cpu":
        raise TypeError(f"generator: expected one on the CPU (it serves every device), got one on {generator.device}")
    return generator
