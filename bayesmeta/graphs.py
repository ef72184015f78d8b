"""A function of tensors written down as a graph of operations (`make_fx`), its noise drawn outside, and compiled; how near is near enough.

Pure tools: what a graph is of, and when it is worth the trouble, is for `compiling` and `compiled` to say.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from . import light_buffers
from .rewriting import LOWERED, is_view, overwritten, products, rewritten
from .short_compiling import short_compiling

log = logging.getLogger(__name__)
aten = torch.ops.aten
Run = Callable[..., Sequence[Any]]
Backend = Callable[[GraphModule, list[Tensor]], Run]
MOVES = (aten._to_copy.default, aten.copy_.default)
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
NUMBERS = (int, float, str)  # numpy's are such, too
PLAIN, CHANGING = {bool, int, float, str, type(None)}, {"training", "gradient_evaluations"}  # a set is looked into faster
SETTLED = 6  # calls in a row; of the first ones of a training step what is written over are copies
MOST_RECORDINGS = 20  # of one graph, where what it writes over is elsewhere again and again
SHAPES = 8  # graphs kept, one for each shape of the data; the one unused for longest goes first


def trace(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    """``function`` of tensors as a graph, traced on ``inputs``. Raises what tracing raises, RuntimeError where no graph is equal to it."""
    with tracing(TracingContext(FakeTensorMode())):  # without one every operation makes a mode of its own, which takes half of the time
        module = make_fx(function)(*inputs)
    if any(_is_random(node) and node.kwargs.get("generator") is not None for node in module.graph.nodes):
        raise RuntimeError("it draws from a random generator of its own, whose state a graph would carry on")
    if any(_has_dynamic_shape(node) for node in module.graph.nodes):
        raise RuntimeError("the shape of an intermediate result hangs on values, and a graph has fixed shapes")
    if any(v.device.type != "cpu" for v in inputs):
        move_constants(module)
    return module


def inductor(module: GraphModule, inputs: list[Tensor]) -> Run:
    """Compiles a graph with TorchInductor; what random operations are left in it draw as eager ones do. On a GPU it is `Recorded`."""
    on_gpu = any(v.is_cuda for v in inputs)
    if not on_gpu:
        keep_freed_memory()
    inputs = [v.contiguous() for v in inputs] if on_gpu else [*inputs]
    with warnings.catch_warnings(), light_buffers.light_buffers(), short_compiling():
        warnings.simplefilter("ignore")  # the compiler's remarks on itself
        run = _compiled(module, inputs, on_gpu)
    return Recorded(run, module, inputs) if on_gpu else run


def _compiled(module: GraphModule, inputs: list[Tensor], on_gpu: bool) -> Run:
    copied = rewritten(module)
    # on a CPU what calls the kernels is compiled too, which saves a tenth to a fifth of a step and some seconds of compiling; operations
    # without a door in C stay with Python
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
    written_here = f"{config.cache_key_tag} {light_buffers.version()} {products.version()}"
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
        if _is_random(node) or node.target in WAITS:
            return f"it has {node.target}"
        places = {value.device.type for n in (node, *node.all_input_nodes) if (value := _value(n, module)) is not None}
        if len(places) > 1 and (node.target in MOVES or any(_value(n, module).dim() for n in node.all_input_nodes if _on_cpu(n, module))):
            return f"{node.target} moves a tensor"
    return None


def move_constants(module: GraphModule) -> None:
    """What a graph makes of nothing on the CPU and then moves becomes a constant of its own, moved once."""
    graph, values = module.graph, dict[Node, Any]()
    for i, node in enumerate(list(graph.nodes)):
        if node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        if node.op != "call_function" or _is_random(node) or not all(n in values for n in node.all_input_nodes):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        values[node] = node.target(*args, **kwargs)
        written = any(getattr(getattr(user.target, "_schema", None), "is_mutable", False) for user in node.users)
        if node.target == aten._to_copy.default and args[0].device != values[node].device and not written:
            module.register_buffer(f"moved_{i}", values[node], persistent=False)
            with graph.inserting_before(node):
                constant = graph.get_attr(f"moved_{i}")
            constant.meta, values[constant] = dict(node.meta), values[node]
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()


def draw_noise_outside(module: GraphModule, *, given: int = 0) -> GraphModule | None:
    """Takes the random operations out of a graph and makes their results further inputs, in order; returns what draws them, or None.

    Only those whose arguments hang on no input, and only up to the first of which that is not so (a draw from a Gamma): the order in
    which numbers are taken from the stream stays eager's. Noise that is drawn on the CPU and moved (`bayesmeta.randomness`) comes in moved.
    The first ``given`` of them somebody else draws.
    """
    graph, drawn, free = module.graph, Graph(), set[Node]()
    outside: dict[Node, Node] = {}
    found: list[Node] = []
    for node in graph.nodes:
        if node.op == "call_function" and all(n in free for n in node.all_input_nodes):
            free.add(node)
        if _is_random(node):
            # one that fills a tensor in place is its own only where nothing else looks at that tensor
            if node not in free or any(len(n.users) > 1 for n in node.all_input_nodes):
                break
            found.append(node)
    drawn_by, found = found, [_moved(node, free) for node in found]
    if not found:
        return None
    needed, todo = set[Node](), found[given:]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    for node in graph.nodes:
        if node in needed:
            outside[node] = drawn.node_copy(node, lambda n: outside[n])
    drawn.output(tuple(outside[node] for node in found[given:]))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for i, node in enumerate(found):
        with graph.inserting_after(last):
            last = graph.placeholder(f"noise_{i}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.erase_node(node)
        if node is not drawn_by[i]:
            graph.erase_node(drawn_by[i])
    graph.eliminate_dead_code()
    module.recompile()
    return GraphModule(module, drawn) if found[given:] else None


def is_random(module: GraphModule) -> bool:
    """Whether the graph draws random numbers."""
    return any(_is_random(node) for node in module.graph.nodes)


def settings(learner: nn.Module) -> list[tuple[str, str, object]]:
    """Numbers, words and flags among the public attributes of a learner's modules, which a graph of it takes as they are."""
    return [
        (name, key, value)
        for name, module in learner.named_modules()
        for key, value in vars(module).items()
        if (type(value) in PLAIN or isinstance(value, NUMBERS)) and key[0] != "_" and key not in CHANGING
    ]


