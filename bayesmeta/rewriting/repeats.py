"""What a graph works out twice, from the same numbers in the same way, is worked out once: a rule for graphs (`bayesmeta.rewriting`)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import is_view


def work_out_once(graph: Graph) -> None:
    """Changes ``graph``, in which nothing may be written over in place."""
    found: dict[Any, Node] = {}
    given = _given(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in given or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        key = (node.target, _fixed(node.args), _fixed(node.kwargs))
        first = found.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _given(graph: Graph) -> set[Node]:
    """The results, and what they are views of: each in a place of its own, for somebody may write over one of them."""
    found, todo = set[Node](), list(graph.output_node().all_input_nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            if is_view(node):
                todo += node.all_input_nodes
    return found


def _fixed(value: Any) -> Any:
    """Something of which a dictionary can be asked; 1, 1.0 and True are told apart, and 0.0 and -0.0."""
    if isinstance(value, list | tuple):
        return tuple(_fixed(v) for v in value)
    if isinstance(value, dict):
        return tuple((name, _fixed(v)) for name, v in value.items())
    return value if isinstance(value, Node) else (type(value), repr(value) if isinstance(value, float) else value)
