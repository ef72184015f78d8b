"""Graphs whose last results are put where some of their inputs stand, so that a training step needs no copying after it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

COPY = torch.ops.aten.copy_.default


def overwrite(module: GraphModule, places: Mapping[int, int]) -> None:
    """Changes a graph: result number i is written over input number ``places[i]``, at the end, and is no result any more."""
    graph = module.graph
    inputs, output = graph.find_nodes(op="placeholder"), graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(output):
        for i, place in places.items():
            written = graph.call_function(COPY, (inputs[place], results[i]))
            written.meta = dict(inputs[place].meta)
    output.args = (tuple(result for i, result in enumerate(results) if i not in places),)
    module.recompile()


def overwritten(module: GraphModule) -> list[int]:
    """The numbers of the inputs that a graph writes over at its end."""
    inputs = module.graph.find_nodes(op="placeholder")
    return [inputs.index(write.args[0]) for write in _writes(module)]


def give_back(module: GraphModule) -> dict[int, int]:
    """Undoes `overwrite`: what is written over inputs at the end becomes results; returns which of them goes where.

    A program's own last writes over inputs are among them: nothing reads those any more.
    """
    graph, output = module.graph, module.graph.output_node()
    places, writes = overwritten(module), _writes(module)
    results = list(output.args[0])  # type: ignore[arg-type]
    output.args = ((*results, *(write.args[1] for write in writes)),)
    for write in writes:
        graph.erase_node(write)
    module.recompile()
    return dict(enumerate(places, start=len(results)))


def _writes(module: GraphModule) -> list[Node]:
    """The last operations of a graph, as far as they write over its inputs and nothing more."""
    found, node = list[Node](), module.graph.output_node().prev
    while node.target == COPY and not node.users and isinstance(node.args[0], Node) and node.args[0].op == "placeholder":
        found.append(node)
        node = node.prev
    return found[::-1]