def tolerance(dtype: torch.dtype) -> float:
    """How far a compiled step may be from eager: half of the digits of ``dtype``."""
    return math.sqrt(torch.finfo(dtype).eps)


def gap(found: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """The largest difference as a share of the size of ``wanted``, at least ``floor``; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return math.inf
    size = max(wanted.abs().max().item(), floor)
    most = (found - wanted).abs().max().item()
    return most / size if size else math.inf * most if most else 0.0


def first_lines(error: BaseException) -> str:
    """The error's text in one line, shortened; of a value that Python looks at, what that means."""
    text = str(error).strip()
    if "value out of a tracing tensor" in text:
        return "a value is looked at from Python (if, float, item), which a graph cannot follow"
    return " ".join(text.split())[:300]


def _moved(node: Node, free: set[Node]) -> Node:
    """What moves the noise that ``node`` draws and all else takes it from; ``node`` where nothing does."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    alone = user in free and user.target in MOVES and all(len(n.users) == 1 for n in user.all_input_nodes)
    return user if alone and user.args[user.target == aten.copy_.default] is node else node


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
    return node.op == "call_function" and (not known or "linalg" in name or "median" in name or _is_random(node))


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _has_dynamic_shape(node: Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target != torch.ops.aten.index.Tensor:
        return True
    return any(_dtype(index) in (torch.bool, torch.uint8) for index in node.args[1] if index is not None)  # type: ignore[union-attr]


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("val", node.meta.get("tensor_meta")), "dtype", None)
