"""What is the same for all tasks is worked out once: a rule for graphs of operations (`bayesmeta.rewriting`).

A step's tasks begin at one θ, spread out to φ ``(T, D)`` by `expand`. What follows of it is the same for each task until a task's own
data come in. Here a value that is the same along an axis is kept once (size 1 there: "thin"), and spread out only where no rule is known:

    f(expand a, expand b)      →  expand f(a, b)               operations number by number; moves of axes, sums and means likewise
    A_t @ expand W, all t      →  [A_1; A_2; …] @ W            one product of many rows in place of T small ones

JAX's `vmap` comes to the same products, by keeping what is not batched apart from what is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .nodes import RESHAPES, SAME, TRANSPOSES, groups, is_tensor, order, shape, transposed_from

aten = torch.ops.aten
Axes = frozenset[int]
Copied = tuple[Node, Axes]  # a node's copy, and its thin axes
NONE: Axes = frozenset()
SMALL = 8  # how much smaller than the product a factor is that may be copied
SUMS = (aten.sum.dim_IntList, aten.sum.default)
MEANS = (aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default)


def shared(module: GraphModule) -> GraphModule:
    """A copy of a graph in which what is the same along an axis is worked out once, its views reshapes: they hang on no memory.

    Not for graphs in which something is written over in place (`nodes.is_pure`).
    """
    return _Thin(module).run()


class _Thin:
    """Copies a graph node by node. ``new``: a node's copy; ``thin``: the axes along which that has one number for many equal ones."""

    def __init__(self, module: GraphModule) -> None:
        self.module, self.graph = module, Graph()
        self.new: dict[Node, Node] = {}
        self.thin: dict[Node, Axes] = {}
        self.whole: dict[tuple[Node, Axes], Node] = {}

    def run(self) -> GraphModule:
        """The graph's copy."""
        for node in self.module.graph.nodes:
            rule = self._rule(node)
            found = rule(node) if rule else None
            if found is None:
                spread = self._written_out if node.op == "output" else self._spread
                found = self.graph.node_copy(node, spread), NONE
                if node.target in RESHAPES:
                    found[0].target = aten.reshape.default
            self.new[node], self.thin[node] = found
        self.graph.eliminate_dead_code()
        return GraphModule(self.module, self.graph)

    def _rule(self, node: Node) -> Callable[[Node], Copied | None] | None:
        if node.op != "call_function" or not all("val" in x.meta for x in (node, *node.all_input_nodes)):
            return None
        if any(0 in shape(x) for x in (node, *node.all_input_nodes)):
            return None
        if node.target in RULES:
            return RULES[node.target].__get__(self)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags and is_tensor(node):
            return self._pointwise
        return None

    def _spread(self, node: Node, keep: Axes = NONE) -> Node:
        """The copy of ``node`` with its thin axes, but for those of ``keep``, at their full size."""
        if self.thin[node] <= keep:
            return self.new[node]
        if (node, keep) not in self.whole:
            size = [1 if d in keep else n for d, n in enumerate(shape(node))]
            self.whole[node, keep] = self._call(aten.expand.default, self.new[node], size)
        return self.whole[node, keep]

    def _written_out(self, node: Node) -> Node:
        """The copy of a result, every number in a place of its own where the graph itself had it so: others rely on where numbers stand."""
        whole = self._spread(node)
        own = any(node.meta["val"].stride(d) for d in self.thin[node])
        return self._call(aten.clone.default, whole, memory_format=torch.contiguous_format) if own else whole

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def _copy(self, node: Any, *args: Any) -> Node:
        """``node``'s operation on other arguments."""
        return self.graph.call_function(node.target, (*args, *map_arg(node.args[len(args) :], self.new.__getitem__)), dict(node.kwargs))

    # --- rules: a node to its copy and that one's thin axes; None: spread everything out

    def _expand(self, node: Any) -> Copied | None:
        (x, *_), size = node.args, shape(node)
        before, more = shape(x), len(size) - len(shape(x))
        copied = self.new[x]
        for _ in range(more):
            copied = self._call(aten.unsqueeze.default, copied, 0)
        widened = {d for d, n in enumerate(size) if n > 1 and (d < more or before[d - more] == 1)}
        return copied, frozenset({d + more for d in self.thin[x]} | widened)

    def _same(self, node: Any) -> Copied | None:
        x = node.args[0]
        if node.target != aten.clone.default:
            return self.new[x], self.thin[x]
        return (self._call(node.target, self.new[x]), self.thin[x]) if self.thin[x] else None

    def _pointwise(self, node: Any) -> Copied | None:
        size = shape(node)
        filled = set[int]()
        for arg in node.all_input_nodes:
            if not is_tensor(arg):
                return None
            more = len(size) - len(shape(arg))
            filled |= {d + more for d, n in enumerate(shape(arg)) if n > 1 and d not in self.thin[arg]}
        return self.graph.node_copy(node, self.new.__getitem__), frozenset(d for d, n in enumerate(size) if n > 1 and d not in filled)

    def _reshape(self, node: Any) -> Copied | None:
        x, size = node.args[0], shape(node)
        if size == shape(x):
            return self.new[x], self.thin[x]
        if not self.thin[x]:
            return None
        keep, after = set[int](), set[int]()
        for mine, theirs in groups(shape(x), size):
            if all(d in self.thin[x] for d in mine) or (len(mine) == len(theirs) == 1 and mine[0] in self.thin[x]):
                keep |= {*mine}
                after |= {*theirs}
        copied = self._spread(x, frozenset(keep) & self.thin[x])
        return self._call(aten.reshape.default, copied, [1 if d in after else n for d, n in enumerate(size)]), frozenset(after)

    def _permute(self, node: Any) -> Copied | None:
        x = node.args[0]
        axes = order(node)
        return self._copy(node, self.new[x]), frozenset(axes.index(d) for d in self.thin[x])

    def _unsqueeze(self, node: Any) -> Copied | None:
        x, dim = node.args
        at = dim % (len(shape(x)) + 1)
        return self._copy(node, self.new[x]), frozenset(d + (d >= at) for d in self.thin[x])

    def _squeeze(self, node: Any) -> Copied | None:
        x, dim = node.args
        before = shape(x)
        if not before:
            return None
        dims = sorted(d % len(before) for d in ([dim] if isinstance(dim, int) else dim))
        if any(before[d] != 1 for d in dims):
            return None
        return self._copy(node, self.new[x]), frozenset(d - sum(e < d for e in dims) for d in self.thin[x])

    def _select(self, node: Any) -> Copied | None:
        x, dim, index = node.args
        at = dim % len(shape(x))
        if at in self.thin[x]:
            index = 0
        return self._copy(node, self.new[x], dim, index), frozenset(d - (d > at) for d in self.thin[x] - {at})

    def _slice(self, node: Any) -> Copied | None:
        x, at = node.args[0], (node.args[1] if len(node.args) > 1 else 0) % len(shape(node))
        if shape(node) == shape(x):
            return self.new[x], self.thin[x]
        if at in self.thin[x]:
            if shape(node)[at] == 0:
                return None
            return self.new[x], self.thin[x] if shape(node)[at] > 1 else self.thin[x] - {at}
        return self._copy(node, self.new[x]), self.thin[x]

    def _split(self, node: Any) -> Copied | None:
        x = node.args[0]
        at = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(shape(x))
        keep = self.thin[x] - {at}
        return self._copy(node, self._spread(x, keep)), keep

    def _getitem(self, node: Any) -> Copied | None:
        x = node.args[0]
        return self.graph.node_copy(node, self.new.__getitem__), self.thin[x]

    def _cat(self, node: Any) -> Copied | None:
        parts = node.args[0]
        if len(parts) == 1:
            return self._call(aten.clone.default, self.new[parts[0]]), self.thin[parts[0]]
        at = (node.args[1] if len(node.args) > 1 else 0) % len(shape(node))
        if any(len(shape(p)) != len(shape(node)) for p in parts):
            return None
        keep = frozenset.intersection(*(self.thin[p] for p in parts)) - {at}
        return self._copy(node, [self._spread(p, keep) for p in parts]), keep

    def _reduce(self, node: Any) -> Copied | None:
        x, before = node.args[0], shape(node.args[0])
        if not self.thin[x] or node.meta["val"].dtype == torch.bool:
            return None
        dims = node.args[1] if len(node.args) > 1 else None
        dims = {d % len(before) for d in ([dims] if isinstance(dims, int) else dims or range(len(before)))}
        keepdim = len(node.args) > 2 and node.args[2]
        copied = self._copy(node, self.new[x])
        times = math.prod(before[d] for d in dims & self.thin[x])
        if node.target in SUMS and times > 1:
            copied = self._call(aten.mul.Tensor, copied, times)
        left = self.thin[x] - dims
        return copied, left if keepdim else frozenset(d - sum(e < d for e in dims) for d in left)

    def _mm(self, node: Any) -> Copied | None:
        a, b = node.args
        rows, columns = self.thin[a] & {0}, self.thin[b] & {1}
        return self._call(node.target, self._spread(a, rows), self._spread(b, columns)), rows | columns

    def _bmm(self, node: Any) -> Copied | None:
        a, b = node.args
        rows, columns, each = self.thin[a] & {1}, self.thin[b] & {2}, self.thin[a] & self.thin[b] & {0}
        if each or not (0 in self.thin[a] or 0 in self.thin[b] or self._spread_from(a) or self._spread_from(b)):
            return self._call(node.target, self._spread(a, rows | each), self._spread(b, columns | each)), rows | columns | each
        found = None
        if not rows and not columns:
            found = self._many_rows(a, b) or self._many_columns(a, b)
        return (found or self._call(node.target, self._spread(a, rows), self._spread(b, columns))), rows | columns

    def _spread_from(self, node: Any) -> tuple[Node, int] | None:
        """Of matrices ``(M · T, …)`` that are the same for all T: the copy of what has them once, ``(M, …)``, and M; None for others.

        Axes before the matrices were put into one, which an axis of equal numbers does not survive.
        """
        while node.op == "call_function" and node.target in SAME:
            node = node.args[0]
        if (stands := transposed_from(node)) is not None:
            found = self._spread_from(stands)
            return found and (self._call(aten.transpose.int, found[0], 1, 2), found[1])
        if node.op != "call_function" or node.target not in RESHAPES:
            return None
        x = node.args[0]
        before, size = shape(x), shape(node)
        lead = len(before) - 2
        if lead < 2 or before[-2:] != size[-2:] or self.thin[x] != {lead - 1}:
            return None
        times = math.prod(before[: lead - 1])
        return self._call(aten.reshape.default, self.new[x], [times, *size[1:]]), times

    def _once(self, node: Any) -> tuple[Node, int] | None:
        """Matrices ``(M · T, …)`` that are the same for all T, once, and M."""
        if self.thin[node]:
            return (self.new[node], 1) if self.thin[node] == {0} else None
        return self._spread_from(node)

    def _many_rows(self, a: Any, b: Any) -> Node | None:
        """A_t @ W for all t: the rows of all A_t behind each other. Not where A is large and a transpose, to be copied."""
        if self.thin[a]:
            return None
        (batch, rows, inner), columns = shape(a), shape(b)[-1]
        if (transposed_from(a) is not None and inner * SMALL > columns) or (once := self._once(b)) is None:
            return None
        w, times = once
        return self._rows_by(self.new[a], w, times, batch, rows, inner, columns)

    def _many_columns(self, a: Any, b: Any) -> Node | None:
        """W @ B_t for all t, as (B_tᵀ @ Wᵀ)ᵀ where B_tᵀ stands there as it is, or is small."""
        stands = transposed_from(b)
        (batch, rows, inner), columns = shape(a), shape(b)[-1]
        if self.thin[b] or (stands is not None and self.thin[stands]) or (stands is None and inner * SMALL > rows):
            return None
        if (once := self._once(a)) is None:
            return None
        w, times = once
        turned = self._call(aten.transpose.int, w, 1, 2)
        right = self._call(aten.transpose.int, self.new[b], 1, 2) if stands is None else self.new[stands]
        return self._call(aten.transpose.int, self._rows_by(right, turned, times, batch, columns, inner, rows), 1, 2)

    def _rows_by(self, a: Node, w: Node, times: int, batch: int, rows: int, inner: int, columns: int) -> Node:
        if times == 1:
            flat = self._call(aten.reshape.default, a, [batch * rows, inner])
            product = self._call(aten.mm.default, flat, self._call(aten.select.int, w, 0, 0))
        else:
            flat = self._call(aten.reshape.default, a, [times, batch // times * rows, inner])
            product = self._call(aten.bmm.default, flat, w)
        return self._call(aten.reshape.default, product, [batch, rows, columns])


RULES: dict[Any, Any] = {
    aten.expand.default: _Thin._expand, aten.unsqueeze.default: _Thin._unsqueeze, aten.squeeze.dim: _Thin._squeeze,
    aten.squeeze.dims: _Thin._squeeze, aten.select.int: _Thin._select, aten.slice.Tensor: _Thin._slice,
    aten.split_with_sizes.default: _Thin._split, aten.split.Tensor: _Thin._split, operator.getitem: _Thin._getitem,
    aten.cat.default: _Thin._cat, aten.mm.default: _Thin._mm, aten.bmm.default: _Thin._bmm,
    **dict.fromkeys(SAME, _Thin._same), **dict.fromkeys(RESHAPES, _Thin._reshape), **dict.fromkeys(TRANSPOSES, _Thin._permute),
    **dict.fromkeys((*SUMS, *MEANS), _Thin._reduce),
}  # fmt: skip
