"""What runs a graph of operations fast: TorchInductor's code for it, and on a GPU one launch of all its kernels (`Recorded`)."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from . import light_buffers
from .graphs import MOVES, Run, first_lines, is_draw
from .rewriting import LOWERED, is_view, kernels, overwritten, rewritten
from .saved_graphs import saved
from .short_compiling import short_compiling

log = logging.getLogger(__name__)
aten = torch.ops.aten
WAITS = tuple(  # operations that wait for the GPU, or that its libraries refuse while they are recorded
    getattr(aten, name).default
    for name in (
        "_linalg_check_errors", "_local_scalar_dense", "cholesky_solve", "cholesky_inverse", "_linalg_eigh", "linalg_eig", "_linalg_svd",
        "linalg_lstsq", "linalg_lu_factor_ex", "linalg_lu_solve", "_linalg_solve_ex", "linalg_inv_ex", "linalg_qr", "triangular_solve",
        "_linalg_slogdet", "_linalg_det", "geqrf", "ormqr",
    )
)  # fmt: skip
SHORT = 4000  # operations; longer graphs are swept or rare, and have not been tried
KEPT = 2**28  # bytes of freed memory that stay with the process
LITTLE = 2**25  # bytes of results at once, up to which a graph takes its memory in one piece: larger ones GNU's library gives back
LARGE = 2**21  # bytes of one result; where one is larger it is put in the place of what it is made of, which the plan does not allow
SETTLED = 6  # calls in a row; of the first ones of a training step what is written over are copies
MOST_RECORDINGS = 20  # of one graph, where what it writes over is elsewhere again and again


def inductor(module: GraphModule, inputs: list[Tensor]) -> Run:
    """Compiles a graph with TorchInductor, or takes it from the disk (`saved_graphs`). On a GPU it is `Recorded`.

    What random operations are left in it draw as eager ones do.
    """
    on_gpu = any(v.is_cuda for v in inputs)
    if not on_gpu:
        keep_freed_memory()
    inputs = [v.contiguous() for v in inputs] if on_gpu else [*inputs]
    with light_buffers.ONE_AT_A_TIME:
        run = saved(module, inputs, lambda: _compiled(module, inputs, on_gpu))
    return Recorded(run, module, inputs) if on_gpu else run


def _compiled(module: GraphModule, inputs: list[Tensor], on_gpu: bool) -> Run:
    with warnings.catch_warnings(), light_buffers.light_buffers(), short_compiling():  # the rules ask the compiler what it can do, too
        warnings.simplefilter("ignore")  # the compiler's remarks on itself
        copied = rewritten(module)
        # on a CPU what calls the kernels is compiled too, which saves a tenth to a fifth of a step and some seconds of compiling;
        # operations without a door in C stay with Python
        pythons = [node for node in copied.graph.nodes if _is_pythons(node)]
        short = len(copied.graph.nodes) <= SHORT and not pythons
        planned = not on_gpu and _memory(module) <= LITTLE and all(_size(node) <= LARGE for node in module.graph.nodes)
        # the plan takes no account of a part of a result in whose place another one is put
        options = {"fallback_random": True, "cpp_wrapper": short and not on_gpu, "memory_planning": planned, "inplace_buffers": not planned}
        from torch.compiler import config
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # takes a third of a second, and not every run compiles

        # without a context of shapes the compiler leaves its disk cache of graphs alone, and writes all their code anew in every process
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
        # of tensors as they are the compiler takes the sizes as unknown
        examples: list[Any] = [mode.from_tensor(v, static_shapes=True) for v in inputs]
        written_here = f"{config.cache_key_tag} {light_buffers.version()} {kernels.version()}"
        keys = config.patch(cache_key_tag=written_here)  # type: ignore[attr-defined]  # of its disk cache
        with tracing(TracingContext(mode)), keys:
            return torch._inductor.compile(copied, examples, options=options)


@functools.cache
def keep_freed_memory() -> None:
    """Tells the C library, where it is GNU's, to keep up to 256 MiB of freed memory for the next step. Holds for the whole process.

    Given back after each step, the same pages are faulted in again in the next, which was up to half of a step on a CPU.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, KEPT)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, LITTLE)  # M_MMAP_THRESHOLD: what is larger is mapped on its own, and given back


