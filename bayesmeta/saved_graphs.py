"""Compiled graphs kept on disk, and run again without the compiler: it takes seconds to import, and more to look up what it made before.

What TorchInductor makes of a graph for a CPU is a library with one function, from tensors to tensors. It is copied to a file named by all
that it follows from: the traced graph, the layout of its inputs, the rules that rewrite it, torch, its settings and the processor.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import importlib.util
import logging
import operator
import os
import platform
import re
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .graphs import Run, first_lines

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
WRITTEN_BY = ("rewriting", "backends.py", "graphs.py", "light_buffers.py", "saved_graphs.py", "short_compiling.py")
ENTRY = "inductor_entry_cpp"  # what TorchInductor calls the function, and so the library's module
SETTINGS, ELSEWHERE = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "ATEN_", "CXX"), ("TORCHINDUCTOR_CACHE_DIR",)  # in the environment
OFF = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}  # how torch is told to keep nothing


class Saved:
    """A compiled graph as its library gives it."""

    def __init__(self, entry: Callable[[Any], Any]) -> None:
        self._entry = entry

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        """What the graph gives for ``inputs``."""
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(inputs))
        return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(self._entry(handles))


def saved(module: GraphModule, inputs: Sequence[Tensor], compiling: Callable[[], Run]) -> Run:
    """``module`` from the disk, for inputs like these; or what ``compiling`` gives, which goes to the disk where it is one library.

    One thread at a time.
    """
    plain = all(v.device.type == "cpu" and not v.requires_grad for v in inputs) and all(map(_is_dense, _constants(module)))
    if not plain or _keeps_nothing():
        return compiling()
    file = cache_folder() / f"{identity(module, inputs)}.so"
    if (found := _loaded(file)) is not None:
        return found
    before = {*sys.modules}
    run = compiling()
    libraries = [part for name, part in [*sys.modules.items()] if name.endswith(f".{ENTRY}") and name not in before]
    if len(libraries) == 1 and _is_all(run, inputs) and _copied(str(libraries[0].__file__), file):
        return _loaded(file) or run
    log.info("a compiled graph of %d operations is not kept as a library", len(module.graph.nodes))
    return run


def cache_folder() -> Path:
    """Where the compiler keeps things, and in it a folder of our own; to ask the compiler takes the seconds in which it is imported."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have no name
            user = f"uid_{os.getuid()}"
        folder = f"{tempfile.gettempdir()}/torchinductor_{re.sub(r'[^A-Za-z0-9._-]', '_', user)}"
    return Path(folder) / "bayesmeta"


def identity(module: GraphModule, inputs: Sequence[Any] | None = None) -> str:
    """A name of what a graph compiles to, here and now, for ``inputs`` or ones like those that it was traced on.

    A graph within the graph, and whatever else is no dense tensor, gets another name each time.
    """
    if inputs is None:
        inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    constants = _constants(module)
    tensors = [f"{tuple(v.shape)} {v.stride()} {v.dtype} {v.device}" for v in (*inputs, *constants) if _is_dense(v)]
    facts = "\n".join([*_always(), *_now(), module.code, *tensors]).encode()
    return hashlib.sha256(b"\n".join([facts, *map(_bytes, constants)])).hexdigest()


