"""Cholesky's factor of small matrices as plain operations, held to LAPACK's: values, gradients, failures; and graphs that take it on."""

import math

import pytest
import torch

from bayesmeta.graphs import trace
from bayesmeta.rewriting import rewritten, small_matrices

aten = torch.ops.aten
LIBRARY = ("linalg", "cholesky")


def spd(n, *axes):
    g = torch.Generator().manual_seed(n)
    root = torch.randn(*axes, n, n, generator=g, dtype=torch.float64)
    return root @ root.mT + 0.3 * torch.eye(n, dtype=torch.float64), torch.randn(*axes, n, 2, generator=g, dtype=torch.float64)


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def leftover(module):
    return [str(node.target) for node in module.graph.nodes if any(name in str(node.target) for name in LIBRARY)]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("axes", [(), (7,), (2, 7)], ids=["one", "batch", "two axes"])
def test_factor_and_solutions_are_lapacks(n, axes):
    a, b = spd(n, *axes)
    for upper in (False, True):
        factor, info = torch.linalg.cholesky_ex(a, upper=upper)
        # only one triangle is read
        found, number = small_matrices.cholesky_ex(a.triu() if upper else a.tril(), upper=upper)
        near(found, factor)
        assert torch.equal(number, info) and number.dtype == info.dtype
        near(small_matrices.cholesky_solve(b, factor, upper), torch.cholesky_solve(b, factor, upper))
        near(small_matrices.cholesky_inverse(factor, upper), torch.cholesky_inverse(factor, upper))
        for left, right in ((True, b), (False, b.mT)):
            for unit in (False, True):
                options = {"upper": upper, "left": left, "unitriangular": unit}
                near(small_matrices.solve_triangular(factor, right, **options), torch.linalg.solve_triangular(factor, right, **options))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_derivatives_are_lapacks(n):
    a, b = spd(n, 5)

    def value(cholesky, solve):
        given, right = a.clone().requires_grad_(), b.clone().requires_grad_()
        factor = cholesky((given + given.mT) / 2)
        (solve(right, factor).square().sum() + factor.diagonal(dim1=-2, dim2=-1).log().sum()).backward()
        return given.grad, right.grad

    ours = value(lambda m: small_matrices.cholesky_ex(m)[0], small_matrices.cholesky_solve)
    for found, wanted in zip(ours, value(torch.linalg.cholesky, torch.cholesky_solve), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * wanted.abs().max().item())


@pytest.mark.parametrize("bad", [[[-1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
def test_what_has_no_factor_is_numbered_as_lapack_does_and_nan(bad):
    a = torch.stack([torch.tensor(bad, dtype=torch.float64), torch.eye(2, dtype=torch.float64)])
    found, info = small_matrices.cholesky_ex(a)
    assert torch.equal(info, torch.linalg.cholesky_ex(a).info) and info[0] > 0
    assert found[0, 1, 1].isnan() and torch.equal(found[1], torch.eye(2, dtype=torch.float64))


def with_derivative(function):
    def both(a, b):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        with torch.enable_grad():
            value = function(a, b)
            return [value.detach(), *torch.autograd.grad(value.square().sum(), [a, b])]

    return both


FUNCTIONS = {
    "solve": lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a)),
    "upper": lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a, upper=True), upper=True),
    "whitened": lambda a, b: torch.linalg.solve_triangular(torch.linalg.cholesky(a), b, upper=False),
    "inverse": lambda a, b: torch.cholesky_inverse(torch.linalg.cholesky(a)) @ b,
}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_graph_has_the_same_values_and_gradients_without_the_library(function, n):
    a, b = spd(n, 5)
    graph = trace(with_derivative(function), [a, b])
    fast = rewritten(graph)
    assert leftover(graph) and bool(leftover(fast)) == (n > small_matrices.LARGEST)
    assert not any("check_errors" in name for name in leftover(fast))
    for found, wanted in zip(fast(a, b), with_derivative(function)(a, b), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * wanted.abs().max().item())


@pytest.mark.parametrize("n", [2, 4])
def test_where_a_factor_fails_a_graph_gives_nan_for_that_matrix(n):
    a, b = spd(n, 5)
    fast = rewritten(trace(lambda a, b: [torch.cholesky_solve(b, torch.linalg.cholesky(a))], [a, b]))
    a[3] *= -1
    (found,) = fast(a, b)
    assert found[3].isnan().all() and found[[0, 1, 2, 4]].isfinite().all()


def test_solving_spreads_one_side_over_the_batch_of_the_other():
    a = torch.randn(6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for unitriangular in (False, True):
        wanted = torch.linalg.solve_triangular(a, b, upper=False, unitriangular=unitriangular)
        found = small_matrices.solve_triangular(a, b, upper=False, unitriangular=unitriangular)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_an_infinite_pivot_is_no_factor():
    factor, info = small_matrices.cholesky_ex(torch.diag(torch.tensor([math.inf, 1.0])))
    assert int(info) != 0 and bool(factor.isnan().any())
    assert int(torch.linalg.cholesky_ex(torch.diag(torch.tensor([math.inf, 1.0])))[1]) != 0
