"""Encoders: sets of points, blind to order and padding, each against its formula; the flow against its Jacobian."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn.functional import one_hot

from bayesmeta import HierarchicalModel, Points
from bayesmeta.learners.base import AbstractLazyModule
from bayesmeta.learners.encoders import (
    Attention,
    DeepSet,
    Head,
    PerClass,
    PointFeatures,
    Recurrent,
    make_encoder,
    projections,
    random_part,
)  # fmt: skip
from bayesmeta.learners.flows import ConditionalFlow, FlowNormal
from bayesmeta.learners.layers import positive
from bayesmeta.likelihoods import Categorical, Gaussian, Poisson
from bayesmeta.networks import DecoderNetwork, HeadNetwork, WeightNetwork

from ..conftest import linear_program, positive_program, ragged

ENCODERS = {
    "deep set": lambda **kw: DeepSet(8, **kw),
    "gru": lambda **kw: Recurrent(8, **kw),
    "lstm, three orders": lambda **kw: Recurrent(8, cell="lstm", orders=3, **kw),
    "attention": lambda **kw: Attention(8, **kw),
    "attention, one head, no block": lambda **kw: Attention(8, blocks=0, heads=1, **kw),
}
every_encoder = pytest.mark.parametrize("name", ENCODERS)


def built(encoder, model):
    """``encoder`` and all in it built for ``model``, its weights moved off their start."""
    for module in encoder.modules():
        if isinstance(module, AbstractLazyModule):
            module.build(model)
    with torch.no_grad():
        for p in encoder.parameters():
            p += 0.1 * torch.randn_like(p)
    return encoder


def linear(dtype=torch.float64):
    torch.set_default_dtype(dtype)
    return HierarchicalModel(linear_program, example=ragged((4, 4), 2))


def alone(points, task):
    """One task without its padding."""
    keep = points.mask[task]
    return Points(points.x[[task]][:, keep], points.y[[task]][:, keep], points.mask[[task]][:, keep])


@every_encoder
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_order_and_padding_do_not_matter(name, dtype, tolerance):
    encoder = built(ENCODERS[name](), linear(dtype))
    points = ragged((6, 0, 1, 9), 2)
    e = encoder(points)
    assert e.shape == (4, 8)
    assert e.dtype == dtype
    order = torch.randperm(9)
    shuffled = Points(points.x[:, order], points.y[:, order], points.mask[:, order])
    torch.testing.assert_close(encoder(shuffled), e, rtol=0, atol=tolerance)
    more = points.union(Points(torch.ones(4, 5, 2), torch.ones(4, 5), torch.zeros(4, 5, dtype=torch.bool)))
    torch.testing.assert_close(encoder(more), e, rtol=0, atol=tolerance)
    for task in range(4):
        torch.testing.assert_close(encoder(alone(points, task))[0], e[task], rtol=0, atol=tolerance)


@every_encoder
@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_what_stands_in_the_padding_changes_no_bit(name, value):
    encoder = built(ENCODERS[name](), linear())
    points = ragged((6, 0, 1, 9), 2)
    odd = points._replace(x=torch.where(points.mask[..., None], points.x, value), y=torch.where(points.mask, points.y, value))
    one, two = encoder(points), encoder(odd)
    assert torch.equal(one, two)
    parameters = list(encoder.parameters())
    for a, b in zip(*(torch.autograd.grad(e.square().sum(), parameters) for e in (one, two)), strict=True):
        assert torch.equal(a, b)


@every_encoder
def test_an_empty_set_has_a_learned_answer(name):
    encoder = built(ENCODERS[name](), linear())
    none = encoder(ragged((0, 0), 2))
    beside = encoder(ragged((0, 5), 2))
    assert none.isfinite().all()
    torch.testing.assert_close(none[0], none[1], rtol=0, atol=1e-15)
    torch.testing.assert_close(beside[0], none[0], rtol=0, atol=1e-12)
    assert (beside[1] - none[0]).abs().max() > 1e-3
    gradients = torch.autograd.grad(none.square().sum(), list(encoder.parameters()), allow_unused=True)
    assert any(g is not None and bool((g != 0).any()) for g in gradients)


@every_encoder
def test_the_number_of_points_is_seen(name):
    """The same point twice is another set than once."""
    encoder = built(ENCODERS[name](), linear())
    once = ragged((1,), 2)
    twice = Points(*(v.repeat(1, 2, *(1,) * (v.dim() - 2)) for v in once))
    assert (encoder(once) - encoder(twice)).abs().max() > 1e-3


@every_encoder
def test_every_parameter_gets_a_gradient(name):
    encoder = built(ENCODERS[name](), linear())
    gradients = torch.autograd.grad(encoder(ragged((6, 0, 1), 2)).square().sum(), list(encoder.parameters()))
    assert all(bool((g != 0).any()) for g in gradients)


def test_the_deep_set_is_its_formula():
    encoder = built(DeepSet(8), linear())
    points = ragged((5,), 2)
    rows = []
    for x, y in zip(points.x[0], points.y[0], strict=True):
        first = [*x, y]
        f = torch.stack([*first, *(first[i] * first[j] for i in range(3) for j in range(i, 3))])
        rows.append(torch.cat([encoder.each(f), f]))
    mean = sum(rows) / 5
    wanted = encoder.out(torch.cat([mean, torch.tensor([math.log(6.0)])]))
    torch.testing.assert_close(encoder(points)[0], wanted, rtol=0, atol=1e-12)


def test_the_recurrent_encoder_is_its_formula():
    encoder = built(Recurrent(8), linear())
    points = ragged((5,), 2)
    f = encoder.points(points)[0]
    place = projections(torch.cat([points.x, points.y[..., None]], -1), 1)[0, :, 0]
    order = sorted(range(5), key=lambda j: place[j].item())
    states = [encoder.network(f[o][None])[1][0, 0] for o in (order, order[::-1])]
    wanted = encoder.out(torch.cat([(states[0] + states[1]) / 2, torch.tensor([math.log(6.0)])]))
    torch.testing.assert_close(encoder(points)[0], wanted, rtol=0, atol=1e-12)


def test_attention_is_its_formula():
    encoder = built(Attention(8, blocks=1, heads=2), linear())
    points = ragged((5,), 2)

    def attend(k, queries, values):
        q, (key, v) = encoder.queries[k](queries), encoder.keys[k](values).split(8, -1)
        parts = []
        for h in (slice(0, 4), slice(4, 8)):
            weights = torch.softmax(q[:, h] @ key[:, h].T / math.sqrt(4), -1)
            parts.append(weights @ v[:, h])
        return encoder.mixes[k](torch.cat(parts, -1))

    e = torch.cat([encoder.token[None], encoder.embed(encoder.points(points)[0])])
    e = e + attend(0, encoder.norms[0](e), encoder.norms[0](e))
    e = e + encoder.layers[0](encoder.norms[1](e))
    pooled = attend(1, encoder.query[None], encoder.norms[2](e))[0]
    wanted = encoder.out(torch.cat([pooled, torch.tensor([math.log(6.0)])]))
    torch.testing.assert_close(encoder(points)[0], wanted, rtol=0, atol=1e-12)


def test_features_of_scalars_and_counts():
    f = built(PointFeatures(), linear())
    points = ragged((3,), 2)
    assert (f.size, f.num_inputs, f.num_targets) == (9, 2, 1)
    torch.testing.assert_close(f(points)[0, 1, 3:5], points.x[0, 1, 0] * points.x[0, 1])
    counts = built(PointFeatures(), HierarchicalModel(positive_program, example=ragged((3,), counts_as_targets=True)))
    seen = ragged((3,), counts_as_targets=True)
    torch.testing.assert_close(counts.values(seen)[..., 1], torch.log(1 + seen.y))


def test_classes_are_one_hot_and_wide_points_have_no_products(float64):
    body = nn.Linear(6, 4)
    x, y = torch.randn(2, 3, 6), torch.tensor([[0, 3, 1], [2, 2, 0]])
    points = Points.of(x, y)
    model = HierarchicalModel.from_network(WeightNetwork(body), Categorical(4), example=points)
    f = built(PointFeatures(), model)
    assert f.size == 10
    torch.testing.assert_close(f(points), torch.cat([x, one_hot(y, 4).double()], -1))


def test_images_go_through_features_or_the_models_own(float64):
    images = Points.of(torch.randn(2, 3, 4, 4), torch.randn(2, 3))
    own = HeadNetwork(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh()), 3, 1)
    model = HierarchicalModel.from_network(own, Gaussian(), example=images)
    f = built(PointFeatures(), model)
    torch.testing.assert_close(f.inputs(images.x), own.embed(images.x))
    assert not list(f.parameters())  # they are the model's

    given = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    encoder = built(DeepSet(8, features=given), model)
    assert encoder.points.num_inputs == 2
    assert {id(p) for p in given.parameters()} <= {id(p) for p in encoder.parameters()}
    assert torch.autograd.grad(encoder(images).sum(), given[1].weight)[0].abs().max() > 0

    flat = HierarchicalModel.from_network(DecoderNetwork(nn.Linear(16 + 2, 1), 2), Gaussian(), example=images)
    assert built(PointFeatures(), flat).num_inputs == 16


def test_a_log_exposure_stays_by_itself(float64):
    points = Points.of(torch.randn(2, 3, 3), torch.ones(2, 3))
    own = HeadNetwork(nn.Linear(2, 3), 3, 1)
    f = built(PointFeatures(), HierarchicalModel.from_network(own, Poisson(exposure=True), example=points))
    torch.testing.assert_close(f.inputs(points.x), torch.cat([own.embed(points.x[..., :2]), points.x[..., 2:]], -1))


def test_first_weights_come_from_the_stream_where_an_encoder_is_made():
    model = linear()
    torch.manual_seed(3)
    one, two = DeepSet(8), DeepSet(8)
    torch.manual_seed(3)
    again = DeepSet(8)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for encoder in (one, two, again):
        encoder.points.build(model)
        encoder.build(model)
        encoder.build(model)  # once
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.out[0].weight, again.out[0].weight)
    assert not torch.equal(one.out[0].weight, two.out[0].weight)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"encoder: expected one of 'deep_set'.*got 'deepset'; did you mean 'deep_set'"):
        make_encoder("deepset", 8)
    with pytest.raises(ValueError, match="hidden: expected a whole number of at least 1, got 0"):
        make_encoder("attention", 0)
    with pytest.raises(ValueError, match="heads: expected a divisor of hidden=6, got 4"):
        Attention(6)
    with pytest.raises(ValueError, match="cell: expected one of 'gru', 'lstm', got 'rnn'"):
        Recurrent(8, cell="rnn")
    with pytest.raises(ValueError, match="orders: expected a whole number of at least 1, got 0"):
        Recurrent(8, orders=0)
    given = DeepSet(5)
    assert make_encoder(given, 64) is given
    names = ("deep_set", "recurrent", "attention", "per_class")
    assert [type(make_encoder(n, 8)) for n in names] == [DeepSet, Recurrent, Attention, PerClass]


def test_a_head_starts_near_zero(float64):
    head = Head(DeepSet(5), 16, lambda model: 2 * model.dim)
    head.build(linear())
    out = head(torch.randn(100, 5))
    assert out.shape == (100, 4)
    assert 0 < out.abs().max() < 0.05


def test_positive_is_one_at_zero_and_has_a_floor(float64):
    values = positive(torch.tensor([-1e4, 0.0, 3.0]), 0.1)
    torch.testing.assert_close(values, torch.tensor([0.1, 1.0, 0.1 + 0.9 * math.log(1 + (math.e - 1) * math.exp(3))]), rtol=0, atol=1e-14)


def test_a_random_part_is_of_the_size_asked_for_and_hangs_on_values_alone(float64):
    points = ragged((6, 0, 1, 9), 2)
    values = built(PointFeatures(), linear()).values(points)
    for share, wanted in ((0.0, [0, 0, 0, 0]), (0.5, [3, 0, 1, 5]), (0.99, [6, 0, 1, 9]), (1.0, [6, 0, 1, 9])):
        part = random_part(points, values, torch.full((4,), share))
        assert part.sum(1).tolist() == wanted
        assert not (part & ~points.mask).any()
    order = torch.randperm(9)
    shuffled = Points(points.x[:, order], points.y[:, order], points.mask[:, order])
    torch.manual_seed(1)
    part = random_part(points, values, torch.full((4,), 0.5))
    torch.manual_seed(1)
    assert torch.equal(random_part(shuffled, values[:, order], torch.full((4,), 0.5)), part[:, order])


def test_every_point_is_in_a_random_part_as_often_as_any_other(float64):
    points = Points.of(torch.linspace(-2, 2, 8).view(1, 8, 1), torch.linspace(-2, 2, 8).view(1, 8))
    values = torch.stack([points.x[..., 0], points.y], -1)
    often = torch.stack([random_part(points, values, torch.tensor([0.5])) for _ in range(4000)]).double().mean(0)[0]
    torch.testing.assert_close(often, torch.full((8,), 0.5), rtol=0, atol=4 * 0.5 / math.sqrt(4000))
    pairs = torch.stack([random_part(points, values, torch.tensor([0.25]))[0] for _ in range(4000)]).double()
    together = (pairs.T @ pairs / 4000)[~torch.eye(8, dtype=torch.bool)]  # 2 of 8: each pair in one of 28
    torch.testing.assert_close(together, torch.full((56,), 1 / 28), rtol=0, atol=4.5 * math.sqrt(1 / 28 / 4000))


def flow_of(dim, couplings=4):
    def program(points):
        import pyro
        import pyro.distributions as dist

        with pyro.plate("tasks", points.num_tasks):
            w = pyro.sample("w", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(w.sum(-1)[..., None] * points.x[..., 0], 1.0).to_event(1), obs=points.y)

    flow = ConditionalFlow(3, 8, couplings=couplings)
    flow.build(HierarchicalModel(program, example=ragged((3,))))
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn_like(p)
    return flow


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_flow_and_its_inverse_and_log_determinant(float64, dim):
    flow, context, seen = flow_of(dim), torch.randn(3, 3), torch.ones(3, 1)
    noise = torch.randn(7, 3, dim)
    u = flow(noise, context, seen)
    back, log_det = flow.inverse(u, context, seen)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-9)
    for s in range(2):
        for t in range(3):
            j = jacobian(lambda e, t=t: flow(e[None], context[[t]], seen[[t]])[0], noise[s, t])
            torch.testing.assert_close(torch.linalg.slogdet(j)[1], log_det[s, t], rtol=0, atol=1e-9)
    assert (u - noise).abs().max() > 0.1
    torch.testing.assert_close(flow(noise, context, 0 * seen), noise, rtol=0, atol=1e-12)


def test_the_flows_density_integrates_to_one_and_has_the_moments_of_its_draws(float64):
    flow = flow_of(1)
    q = FlowNormal(flow, torch.randn(2, 3), torch.ones(2, 1), torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [2.0]]))
    grid = torch.linspace(-60, 60, 240_001)
    density = q.log_prob(grid[:, None, None].expand(-1, 2, 1)).exp()
    torch.testing.assert_close(torch.trapezoid(density, grid, dim=0), torch.ones(2), rtol=0, atol=1e-8)
    mean = torch.trapezoid(density * grid[:, None], grid, dim=0)
    draws = q.sample((40_000,))
    torch.testing.assert_close(draws.mean(0)[:, 0], mean, rtol=0, atol=float(5 * draws.std() / 200))
    torch.testing.assert_close(q.mean[:, 0], mean, rtol=0, atol=float(0.1 * draws.std()))


def test_without_points_a_flow_has_exactly_the_moments_of_its_base(float64):
    loc, scale = torch.randn(2, 4), torch.rand(2, 4) + 0.5
    q = FlowNormal(flow_of(4), torch.randn(2, 3), torch.zeros(2, 1), loc, scale)
    torch.testing.assert_close(q.mean, loc, rtol=0, atol=1e-12)
    torch.testing.assert_close(q.stddev, scale, rtol=0, atol=1e-12)
    phi = torch.randn(5, 2, 4)
    wanted = torch.distributions.Normal(loc, scale).log_prob(phi).sum(-1)
    torch.testing.assert_close(q.log_prob(phi), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(q.select(torch.tensor([1, 0])).mean, loc[[1, 0]], rtol=0, atol=1e-12)
    torch.testing.assert_close(q.with_points_axis().log_prob(phi[:, :, None]), wanted[..., None], rtol=0, atol=1e-10)
