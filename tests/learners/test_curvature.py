"""Curvature against `torch.func` on hand-written log densities, and against plain matrices."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from bayesmeta import HierarchicalModel, Points
from bayesmeta.learners.blocks import Block, BlockNormal, floored, log_determinant, newton_step, normal, plus
from bayesmeta.learners.curvature import likelihood_curvature, prior_precision
from bayesmeta.likelihoods import Bernoulli, Categorical, Gaussian, Poisson, StudentT
from bayesmeta.networks import DecoderNetwork, HeadNetwork, WeightNetwork

from ..conftest import positive_program, ragged
from .closed_forms import design, theta

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
COUNTS = (3, 1, 5)
NOISE = 0.5
# −log p(y | output) of one point written out, by likelihood; outputs (O,)
NLL = {
    "gaussian": (lambda: Gaussian(NOISE), 1, lambda o, y: 0.5 * ((y - o[0]) / NOISE) ** 2 + math.log(NOISE) + HALF_LOG_2PI),
    "several outputs": (lambda: Gaussian(NOISE), 2, lambda o, y: (0.5 * ((y - o) / NOISE) ** 2 + math.log(NOISE) + HALF_LOG_2PI).sum()),
    "bernoulli": (Bernoulli, 1, lambda o, y: torch.log1p(o[0].exp()) - y * o[0]),
    "categorical": (lambda: Categorical(3), 3, lambda o, y: torch.logsumexp(o, 0) - (torch.arange(3) == y).to(o) @ o),
    "poisson": (Poisson, 1, lambda o, y: o[0].exp() - y * o[0] + torch.lgamma(y + 1)),
}
every_likelihood = pytest.mark.parametrize("name", NLL)
both_hessians = pytest.mark.parametrize("kind", ["exact", "gauss_newton"])


def hessian(f):
    """Reverse over reverse: forward mode would load torch's deprecated scripts."""
    return jacrev(jacrev(f))


def data(name, counts=COUNTS):
    points = ragged(counts, 2, counts_as_targets=name == "poisson")
    if name == "several outputs":
        points = points._replace(y=torch.stack([points.y, points.y.sin()], -1))
    if name == "bernoulli":
        points = points._replace(y=(points.y > 0).to(points.y))
    if name == "categorical":
        points = points._replace(y=(points.y.abs() * 2).long().clamp(max=2))
    return points


def network(outputs, bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3, bias=bias), nn.Tanh(), nn.Linear(3, outputs))


def made(name, counts=COUNTS, body=None):
    """Model, φ away from the prior's mean, points as the model sees them, and the module."""
    likelihood, outputs, _ = NLL[name]
    body = (body or network)(outputs)
    points = data(name, counts)
    model = HierarchicalModel.from_network(WeightNetwork(body), likelihood(), example=points)
    phi = model.initial(points).detach() + 0.3 * torch.randn(len(counts), model.dim)
    return model, phi, model.prepare(points), body


def call(body, phi, x):
    """The module at one task's flat weights."""
    named = dict(body.named_parameters())
    parts = phi.split([p.numel() for p in named.values()])
    return functional_call(body, {n: v.view(p.shape) for (n, p), v in zip(named.items(), parts, strict=True)}, (x,))


def independent(name, body, phi, points, task, kind):
    """H of one task, point by point, with `torch.func` alone."""
    x, y, nll = points.x[task][points.mask[task]], points.y[task][points.mask[task]], NLL[name][2]
    if kind == "exact":
        return hessian(lambda p: sum(nll(call(body, p, x[j : j + 1])[0], y[j]) for j in range(len(y))))(phi)
    total = torch.zeros(len(phi), len(phi))
    for j in range(len(y)):

        def one(p, j=j):
            return call(body, p, x[j : j + 1])[0]

        jacobian, bend = jacrev(one)(phi), hessian(lambda o, j=j: nll(o, y[j]))(one(phi))
        total = total + jacobian.T @ bend @ jacobian
    return total


