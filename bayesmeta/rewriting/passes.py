"""Fewer passes over large tensors: rules for graphs of operations (`bayesmeta.rewriting`), on a CPU.

    A (2 B)          →   (2 A) B            where A, or else the product, is much the smaller
    cat(x, y) + z    →   cat(x + z₁, y + z₂)

A product puts its result into memory; so does `cat`, to which the compiler copies what is there already. What is done to B on its way into
a product, or to a gradient put together of its parts, was a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import MANY, PRODUCTS, RESHAPES, SAME, TRANSPOSES, call, is_real, is_tensor, shape
from .products import PRODUCT

aten = torch.ops.aten
VIEWS = (*RESHAPES, *SAME, *TRANSPOSES)
SMALLER = 8  # times
MORE = 200  # operations on parts, up to which there may be more for it
MOST = 12  # parts of a tensor that are gone through one by one


def pass_less(graph: Graph) -> None:
    """Changes ``graph``, in which nothing may be written over in place."""
    more = 0
    for node in list(graph.nodes):
        if not is_real(node):
            continue
        if node.target in (PRODUCT, *PRODUCTS) and not node.kwargs:
            _take_factors_out(node)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()) and more < MORE:
            more += _part_by_part(node)


def _take_factors_out(product: Any) -> None:
    sizes = [x.meta["val"].numel() for x in (*product.args, product)]
    for i in range(2):
        if sizes[i] < MANY or sizes[i] < SMALLER * min(sizes[1 - i], sizes[2]):
            continue
        factor, x, views = 1.0, product.args[i], list[Any]()
        while x.op == "call_function" and not x.kwargs:
            if x.target in VIEWS:
                views.append(x)
            elif x.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(x.args[1], int | float) and _alike(x.args[0], x):
                factor *= x.args[1]
            else:
                break
            x = x.args[0]
        if factor == 1.0:
            continue
        with product.graph.inserting_before(product):
            for view in reversed(views):
                x = call(product.graph, view.target, x, *view.args[1:])
            args = [x if j == i else product.args[j] for j in range(2)]
            if sizes[1 - i] <= sizes[2]:
                args[1 - i] = call(product.graph, aten.mul.Tensor, args[1 - i], factor)
                factor = 1.0
            product.args = tuple(args)
        if factor != 1.0:
            with product.graph.inserting_after(product):
                scaled = call(product.graph, aten.mul.Tensor, product, factor)
            product.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)


def _alike(one: Any, other: Any) -> bool:
    return is_tensor(one) and shape(one) == shape(other) and one.meta["val"].dtype == other.meta["val"].dtype


def _part_by_part(node: Any) -> int:
    """What is done to the result of `cat`, which nobody else wants, done to its parts; how many operations that makes."""
    size = shape(node)
    whole = [x for x in node.all_input_nodes if x.target == aten.cat.default and len(x.users) == 1 and shape(x) == size]
    if len(whole) != 1 or node.kwargs or whole[0].kwargs or node.meta["val"].numel() < MANY:
        return 0
    (whole,) = whole
    parts, dim = whole.args[0], (whole.args[1] if len(whole.args) > 1 else 0) % len(size)
    others = [x for x in node.args if isinstance(x, Node) and x is not whole]
    if not 1 < len(parts) <= MOST or not all(is_tensor(x) for x in (*parts, *others)) or sum(a is whole for a in node.args) != 1:
        return 0
    if any(p.meta["val"].dtype != whole.meta["val"].dtype or len(shape(p)) != len(size) for p in parts):
        return 0
    if whole.meta["val"].dtype != node.meta["val"].dtype:
        return 0
    graph, done, start = node.graph, list[Node](), 0
    with graph.inserting_before(node):
        for part in parts:
            end, args = start + shape(part)[dim], list[Any]()
            for arg in node.args:
                axis = dim - (len(size) - len(shape(arg))) if isinstance(arg, Node) else -1
                if arg is whole:
                    arg = part
                elif axis >= 0 and shape(arg)[axis] > 1:
                    arg = call(graph, aten.slice.Tensor, arg, axis, start, end)
                args.append(arg)
            done.append(call(graph, node.target, *args))
            start = end
        together = call(graph, aten.cat.default, done, dim)
    node.replace_all_uses_with(together)
    graph.erase_node(node)
    graph.erase_node(whole)
    return len(parts)