def _constants(module: GraphModule) -> list[Any]:
    return [operator.attrgetter(str(node.target))(module) for node in module.graph.nodes if node.op == "get_attr"]


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _bytes(value: Any) -> bytes:
    if not _is_dense(value):
        return os.urandom(16)
    return value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _keeps_nothing() -> bool:
    """Whether torch is told to; before its settings are imported the environment says so."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None:
        return bool(config.force_disable_caches or not config.fx_graph_cache)
    return any(os.environ.get(name) == value for name, value in OFF.items())


@functools.cache
def _always() -> list[str]:
    """What stays as it is in a process: the code that compiles, and what it compiles for."""
    files = sorted(file for part in WRITTEN_BY for file in (HERE / part, *(HERE / part).glob("*")) if file.suffix in (".py", ".h"))
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    processor = platform.machine() + platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return [sources, torch.__version__, str(torch.version.git_version), str(sysconfig.get_config_var("SOABI")), processor]


def _now() -> list[str]:
    """The settings that the compiler looks at; its own where they are not as the environment has them, as they are before its import."""
    environment = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS) and name not in ELSEWHERE]
    mkldnn: Any = torch.backends.mkldnn
    # "highest" is no setting, or one of this name
    precisions = [one.fp32_precision.replace("none", "ieee") for one in (torch.backends, mkldnn, mkldnn.matmul, mkldnn.conv)]
    settings = (
        torch.get_num_threads(), torch.get_default_dtype(), *precisions, mkldnn.enabled, torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )  # fmt: skip
    return [*_changed(), *environment, str(settings)]


def _changed() -> list[str]:
    config = sys.modules.get("torch._inductor.config")
    if config is None:
        return []
    from torch.utils._config_module import _UNSET_SENTINEL as unset

    found = []
    for name, value in sorted(config.get_config_copy().items()):
        entry = config._config[name]
        at_first = [one for one in (entry.env_value_force, entry.env_value_default, entry.default) if one is not unset]
        if at_first and value != at_first[0]:
            found.append(f"{name}={value!r}")
    return found


@functools.cache
def _module(file: Path) -> Any:
    # torch's own loader tells the library this address in the same way
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    spec = importlib.util.spec_from_file_location(f"{file.stem}.{ENTRY}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _loaded(file: Path) -> Saved | None:
    try:
        return Saved(getattr(_module(file), ENTRY)) if file.exists() else None
    except (ImportError, AttributeError, OSError) as error:  # of another system, say: it is written anew
        log.info("%s cannot be loaded: %s", file, first_lines(error))
        return None


def _copied(library: str, file: Path) -> bool:
    """Whether ``library`` stands at ``file`` now: all of it, or nothing is there."""
    part = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=file.parent)
        part = Path(name)
        with open(number, "wb") as copy:
            copy.write(Path(library).read_bytes())
            copy.flush()
            os.fsync(copy.fileno())
        part.replace(file)
    except OSError as error:
        log.info("a compiled graph is not kept: %s", error)
        if part is not None:
            part.unlink(missing_ok=True)
        return False
    return True


def _is_all(run: Run, inputs: Sequence[Tensor]) -> bool:
    """Whether ``run`` hands its inputs to the library as they are and gives back what the library gives: it is watched doing it once."""
    doors, here = torch._C._aoti, threading.get_ident()
    given, back = doors.unsafe_alloc_void_ptrs_from_tensors, doors.alloc_tensors_by_stealing_from_void_ptrs
    taken, made = [], []

    def watched(tensors: list[Tensor]) -> Any:
        if threading.get_ident() == here:
            taken.append([*tensors])
        return given(tensors)

    def watched_back(handles: Any) -> Any:
        tensors = back(handles)
        if threading.get_ident() == here:
            made.append(tensors)
        return tensors

    copies = [_copy(v) for v in inputs]  # the graph may write over them
    doors.unsafe_alloc_void_ptrs_from_tensors, doors.alloc_tensors_by_stealing_from_void_ptrs = watched, watched_back
    try:
        found = [*run(*copies)]
    except Exception as error:  # it runs on from there as it would have without this
        log.info("a compiled graph fails on the inputs that it was compiled for: %s", first_lines(error))
        return False
    finally:
        doors.unsafe_alloc_void_ptrs_from_tensors, doors.alloc_tensors_by_stealing_from_void_ptrs = given, back
    return len(taken) == len(made) == 1 and _are(taken[0], copies) and _are(made[0], found)


def _copy(value: Tensor) -> Tensor:
    """The same numbers in the same order in memory."""
    if value.is_contiguous():
        return value.clone()
    return value.new_empty(0).set_(value.untyped_storage().clone(), value.storage_offset(), value.shape, value.stride())


def _are(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