def curvature(model, phi, points, kind, hessian="exact", **options):
    return likelihood_curvature(model, phi, points, kind=kind, hessian=hessian, **options)


def dense(blocks, dim):
    whole = torch.zeros(len(blocks[0].matrix), dim, dim)
    for where, matrix, _ in blocks:
        whole[:, where, where] = matrix if matrix.dim() == 3 else torch.diag_embed(matrix)
    return whole


@every_likelihood
@both_hessians
def test_a_networks_curvature_is_torch_funcs(float64, name, kind):
    model, phi, points, body = made(name)
    (block,) = curvature(model, phi, points, "full", kind)
    for task in range(len(COUNTS)):
        wanted = independent(name, body, phi[task], points, task, kind)
        torch.testing.assert_close(block.matrix[task], wanted, rtol=0, atol=1e-10)


@every_likelihood
@both_hessians
def test_diagonal_and_last_layer_are_cut_from_the_full_one(float64, name, kind):
    model, phi, points, body = made(name)
    whole = curvature(model, phi, points, "full", kind)[0].matrix
    (diagonal,) = curvature(model, phi, points, "diagonal", kind)
    torch.testing.assert_close(diagonal.matrix, whole.diagonal(dim1=-2, dim2=-1), rtol=0, atol=1e-12)
    rest, last = curvature(model, phi, points, "last_layer", kind)
    start = body[0].weight.numel() + 3
    assert (rest.where, last.where) == (slice(0, start), slice(start, model.dim))
    assert not rest.matrix.any()
    assert (rest.curved, last.curved) == (False, True)
    torch.testing.assert_close(last.matrix, whole[:, start:, start:], rtol=0, atol=1e-12)


@every_likelihood
def test_gauss_newton_is_never_negative_where_the_exact_one_is(float64, name):
    model, phi, points, _ = made(name)
    smallest = {k: torch.linalg.eigvalsh(curvature(model, phi, points, "full", k)[0].matrix).min() for k in ("exact", "gauss_newton")}
    assert smallest["exact"] < -1e-3
    assert smallest["gauss_newton"] > -1e-12


