"""A program's ``pyro.param`` statements as parameters of the module that holds it: made, named, redrawn, announced to Pyro."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import transform_to

from .handlers import attach_leaf
from .survey import ModelError

TAKEN = frozenset(dir(nn.ParameterDict()))  # attributes of torch's own ("half", "values"): no names for its entries


def new_parameter(name: str, args: tuple[Any, ...], constraint: Any, like: Tensor) -> nn.Parameter:
    """What ``pyro.param(name, *args, constraint=)`` makes when it is first met: unconstrained, in the dtype and device of ``like``.

    Raises ModelError without an initial value, for a module's parameter, and for a value outside of ``constraint``.
    """
    if not args:
        raise ModelError(f"pyro.param('{name}') has no initial value: write pyro.param('{name}', tensor)")
    init = args[0]
    if isinstance(init, nn.Parameter):
        raise ModelError(
            f"'{name}' is the parameter of a module that the function only refers to, so a copy of the model could not own it: "
            "write the program as a PyroModule that holds the module"
        )
    with torch.no_grad():
        value = torch.as_tensor(init() if callable(init) else init).detach()
        value = value.to(device=like.device, dtype=like.dtype)
        if not constraint.check(value).all():
            raise ModelError(f"pyro.param('{name}'): the initial value {value.tolist()} does not satisfy {constraint}")
        return nn.Parameter(transform_to(constraint).inv(value).clone())


def free_key(name: str, entries: nn.ParameterDict) -> str:
    """A key for the parameter ``name`` that ``entries`` does not have yet and can take."""
    key = name.replace(".", "__")
    while key in TAKEN or key in entries:  # "a.b" and "a__b" are two parameters
        key += "_"
    return key


def check_shape(name: str, value: Tensor, args: tuple[Any, ...]) -> None:
    """Raises ModelError where ``pyro.param(name, *args)`` asks for another shape than the ``value`` made before has."""
    if args and isinstance(args[0], Tensor) and args[0].shape != value.shape:
        raise ModelError(
            f"pyro.param('{name}') has shape {tuple(value.shape)} in one run and {tuple(args[0].shape)} in another: a parameter's "
            "shape must not depend on the numbers of tasks and points; sample what belongs to a task inside "
            '`with pyro.plate("tasks", points.num_tasks):`'
        )


def redraw(modules: Iterable[nn.Module]) -> set[int]:
    """Draws anew those of ``modules`` that have ``reset_parameters`` (PyTorch's layers); the ids of the parameters they own."""
    drawn: set[int] = set()
    for module in modules:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            drawn |= {id(p) for p in module.parameters(recurse=False)}
    return drawn


def announce(name: str, parameter: nn.Parameter) -> None:
    """Tells Pyro's handlers of a module's parameter, as a ``pyro.param`` statement would; the global store stays empty."""
    value = attach_leaf(parameter, parameter)
    effectful(lambda *_, **__: value, type="param")(name, name=name)


@contextmanager
def own_parameters(program: Any, device: torch.device) -> Iterator[None]:
    """Inside, PyroModules in ``program`` announce their parameters and keep them out of Pyro's store; new tensors are made on ``device``.

    Their contexts count as entered: entering one itself would swap the contents of the store, and a guide's parameters there would
    lose what Pyro's optimisers find them by.
    """
    modules = program.modules() if isinstance(program, nn.Module) else ()
    contexts = {id(c): c for c in (module.__dict__.get("_pyro_context") for module in modules) if c is not None}.values()
    here = contextlib.nullcontext() if device.type == "cpu" else device  # Normal(0.0, 1.0) has tensors too
    with pyro.settings.context(module_local_params=bool(contexts)), here:
        for context in contexts:
            context.active += 1
            context.used = True
        try:
            yield
        finally:
            for context in contexts:
                context.active -= 1
                if not context.active:
                    context.cache.clear()
