"""Sums of products are taken as one product: a rule for graphs of operations (`bayesmeta.rewriting`).

    Σ_t A_tᵀ B_t   →   [A_1; A_2; …]ᵀ [B_1; B_2; …]

A gradient in θ is the sum of the tasks' own. Where those are products, their sums, or put together of such, they are never written down.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import RESHAPES, SAME, TRANSPOSES, groups, order, shape, transposed_from

aten = torch.ops.aten
DEEPEST = 60  # operations between a sum and a product that are looked through


def add_up_within_products(graph: Graph) -> None:
    """Changes ``graph``, in which nothing may be written over in place: its sums along an axis of what has products in it."""
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        x, dims, *rest = node.args
        if node.kwargs or dims is None or len(dims) != 1 or not shape(x):
            continue
        at = dims[0] % len(shape(x))
        if not _reaches_product(x, at):
            continue
        with graph.inserting_before(node):
            total = _summed(x, at)
            if not (rest and rest[0]):
                total = graph.call_function(aten.squeeze.dim, (total, at))
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def _reaches_product(node: Any, at: int, depth: int = 0) -> bool:
    """Whether `_summed` gets as far as a product."""
    return _product_of(node, at) is not None or any(_reaches_product(x, d, depth + 1) for x, d in _parts(node, at, depth))


def _parts(node: Any, at: int, depth: int) -> list[tuple[Node, int]]:
    """What ``node``, which nobody else wants, is a linear function of, each with the axis there that ``at`` is here; [] where it is not."""
    if node.op != "call_function" or len(node.users) > 1 or depth == DEEPEST or 0 in shape(node):
        return []
    size, target = shape(node), node.target
    if target in (aten.add.Tensor, aten.sub.Tensor, aten.neg.default, *SAME) and not node.kwargs:
        parts = [x for x in node.args if isinstance(x, Node)]
        each_once = len(parts) == len(node.args) == len(set(parts))
        return [(x, at) for x in parts] if each_once and all(shape(x) == size for x in parts) else []
    if target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        x, by = node.args
        return [(x, at)] if isinstance(x, Node) and shape(x) == size and isinstance(by, int | float) else []
    if target == aten.cat.default:
        parts, dim = node.args[0], (node.args[1] if len(node.args) > 1 else 0) % len(size)
        alike = len(parts) == len(set(parts)) and all(len(shape(x)) == len(size) for x in parts)
        return [(x, at) for x in parts] if dim != at and alike else []
    if target in RESHAPES:
        x = node.args[0]
        return [(x, mine[0]) for mine, theirs in groups(shape(x), size) if [at] == theirs and len(mine) == 1]
    if target in TRANSPOSES:
        return [(node.args[0], order(node)[at])]
    return []


def _summed(node: Any, at: int, depth: int = 0) -> Node:
    """The sum of ``node`` along an axis, which stays with size 1."""
    graph = node.graph
    call = graph.call_function
    if (product := _product_of(node, at)) is not None:
        left, right, times = product
        (batch, rows, inner), columns = shape(left), shape(right)[-1]
        each = [times, batch // times * rows]
        a, b = call(aten.reshape.default, (left, [*each, inner])), call(aten.reshape.default, (right, [*each, columns]))
        if times == 1:
            a, b = (call(aten.select.int, (x, 0, 0)) for x in (a, b))
            total = call(aten.mm.default, (call(aten.t.default, (a,)), b))
        else:
            total = call(aten.bmm.default, (call(aten.transpose.int, (a, 1, 2)), b))
        return call(aten.reshape.default, (total, [1 if d == at else n for d, n in enumerate(shape(node))]))
    parts = _parts(node, at, depth)
    if not any(_reaches_product(x, d, depth + 1) for x, d in parts):
        return call(aten.sum.dim_IntList, (node, [at], True))
    totals = [_summed(x, d, depth + 1) for x, d in parts]
    if node.target in RESHAPES:
        return call(aten.reshape.default, (totals[0], [1 if d == at else n for d, n in enumerate(shape(node))]))
    if node.target in SAME:
        return totals[0]
    if node.target == aten.cat.default:
        return call(node.target, (totals, *node.args[1:]))
    return call(node.target, (*totals, *node.args[len(totals) :]))


def _product_of(node: Any, at: int) -> tuple[Node, Node, int] | None:
    """(A, B, M) where ``node`` is the product of ``A (M · T, r, k)`` transposed and ``B (M · T, r, n)``, ``at`` its axis of T."""
    if node.op != "call_function" or len(node.users) > 1 or 0 in shape(node):
        return None
    times, product = 1, node
    if node.target in RESHAPES and isinstance(node.args[0], Node) and len(node.args[0].users) == 1:
        product, size = node.args[0], shape(node)
        if product.target != aten.bmm.default or size[-2:] != shape(product)[-2:] or at != len(size) - 3:
            return None
        times = math.prod(size[:at])
    elif at != 0:
        return None
    if product.target != aten.bmm.default:
        return None
    a, b = product.args
    stands = transposed_from(a)
    return None if stands is None or transposed_from(b) is not None else (stands, b, times)