@both_hessians
def test_the_linear_gaussian_curvature_is_the_design_matrix(linear_model, kind):
    points = linear_model.prepare(ragged((4, 0, 1, 6), 2))
    phi = torch.randn(4, 2)
    (block,) = curvature(linear_model, phi, points, "full", kind)
    prior = prior_precision(linear_model, phi, points)
    for task in range(4):
        _, prior_precision_, variance = theta(linear_model)
        x, _ = design(points, task)
        torch.testing.assert_close(block.matrix[task], (x.T @ x / variance).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(prior[task].diag(), prior_precision_.detach(), rtol=0, atol=1e-12)


@both_hessians
def test_counts_with_a_points_plate_and_a_positive_site(float64, kind):
    """log rate is linear in the packed (log rate, slope), so both curvatures are Σ λ z zᵀ with z = (1, 0.3 x)."""
    points = ragged((3, 5, 1), counts_as_targets=True)
    model = HierarchicalModel(positive_program, example=points)
    points, phi = model.prepare(points), torch.randn(3, 2)
    (block,) = curvature(model, phi, points, "full", kind)
    prior = prior_precision(model, phi, points)
    spread = model.theta()["spread"].detach()
    for task in range(3):
        x = points.x[task][points.mask[task], 0]
        z = torch.stack([torch.ones_like(x), 0.3 * x], -1)
        torch.testing.assert_close(block.matrix[task], z.T @ ((z @ phi[task]).exp()[:, None] * z), rtol=0, atol=1e-10)
        torch.testing.assert_close(prior[task], torch.diag(torch.stack([spread**-2, torch.ones(())])), rtol=0, atol=1e-10)


def coin(points, written):
    with pyro.plate("tasks", points.num_tasks):
        w = pyro.sample("w", dist.Normal(0.0, torch.ones(2)).to_event(1))
        z = (w[..., None, :] * points.x).sum(-1)
        own = points.x[..., 1] > -0.5  # the program's own mask: the likelihood leaves these points out
        fn = dist.Bernoulli(logits=z) if written == "logits" else dist.Bernoulli(probs=torch.sigmoid(z))
        pyro.sample("y", fn.mask(points.mask & own).to_event(1), obs=points.y)


@pytest.mark.parametrize("written", ["logits", "probs"])
def test_gauss_newton_does_not_depend_on_how_the_likelihood_is_written(float64, written):
    points = data("bernoulli", (6, 4))
    model = HierarchicalModel(lambda points: coin(points, written), example=points)
    phi = torch.randn(2, 2)
    (block,) = curvature(model, phi, model.prepare(points), "full", "gauss_newton")
    for task in range(2):
        x = points.x[task][points.mask[task] & (points.x[task, :, 1] > -0.5)].double()
        assert len(x) < points.counts[task]
        p = torch.sigmoid(x @ phi[task])
        torch.testing.assert_close(block.matrix[task], x.T @ ((p * (1 - p))[:, None] * x), rtol=0, atol=1e-10)


@both_hessians
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["gaussian", "several outputs"])
def test_kronecker_is_exact_for_a_linear_layer_and_gaussian_noise(float64, name, bias, kind):
    """Every point bends the output equally: Σ_j G ⊗ a_j a_jᵀ is one Kronecker product."""
    model, phi, points, _ = made(name, body=lambda outputs: nn.Linear(2, outputs, bias=bias))
    (block,) = curvature(model, phi, points, "kronecker", kind)
    torch.testing.assert_close(block.matrix, curvature(model, phi, points, "full", kind)[0].matrix, rtol=0, atol=1e-12)


@both_hessians
@every_likelihood
def test_kronecker_blocks_are_exact_for_one_point(float64, name, kind):
    for bias in (True, False):
        model, phi, points, _ = made(name, (1, 1), body=lambda outputs, bias=bias: network(outputs, bias))
        whole = curvature(model, phi, points, "full", kind)[0].matrix
        blocks = curvature(model, phi, points, "kronecker", kind)
        assert len(blocks) == 2
        for block in blocks:
            torch.testing.assert_close(block.matrix, whole[:, block.where, block.where], rtol=0, atol=1e-12)


@both_hessians
def test_kronecker_factors_written_out(float64, kind):
    """1/N Σ G_j ⊗ Σ a_j a_jᵀ of both layers from hand-written layers; entries: weights row by row, then biases."""
    model, phi, points, _ = made("categorical")
    first, second = curvature(model, phi, points, "kronecker", kind)
    for task, count in enumerate(COUNTS):
        w1, b1, w2, b2 = (v.view(s) for v, s in zip(phi[task].split([6, 3, 9, 3]), ((3, 2), (3,), (3, 3), (3,)), strict=True))
        x, y = points.x[task, :count], points.y[task, :count]
        s1 = x @ w1.T + b1
        hidden = torch.tanh(s1)
        bends = bends_of(lambda s, w2=w2, b2=b2: w2 @ torch.tanh(s) + b2, s1, y, kind)
        torch.testing.assert_close(first.matrix[task], product(bends, x), rtol=0, atol=1e-12)
        bends = bends_of(lambda s: s, hidden @ w2.T + b2, y, kind)
        torch.testing.assert_close(second.matrix[task], product(bends, hidden), rtol=0, atol=1e-12)


def bends_of(onward, outputs, y, kind):
    """Σ_j G_j of a layer's outputs ``(N, 3)``, with ``onward`` from there to the logits."""
    total = torch.zeros(3, 3)
    for before, label in zip(outputs, y, strict=True):
        nll, jacobian = partial(NLL["categorical"][2], y=label), jacrev(onward)(before)
        exact = hessian(lambda s, nll=nll: nll(onward(s)))(before)
        total += exact if kind == "exact" else jacobian.T @ hessian(nll)(onward(before)) @ jacobian
    return total


