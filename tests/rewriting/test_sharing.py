"""What is the same for all tasks is worked out once, and sums of products within the product: the same numbers by fewer operations."""

import pytest
import torch
from torch.nn.functional import relu

from bayesmeta.graphs import trace
from bayesmeta.rewriting import rewritten
from bayesmeta.rewriting.nodes import groups, note_values, shape
from bayesmeta.rewriting.sharing import shared

aten = torch.ops.aten
T, N, K, OUT = 7, 3, 4, 5  # tasks, points, inputs and outputs of a layer

pytestmark = pytest.mark.usefixtures("float64")


def tensor(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


def both(function, *inputs):
    """The graph as traced and as rewritten, which must agree, and with the function itself."""
    graph = trace(function, list(inputs))
    fast = rewritten(graph)
    for found, wanted in zip(fast(*inputs), graph(*inputs), strict=True):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        assert [n > 0 for n in found.stride()] == [n > 0 for n in wanted.stride()]  # results stand in memory as they did
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    return graph, fast


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def layer(phi, x):
    """A linear layer with each task's own weights ``(T, OUT · K)`` at ``x (T, N, K)``."""
    return x @ phi.view(*phi.shape[:-1], OUT, K).mT


def test_a_layer_with_shared_weights_is_one_product():
    _, fast = both(lambda theta, x: [relu(layer(theta.expand(T, -1), x))], tensor(OUT * K), tensor(T, N, K))
    assert aten.mm.default in targets(fast) and aten.bmm.default not in targets(fast)
    assert aten.expand.default not in targets(fast)


def test_weights_of_their_own_stay_many_products():
    _, fast = both(lambda phi, x: [layer(phi, x)], tensor(T, OUT * K), tensor(T, N, K))
    assert aten.bmm.default in targets(fast) and aten.mm.default not in targets(fast)


def test_particles_that_all_tasks_share_are_one_product_each():
    def function(starts, x):
        return [(x @ starts[:, None].expand(-1, T, -1).unflatten(-1, (OUT, K)).mT).tanh()]

    _, fast = both(function, tensor(2, OUT * K), tensor(T, N, K))
    batches = [node.args[0].meta for node in fast.graph.nodes if node.target == aten.bmm.default]
    assert len(batches) == 1
    sizes = [tuple(node.args[1]) for node in fast.graph.nodes if node.target == aten.reshape.default]
    assert (2, T * N, K) in sizes  # the rows of all tasks behind each other


def test_shared_weights_on_the_left_where_the_other_factor_stands_transposed():
    _, fast = both(lambda w, x: [w.expand(T, OUT, K) @ x.mT], tensor(OUT, K), tensor(T, N, K))
    assert aten.mm.default in targets(fast) and aten.bmm.default not in targets(fast)


def test_numbers_that_all_tasks_share_are_worked_out_once():
    """All but the last operation are on one copy."""

    def function(theta, x):
        phi = theta.expand(T, -1)
        first, second = phi.split([2, 3], 1)
        both = torch.cat([second.exp(), first.square()], 1)[:, 1:]
        return [both * x + both.sum(1, keepdim=True) - both.mean(), both.sum(0), both.permute(1, 0)[:, 2]]

    graph = trace(function, [tensor(5), tensor(T, 4)])
    both(function, tensor(5), tensor(T, 4))
    fast = shared(graph)
    note_values(fast, graph)
    for target in (aten.exp.default, aten.pow.Tensor_Scalar, aten.cat.default):
        for node in fast.graph.find_nodes(op="call_function", target=target):
            assert shape(node)[0] == 1


MOVES = {
    "flatten": lambda p: p.flatten(),
    "tasks before others": lambda p: p.unflatten(1, (2, 3)).permute(2, 0, 1).reshape(3, -1),
    "tasks behind others": lambda p: p.mT.reshape(2, 3, T).sum(2),
    "tasks apart": lambda p: p.reshape(T, 3, 2).select(2, 1),
    "select a task": lambda p: p[3],
    "slice tasks": lambda p: p[2:5],
    "slice to one": lambda p: p[2:3] * 2,
    "chunks of tasks": lambda p: torch.cat(p.split([3, 4], 0)[::-1], 0),
    "stack": lambda p: torch.stack([p, p.exp()], 1),
    "squeeze": lambda p: p[:, :1].squeeze(1),
    "unsqueeze": lambda p: p.unsqueeze(0).expand(2, T, 6).sum(0),
    "largest": lambda p: p.amax(0) + p.amax(1).sum(),
    "mean and sum of all": lambda p: p.mean() * p.sum(),
    "softmax": lambda p: p.log_softmax(1) + p.logsumexp(0),
    "cumulative": lambda p: p.cumsum(0),
    "gather": lambda p: p[torch.tensor([0, 2])],
    "matrix of tasks": lambda p: p @ p.mT,
    "matrix of numbers": lambda p: p.mT @ p,
    "inner product of shared rows": lambda p: p.unsqueeze(1).expand(T, 4, 6) @ p.unsqueeze(2).expand(T, 6, 2),
    "whole numbers": lambda p: (p > 0).sum(0) + (p > 0).long().sum(0),
    "where": lambda p: torch.where(p > 0, p, torch.zeros_like(p)) + torch.ones_like(p),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("spread", [True, False], ids=["spread", "own"])
def test_whatever_is_done_with_it_the_numbers_stay(move, spread):
    first = tensor(6) if spread else tensor(T, 6)
    both(lambda p, y: [move(p.expand(T, 6)), move(p.expand(T, 6) + 1) * 2, y], first, tensor(2))


def random_program(seed):
    """Operations, drawn by ``seed``, on matrices some of which are the same for all tasks."""
    draw = torch.Generator().manual_seed(seed)
    steps = [tuple(int(torch.randint(n, (), generator=draw)) for n in (7, 4, 4, 4)) for _ in range(12)]

    def program(theta, w, x):
        pool = [theta.expand(T, 4, 4), w.unsqueeze(1).expand(T, 4, 4), x, w.unsqueeze(2).expand(T, 4, 4)]
        for kind, first, second, place in steps:
            a, b = pool[first], pool[second]
            kinds = (
                lambda a, b: a + b, lambda a, b: a @ b, lambda a, b: a.mT @ b, lambda a, b: (a * b).tanh(), lambda a, b: (a @ b.mT).mT,
                lambda a, b: a.sum(1, keepdim=True) + b, lambda a, b: torch.cat([a[:, :2], b[:, 2:]], 1).reshape(T, 4, 4),
            )  # fmt: skip
            pool[place] = kinds[kind](a, b) / 3
        return [*(p.sum(0) for p in pool), sum(pool).reshape(T, 2, 8)[:, 1].sum(0, keepdim=True), pool[0].mT.flatten(1)]

    return program


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_stay_what_they_are(seed):
    both(random_program(seed), tensor(4, 4), tensor(T, 4), tensor(T, 4, 4))


def written_over(theta):
    phi = theta.expand(T, 3).clone()
    phi[2] = 1.0
    return [phi * 2]


def written_over_behind_a_transpose(x):
    y = x.t().clone().t()
    y.add_(1)
    return [y, x * 2]


def written_over_through_a_view(x):
    y = (x @ x.exp()).t()
    whole = y.t().view(-1)
    whole.mul_(0.0)
    return [y, whole]


@pytest.mark.parametrize("function", [written_over, written_over_behind_a_transpose, written_over_through_a_view])
def test_a_program_that_writes_in_place_is_only_copied(function):
    x = tensor(3) if function is written_over else tensor(3, 3)
    before = x.clone()
    both(function, x)
    assert torch.equal(x, before)


ODD = {
    "an axis of none": lambda p: [p[None].expand(0, 6).sum(), p[None].expand(0, 6).exp().sum(0), p.expand(0, 6) + 1],
    "a number": lambda p: [p.sum().squeeze(0).expand(T).exp(), p.sum().sum(-1), torch.sum(p, None), p.sum(None, keepdim=True)],
    "a cat of one": lambda p: [torch.cat([p]), p.expand(T, 6).clone()[0]],
    "whole numbers": lambda p: [p.long()[None].int() @ p.int()[:, None], (p > 0).expand(T, 6).sum(0, dtype=torch.bool)],
    "another type": lambda p: [(p.view(6, 1, 1).expand(6, 2, 3).mT @ p.view(6, 1, 1).expand(6, 2, 3)).sum(0, dtype=torch.float32)],
    "an empty part": lambda p: [torch.cat([p.new_empty(0), p.view(2, 3)], 1).sum(0)],
    "a batch of none": lambda p: [(p.new_zeros(0, 2, 3).mT @ p.new_zeros(0, 2, 3)).view(0, 7, 3, 3).sum(1)],
}


@pytest.mark.parametrize("function", ODD.values(), ids=ODD)
def test_odd_shapes_and_types_stay_what_they_are(function):
    p = tensor(6)
    _, fast = both(function, p)
    for result in fast(p):
        assert result.numel() == 0 or result.data_ptr() != p.data_ptr()  # a result of its own is nobody else's


def test_long_sums_and_doubled_terms_are_left_in_time():
    def long(x, g):
        total = g.mT @ x
        for k in range(150):
            total = total + g.mT @ (x * k)
        return [total.sum(0)]

    def doubled(x, g):
        total = g.mT @ x
        for _ in range(20):
            total = total + total
        return [total.sum(0)]

    for function in (long, doubled):
        graph, fast = both(function, tensor(T, N, K), tensor(T, N, OUT))
        assert len(fast.graph.nodes) < 2 * len(graph.graph.nodes)


def test_random_numbers_are_drawn_for_each_task():
    graph = rewritten(trace(lambda p: [torch.bernoulli(p.expand(1000, 2)), torch.rand_like(p.expand(1000, 2))], [torch.full((2,), 0.5)]))
    for found in graph(torch.full((2,), 0.5)):
        assert (found.min(0).values < found.max(0).values).all()


# --- sums of products


def gradient_of_shared_weights(theta, x, g):
    """Σ_t of each task's own gradient ``g_tᵀ x_t``, as it comes out of a step on packed weights."""
    own = torch.cat([(g.mT @ x).reshape(T, -1), g.sum(1)], 1)
    return [(theta.exp() * own.sum(0))]


def test_the_sum_over_tasks_is_taken_within_the_product():
    _, fast = both(gradient_of_shared_weights, tensor(OUT * K + OUT), tensor(T, N, K), tensor(T, N, OUT))
    assert aten.mm.default in targets(fast) and aten.bmm.default not in targets(fast)


def test_and_within_sums_of_products_kept_apart_by_particle():
    def function(x, y, g):
        own = (g.mT @ x).unflatten(0, (2, T)) - 2.0 * (g.mT @ y).unflatten(0, (2, T))
        return [own.sum(1), own.neg().mT.flatten(2).sum(1, keepdim=True)]

    def first(*inputs):
        return function(*inputs)[:1]

    inputs = tensor(2 * T, N, K), tensor(2 * T, N, K).sin(), tensor(2 * T, N, OUT)
    _, fast = both(first, *inputs)
    assert {shape_of(fast, node)[0] for node in fast.graph.find_nodes(op="call_function", target=aten.bmm.default)} == {2}
    both(function, *inputs)  # what is wanted in other places is multiplied as it was


def shape_of(module, node):
    """The first axis of a product's result, from the reshape of its first factor."""
    while node.target != aten.reshape.default:
        node = node.args[0]
    return node.args[1]


def test_sums_over_tasks_and_over_particles_of_what_is_linear_in_products():
    """As in the gradient of particles: A_t θ and its mean over particles are wanted for θ, and only summed over tasks."""

    def function(theta, a, scale, other):
        product = a @ theta.expand(T, -1, -1)  # (T, particles, D)
        turned = (theta.mT.expand(T, -1, -1) @ a).mT
        moved = scale[:, None, None] * (product + turned).transpose(0, 1).transpose(0, 1) / 2
        return [(other + product - moved.mean(1, keepdim=True)).sum(0), -turned.sum(1)]

    inputs = tensor(K, 80), tensor(T, K, K), tensor(T), tensor(T, K, 80)
    _, fast = both(function, *inputs)
    note_values(fast, trace(function, list(inputs)))
    products = [shape(node) for node in fast.graph.nodes if node.target in (aten.mm.default, aten.bmm.default)]
    assert products
    assert (T, K, 80) not in products and (T * K, 80) not in products  # never written down


def test_sums_along_a_part_of_the_rows():
    def function(a, b):
        rows = (a @ b).reshape(2, T, 3, OUT)
        return [rows.sum(0), rows.sum(1), rows.sum(2)]

    graph, fast = both(function, tensor(2 * T * 3, K), tensor(K, OUT))
    note_values(fast, graph)
    assert {shape(node)[0] for node in fast.graph.find_nodes(op="call_function", target=aten.mm.default)} == {T * 3, 2 * 3, 2 * T}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, a, b: [(torch.bmm(x.mT, y).sum(0) + a @ b).sum(0)],
        lambda x, y, a, b: [(torch.bmm(x.mT, y).sum(0) * (a @ b)).sum(0), (torch.bmm(x.mT, y).sum(0, keepdim=True) * (a @ b)).sum(1)],
        lambda x, y, a, b: [torch.bmm(torch.bmm(x.mT, y).sum(1, keepdim=True).mT, y[:, :1]).sum(0)],
        lambda x, y, a, b: [((x.mT @ y).sum(0) - 2.0 * (x.mT @ y).sum(0).mT.reshape(6, 4)).sum(1), (y @ y.mT).sum(0).sum(0).sum(0)],
    ],
)
def test_sums_of_sums(function):
    """What the rule puts in place is known to the sums that come later."""
    both(function, tensor(5, 7, 6), tensor(5, 7, 4), tensor(6, 3), tensor(3, 4))


