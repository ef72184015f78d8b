"""Long sums read what they are of once, and in registers: rules for graphs of operations (`bayesmeta.rewriting`).

    Σ_i (− 2 c x_i)   →   − 2 c Σ_i x_i          what is constant along an axis of the sum is taken out of it
    Σ_ij x_ij         →   Σ_i (Σ_j x_ij)         where there are more numbers than TorchInductor adds up in registers

In the gradient of a batch norm the first spares two passes over all images: the sums that remain need nothing of one another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import SAME, call, is_tensor, shape

aten = torch.ops.aten
SUM = aten.sum.dim_IntList
CHUNK = 4096  # TorchInductor adds up more than that in pieces, for exactness
LONG = 256  # numbers in a sum over several axes from which on factors are taken out of it: shorter ones are fused with what they are of
DEEPEST = 20  # factors


def shorten_sums(graph: Graph) -> None:
    """Changes ``graph``, in which nothing may be written over in place."""
    for rule in (_take_factors_out, _add_up_in_two):
        for node in graph.find_nodes(op="call_function", target=SUM):
            if is_tensor(node) and shape(node.args[0]) and not node.kwargs and node.args[1] and node.meta["val"].is_floating_point():
                rule(node)


def _take_factors_out(node: Any) -> None:
    values, axes, *_ = node.args
    size = shape(values)
    axes = [axis % len(size) for axis in axes]
    if len(axes) < 2 or math.prod(size[axis] for axis in axes) < LONG:
        return
    inner, factors, constant = values, list[Any](), set(axes)
    while len(factors) < DEEPEST:
        found = _without_factor(inner, size, axes)
        if found is None or not constant & found[1]:
            break
        inner, along, *factor = found
        constant &= along
        factors.append(factor)
    if inner is values:
        return
    graph = node.graph
    with graph.inserting_before(node):
        total = _sum(inner, [axis for axis in axes if axis in constant])
        for target, other in reversed(factors):
            total = total if target is None else call(graph, target, total, *other)
        if set(axes) != constant or not _keeps(node):
            total = call(graph, SUM, total, axes, _keeps(node))
    _replace(node, total)


def _without_factor(node: Any, size: tuple[int, ...], axes: list[int]) -> tuple[Node, set[int], Any, tuple[Any, ...]] | None:
    """What ``node``, of ``size``, is a multiple of; along which of ``axes`` the factor is constant; how it multiplies, None by 1."""
    if not isinstance(node, Node) or node.op != "call_function" or node.kwargs or not is_tensor(node.args[0] if node.args else None):
        return None
    of, *others = node.args
    target: Any = node.target
    along, by = set(axes), tuple[Any, ...]()
    if target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) and isinstance(others[0], int | float):
        by = (others[0],)
    elif target in (aten.mul.Tensor, aten.div.Tensor) and is_tensor(others[0]):
        factor = others[0]
        if target == aten.mul.Tensor and shape(of) != size:
            of, factor = factor, of
        missing = len(size) - len(shape(factor))
        along, by = {axis for axis in axes if axis < missing or shape(factor)[axis - missing] == 1}, (factor,)
    elif target in SAME or (target == aten.pow.Tensor_Scalar and others[0] == 1):
        target = None
    elif target != aten.neg.default:
        return None
    alike = shape(of) == size and of.meta["val"].dtype == node.meta["val"].dtype  # type: ignore[union-attr]
    return (of, along, target, by) if alike and along else None  # type: ignore[return-value]


def _add_up_in_two(node: Any) -> None:
    """Over all axes but the first, then over that one: as exact as adding up in pieces."""
    values, axes, *_ = node.args
    size = shape(values)
    first, *others = sorted(axis % len(size) for axis in axes)
    rest = math.prod(size[axis] for axis in others)
    if node.meta["val"].device.type != "cpu" or not others or size[first] == 1 or not rest <= CHUNK < size[first] * rest:
        return
    with node.graph.inserting_before(node):
        whole = call(node.graph, SUM, _sum(values, others), axes, _keeps(node))
    _replace(node, whole)


def _sum(values: Any, axes: list[int]) -> Node:
    return call(values.graph, SUM, values, axes, True)


def _keeps(node: Any) -> bool:
    return len(node.args) > 2 and bool(node.args[2])


def _replace(node: Node, by: Node) -> None:
    by.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