def product(bends, inputs):
    count = len(inputs)
    a = torch.cat([inputs, torch.ones(count, 1)], -1)
    size = a.shape[1]
    order = [o * size + i for o in range(3) for i in range(size - 1)] + [o * size + size - 1 for o in range(3)]
    return torch.kron(bends, a.T @ a)[order][:, order] / count


def test_kronecker_of_a_head_and_with_exposure(float64):
    points = ragged((1, 1), 2, counts_as_targets=True)
    models = [
        HierarchicalModel.from_network(HeadNetwork(nn.Linear(2, 3), 3, 1), Poisson(), example=points),
        HierarchicalModel.from_network(WeightNetwork(nn.Linear(1, 1)), Poisson(exposure=True), example=points),
    ]
    for model in models:
        phi = torch.randn(2, model.dim)
        for kind in ("exact", "gauss_newton"):
            (block,) = curvature(model, phi, model.prepare(points), "kronecker", kind)
            (whole,) = curvature(model, phi, model.prepare(points), "full", kind)
            torch.testing.assert_close(block.matrix, whole.matrix, rtol=0, atol=1e-12)
    (last,) = curvature(models[0], torch.randn(2, 4), models[0].prepare(points), "last_layer")
    assert last.where == slice(0, 4)


@pytest.mark.parametrize("which", ["full", "diagonal", "kronecker", "last_layer"])
@both_hessians
def test_the_derivative_in_phi_is_the_finite_difference(float64, which, kind):
    model, phi, points, _ = made("categorical", (3, 2))

    def f(phi):
        return sum((b.matrix * torch.arange(b.matrix.numel()).sin().view_as(b.matrix)).sum() for b in blocks(phi))

    def blocks(phi):
        return [b for b in curvature(model, phi, points, which, kind, create_graph=True) if b.curved]

    direction = torch.randn_like(phi)
    (gradient,) = torch.autograd.grad(f(phi.requires_grad_()), phi)
    slope = (f(phi + 1e-5 * direction) - f(phi - 1e-5 * direction)).item() / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)
    assert not any(m.requires_grad for m in (b.matrix for b in curvature(model, phi.detach(), points, which, kind)))


def test_what_has_no_such_curvature_says_so(float64):
    points = ragged((2, 3), 2)
    norm = WeightNetwork(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)))
    shared = nn.Linear(2, 2)
    twice = WeightNetwork(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(2, 1)))
    for net, match in (
        (norm, "got '1', a LayerNorm"), (DecoderNetwork(nn.Linear(4, 1), 2), "got a DecoderNetwork"), (twice, "see each point once")
    ):  # fmt: skip
        model = HierarchicalModel.from_network(net, Gaussian(), example=points)
        with pytest.raises(ValueError, match=match):
            curvature(model, torch.zeros(2, model.dim), model.prepare(points), "kronecker")
    with pytest.raises(ValueError, match=r"last_layer.*got a DecoderNetwork"):
        model = HierarchicalModel.from_network(DecoderNetwork(nn.Linear(4, 1), 2), Gaussian(), example=points)
        curvature(model, torch.zeros(2, 2), model.prepare(points), "last_layer")
    heavy = HierarchicalModel.from_network(WeightNetwork(nn.Linear(2, 1)), StudentT(), example=points)
    with pytest.raises(ValueError, match=r"StudentT has no Kullback–Leibler divergence.*hessian='exact'"):
        curvature(heavy, torch.zeros(2, 3), heavy.prepare(points), "full", "gauss_newton")


# --- precisions in blocks


def precisions(tasks=3, sizes=(2, 3, 4)):
    """A diagonal block between two whole ones."""
    blocks, start = [], 0
    for k, size in enumerate(sizes):
        root = torch.randn(tasks, size, size)
        matrix = root @ root.mT + torch.eye(size)
        where = slice(start, start := start + size)
        blocks.append(Block(where, matrix.diagonal(dim1=-2, dim2=-1) if k == 1 else matrix, curved=k != 2))
    return blocks, start


