"""What is done to a graph of operations before TorchInductor compiles it: products of matrices, and factors of small ones, done faster.

    (A B)ᵀ  →  Bᵀ Aᵀ     a gradient in weights comes out transposed, and setting it right number by number took longer than the product
    float32 A B          by code of our own on the CPU (`products`); convolutions likewise (`convolutions`)
    a row, a column      number by number, which is fused with what is round it
    long sums            without what is constant in them, and in two steps (`long_sums`)
    axes put into one    their numbers kept in the order of the result (convolutions as products)
    the same for all     once (`sharing`); sums of products within the product (`sums_of_products`)
    Cholesky, n ≤ 3      plain operations (`small_matrices`)
    medians on a CPU     the value in the middle by its place, for which there is a way without Python
    its check of errors  NaN where it fails, which a step's own check finds: an error raised in a graph keeps it from the disk cache
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from . import small_matrices
from .convolutions import convolve_here
from .divisions import add_up_for_means, divide_less
from .layouts import lay_out_weights
from .long_sums import shorten_sums
from .nodes import MANY, PRODUCTS, call, groups, is_pure, is_tensor, note_values, shape, transposed_from
from .overwriting import give_back, overwrite
from .passes import pass_less
from .products import multiply_here
from .repeats import work_out_once
from .sharing import shared
from .sums_of_products import add_up_within_products

aten = torch.ops.aten
SUMS = (aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)  # transposed by transposing what they are of
ROWS, NARROW = 500, 16
FEW = 100_000  # multiplications up to which a product with a single row or column is taken number by number
FACTORS: dict[Any, tuple[int, Callable[..., Any]]] = {  # of small matrices: which argument is one, and what is put in place
    aten.linalg_cholesky_ex.default: (0, small_matrices.cholesky_ex),
    aten.linalg_solve_triangular.default: (0, small_matrices.solve_triangular),
    aten.cholesky_solve.default: (1, small_matrices.cholesky_solve),
    aten.cholesky_inverse.default: (0, small_matrices.cholesky_inverse),
}


def rewritten(module: GraphModule) -> GraphModule:
    """A copy of ``module`` with the rules above applied, and without what tracing noted of its tensors."""
    given = _copied(module)
    places = give_back(given)
    whole = _with_faster_products(given) if is_pure(given.graph) else given
    graph = whole.graph
    for node in list(graph.nodes):
        if node.target == aten._linalg_check_errors.default:
            _mark_failures(node)
    for node in list(graph.nodes):
        if node.target in FACTORS:
            which, instead = FACTORS[node.target]
            if 1 <= shape(node.args[which])[-1] <= small_matrices.LARGEST:
                _written_out(node, instead)
    for node in graph.find_nodes(op="call_function", target=aten.median.dim):
        _take_kth(node)
    overwrite(whole, places)
    for node in graph.nodes:
        node.meta.clear()
    whole.recompile()
    return whole


def _copied(module: GraphModule) -> GraphModule:
    graph, copied = Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    return GraphModule(module, graph)


def _with_faster_products(module: GraphModule) -> GraphModule:
    """A copy of ``module``, in which nothing may be written over in place: these rules change which numbers share a place."""
    whole = shared(module)
    graph = whole.graph
    work_out_once(graph)
    note_values(whole, module)
    add_up_for_means(graph)
    add_up_within_products(graph)
    for node in list(graph.nodes):
        product = transposed_from(node)
        if product is not None and _can_flip(product):
            node.replace_all_uses_with(_flipped(product))
    graph.eliminate_dead_code()
    for rule in (_multiply_by_number, _turn_narrow):
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            rule(node)
    note_values(whole, module)  # what is transposed now stands in memory in another way
    for node in list(graph.nodes):
        multiply_here(node)
    convolve_here(graph)
    graph.eliminate_dead_code()
    shorten_sums(graph)
    graph.eliminate_dead_code()
    divide_less(graph)
    work_out_once(graph)
    pass_less(graph)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        _keep_order(node)
    lay_out_weights(graph)
    return whole


def _can_flip(node: Any) -> bool:
    """Whether the transpose of a node costs no more than the node, which nobody wants as it is."""
    if node.op != "call_function":
        return False
    if transposed_from(node) is not None:
        return True
    if len(node.users) > 1 or node.kwargs:
        return False
    if node.target in PRODUCTS:
        return True
    if node.target == aten.reshape.default:
        before, after = shape(node.args[0]), shape(node)
        only_leading = min(len(before), len(after)) >= 2 and before[-2:] == after[-2:]
        return only_leading and _can_flip(node.args[0])
    return node.target in SUMS and all(shape(arg) == shape(node) and _can_flip(arg) for arg in node.args if isinstance(arg, Node))


def _flipped(node: Any) -> Node:
    """The transpose of a node that can be flipped, put in behind it."""
    if (inner := transposed_from(node)) is not None:
        return inner
    if node.target in PRODUCTS:
        args: list[Any] = [_transposed(operand, node) for operand in reversed(node.args)]
    else:
        args = [_flipped(arg) if isinstance(arg, Node) else arg for arg in node.args]
    if node.target == aten.reshape.default:
        *leading, rows, columns = shape(node)
        args[1] = [*leading, columns, rows]
    with node.graph.inserting_after(node):
        return _noted(node.graph.call_function(node.target, tuple(args)), node)


def _transposed(operand: Any, before: Node) -> Node:
    if (inner := transposed_from(operand)) is not None:
        return inner
    with before.graph.inserting_before(before):
        return _noted(before.graph.call_function(aten.transpose.int, (operand, -2, -1)), operand)


def _noted(node: Node, like: Node) -> Node:
    """``node`` with what is known of its result: that of ``like``, transposed."""
    node.meta["val"] = like.meta["val"].mT
    return node


def _multiply_by_number(node: Node) -> None:
    """Products with a single row or column, or of one with one, number by number: the compiler fuses those with what is round them."""
    a, b = node.args
    (rows, inner), columns = shape(a) or (0, 0), (shape(b) or (0,))[-1]
    if not node.meta["val"].is_floating_point():  # a sum of whole numbers is of another type
        return
    if not (inner == 1 or (min(rows, columns) == 1 and rows * inner * columns <= FEW)):
        return
    if inner == 1 and rows > ROWS and is_tensor(b) and b.meta["val"].stride(1) > 1:  # type: ignore[union-attr]  # a weight's column: read without vectors at each row
        return
    graph = node.graph
    with graph.inserting_before(node):
        if inner == 1:
            product = call(graph, aten.mul.Tensor, a, b)
        elif columns == 1:
            product = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, a, call(graph, aten.t.default, b)), [1], True)
        else:
            product = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, call(graph, aten.t.default, a), b), [0], True)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _turn_narrow(node: Node) -> None:
    """Aᵀ B of many rows, B of a few columns: as (Bᵀ A)ᵀ. A convolution's weights' gradient from patches: 0.25 ms instead of 1.2."""
    a, b = node.args
    stands = transposed_from(a)
    if stands is None or not shape(b) or not (shape(b)[0] >= ROWS and shape(b)[1] < NARROW <= shape(a)[0]):
        return
    graph = node.graph
    with graph.inserting_before(node):
        turned = call(graph, aten.t.default, call(graph, aten.mm.default, call(graph, aten.t.default, b), stands))
    node.replace_all_uses_with(turned)
    node.graph.erase_node(node)


def _keep_order(node: Any) -> None:
    """Where axes are put in another order and then into one, memory already in that order: the compiler may choose a third one.

    Number by number out of that took a quarter of a step with convolutions.
    """
    from torch._inductor import inductor_prims  # not before it is needed: it takes long to import

    moved = node.args[0]
    if not is_tensor(moved) or moved.op != "call_function" or moved.target != aten.permute.default:
        return
    source, value = moved.args[0], moved.meta["val"]
    merges = any(len(mine) > 1 for mine, _ in groups(value.shape, shape(node)))
    if not (merges and value.device.type == "cpu" and value.is_contiguous() and value.numel() >= MANY and source.op == "call_function"):
        return
    force = inductor_prims.force_stride_order
    if source.target == force:
        return
    with node.graph.inserting_after(source):
        kept = node.graph.call_function(force, (source, list(source.meta["val"].stride())))
    kept.meta["val"] = source.meta["val"]
    source.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)


def _take_kth(median: Node) -> None:
    """As torch's median the lower one of two in the middle; but where one of the values is NaN it need not be NaN."""
    x, dim, *keepdim = median.args
    if not shape(x) or x.meta["val"].device.type != "cpu":  # type: ignore[union-attr]
        return
    median.target, median.args = aten.kthvalue.default, (x, (shape(x)[dim] + 1) // 2, dim, *keepdim)  # type: ignore[index]


def _mark_failures(check: Node) -> None:
    """In place of an error of Cholesky's NaN in all of the factor."""
    info, graph = check.args[0], check.graph
    made = info.args[0] if isinstance(info, Node) and info.target is operator.getitem else None
    if not isinstance(made, Node) or made.target != aten.linalg_cholesky_ex.default:
        return
    for factor in [user for user in made.users if user.args[1] == 0]:
        with graph.inserting_before(factor.next):
            failed = graph.call_function(aten.ne.Scalar, (graph.call_function(operator.getitem, (made, 1)), 0))
            for _ in range(2):
                failed = graph.call_function(aten.unsqueeze.default, (failed, -1))
            marked = graph.call_function(aten.masked_fill.Scalar, (factor, failed, math.nan))
        marked.meta["val"] = factor.meta["val"]
        factor.replace_all_uses_with(marked)
        marked.replace_input_with(marked, factor)
    graph.erase_node(check)


def _written_out(node: Node, instead: Callable[..., Any]) -> None:
    """Puts the operations of ``instead`` in the place of ``node``."""
    given, graph = node.all_input_nodes, node.graph

    def function(*inputs: Tensor) -> Any:
        values = dict(zip(given, inputs, strict=True))
        return instead(*map_arg(node.args, values.__getitem__), **node.kwargs)

    known = [arg.meta["val"] for arg in given]
    traced = make_fx(function)(*(torch.zeros(v.shape, dtype=v.dtype, device=v.device) for v in known)).graph
    copied = dict(zip(traced.find_nodes(op="placeholder"), given, strict=True))
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(traced, copied)
    if not isinstance(results, tuple):
        node.replace_all_uses_with(results)
    for part in list(node.users):
        number: Any = part.args[1]
        part.replace_all_uses_with(results[number])
        graph.erase_node(part)
    graph.erase_node(node)
