"""Divisions, which take a processor several times as long as a multiplication: rules for graphs of operations (`bayesmeta.rewriting`).

    x / 3                →   x · (1 / 3)                       XLA does so, too
    x / b, b repeated    →   x · once(1 / b)
    f(exp a), a repeated →   f(once(exp a))                    likewise logarithms, powers, …

TorchInductor works out again, number by number of the larger result, whatever is cheap to write: a bandwidth or a variance in each of all
weights' kernels. `once` is the identity that has its argument put into memory first. For graphs on a CPU.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import MANY, RESHAPES, SAME, TRANSPOSES, call, is_real, is_tensor, shape

aten = torch.ops.aten
DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
SLOW = {
    *DIVISIONS, aten.reciprocal.default, aten.sqrt.default, aten.rsqrt.default, aten.exp.default, aten.expm1.default, aten.log.default,
    aten.log1p.default, aten.tanh.default, aten.sigmoid.default, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.erf.default,
    aten.softplus.default, aten.logaddexp.default, aten.lgamma.default, aten.digamma.default,
}  # fmt: skip
VIEWS = (*RESHAPES, *SAME, *TRANSPOSES, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default)
TIMES = 8  # so often repeated a result must be to be put into memory
EXACT = (torch.float32, torch.float64)  # types of which a sum does not overflow where a mean does not
RANGE = (1e-30, 1e30)  # numbers that have a reciprocal of all digits

_library = torch.library.Library("bayesmeta", "FRAGMENT")
_library.define("once(Tensor x) -> Tensor")
_library.impl("once", torch.clone, "CPU")
_library.impl("once", torch.empty_like, "Meta")
ONCE = torch.ops.bayesmeta.once.default


def add_up_for_means(graph: Graph) -> None:
    """Means as sums, for the rules about those."""
    for node in graph.find_nodes(op="call_function", target=aten.mean.dim):
        x, axes, *keep = node.args
        size = shape(x)
        if node.kwargs or not size or not axes or 0 in size or not is_tensor(node) or node.meta["val"].dtype not in EXACT:
            continue
        with graph.inserting_before(node):
            total = call(graph, aten.sum.dim_IntList, x, axes, *keep)
        node.target, node.args = aten.mul.Tensor, (total, 1.0 / math.prod(size[axis] for axis in axes))


def divide_less(graph: Graph) -> None:
    """Changes ``graph``, in which nothing may be written over in place."""
    for node in list(graph.nodes):
        if is_real(node) and node.target in DIVISIONS and not node.kwargs:
            _multiply(node)
    if is_lowered():
        _put_down(graph)


def _multiply(node: Any) -> None:
    x, by = node.args
    if not is_tensor(x) or x.meta["val"].dtype != node.meta["val"].dtype:
        return
    if isinstance(by, int | float):
        if RANGE[0] < abs(by) < RANGE[1]:
            node.target, node.args = aten.mul.Tensor, (x, 1.0 / by)
    elif is_tensor(by) and by.meta["val"].dtype == x.meta["val"].dtype and _repeated(by, node):
        with node.graph.inserting_before(node):
            node.target, node.args = aten.mul.Tensor, (x, call(node.graph, aten.reciprocal.default, by))


def _repeated(small: Any, large: Any) -> bool:
    n = large.meta["val"].numel()
    return n >= MANY and small.meta["val"].numel() * TIMES <= n


def _put_down(graph: Graph) -> None:
    slow = set[Node]()  # what the compiler would work out again for each number of a larger result, and takes long
    for node in list(graph.nodes):
        if not is_real(node):
            continue
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not pointwise and node.target not in VIEWS:
            continue
        for x in [x for x in node.all_input_nodes if x in slow and _repeated(x, node)]:
            with graph.inserting_after(x):
                kept = graph.call_function(ONCE, (x,))
            kept.meta["val"] = x.meta["val"]
            x.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
            slow.discard(x)
        if (pointwise and node.target in SLOW) or any(x in slow for x in node.all_input_nodes):
            slow.add(node)


@functools.cache
def is_lowered() -> bool:
    """Whether TorchInductor puts what is asked for once into memory; tells it how when first asked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on itself
            from torch._inductor import compile_fx  # noqa: F401 - the first one first: the others import each other
            from torch._inductor.lowering import register_lowering
    except ImportError:  # no part of torch's interface
        return False

    def lower(x: Any) -> Any:
        x.realize()
        return x

    register_lowering(ONCE, type_promotion_kind=None)(lower)
    return True