def test_log_determinant_and_newton_step(float64):
    blocks, dim = precisions()
    whole, g = dense(blocks, dim), torch.randn(3, dim)
    torch.testing.assert_close(log_determinant(blocks), torch.logdet(whole), rtol=0, atol=1e-12)
    seen = g.clone()
    seen[:, blocks[2].where] = 0.0  # the last one is not curved
    torch.testing.assert_close(newton_step(blocks, g), torch.linalg.solve(whole, seen[..., None])[..., 0], rtol=0, atol=1e-12)


def test_plus_takes_what_is_in_the_blocks(float64):
    blocks, dim = precisions()
    diagonal, matrix = torch.rand(3, dim), torch.randn(3, dim, dim)
    inside = dense([b._replace(matrix=torch.ones_like(b.matrix)) for b in blocks], dim)
    torch.testing.assert_close(dense(plus(blocks, diagonal), dim), dense(blocks, dim) + torch.diag_embed(diagonal), rtol=0, atol=0)
    torch.testing.assert_close(dense(plus(blocks, matrix), dim), dense(blocks, dim) + inside * matrix, rtol=0, atol=0)


def test_the_normal_of_blocks(float64):
    blocks, dim = precisions()
    mean, covariance = torch.randn(3, dim), dense(blocks, dim).inverse()
    q, wanted = normal(mean, blocks), dist.MultivariateNormal(mean, covariance)
    assert isinstance(q, BlockNormal)
    assert (q.batch_shape, q.event_shape) == ((3,), (dim,))
    torch.testing.assert_close(q.mean, mean, rtol=0, atol=0)
    torch.testing.assert_close(q.variance, wanted.variance, rtol=0, atol=1e-12)
    torch.testing.assert_close(q.covariance_matrix, covariance, rtol=0, atol=1e-12)
    phi = torch.randn(5, 3, dim)
    torch.testing.assert_close(q.log_prob(phi), wanted.log_prob(phi), rtol=0, atol=1e-11)
    chosen = torch.tensor([2, 0])
    torch.testing.assert_close(q.select(chosen).log_prob(phi[:, chosen]), q.log_prob(phi)[:, chosen], rtol=0, atol=1e-12)
    draws = q.sample((40_000,))
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean)[..., None], upper=False)[..., 0]
    spread = torch.einsum("std,ste->tde", z, z) / len(z)
    assert (spread - torch.eye(dim)).abs().max() < 4.5 * math.sqrt(2 / len(z))
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(len(z))
    for block, kind in ((blocks[0], dist.MultivariateNormal), (blocks[1], dist.Independent)):
        alone = Block(slice(0, block.matrix.shape[1]), block.matrix)
        one = normal(mean[:, alone.where], [alone])
        assert isinstance(one, kind)
        torch.testing.assert_close(one.variance, covariance.diagonal(dim1=-2, dim2=-1)[:, block.where], rtol=0, atol=1e-12)


def test_the_floor_moves_only_what_is_below_it(float64):
    vectors = torch.linalg.qr(torch.randn(2, 4, 4))[0]
    values = torch.tensor([[3.0, 0.5, 1.0, 2.0], [-1.0, 0.02, 0.02, 2.0]])
    sd = torch.rand(2, 4) + 0.5
    matrix = (vectors * values[:, None]) @ vectors.mT / (sd[:, :, None] * sd[:, None, :])
    (block,) = floored([Block(slice(0, 4), matrix)], sd, 0.1)
    assert torch.equal(block.matrix[0], matrix[0])
    scaled = block.matrix[1] * sd[1, :, None] * sd[1, None]
    torch.testing.assert_close(scaled, vectors[1] @ torch.diag(values[1].clamp(min=0.1)) @ vectors[1].T, rtol=0, atol=1e-12)
    (diagonal,) = floored([Block(slice(0, 4), values)], sd, 0.1)
    torch.testing.assert_close(diagonal.matrix, torch.maximum(values, 0.1 / sd**2), rtol=0, atol=0)


