"""A function of tensors written down as a graph of operations (`make_fx`), its noise drawn outside; how near is near enough.

Pure tools: what a graph is of, and when it is worth the trouble, is for `compiling` and `compiled` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

aten = torch.ops.aten
Run = Callable[..., Sequence[Any]]
Backend = Callable[[GraphModule, list[Tensor]], Run]
MOVES = (aten._to_copy.default, aten.copy_.default)
NUMBERS = (int, float, str)  # numpy's are such, too
PLAIN, CHANGING = {bool, int, float, str, type(None)}, {"training", "gradient_evaluations"}  # a set is looked into faster
SHAPES = 8  # graphs kept, one for each shape of the data; the one unused for longest goes first


def trace(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    """``function`` of tensors as a graph, traced on ``inputs``. Raises what tracing raises, RuntimeError where no graph is equal to it."""
    with tracing(TracingContext(FakeTensorMode())):  # without one every operation makes a mode of its own, which takes half of the time
        module = make_fx(function)(*inputs)
    if any(is_draw(node) and node.kwargs.get("generator") is not None for node in module.graph.nodes):
        raise RuntimeError("it draws from a random generator of its own, whose state a graph would carry on")
    if any(_has_dynamic_shape(node) for node in module.graph.nodes):
        raise RuntimeError("the shape of an intermediate result hangs on values, and a graph has fixed shapes")
    if any(v.device.type != "cpu" for v in inputs):
        move_constants(module)
    return module


def move_constants(module: GraphModule) -> None:
    """What a graph makes of nothing on the CPU and then moves becomes a constant of its own, moved once."""
    graph, values = module.graph, dict[Node, Any]()
    for i, node in enumerate(list(graph.nodes)):
        if node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        if node.op != "call_function" or is_draw(node) or not all(n in values for n in node.all_input_nodes):
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
        if is_draw(node):
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
    return any(is_draw(node) for node in module.graph.nodes)


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


def is_draw(node: Node) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _has_dynamic_shape(node: Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target != torch.ops.aten.index.Tensor:
        return True
    return any(_dtype(index) in (torch.bool, torch.uint8) for index in node.args[1] if index is not None)  # type: ignore[union-attr]


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("val", node.meta.get("tensor_meta")), "dtype", None)
