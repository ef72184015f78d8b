"""The Stein step against plain loops, autograd and Pyro's own SVGD."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVGD, RBFSteinKernel

from bayesmeta import HierarchicalModel, Points
from bayesmeta.learners.stein import FLOOR, bandwidth_of, checked_bandwidth, direction, kernel, transport

pytestmark = pytest.mark.usefixtures("float64")


def cloud(particles=5, tasks=3, dim=4):
    return torch.randn(particles, tasks, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def k(a, b, h):
    """The kernel of two points, as it is written in a book."""
    return torch.exp(-((a - b) ** 2 / h).sum())


@pytest.mark.parametrize("bandwidth", ["scalar", "per_dimension", 0.7])
def test_the_direction_is_the_double_sum(bandwidth):
    particles, score = cloud(), cloud().sin()
    got = direction(particles, score, bandwidth)
    h = bandwidth_of(particles, bandwidth)
    for t in range(3):
        for m in range(5):
            total = torch.zeros(4)
            for n in range(5):
                other = particles[n, t].clone().requires_grad_()
                value = k(other, particles[m, t], h[t])
                total += value.detach() * score[n, t] + torch.autograd.grad(value, other)[0]
            torch.testing.assert_close(got[m, t], total / 5, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bandwidth", ["scalar", "per_dimension"])
def test_the_repulsion_is_the_gradient_of_the_kernel_used(bandwidth):
    """Σ_n ∇_{φ_n} k(φ_n, φ_m): half the gradient that autograd finds of all pairs' kernels, with the sign turned."""
    particles = cloud().requires_grad_()
    h = bandwidth_of(particles, bandwidth)
    values = kernel(particles, h)
    (gradient,) = torch.autograd.grad(values.sum(), particles)
    torch.testing.assert_close(direction(particles, torch.zeros(5, 3, 4), bandwidth), -gradient / 2 / 5, rtol=0, atol=1e-13)


def test_autograd_through_kernel_and_direction():
    particles, score = cloud(4, 2, 3).requires_grad_(), cloud(4, 2, 3).cos().requires_grad_()
    h = torch.tensor([[0.8], [1.7]])
    assert torch.autograd.gradcheck(lambda p: kernel(p, h), particles)
    assert torch.autograd.gradcheck(lambda p, s: direction(p, s, 0.9), (particles, score))
    assert torch.autograd.gradgradcheck(lambda p, s: direction(p, s, 0.9), (particles, score))


def test_bandwidths_are_medians_over_pairs():
    particles = cloud(3, 2, 4)
    pairs = [(0, 1), (0, 2), (1, 2)]
    for t in range(2):
        squares = torch.stack([(particles[a, t] - particles[b, t]) ** 2 for a, b in pairs])
        middle = squares.sum(-1).sort().values[1] / math.log(4)
        torch.testing.assert_close(bandwidth_of(particles, "scalar")[t, 0], middle, rtol=1e-12, atol=0)
        middles = squares.sort(0).values[1] / math.log(4)
        torch.testing.assert_close(bandwidth_of(particles, "per_dimension")[t], middles, rtol=1e-12, atol=0)


def test_the_bandwidth_carries_no_gradient():
    particles = cloud().requires_grad_()
    assert not bandwidth_of(particles, "scalar").requires_grad
    gradients = [
        torch.autograd.grad(direction(particles, torch.ones_like(particles), b).square().sum(), particles)[0]
        for b in ("scalar", float(bandwidth_of(particles, "scalar")[0]))
    ]
    torch.testing.assert_close(gradients[0][:, 0], gradients[1][:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bandwidth", ["scalar", "per_dimension"])
def test_particles_that_coincide_stay_finite_and_move_as_one(bandwidth):
    particles = torch.ones(4, 2, 3)
    assert torch.equal(bandwidth_of(particles, bandwidth).unique(), torch.tensor([FLOOR]))
    torch.testing.assert_close(direction(particles, particles, bandwidth), torch.ones(4, 2, 3), rtol=0, atol=1e-15)


def test_a_single_particle_climbs_the_gradient_exactly():
    start = cloud(1)
    got = transport(lambda phi: -phi.pow(4).sum(-1), start, steps=3, step_size=0.01)
    wanted = start
    for _ in range(3):
        wanted = wanted + 0.01 * -4 * wanted.pow(3)
    torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bandwidth", ["scalar", "per_dimension"])
def test_tasks_do_not_see_each_other(bandwidth):
    centre = torch.arange(3.0)[:, None]
    together = transport(lambda phi: -(phi - centre).square().sum(-1), cloud(), steps=20, step_size=0.1, bandwidth=bandwidth)
    for t in range(3):
        alone = transport(lambda phi, t=t: -(phi - t).square().sum(-1), cloud()[:, [t]], steps=20, step_size=0.1, bandwidth=bandwidth)
        torch.testing.assert_close(together[:, [t]], alone, rtol=0, atol=1e-13)


def test_orders_of_the_gradient():
    start = cloud().requires_grad_()
    density = lambda phi: -phi.pow(4).sum(-1)  # noqa: E731
    second, first, none = (
        transport(density, start, steps=2, step_size=0.01, **kind) for kind in ({}, {"first_order": True}, {"keep_graph": False})
    )
    assert not none.requires_grad
    assert torch.equal(second.detach(), none)
    assert torch.equal(first.detach(), none)
    assert torch.equal(torch.autograd.grad(first.sum(), start)[0], torch.ones_like(start))
    assert (torch.autograd.grad(second.sum(), start)[0] - 1).abs().max() > 1e-3
    assert torch.autograd.gradcheck(
        lambda s: transport(density, s, steps=2, step_size=0.1, bandwidth=1.3), cloud(3, 2, 2).requires_grad_()
    )


def positive_vector(points):
    """y = w · x + noise with positive w: packing has a Jacobian."""
    with pyro.plate("tasks", points.num_tasks):
        w = pyro.sample("w", dist.LogNormal(torch.zeros(3), 0.8).to_event(1))
        pyro.sample("y", dist.Normal((w[..., None, :] * points.x).sum(-1), 0.6).to_event(1), obs=points.y)


def test_one_step_is_pyros(float64):
    """Pyro takes the tasks of a program for one particle, so one task; its loss is −log p, minimised."""
    generator = torch.Generator().manual_seed(2)
    points = Points.of(torch.randn(1, 6, 3, generator=generator), torch.randn(1, 6, generator=generator))
    model, start = HierarchicalModel(positive_vector, example=points), cloud(7, 1, 3)
    got = transport(
        lambda phi: model.log_joint(phi, points), start, steps=1, step_size=0.05, bandwidth="per_dimension", keep_graph=False
    )
    svgd = SVGD(positive_vector, RBFSteinKernel(), pyro.optim.SGD({"lr": 0.05}), 7, max_plate_nesting=1, mode="multivariate")
    svgd.guide(points)
    pyro.param("svgd_particles").unconstrained().data.copy_(start.flatten())
    svgd.step(points)
    theirs = pyro.param("svgd_particles").detach().reshape(7, 1, 3)
    assert (theirs - start).abs().max() > 1e-2
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", ["median", 0.0, -1.0, float("nan"), float("inf"), True])
def test_a_bandwidth_that_is_none_is_named(bad):
    with pytest.raises(ValueError, match="bandwidth: expected 'scalar', 'per_dimension' or a positive number, got"):
        checked_bandwidth(bad)