def test_the_floors_derivative_also_where_eigenvalues_are_equal(float64):
    vectors = torch.linalg.qr(torch.randn(2, 4, 4))[0]
    values = torch.tensor([[-1.0, -1.0, 2.0, 2.0], [-3.0, 0.5, 0.5, 0.5]], requires_grad=True)
    root = torch.randn(2, 4, 4)

    def f(values, t):
        matrix = (vectors * values[:, None]) @ vectors.mT + t * (root + root.mT)
        return floored([Block(slice(0, 4), matrix)], torch.ones(2, 4), 0.1)[0].matrix

    assert torch.autograd.gradcheck(f, (values, torch.zeros((), requires_grad=True)))


def test_a_task_that_is_not_finite_is_nan_of_its_own(float64):
    blocks, dim = precisions()
    bad = [b._replace(matrix=b.matrix.index_fill(0, torch.tensor([1]), torch.nan)) for b in blocks]
    done, good = floored(bad, torch.ones(3, dim), 0.1), floored(blocks, torch.ones(3, dim), 0.1)
    for f in (log_determinant, lambda b: normal(torch.zeros(3, dim), b).variance, lambda b: newton_step(b, torch.ones(3, dim))[:, :5]):
        got, wanted = f(done), f(good)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], wanted[[0, 2]])


def test_float32_with_stiff_curvature_still_gives_a_normal():
    root = torch.randn(4, 30, 3) * 1e4
    (block,) = floored([Block(slice(0, 30), root @ root.mT + torch.eye(30))], torch.ones(4, 30), 0.1)
    q = normal(torch.zeros(4, 30), [block])
    assert q.variance.dtype == torch.float32
    assert (q.variance > 0).all()
    assert (q.variance < 10.1).all()


def test_points_that_are_padding_do_not_count(float64):
    model, phi, points, _ = made("poisson")
    more = Points(*(torch.cat([v, v[:, :1].clone().fill_(7)], 1) for v in points[:2]), nn.functional.pad(points.mask, (0, 1)))
    for which in ("full", "diagonal", "kronecker", "last_layer"):
        for kind in ("exact", "gauss_newton"):
            for a, b in zip(*(curvature(model, phi, p, which, kind) for p in (points, more)), strict=True):
                torch.testing.assert_close(a.matrix, b.matrix, rtol=0, atol=1e-12)


def test_raising_low_eigenvalues_is_an_operation_that_a_graph_can_hold(float64):
    """PyTorch's own check of custom operations: shapes without values, strides, gradients."""
    low = torch.diag(torch.tensor([1.0, -0.5, 2.0])) + 0.1
    matrix = torch.stack([low, torch.eye(3)]).requires_grad_()
    units = torch.full((2, 3, 3), 0.5, requires_grad=True)
    torch.library.opcheck(torch.ops.bayesmeta.raised.default, (matrix, units, 1e-3))
    torch.autograd.gradcheck(lambda m, u: torch.ops.bayesmeta.raised((m + m.mT) / 2, (u + u.mT) / 2, 1e-3), (matrix, units))


def test_the_last_linear_layers_curvature_is_the_block_of_the_whole(float64):
    """Two outputs, a bias, a padded point: against the Hessian row by row."""
    net = WeightNetwork(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3)))
    points = Points(torch.randn(2, 5, 1), torch.tensor([[0, 1, 2, 1, 0]] * 2), torch.ones(2, 5, dtype=torch.bool))
    points.mask[1, 3:] = False
    model = HierarchicalModel.from_network(net, Categorical(3), example=points)
    phi = torch.randn(2, model.dim)
    for hessian in ("exact", "gauss_newton"):
        full, last = (likelihood_curvature(model, phi, points, kind=kind, hessian=hessian)[-1] for kind in ("full", "last_layer"))
        torch.testing.assert_close(last.matrix, full.matrix[:, last.where, last.where], rtol=0, atol=1e-12)


