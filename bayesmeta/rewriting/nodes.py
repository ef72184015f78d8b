"""Nodes of a graph of operations (`torch.fx`): shapes of what they give, which operations only move numbers, and how those move axes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
SAME = (aten.alias.default, aten.detach.default, aten.clone.default)
PRODUCTS = (aten.mm.default, aten.bmm.default)
MANY = 4096  # numbers, from which on a pass over them takes longer than the call of a kernel
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)


def is_pure(graph: Graph) -> bool:
    """Whether nothing in it is written over in place."""
    return not any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in graph.nodes)


def is_tensor(node: Any) -> bool:
    """Whether it is a node, of which a tensor is known that it gives."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_real(node: Any) -> bool:
    """Whether it is an operation that gives a tensor of real numbers on a CPU."""
    return is_tensor(node) and node.op == "call_function" and node.meta["val"].is_floating_point() and node.meta["val"].device.type == "cpu"


def shape(node: Any) -> tuple[int, ...]:
    """Of the tensor that a node gives; () where none is known."""
    return tuple(node.meta["val"].shape) if is_tensor(node) else ()


def call(graph: Graph, target: Any, *args: Any) -> Node:
    """A new operation where ``graph`` inserts, and what its tensor is like noted: that of all ``args`` must be known."""
    made = graph.call_function(target, args)
    made.meta["val"] = target(*map_arg(args, lambda node: node.meta["val"]))
    return made


def order(node: Any) -> list[int]:
    """Which axis of its argument each axis of a transpose is."""
    n = len(shape(node))
    if node.target == aten.permute.default:
        return [d % n for d in node.args[1]]
    axes = [*range(n)]
    if n > 1:
        first, second = (0, 1) if node.target == aten.t.default else (d % n for d in node.args[1:])
        axes[first], axes[second] = axes[second], axes[first]
    return axes


def transposed_from(node: Any) -> Node | None:
    """What ``node`` is the transpose of, matrix by matrix; None where it is none."""
    while _changes_nothing(node):
        node = node.args[0]
    if not isinstance(node, Node) or node.op != "call_function" or node.target not in TRANSPOSES:
        return None
    n = len(shape(node))
    return node.args[0] if n > 1 and order(node) == [*range(n - 2), n - 1, n - 2] else None  # type: ignore[return-value]


def _changes_nothing(node: Any) -> bool:
    """Whether it only passes its argument on, or expands or reshapes it to the shape that it has."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return node.target in SAME or (node.target in (aten.expand.default, *RESHAPES) and shape(node) == shape(node.args[0]) != ())


def is_view(node: Node) -> bool:
    """Whether the numbers of its result may stand where those of its argument do."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return node.target is operator.getitem or node.target in RESHAPES or any(value.alias_info for value in returns)


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of a reshape in groups of equal size, axes of size 1 left out: which of ``before`` become which of ``after``."""
    mine, theirs = ([d for d, n in enumerate(size) if n != 1] for size in (before, after))
    if 0 in before:
        return [(mine, theirs)]
    found = []
    while mine:
        left, right = [mine.pop(0)], [theirs.pop(0)]
        while (a := math.prod(before[d] for d in left)) != (b := math.prod(after[d] for d in right)):
            (left if a < b else right).append((mine if a < b else theirs).pop(0))
        found.append((left, right))
    return found


def note_values(module: GraphModule, like: GraphModule) -> None:
    """Notes what each node's tensor is like, without computing anything; inputs are those of ``like``."""
    given = [node.meta["val"] for node in like.graph.find_nodes(op="placeholder")]
    inputs = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in given]
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
