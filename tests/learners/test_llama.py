"""LLAMA against plain matrices where the log joint is quadratic, and against hand-written densities elsewhere."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.func import jacrev

from bayesmeta import Episode, HierarchicalModel, Points
from bayesmeta.learners import MAML, Exact
from bayesmeta.learners.blocks import BlockNormal
from bayesmeta.learners.curvature import likelihood_curvature
from bayesmeta.learners.llama import LLAMA
from bayesmeta.likelihoods import Bernoulli, Categorical, Gaussian
from bayesmeta.networks import HeadNetwork, NormalPrior, WeightNetwork

from ..conftest import episode, linear_program, positive_program, radon_program, ragged
from .closed_forms import design, log_evidence, maml, posterior, theta

KINDS = ("full", "diagonal", "kronecker", "last_layer")
both_hessians = pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])


def chained_program(points):
    """Normal sites of which one looks at the other: a quadratic log joint without an independent prior."""
    spread = pyro.param("spread", torch.tensor(0.6), constraint=dist.constraints.positive)
    with pyro.plate("tasks", points.num_tasks):
        a = pyro.sample("a", dist.Normal(0.3, 1.2))
        b = pyro.sample("b", dist.Normal(0.5 * a, spread))
        y_hat = a[..., None] * points.x[..., 0] + b[..., None] * points.x[..., 1]
        pyro.sample("y", dist.Normal(y_hat, 0.7).mask(points.mask).to_event(1), obs=points.y)


def wide_network(classes=None, scale=1.0):
    """A small network under a prior that is wide beside its curvature."""
    torch.manual_seed(1)
    net = WeightNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, classes or 1)))
    likelihood = Categorical(classes) if classes else Gaussian(0.3)
    return HierarchicalModel.from_network(net, likelihood, NormalPrior.of(net, scale))


def class_episode(classes=3):
    return Episode(*(p._replace(y=(p.y.abs() * 2).long().clamp(max=classes - 1)) for p in episode()))


# --- "evidence"


@both_hessians
@pytest.mark.parametrize(("steps", "lr"), [(0, 0.1), (3, 0.05), (3, 0.3), (1, 5.0)])
def test_evidence_is_exact_for_a_quadratic_wherever_phi_stands(linear_model, steps, lr, hessian):
    e = episode(counts=(3, 5, 0, 8), queries=(4, 0, 6, 2), features=2)
    both = e.union()
    loss = LLAMA(linear_model, inner_steps=steps, inner_lr=lr, objective="evidence", hessian=hessian).meta_loss(e)
    for task in range(4):
        torch.testing.assert_close(-loss[task], log_evidence(linear_model, both, task), rtol=0, atol=1e-8)
    torch.testing.assert_close(-loss, Exact(linear_model).log_evidence(both), rtol=0, atol=1e-8)


@pytest.mark.parametrize("program", [radon_program, chained_program])
def test_evidence_and_its_gradient_on_other_quadratic_programs(float64, program):
    e = episode(features=2)
    model = HierarchicalModel(program, example=e)
    learner, exact = LLAMA(model, inner_steps=2, inner_lr=0.1, objective="evidence"), Exact(model)
    torch.testing.assert_close(learner.meta_loss(e), exact.meta_loss(e), rtol=0, atol=1e-8)
    got, wanted = (torch.autograd.grad(one.meta_loss(e).sum(), list(model.params.values())) for one in (learner, exact))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    q, wanted = learner.adapt(e.support).distribution, exact.adapt(e.support).distribution
    torch.testing.assert_close(q.precision_matrix, wanted.precision_matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("curvature", KINDS)
def test_evidence_on_a_linear_network_by_every_curvature(float64, curvature):
    """One linear layer: all but the diagonal one are the whole curvature, and exact."""
    e = episode(features=2)
    model = HierarchicalModel.from_network(WeightNetwork(nn.Linear(2, 1)), Gaussian(0.7), example=e)
    learner = LLAMA(model, inner_steps=2, inner_lr=1e-3, objective="evidence", curvature=curvature)
    error = (learner.meta_loss(e) - Exact(model).meta_loss(e)).abs().max()
    assert error > 1e-4 if curvature == "diagonal" else error < 1e-8
    q, exact = learner.adapt(e.support).distribution, Exact(model).adapt(e.support).distribution
    if curvature == "diagonal":
        torch.testing.assert_close(q.variance, 1 / exact.precision_matrix.diagonal(dim1=-2, dim2=-1), rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(q.covariance_matrix, exact.covariance_matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("curvature", KINDS)
@both_hessians
def test_the_evidence_formula_term_by_term(float64, curvature, hessian):
    """From the curvature's blocks as one dense matrix; entries without curvature are left at φ̂."""
    e, model = episode(), wide_network(scale=0.05)
    learner = LLAMA(model, inner_steps=2, inner_lr=1e-3, objective="evidence", curvature=curvature, hessian=hessian)
    loss = learner.meta_loss(e)
    both, prior = model.prepare(e), model.program.prior
    phi = prior.loc.expand(4, -1)
    for _ in range(2):
        phi = phi.detach().requires_grad_()
        (g,) = torch.autograd.grad(model.log_joint(phi, both).sum(), phi)
        phi = phi + 1e-3 * g / both.counts[:, None]
    phi = phi.detach().requires_grad_()
    joint = model.log_joint(phi, both)
    (g,) = torch.autograd.grad(joint.sum(), phi)
    precision = torch.diag(prior.scale**-2).repeat(4, 1, 1)
    for where, matrix, curved in likelihood_curvature(model, phi.detach(), both, kind=curvature, hessian=hessian):
        precision[:, where, where] += matrix if matrix.dim() == 3 else torch.diag_embed(matrix)
        g[:, where] *= curved
    assert torch.linalg.eigvalsh(precision).min() > 0.2 * (prior.scale**-2).max()  # the floor is not reached
    step = torch.linalg.solve(precision, g[..., None])[..., 0]
    promised, kept = (g * step).sum(-1) / 2, model.log_joint(phi + step, both) - joint
    wanted = -joint - model.dim / 2 * math.log(2 * math.pi) + torch.logdet(precision) / 2 - torch.minimum(promised, kept.clamp(min=0))
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-9)