@every_likelihood
def test_sampled_curvature_is_gauss_newtons_diagonal_on_average(float64, name):
    model, phi, points, _ = made(name)
    wanted = curvature(model, phi, points, "diagonal", "gauss_newton")[0].matrix
    torch.manual_seed(3)
    runs = torch.stack([curvature(model, phi, points, "diagonal", "sampled", draws=300)[0].matrix for _ in range(30)])
    error = runs.mean(0) - wanted
    assert (error.abs() <= 4.5 * runs.std(0) / math.sqrt(30) + 1e-12).all()
    assert (runs.std(0) <= 0.3 * wanted + 1e-12).all()  # so the bound above means something


@every_likelihood
def test_sampled_curvature_is_the_squared_score_of_the_models_own_draws(float64, name):
    model, phi, points, body = made(name)
    nll = NLL[name][2]
    torch.manual_seed(5)
    y = model.predict(phi, points.x, points.mask).sample((2,))
    phi = phi.requires_grad_()
    wanted = []
    for task in range(len(COUNTS)):
        real = points.mask[task].nonzero()[:, 0]
        losses = [sum(nll(call(body, phi[task], points.x[task, j, None])[0], y[draw, task, j]) for j in real) for draw in range(2)]
        wanted.append(sum(torch.autograd.grad(loss, phi, create_graph=True)[0][task] ** 2 for loss in losses) / 2)
    torch.manual_seed(5)
    (block,) = curvature(model, phi, points, "diagonal", "sampled", draws=2, create_graph=True)
    torch.testing.assert_close(block.matrix, torch.stack(wanted), rtol=0, atol=1e-10)
    got, gradient = (torch.autograd.grad(m.log1p().sum(), phi)[0] for m in (block.matrix, torch.stack(wanted)))
    torch.testing.assert_close(got, gradient, rtol=0, atol=1e-9)


def test_sampled_curvature_of_one_gaussian_point_has_gauss_newtons_proportions(float64):
    model, phi, points, _ = made("gaussian", counts=(1,))
    wanted = curvature(model, phi, points, "diagonal", "gauss_newton")[0].matrix[0]
    sampled = curvature(model, phi, points, "diagonal", "sampled", draws=2)[0].matrix[0]
    torch.testing.assert_close(sampled / sampled.sum(), wanted / wanted.sum(), rtol=1e-10, atol=0)


def test_sampled_curvature_of_a_scaled_likelihood_is_scaled(float64):
    def program(points):
        with pyro.plate("tasks", points.num_tasks, dim=-1):
            slope = pyro.sample("slope", dist.Normal(torch.zeros(points.num_tasks, 2), 1.0).to_event(1))
            mean = (points.x @ slope[..., None])[..., 0]
            with pyro.poutine.scale(scale=7.0):
                pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=points.y)

    points = ragged((4, 0, 2), 2)
    model = HierarchicalModel(program, example=points)
    points, phi = model.prepare(points), torch.zeros(3, 2)
    wanted = curvature(model, phi, points, "diagonal", "gauss_newton")[0].matrix
    torch.manual_seed(0)
    sampled = curvature(model, phi, points, "diagonal", "sampled", draws=4000)[0].matrix
    torch.testing.assert_close(sampled, wanted, rtol=5 * math.sqrt(2 / 4000), atol=0)
    assert not sampled[1].any()


def test_sampled_curvature_is_for_the_diagonal():
    model, phi, points, _ = made("gaussian")
    with pytest.raises(ValueError, match=r"hessian='sampled' is for curvature='diagonal'.*got curvature='full'"):
        curvature(model, phi, points, "full", "sampled")
