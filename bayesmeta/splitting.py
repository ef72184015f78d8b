"""A graph of an inner step and of its derivative as two: the step, then what hangs on the slopes that come back to it.

The second graph takes the step anew, but for results that took long to compute and are kept between the two: those of convolutions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .rewriting import CONVOLUTIONS, is_view


class NotInTwo(RuntimeError):
    """What was to come first hangs on the slopes."""


def split(joint: GraphModule, slopes: range, results: int, memory: float) -> tuple[GraphModule, GraphModule]:
    """``joint`` as two graphs, one of its first ``results`` results, one of its further ones.

    ``slopes``: which inputs only the second one takes. What is kept are the first one's last results and stands before the slopes among the
    second one's inputs, where it takes no more than ``memory`` bytes. Raises NotInTwo where the first results hang on ``slopes``.
    """
    inputs = joint.graph.find_nodes(op="placeholder")
    outputs: Sequence[Node] = joint.graph.output_node().args[0]  # type: ignore[assignment]
    hanging = _hanging(joint.graph, [inputs[i] for i in slopes])
    writing = [node for node in joint.graph.nodes if _writes(node)]
    kept = [] if writing else _kept(outputs[results:], hanging)
    if sum(node.meta["val"].nbytes for node in kept) > memory:
        kept = []
    before, after = inputs[: slopes.start], inputs[slopes.stop :]
    if not hanging.isdisjoint(outputs[:results]):
        raise NotInTwo("a step's result hangs on the slopes")
    first = _part(joint, [*before, *after], [*outputs[:results], *kept], [node for node in writing if node not in hanging])
    second = _part(joint, [*before, *kept, *(inputs[i] for i in slopes), *after], outputs[results:], writing)
    return first, second


def _hanging(graph: Graph, first: Sequence[Node]) -> set[Node]:
    """What hangs on ``first``, or stands where something that does is written."""
    found, before = set(first), 0
    while before < len(found):
        before = len(found)
        for node in graph.nodes:
            if found.isdisjoint(node.all_input_nodes):
                continue
            found.add(node)
            for place in _places(node):
                while place.op == "call_function" and (_writes(place) or is_view(place)):
                    place = place.all_input_nodes[0]
                found.add(place)  # and so, the next time, all other views of it
    return found


def _places(node: Node) -> list[Node]:
    """What ``node`` writes over."""
    if not _writes(node):
        return []
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in arguments]
    given = [node.args[i] if i < len(node.args) else node.kwargs.get(argument.name) for i, argument in enumerate(arguments)]
    found = list[Node]()
    map_arg([value for value, over in zip(given, written, strict=True) if over], found.append)
    return found or list(node.all_input_nodes)


def _kept(outputs: Sequence[Node], hanging: set[Node]) -> list[Node]:
    """Results of convolutions, not ``hanging``, that ``outputs`` are made of."""
    found, seen, todo = list[Node](), set[Node](), [*outputs]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        maker = node.args[0] if node.target is operator.getitem else node
        if node not in hanging and isinstance(maker, Node) and maker.target in CONVOLUTIONS:
            found.append(node)
        else:
            todo += node.all_input_nodes
    return found


def _writes(node: Node) -> bool:
    return node.op == "call_function" and node.is_impure()


def _part(joint: GraphModule, inputs: Sequence[Node], outputs: Sequence[Node], also: Sequence[Node]) -> GraphModule:
    """The graph that makes ``outputs`` of ``inputs``, with what is done in place: ``also``."""
    graph, copied = Graph(), dict[Node, Node]()
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    needed, todo = set(inputs), [*outputs, *also]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    for node in joint.graph.nodes:
        if node in needed and node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output([copied[node] for node in outputs])
    return GraphModule(joint, graph)