@both_hessians
def test_a_promise_that_the_newton_step_does_not_keep_does_not_count(float64, hessian):
    """A sure and wrong classifier bends little: ½ gᵀ P⁻¹ g grows with the prior's variance for ever, and no step could win it."""
    points = Points.of(torch.full((1, 4, 1), 3.0), torch.zeros(1, 4))
    e, losses = Episode(points, points), []
    for sd in (1e1, 1e2, 1e3):
        net = WeightNetwork(nn.Linear(1, 1, bias=False))
        model = HierarchicalModel.from_network(net, Bernoulli(), NormalPrior(torch.full((1,), 5.0), sd), example=e)
        loss = LLAMA(model, inner_steps=0, objective="evidence", hessian=hessian).meta_loss(e)
        phi = torch.full((1, 1), 5.0).requires_grad_()
        (g,) = torch.autograd.grad(model.log_joint(phi, e).sum(), phi)
        (bend,) = (b.matrix[0, 0] for b in likelihood_curvature(model, phi.detach(), model.prepare(e), kind="full", hessian=hessian))
        precision = bend + sd**-2
        joint, moved = model.log_joint(phi, e), model.log_joint(phi + g / precision, e)
        assert g.square() / precision / 2 > 3 * (moved - joint).clamp(min=0)
        wanted = -torch.maximum(joint, moved) - math.log(2 * math.pi) / 2 + precision.log() / 2
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-9)
        losses.append(loss.item())
    assert min(losses) > 0


def test_evidence_without_the_log_prior_has_no_lower_bound(float64):
    """What remains without −log p(φ̂ | θ) falls with the prior's precision for ever where D > N; the whole does not."""
    e = episode(counts=(1,), queries=(0,), features=2)
    losses, remains = [], []
    for sd in (1e1, 1e3, 1e5):
        model = HierarchicalModel(linear_program, example=e)
        with torch.no_grad():
            model.params["sd"].fill_(math.log(sd))
        learner = LLAMA(model, inner_steps=0, objective="evidence")
        losses.append(learner.meta_loss(e).item())
        remains.append(losses[-1] + model.log_prior(model.initial(e.support), e.support).item())
    assert losses[0] < losses[1] < losses[2]
    assert remains[0] - remains[1] > 4
    assert remains[1] - remains[2] > 4


# --- "paper"