def test_sums_of_mixed_types_are_taken_in_the_finer_one():
    both(lambda x, y, scale: [(torch.bmm(x.mT, y) * scale).sum(0)], tensor(5, 7, 6).float(), tensor(5, 7, 4).float(), tensor(6, 1))


def random_sums(seed):
    """Sums of what is linear, or nearly so, in products for particles and tasks, put together as ``seed`` says."""
    draw = torch.Generator().manual_seed(seed)
    steps = [tuple(int(torch.randint(n, (), generator=draw)) for n in (10, 4, 4, 4)) for _ in range(8)]
    axes = [int(torch.randint(4, (), generator=draw)) for _ in range(8)]

    def program(x, w, f):
        pool = [x, (x.mT @ x.flip(1)), (x.flatten(0, 1) @ w).view(2, T, 4, 4), x @ w.expand(2, T, 4, 4)]
        for kind, first, second, place in steps:
            a, b = pool[first], pool[second]
            kinds = (
                lambda a, b: a + b, lambda a, b: a - f[:, None, None] * b, lambda a, b: (a.flatten(0, 1).mT @ b.flatten(0, 1)).view_as(a),
                lambda a, b: a @ b, lambda a, b: -(a.mT) + b / 3, lambda a, b: a.transpose(0, 1).reshape(T, 2, 16).mT.reshape_as(a),
                lambda a, b: torch.cat([a[..., :1], b[..., 1:]], 3), lambda a, b: a * w + b.sum(1, keepdim=True),
                lambda a, b: a + w[0], lambda a, b: (a.flatten(0, 2) @ w).view_as(a) * 0.5,
            )  # fmt: skip
            pool[place] = kinds[kind](a, b)
        return [pool[axis].sum(axes[4 + axis]) for axis in range(4)] + [pool[axes[0]].sum(0).sum(0)]

    return program


@pytest.mark.parametrize("seed", range(60))
def test_random_sums_stay_what_they_are(seed):
    both(random_sums(seed), tensor(2, T, 4, 4) / 4, tensor(4, 4) / 4, tensor(T))


def test_what_somebody_else_wants_is_not_summed_away():
    def function(x, g):
        own = g.mT @ x
        return [own.sum(0), own]

    graph, fast = both(function, tensor(T, N, K), tensor(T, N, OUT))
    assert targets(fast).count(aten.bmm.default) == targets(graph).count(aten.bmm.default) == 1


# --- shapes


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ((2, 3), (2, 3), [([0], [0]), ([1], [1])]),
        ((2, 3), (6,), [([0, 1], [0])]),
        ((6, 1, 5), (2, 3, 5), [([0], [0, 1]), ([2], [2])]),
        ((4, 6), (8, 3), [([0, 1], [0, 1])]),
        ((1, 1), (1,), []),
        ((0, 3), (3, 0), [([0, 1], [0, 1])]),
    ],
)
def test_axes_of_a_reshape_in_groups(before, after, wanted):
    assert groups(before, after) == wanted
