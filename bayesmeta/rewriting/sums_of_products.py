"""Sums of products are taken as one product: a rule for graphs of operations (`bayesmeta.rewriting`).

    Σ_t A_tᵀ B_t   →   [A_1; A_2; …]ᵀ [B_1; B_2; …]
    Σ_r (A B)_r    →   (Σ_r A_r) B

A gradient in θ is the sum of the tasks' own. Where those are products, or linear in such, the products are never written down; nor where
nothing but several such sums is made of them (over tasks and over particles).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .nodes import PRODUCTS, RESHAPES, SAME, TRANSPOSES, call, groups, is_tensor, order, shape, transposed_from

aten = torch.ops.aten
SUM = aten.sum.dim_IntList
SCALED = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
ADDED = (aten.add.Tensor, aten.sub.Tensor, aten.neg.default, *SAME)
LINEAR = (*ADDED, *SCALED, *RESHAPES, *TRANSPOSES, aten.cat.default)
DEEPEST = 60  # operations between a sum and a product that are looked through


class Axis(NamedTuple):
    """What is summed over: ``axis`` of a tensor, its numbers in groups ``(before, n, after)``, over n; ``before * after`` are left."""

    axis: int
    before: int = 1
    after: int = 1

    @property
    def left(self) -> int:
        """The size that the axis has afterwards."""
        return self.before * self.after


def add_up_within_products(graph: Graph) -> None:
    """Changes ``graph``, in which nothing may be written over in place: its sums along an axis of what has products in it."""
    sums = _Sums(graph)
    for node in graph.find_nodes(op="call_function", target=SUM):
        x, dims, *rest = node.args
        if node.kwargs or dims is None or len(dims) != 1 or not shape(x) or not x.meta["val"].is_floating_point():
            continue
        over = Axis(dims[0] % len(shape(x)))
        if not sums.reaches_product(x, over):
            continue
        with graph.inserting_before(node):
            total = sums.of(x, over)
            if not (rest and rest[0]):
                total = call(graph, aten.squeeze.dim, total, over.axis)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


class _Sums:
    """``only_summed``: nodes of which nothing but sums is made, which go away with them; ``made``: sums that are there already."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.only_summed = graph, set[Node]()
        self.made: dict[tuple[Node, Axis], Node] = {}
        self.reached: dict[tuple[Node, Axis], bool] = {}
        for node in reversed(graph.nodes):
            linear = {user for user in node.users if user.target in LINEAR and user in self.only_summed}
            if all(user in linear or (user.target == SUM and len(user.args[1] or ()) == 1) for user in node.users):
                self.only_summed.add(node)

    def reaches_product(self, node: Any, over: Axis, depth: int = 0) -> bool:
        """Whether `of` gets as far as a product."""
        if (node, over) not in self.reached:
            found = self._by_pairs(node, over) is not None or self._by_rows(node, over)
            parts = [] if found or depth == DEEPEST else self._parts(node, over) or []
            self.reached[node, over] = found or any(self.reaches_product(x, along, depth + 1) for x, along in parts if along)
        return self.reached[node, over]

    def of(self, node: Any, over: Axis, depth: int = 0) -> Node:
        """The sum of ``node``; the axis stays, with the size that is left."""
        if (node, over) not in self.made:
            self.made[node, over] = self._of(node, over, depth)
        return self.made[node, over]

    def _of(self, node: Any, over: Axis, depth: int) -> Node:
        graph, size = self.graph, shape(node)
        left = [over.left if d == over.axis else n for d, n in enumerate(size)]
        if (pair := self._by_pairs(node, over)) is not None:
            a, b = (call(graph, aten.reshape.default, x, [over.before, -1, shape(x)[-1]]) for x in pair)
            if over.before == 1:
                a, b = (call(graph, aten.select.int, x, 0, 0) for x in (a, b))
                total = call(graph, aten.mm.default, call(graph, aten.t.default, a), b)
            else:
                total = call(graph, aten.bmm.default, call(graph, aten.transpose.int, a, 1, 2), b)
            return call(graph, aten.reshape.default, total, left)
        if self._by_rows(node, over):
            a, b = node.args
            return call(graph, node.target, self._plainly(a, over), b)
        parts = self._parts(node, over) or []
        if depth == DEEPEST or not any(along and self.reaches_product(x, along, depth + 1) for x, along in parts):
            return self._plainly(node, over)
        times = size[over.axis] // over.left
        totals = [self.of(x, along, depth + 1) if along else call(graph, aten.mul.Tensor, x, times) for x, along in parts]
        if node.target in RESHAPES:
            return call(graph, aten.reshape.default, totals[0], left)
        if node.target in TRANSPOSES:
            return call(graph, node.target, totals[0], *node.args[1:])
        if node.target in SAME:
            return totals[0]
        if node.target == aten.cat.default:
            return call(graph, node.target, totals, *node.args[1:])
        if node.target in SCALED:
            return call(graph, node.target, *(totals[0] if arg is parts[0][0] else arg for arg in node.args))
        return call(graph, node.target, *totals)

    def _plainly(self, x: Any, over: Axis) -> Node:
        graph, size, (axis, before, after) = self.graph, shape(x), over
        if over.left == 1:
            return call(graph, SUM, x, [axis], True)
        apart = [*size[:axis], before, size[axis] // over.left, after, *size[axis + 1 :]]
        total = call(graph, SUM, call(graph, aten.reshape.default, x, apart), [axis + 1])
        return call(graph, aten.reshape.default, total, [*size[:axis], over.left, *size[axis + 1 :]])

    def _goes_away(self, node: Any) -> bool:
        """Whether nobody wants ``node``, a result of an operation, but for the sum, or other sums."""
        return node.op == "call_function" and (len(node.users) <= 1 or node in self.only_summed) and 0 not in shape(node)

    def _parts(self, node: Any, over: Axis) -> list[tuple[Node, Axis | None]] | None:
        """What ``node`` is a linear function of, each with the axis there; None of one that is the same for all. None where it is not."""
        if node.target not in LINEAR or not self._goes_away(node):
            return None
        if not all(is_tensor(x) and x.meta["val"].dtype == node.meta["val"].dtype for x in node.all_input_nodes):
            return None
        size, target, axis = shape(node), node.target, over.axis
        if target in ADDED and not node.kwargs:
            parts = [x for x in node.args if isinstance(x, Node)]
            if not len(parts) == len(node.args) == len(set(parts)):
                return None
            found = [(x, self._along(x, size, over)) for x in parts]
            # an axis that only some of the parts have is put where the others have it by what adds them up
            return found if all(along is None or along == over or len(shape(x)) < len(size) for x, along in found) else None
        if target in SCALED and not node.kwargs:
            return self._scaled(node, over)
        if target == aten.cat.default:
            parts, dim = node.args[0], (node.args[1] if len(node.args) > 1 else 0) % len(size)
            alike = len(parts) == len(set(parts)) and all(len(shape(x)) == len(size) for x in parts)
            return [(x, over) for x in parts] if dim != axis and alike else None
        if target in RESHAPES:
            return self._reshaped(node, over)
        if target in TRANSPOSES:
            return [(node.args[0], over._replace(axis=order(node)[axis]))]
        return None

    def _along(self, x: Any, size: tuple[int, ...], over: Axis) -> Axis | None:
        """The axis of ``x`` that becomes that of a result of ``size``; None where it is the same for all."""
        axis = over.axis - (len(size) - len(shape(x)))
        return over._replace(axis=axis) if axis >= 0 and shape(x)[axis] == size[over.axis] else None

    def _scaled(self, node: Any, over: Axis) -> list[tuple[Node, Axis | None]] | None:
        x, by = node.args
        size = shape(node)
        if isinstance(x, Node) and isinstance(by, int | float):
            return [(x, over)] if shape(x) == size else None
        if not (isinstance(x, Node) and isinstance(by, Node)) or x is by or size[over.axis] == 1:
            return None
        if node.target == aten.mul.Tensor and self._along(x, size, over) is None:
            x, by = by, x
        return [(x, over)] if shape(x) == size and self._along(by, size, over) is None else None

    def _reshaped(self, node: Any, over: Axis) -> list[tuple[Node, Axis | None]] | None:
        x, size = node.args[0], shape(node)
        for mine, theirs in groups(shape(x), size):
            if over.axis not in theirs or len(mine) != 1:
                continue
            if len(theirs) == 1:
                return [(x, over._replace(axis=mine[0]))]
            at = theirs.index(over.axis)
            before, after = (math.prod(size[d] for d in part) for part in (theirs[:at], theirs[at + 1 :]))
            return [(x, Axis(mine[0], before * over.before, over.after * after))]
        return None

    def _by_pairs(self, node: Any, over: Axis) -> tuple[Node, Node] | None:
        """(A, B) where ``node`` is Aᵀ B for each of many pairs, and ``over`` goes over those."""
        if not self._goes_away(node) or node.target != aten.bmm.default or over.axis != 0 or over.after != 1:
            return None
        a, b = node.args
        stands = transposed_from(a)
        return None if stands is None or transposed_from(b) is not None else (stands, b)

    def _by_rows(self, node: Any, over: Axis) -> bool:
        """Whether ``node`` is a product, and ``over`` goes over its rows."""
        size = shape(node)
        return self._goes_away(node) and node.target in PRODUCTS and over.axis == len(size) - 2 and size[over.axis] > over.left