@both_hessians
@pytest.mark.parametrize("eta", [1e-6, 0.3])
def test_the_papers_loss_is_the_direct_computation(linear_model, eta, hessian):
    e = episode(counts=(3, 5, 0, 8), queries=(4, 1, 6, 0), features=2)
    loss = LLAMA(linear_model, inner_steps=3, inner_lr=0.2, eta=eta, damping=0.05, hessian=hessian).meta_loss(e)
    _, _, variance = theta(linear_model)
    for task in range(4):
        phi, _, _ = maml(linear_model, e.support, task, 3, 0.2)
        x, y = design(e.query, task)
        nll = -torch.distributions.Normal(x @ phi, variance.sqrt()).log_prob(y).sum()
        wanted = nll + eta / 2 * torch.logdet(x.T @ x / variance + 0.05 * torch.eye(2))
        torch.testing.assert_close(loss[task], wanted, rtol=0, atol=1e-10)


@both_hessians
def test_the_papers_gradient_is_the_direct_computations(linear_model, hessian):
    e = episode(features=2)
    loss = LLAMA(linear_model, inner_steps=3, inner_lr=0.2, eta=0.3, damping=0.05, hessian=hessian).meta_loss(e).sum()
    names = ("mean", "noise")
    got = torch.autograd.grad(loss, [linear_model.params[n] for n in names])
    _, _, variance = theta(linear_model)
    total = 0.0
    for task in range(4):
        phi, _, _ = maml(linear_model, e.support, task, 3, 0.2)
        x, y = design(e.query, task)
        total = total - torch.distributions.Normal(x @ phi, variance.sqrt()).log_prob(y).sum()
        total = total + 0.15 * torch.logdet(x.T @ x / variance + 0.05 * torch.eye(2))
    for a, b in zip(got, torch.autograd.grad(total, [linear_model.params[n] for n in names]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_without_eta_the_paper_is_maml_summed_over_queries(linear_model):
    e = episode(features=2)
    plain = MAML(linear_model, inner_steps=3, inner_lr=0.2).meta_loss(e) * e.query.counts
    torch.testing.assert_close(LLAMA(linear_model, inner_steps=3, inner_lr=0.2, eta=0.0).meta_loss(e), plain, rtol=0, atol=1e-12)


def test_first_order_takes_the_inner_gradients_as_constants(linear_model):
    e = episode(features=2)
    learner = LLAMA(linear_model, inner_steps=3, inner_lr=0.1, eta=0.3, first_order=True)
    (got,) = torch.autograd.grad(learner.meta_loss(e).sum(), linear_model.params["mean"])
    phi = learner.adapt(e.support).mean.requires_grad_()  # the linear model's curvature does not depend on φ
    (wanted,) = torch.autograd.grad(-linear_model.log_likelihood(phi, e.query).sum(), phi)
    torch.testing.assert_close(got, wanted.sum(0), rtol=0, atol=1e-12)


def test_what_each_objective_trains(linear_model):
    paper, evidence = LLAMA(linear_model), LLAMA(linear_model, objective="evidence")
    params = linear_model.params
    assert {id(p) for p in paper.trained_parameters()} == {id(params["mean"]), id(params["noise"])}
    assert {id(p) for p in evidence.trained_parameters()} == {id(p) for p in params.values()}


# --- q


@both_hessians
@pytest.mark.parametrize("objective", ["paper", "evidence"])
@pytest.mark.parametrize("steps", [0, 4])
def test_q_has_the_exact_precision_and_one_newton_step_gives_the_exact_mean(linear_model, steps, objective, hessian):
    points = ragged((4, 1, 0, 9), 2)
    learner = LLAMA(linear_model, inner_steps=7, adapt_steps=steps, inner_lr=0.2, objective=objective, hessian=hessian)
    q = learner.adapt(points).distribution
    phi = q.mean.requires_grad_()
    (g,) = torch.autograd.grad(linear_model.log_joint(phi, points).sum(), phi)
    for task in range(4):
        mean, precision = posterior(linear_model, points, task)
        torch.testing.assert_close(q.precision_matrix[task], precision.detach(), rtol=0, atol=1e-10)
        newton = phi[task] + torch.linalg.solve(q.precision_matrix[task], g[task])
        torch.testing.assert_close(newton, mean, rtol=0, atol=1e-10)
        if objective == "paper":
            torch.testing.assert_close(phi[task], maml(linear_model, points, task, steps, 0.2)[0], rtol=0, atol=1e-10)


def test_the_ascent_on_the_joint_reaches_the_exact_posterior(linear_model):
    points = ragged((4, 1, 0, 9), 2)
    q = LLAMA(linear_model, inner_steps=2000, inner_lr=0.2, objective="evidence").adapt(points)
    exact = Exact(linear_model).adapt(points)
    torch.testing.assert_close(q.mean, exact.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(q.distribution.covariance_matrix, exact.distribution.covariance_matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("objective", ["paper", "evidence"])
def test_without_support_points_q_is_the_prior(float64, curvature, objective):
    model = wide_network()
    with torch.no_grad():
        model.program.prior.log_scale += torch.linspace(-1, 1, model.program.network.dim)
    q = LLAMA(model, curvature=curvature, objective=objective, hessian="gauss_newton").adapt(ragged((0, 2)))
    torch.testing.assert_close(q.mean[0], model.program.prior.loc.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.distribution.variance[0], model.program.prior.scale.detach() ** 2, rtol=1e-12, atol=0)
    last = slice(-4, None)
    assert (q.distribution.variance[1, last] < q.distribution.variance[0, last]).all()


@pytest.mark.parametrize("curvature", KINDS)
@both_hessians
def test_the_covariance_of_q_is_the_inverse_of_the_blocks_and_the_prior(float64, curvature, hessian):
    e, model = class_episode(), wide_network(3, scale=0.3)
    q = LLAMA(model, inner_steps=2, inner_lr=0.1, curvature=curvature, hessian=hessian).adapt(e.support).distribution
    points, precision = model.prepare(e.support), torch.diag(model.program.prior.scale.detach() ** -2).repeat(4, 1, 1)
    for where, matrix, _ in likelihood_curvature(model, q.mean, points, kind=curvature, hessian=hessian):
        precision[:, where, where] += matrix if matrix.dim() == 3 else torch.diag_embed(matrix)
    wanted = torch.distributions.MultivariateNormal(q.mean, precision_matrix=precision)
    torch.testing.assert_close(q.variance, wanted.variance, rtol=0, atol=1e-12)
    phi = torch.randn(3, 4, model.dim)
    torch.testing.assert_close(q.log_prob(phi), wanted.log_prob(phi), rtol=1e-12, atol=1e-9)
    assert isinstance(q, BlockNormal) == (curvature in ("kronecker", "last_layer"))


def test_last_layer_leaves_the_others_at_the_priors_width_and_is_all_of_a_head(float64):
    e = episode()
    model = wide_network()
    variance = LLAMA(model, curvature="last_layer").adapt(e.support).distribution.variance
    torch.testing.assert_close(variance[:, :6], model.program.prior.scale[:6].detach().expand(4, 6) ** 2, rtol=0, atol=1e-12)
    head = HierarchicalModel.from_network(HeadNetwork(nn.Sequential(nn.Linear(1, 3), nn.Tanh()), 3, 1), Gaussian(0.5), example=e)
    last, full = (LLAMA(head, curvature=c).adapt(e.support).distribution for c in ("last_layer", "full"))
    torch.testing.assert_close(last.covariance_matrix, full.covariance_matrix, rtol=0, atol=1e-14)


@both_hessians
def test_counts_with_a_points_plate(float64, hessian):
    """Precision of (log rate, slope) written out: Σ λ z zᵀ + Λ, z = (1, 0.3 x)."""
    e = episode(counts_as_targets=True)
    model = HierarchicalModel(positive_program, example=e)
    learner = LLAMA(model, inner_steps=3, inner_lr=0.1, objective="evidence", hessian=hessian)
    q, points, spread = learner.adapt(e.support).distribution, model.prepare(e.support), model.theta()["spread"].detach()
    for task in range(4):
        x = points.x[task][points.mask[task], 0]
        z = torch.stack([torch.ones_like(x), 0.3 * x], -1)
        wanted = z.T @ ((z @ q.mean[task]).exp()[:, None] * z) + torch.diag(torch.stack([spread**-2, torch.ones(())]))
        torch.testing.assert_close(q.precision_matrix[task], wanted, rtol=0, atol=1e-10)


@both_hessians
@pytest.mark.parametrize("classes", [2, 3])
def test_classes_of_a_linear_network(float64, classes, hessian):
    """log p is concave and canonical: both are the Hessian of softmax (or logistic) regression, from `torch.func`."""
    e = class_episode(classes)
    e = Episode(*(p._replace(y=p.y.double()) for p in e)) if classes == 2 else e
    outputs, likelihood = (1, Bernoulli()) if classes == 2 else (3, Categorical(3))
    net = WeightNetwork(nn.Linear(1, outputs))
    model = HierarchicalModel.from_network(net, likelihood, NormalPrior.of(net, 0.8), example=e)
    q = LLAMA(model, inner_steps=3, inner_lr=0.5, hessian=hessian).adapt(e.support).distribution
    for task in range(4):
        x, y = design(model.prepare(e.support), task)

        def nll(phi, x=x, y=y):
            weight, bias = phi[:outputs], phi[outputs:]
            logits = x * weight + bias
            if classes == 2:
                return (torch.log1p(logits[:, 0].exp()) - y * logits[:, 0]).sum()
            return (torch.logsumexp(logits, -1) - logits.gather(-1, y[:, None].long())[:, 0]).sum()

        wanted = jacrev(jacrev(nll))(q.mean[task]) + torch.eye(model.dim) / 0.64
        torch.testing.assert_close(q.precision_matrix[task], wanted, rtol=0, atol=1e-10)


# --- where the curvature is not positive


def test_a_floor_keeps_q_within_three_prior_sds_and_its_gradient_is_right(float64):
    e, model = episode(), wide_network(scale=2.0)
    learner = LLAMA(model, inner_steps=1, inner_lr=0.01, objective="evidence")
    both = model.prepare(e)
    raw = -jacrev(jacrev(lambda phi: model.log_joint(phi, both).sum()))(learner.model.initial(both)[:1].detach().expand(4, -1).clone())
    raw = torch.stack([raw[t, :, t] for t in range(4)])
    assert (torch.linalg.eigvalsh(raw)[:, 0] < -1).any()  # it is reached
    variance = learner.adapt(e.support).distribution.variance
    assert (variance <= 10 * 4.0 + 1e-9).all()
    assert (variance > 1.01 * 4.0).any()
    for objective in ("evidence", "paper"):
        learner = LLAMA(model, inner_steps=1, inner_lr=0.01, objective=objective, eta=0.5, damping=0.1)
        parameters = learner.trained_parameters()
        gradients = torch.autograd.grad(learner.meta_loss(e).sum(), parameters)
        directions = [torch.randn_like(p) for p in parameters]
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p += step * d
            values.append(learner.meta_loss(e).sum().item())
        slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_a_diverged_task_is_nan_of_its_own(linear_model):
    points = ragged((4, 3), 2)
    points = Points(points.x * torch.tensor([1.0, 1e30])[:, None, None], points.y, points.mask)
    learner = LLAMA(linear_model, inner_steps=40, inner_lr=0.1)
    with pytest.warns(RuntimeWarning, match="the adaptation of 1 of 2 tasks diverged"):
        q = learner.adapt(points)
    wanted = learner.adapt(points.select([0])).distribution
    torch.testing.assert_close(q.distribution.variance[0], wanted.variance[0], rtol=0, atol=1e-12)
    assert q.mean[1].isnan().all()


@pytest.mark.parametrize("curvature", KINDS)
def test_a_network_that_has_diverged_is_nan_and_says_why(curvature):
    model, points = wide_network(), ragged((4, 3))
    with pytest.warns(RuntimeWarning, match=r"2 of 2 tasks diverged.*lower inner_lr \(a Gaussian's steps grow as inner_lr / noise²\)"):
        q = LLAMA(model, inner_steps=40, inner_lr=1e6, curvature=curvature, hessian="gauss_newton").adapt(points)
    assert q.mean.isnan().all()


def test_a_prior_without_curvature_of_its_own_still_gives_a_normal(float64):
    """A Student-t prior bends the wrong way far out: the floor is a tenth of the prior's precision."""

    def heavy(points):
        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.StudentT(3.0, 0.0, 1.0))
            pyro.sample("y", dist.Normal(w[..., None] * points.x[..., 0], 4.0).mask(points.mask).to_event(1), obs=points.y)

    points = Points.of(torch.ones(1, 1, 1), torch.full((1, 1), 60.0))
    model = HierarchicalModel(heavy, example=points)
    q = LLAMA(model, inner_steps=1, inner_lr=1.0).adapt(points)
    w = q.mean[0, 0].item()
    bend = 1 / 16 + 4 * (3 - w**2) / (3 + w**2) ** 2
    assert bend < 0.1 / 3
    torch.testing.assert_close(q.distribution.variance, torch.full((1, 1), 30.0), rtol=1e-12, atol=0)


# --- Pyro, options


def test_pyros_elbo_under_the_guide_is_the_log_evidence(linear_model):
    """q is the exact posterior after many steps, so every draw's ELBO is log p(S | θ)."""
    points = ragged((4, 1, 0, 9), 2)
    learner = LLAMA(linear_model, inner_steps=600, inner_lr=0.2, objective="evidence", first_order=True)
    elbo = -Trace_ELBO().loss(linear_model, learner.guide, points)
    assert elbo == pytest.approx(Exact(linear_model).log_evidence(points).sum().item(), abs=1e-9)


@pytest.mark.parametrize("curvature", KINDS)
def test_the_guide_is_q_and_sees_the_support_only(float64, curvature):
    e, model = class_episode(), wide_network(3)
    learner = LLAMA(model, inner_steps=2, curvature=curvature)
    learner.materialise(e)
    pyro.set_rng_seed(3)
    elbo = -Trace_ELBO().differentiable_loss(model, learner.guide, e)
    elbo.backward()
    assert model.program.prior.log_scale.grad.abs().max() > 0
    pyro.set_rng_seed(3)
    q = learner.adapt(e.support)
    trace = pyro.poutine.trace(learner.guide).get_trace(e)
    phi = trace.nodes["phi"]["value"].detach()
    wanted = (model.log_joint(phi, e) - q.log_prob(phi)).sum()
    torch.testing.assert_close(elbo, wanted, rtol=0, atol=1e-9)


def test_the_guide_of_a_program_with_a_points_plate(float64):
    e = episode(counts_as_targets=True)
    model = HierarchicalModel(positive_program, example=e)
    learner = LLAMA(model, inner_steps=2, inner_lr=0.1)
    trace = pyro.poutine.trace(learner.guide).get_trace(e)
    phi = model.pack({name: trace.nodes[name]["value"][..., 0] for name in ("rate", "slope")})
    trace.compute_log_prob()
    wanted = learner.adapt(e.support).log_prob(phi).sum() - phi[:, 0].sum()  # the Jacobian of rate = exp φ
    total = sum(trace.nodes[name]["log_prob_sum"] for name in ("_phi", "rate", "slope"))
    torch.testing.assert_close(total - trace.nodes["_phi"]["log_prob_sum"], -phi[:, 0].sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-10)


def test_float32_networks_have_finite_posteriors():
    model, e = wide_network(3), class_episode()
    for curvature in KINDS:
        for objective in ("paper", "evidence"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                q = LLAMA(model, curvature=curvature, objective=objective).adapt(e.support).distribution
            assert q.variance.dtype == torch.float32
            assert (q.variance > 0).all()


def test_sampled_curvature_gives_q_a_variance_near_gauss_newtons(float64):
    model, e = wide_network(3), class_episode()
    wanted = LLAMA(model, curvature="diagonal", hessian="gauss_newton").adapt(e.support).distribution
    learner = LLAMA(model, curvature="diagonal", hessian="sampled", fisher_draws=2000)
    q, again, other = (learner.adapt(e.support, generator=torch.Generator().manual_seed(s)).distribution for s in (0, 0, 1))
    torch.testing.assert_close(q.variance, wanted.variance, rtol=0.2, atol=0)
    torch.testing.assert_close(q.mean, wanted.mean, rtol=0, atol=0)
    assert torch.equal(q.variance, again.variance)
    assert not torch.equal(q.variance, other.variance)


def test_wrong_options_are_named(linear_model):
    for options, match in (
        ({"objective": "evidense"}, "did you mean 'evidence'"),
        ({"curvature": "diag"}, "curvature: expected one of 'full', 'diagonal', 'kronecker', 'last_layer', got 'diag'"),
        ({"hessian": "gauss-newton"}, "did you mean 'gauss_newton'"),
        ({"damping": -1.0}, r"damping: expected a number of at least 0, got -1\.0"),
        ({"eta": float("nan")}, "eta: expected a number of at least 0, got nan"),
        ({"inner_steps": 1.5}, r"inner_steps: expected a whole number of at least 0, got 1\.5"),
        ({"adapt_steps": -1}, "adapt_steps: expected a whole number"),
        ({"curvature": "kronecker"}, "curvature='kronecker' needs a WeightNetwork .* got a program without layers"),
        ({"curvature": "last_layer"}, "curvature='last_layer' needs .* got a program without layers"),
        ({"hessian": "sampled"}, "hessian='sampled' is for curvature='diagonal'"),
        ({"curvature": "diagonal", "hessian": "sampled", "fisher_draws": 0}, "fisher_draws: expected a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            LLAMA(linear_model, **options)
