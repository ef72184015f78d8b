"""ANIL (Raghu et al. 2020) is `MAML` on a `HeadNetwork`: the inner loop moves the head alone, the outer one the features too."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bayesmeta import Episode, HierarchicalModel
from bayesmeta.learners import MAML
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.networks import HeadNetwork

from ..conftest import episode

FEATURES, STEPS, ALPHA, NOISE = 5, 3, 0.3, 0.4


def body():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, FEATURES), nn.Tanh())


def anil_by_hand(features, weight, bias, e, loss, first_order):
    """One task at a time, one head at a time, with plain torch: the query losses."""
    losses = []
    for (xs, ys), (xq, yq) in zip(e.support.to_tasks(), e.query.to_tasks(), strict=True):
        w, b = weight, bias
        for _ in range(STEPS):
            gw, gb = torch.autograd.grad(loss(features(xs) @ w.T + b, ys), (w, b), create_graph=not first_order)
            w, b = w - ALPHA * gw, b - ALPHA * gb
        losses.append(loss(features(xq) @ w.T + b, yq))
    return torch.stack(losses)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_maml_on_a_head_is_anil_by_hand(float64, kind, first_order):
    e, outputs = episode(), 1
    features = body()
    if kind == "classification":
        outputs = 3
        e = Episode(*(p._replace(y=(p.y.abs() * 2).long().clamp(max=2)) for p in e))
    likelihood = Categorical(3) if kind == "classification" else Gaussian(NOISE, learn=False)
    model = HierarchicalModel.from_network(HeadNetwork(copy.deepcopy(features), FEATURES, outputs), likelihood)
    torch.manual_seed(2)
    with torch.no_grad():
        model.program.prior.loc.copy_(0.5 * torch.randn(model.network.dim))  # not at 0, where features get no first-order gradient
    learner = MAML(model, inner_steps=STEPS, inner_lr=ALPHA, first_order=first_order)

    def loss(output, y):
        if kind == "classification":
            return cross_entropy(output, y)
        return -torch.distributions.Normal(output[:, 0], NOISE).log_prob(y).mean()

    start = model.program.prior.loc.detach()
    weight = start[: outputs * FEATURES].view(outputs, FEATURES).clone().requires_grad_()
    bias = start[outputs * FEATURES :].clone().requires_grad_()
    wanted = anil_by_hand(features, weight, bias, e, loss, first_order)
    got = learner.meta_loss(e)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    by_hand = torch.autograd.grad(wanted.sum(), [weight, bias, *features.parameters()])
    ours = torch.autograd.grad(got.sum(), [model.program.prior.loc, *model.network.features.parameters()])
    torch.testing.assert_close(ours[0], torch.cat([g.flatten() for g in by_hand[:2]]), rtol=0, atol=1e-10)
    for a, b in zip(ours[1:], by_hand[2:], strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_adaptation_leaves_the_features_alone(float64):
    e = episode()
    model = HierarchicalModel.from_network(HeadNetwork(body(), FEATURES, 1), Gaussian(NOISE))
    learner = MAML(model, inner_steps=STEPS, inner_lr=ALPHA)
    before = copy.deepcopy(model.network.state_dict())
    posterior = learner.adapt(e.support)
    assert posterior.mean.shape == (4, FEATURES + 1)
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())
    x = e.query.filled().x
    features = model.network.features(x)
    by_hand = (features * posterior.mean[:, None, :FEATURES]).sum(-1) + posterior.mean[:, None, -1]
    torch.testing.assert_close(posterior.predict(x).mean, by_hand.detach(), rtol=0, atol=1e-12)
    trained = {id(p) for p in learner.trained_parameters()}
    assert all(id(p) in trained for p in model.network.features.parameters())