class Recorded:
    """The run of a graph on a GPU as one launch: its kernels are recorded once, with its inputs copied to where they stood then.

    The next call writes over the results. Inputs that the graph writes over are taken where they stand once they have stood there for
    `SETTLED` calls; the kernels are recorded anew then. Where they cannot be recorded (``why_not``) they are launched one by one.
    ``run``: what does the operations of ``module``.
    """

    def __init__(self, run: Run, module: GraphModule, inputs: Sequence[Tensor]) -> None:
        self.run, self.standing = run, [_kept(v) for v in inputs]
        self._kinds = [(v.dtype, v.device) for v in inputs]
        self._written = overwritten(module)
        self._moving = [*range(len(inputs))]  # are copied
        self._last: list[Any] = []  # where what is written over stood in the last call
        self._in_a_row = 0  # calls in which it stood there
        self.recordings = 0
        self.recording: torch.cuda.CUDAGraph | None = None
        self.results: Sequence[Any] = ()
        self.why_not = obstacle(module, inputs)
        self._sort()
        if self.why_not is None:
            here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(here)
            with torch.no_grad(), torch.cuda.stream(stream):
                run(*self.standing)  # libraries set themselves up
            here.wait_stream(stream)
            self._record()
        if self.why_not is not None:
            log.info("a graph's kernels are launched one by one: %s", self.why_not)

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        """What the graph gives for ``inputs``."""
        if self.recording is not None and self._written:
            self._settle(inputs)
        for which in self._alike:
            torch._foreach_copy_([self.standing[i] for i in which], [inputs[i] for i in which])
        if self.recording is None:
            results = self.run(*self.standing)
        else:
            self.recording.replay()
            results = self.results
        if self._back:
            torch._foreach_copy_([inputs[i] for i in self._back], [self.standing[i] for i in self._back])
        return results

    def _settle(self, inputs: Sequence[Tensor]) -> None:
        """Takes what is written over where it stands, or no longer."""
        places = [(inputs[i].data_ptr(), inputs[i].stride()) for i in self._written]
        self._in_a_row = self._in_a_row + 1 if places == self._last else 0
        self._last = places
        taken = len(self._moving) < len(inputs)
        if taken and not self._in_a_row:
            self._moving = [*range(len(inputs))]
            for i in self._written:
                self.standing[i] = _kept(inputs[i])
        elif not taken and self._in_a_row == SETTLED and self.recordings < MOST_RECORDINGS:
            if not all(inputs[i].is_contiguous() for i in self._written):
                return
            self._moving = [i for i in self._moving if i not in self._written]
            for i in self._written:
                self.standing[i] = inputs[i].detach()
        else:
            return
        self._sort()
        self._record()

    def _sort(self) -> None:
        kinds = dict.fromkeys(self._kinds[i] for i in self._moving)
        self._alike = [[i for i in self._moving if self._kinds[i] == kind] for kind in kinds]  # are copied in one go
        self._back = [i for i in self._written if i in self._moving]

    def _record(self) -> None:
        """Recording runs nothing."""
        here = torch.cuda.current_stream()
        self.recording, recording = None, torch.cuda.CUDAGraph()
        self.recordings += 1
        try:
            with torch.no_grad(), torch.cuda.graph(recording, capture_error_mode="thread_local"):
                self.results = self.run(*self.standing)
            self.recording = recording
        except BaseException as error:
            torch.cuda.set_stream(here)
            self.why_not = first_lines(error)
            self.standing, self._moving = [_kept(v) for v in self.standing], [*range(len(self.standing))]
            self._sort()
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # one that succeeds, so that nothing takes the failed one for going on
                torch.zeros((), device=self.standing[0].device)
            if not isinstance(error, RuntimeError):  # an interrupt, say; the next call finds everything in order
                raise


def _kept(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def obstacle(module: GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """Why a graph's kernels cannot be recorded: something in it happens on the CPU or waits for the GPU. None where nothing does."""
    if not all(v.is_cuda for v in inputs):
        return "an input is on the CPU"
    for node in module.graph.nodes:
        if is_draw(node) or node.target in WAITS:
            return f"it has {node.target}"
        places = {value.device.type for n in (node, *node.all_input_nodes) if (value := _value(n, module)) is not None}
        if len(places) > 1 and (node.target in MOVES or any(_value(n, module).dim() for n in node.all_input_nodes if _on_cpu(n, module))):
            return f"{node.target} moves a tensor"
    return None


def _value(node: Node, module: GraphModule) -> Any:
    value = getattr(module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _on_cpu(node: Node, module: GraphModule) -> bool:
    value = _value(node, module)
    return value is not None and value.device.type == "cpu"


def _memory(module: GraphModule) -> float:
    """Bytes of all results of a graph that are there at once, at most; infinite where one is not known.

    A view keeps what it is of. The compiler fuses operations, so that less is there in truth.
    """
    stands, last = dict[Node, Node](), dict[Node, Node]()
    for node in module.graph.nodes:
        of = next(iter(node.all_input_nodes), node)
        stands[node] = stands[of] if of is not node and is_view(node) else node
        last |= dict.fromkeys([stands[node], *(stands[n] for n in node.all_input_nodes)], node)
    going: dict[Node, list[Node]] = {}
    for node, user in last.items():
        going.setdefault(user, []).append(node)
    now = most = 0.0
    for node in module.graph.nodes:
        if stands[node] is node:
            now += _size(node)
            most = max(most, now)
        now -= sum(map(_size, going.get(node, [])))
    return most


def _size(node: Node) -> float:
    """Bytes of what an operation makes."""
    value = node.meta.get("val")
    if node.op != "call_function" or isinstance(value, list | tuple):
        return 0
    return value.nbytes if isinstance(value, Tensor) else math.inf


def _is_pythons(node: Node) -> bool:
    name = str(node.target)
    known = node.target in LOWERED or name.startswith(("aten.", "prims.", "<built-in"))
    return node.op == "call_function" and (not known or "linalg" in name or "median" in name or is_draw(node))
