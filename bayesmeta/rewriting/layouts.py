"""Where convolutions have the numbers of their weights: rules for graphs of operations (`bayesmeta.rewriting`), on a CPU.

    weights      put with their channels last once, as convolutions want them, not for every one of them
    gradients    put in order by themselves, block by block, before they become a part of a vector

The compiler does both where the numbers are used: in every convolution of the same weights, and one by one, at two divisions a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .convolutions import CONVOLUTIONS, OURS
from .nodes import MANY, RESHAPES, is_real, is_tensor, shape

aten = torch.ops.aten


def lay_out_weights(graph: Graph) -> None:
    """Changes ``graph``, in which nothing may be written over in place."""
    users: dict[Node, list[Node]] = {}
    after = set[Node]()  # what hangs on weights that were put in another order, and may be in another one itself; so may our convolutions
    for node in graph.nodes:
        if node.target in CONVOLUTIONS and _is_large(weights := node.args[CONVOLUTIONS[node.target]]):
            users.setdefault(weights, []).append(node)
    for weights, convolutions in users.items():
        if len(convolutions) > 1 and weights.meta["val"].is_contiguous():
            last = weights.meta["val"].to(memory_format=torch.channels_last)
            laid = _in_order(weights, last.stride())
            for node in convolutions:
                node.replace_input_with(weights, laid)
            after.add(laid)
    for node in graph.nodes:
        if node.target in OURS or not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    output = graph.output_node()
    for node in after.intersection(output.all_input_nodes):
        if is_tensor(node) and node.op == "call_function" and _is_dense(node.meta["val"]):  # a graph's results stand as they did
            output.replace_input_with(node, _in_order(node, node.meta["val"].stride()))
    if users:
        for node in graph.find_nodes(op="call_function", target=aten.clone.default):
            if _is_large(node) and any(user.target in RESHAPES and len(shape(user)) == 1 for user in node.users):
                ordered = _in_order(node, node.meta["val"].contiguous().stride())
                node.replace_all_uses_with(ordered, delete_user_cb=lambda user, ordered=ordered: user is not ordered)


def _is_large(node: Any) -> bool:
    return is_real(node) and len(shape(node)) == 4 and node.meta["val"].numel() >= MANY


def _is_dense(value: torch.Tensor) -> bool:
    """Whether its numbers fill a piece of memory, in any order of its axes."""
    step = 1
    for stride, size in sorted((stride, n) for stride, n in zip(value.stride(), value.shape, strict=True) if n != 1):
        if stride != step:
            return False
        step *= size
    return True


def _in_order(node: Node, strides: Any) -> Node:
    """``node`` with such ``strides``, after it."""
    from torch._inductor import inductor_prims  # not before it is needed: it takes long to import

    with node.graph.inserting_after(node):
        made = node.graph.call_function(inductor_prims.force_stride_order, (node, list(strides)))
    made.meta["val"] = node.meta["val"].as_strided(shape(node), strides)
    return made
