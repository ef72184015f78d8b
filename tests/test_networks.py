"""Networks: φ in a batch is φ in a loop; what a module may not do; the learned Normal prior."""

import copy
import math

import pytest
import scipy.stats
import torch
from torch import nn
from torch.func import functional_call

from bayesmeta import HierarchicalModel
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import DecoderNetwork, HeadNetwork, NormalPrior, PrototypeNetwork, WeightNetwork

from .conftest import episode

pytestmark = pytest.mark.usefixtures("float64")
T, N = 3, 4
every_draws = pytest.mark.parametrize("draws", [(), (5,), (2, 5)])


class Convolutional(nn.Module):
    """Images to three logits: convolution, group norm, a head, and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Linear(8, 3)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1) + self.shift)


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


MODULES = {
    "linear": (lambda: nn.Linear(2, 1), (2,), 3),
    "several layers and outputs": (lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)), (2,), 43),
    "convolutional": (Convolutional, (1, 4, 4), 20 + 4 + 27),
    "tied": (Tied, (2,), 8),
    "outputs of a shape": (lambda: nn.Sequential(nn.Linear(2, 6), nn.Unflatten(-1, (2, 3))), (2,), 18),
}


def one_by_one(f, phi, x):
    """``f(phi (D,), x (N, *I))`` in Python loops over draws and tasks."""
    flat = phi.reshape(-1, T, phi.shape[-1])
    out = torch.stack([torch.stack([f(flat[s, t], x[t]) for t in range(T)]) for s in range(len(flat))])
    return out.reshape(*phi.shape[:-1], *out.shape[2:])


@every_draws
@pytest.mark.parametrize("name", MODULES)
def test_a_weight_network_is_functional_call_in_a_loop(name, draws):
    make, shape, dim = MODULES[name]
    module = make()
    network = WeightNetwork(module)
    assert network.dim == dim == network.initial().numel() == network.initial_scale().numel()
    phi, x = torch.randn(*draws, T, dim), torch.randn(T, N, *shape)

    def one(phi, x):
        weights, start = {}, 0
        for n, p in module.named_parameters():
            weights[n] = phi[start : (start := start + p.numel())].reshape(p.shape)
        return functional_call(module, weights, (x,))

    torch.testing.assert_close(network(phi, x), one_by_one(one, phi, x), rtol=1e-12, atol=1e-12)
    start = network.initial().expand(T, dim)
    torch.testing.assert_close(network(start, x), torch.stack([module(v) for v in x]), rtol=1e-12, atol=1e-12)


def test_the_callers_module_is_never_changed():
    module = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    before = copy.deepcopy(module.state_dict())
    model = HierarchicalModel.from_network(WeightNetwork(module), Gaussian(0.5), example=episode())
    model.reinitialise(3)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())


def test_a_weight_network_has_no_parameters_of_its_own_and_moves_with_the_model():
    network = WeightNetwork(Convolutional())
    assert not list(network.parameters())
    assert not network.state_dict()
    network.float()
    assert network.initial().dtype == torch.float32
    phi, x = network.initial().expand(T, -1), torch.randn(T, N, 1, 4, 4, dtype=torch.float32)
    assert network(phi, x).dtype == torch.float32
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.module.head.bias.add_(1.0)
    assert not torch.equal(twin.initial(), network.initial())


def test_the_first_scale_is_a_tenth_of_each_tensors_size():
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 4.0]]))
        module.bias.zero_()
    root = 0.1 * math.sqrt(12.5)
    assert WeightNetwork(module).initial().tolist() == [3.0, 4.0, 0.0]
    assert WeightNetwork(module).initial_scale().tolist() == pytest.approx([root, root, 0.01])


@every_draws
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_network_is_a_linear_layer_in_a_loop(draws, bias):
    features = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh())
    network = HeadNetwork(features, 5, 2, bias=bias)
    assert network.dim == 2 * 5 + 2 * bias
    assert torch.equal(network.initial(), torch.zeros(network.dim))
    assert network.initial_scale().tolist() == pytest.approx([1 / math.sqrt(5)] * network.dim)
    phi, x = torch.randn(*draws, T, network.dim), torch.randn(T, N, 2, 3)

    def one(phi, x):
        return nn.functional.linear(features(x), phi[:10].reshape(2, 5), phi[10:] if bias else None)

    torch.testing.assert_close(network(phi, x), one_by_one(one, phi, x), rtol=1e-12, atol=1e-12)
    assert set(network.parameters()) == set(features.parameters())


@every_draws
def test_prototype_logits_are_minus_squared_distances(draws):
    features = nn.Linear(2, 3)
    network = PrototypeNetwork(features, 3, 4)
    assert network.dim == 12
    assert torch.equal(network.initial(), torch.zeros(12))
    assert torch.equal(network.initial_scale(), torch.ones(12))
    phi, x = torch.randn(*draws, T, 12), torch.randn(T, N, 2)

    def one(phi, x):
        return -(features(x)[:, None] - phi.reshape(4, 3)).square().sum(-1)

    torch.testing.assert_close(network(phi, x), one_by_one(one, phi, x), rtol=1e-12, atol=1e-12)


@every_draws
def test_a_decoder_sees_x_and_the_code(draws):
    decoder = nn.Sequential(nn.Linear(6 + 2, 5), nn.Tanh(), nn.Linear(5, 3))
    network = DecoderNetwork(decoder, 2)
    assert network.dim == 2
    assert network.initial().tolist() == [0.0, 0.0]
    assert network.initial_scale().tolist() == [1.0, 1.0]
    phi, x = torch.randn(*draws, T, 2), torch.randn(T, N, 2, 3)

    def one(phi, x):
        return torch.stack([decoder(torch.cat([point.flatten(), phi])) for point in x])

    torch.testing.assert_close(network(phi, x), one_by_one(one, phi, x), rtol=1e-12, atol=1e-12)


REFUSED = [
    (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "module '1' is Dropout.*deterministic given φ"),
    (nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout2d(0.1))), "module '1.0' is Dropout2d"),
    (nn.Sequential(nn.Linear(2, 2), nn.AlphaDropout(0.1)), "AlphaDropout"),
    (nn.LSTM(2, 2, 2, dropout=0.1), "LSTM with dropout=0.1.*set it to 0"),
    (nn.MultiheadAttention(2, 1, dropout=0.1), "MultiheadAttention with dropout=0.1"),
    (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "module '1' is BatchNorm1d: its statistics would mix tasks and padding.*GroupNorm"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True)), "InstanceNorm2d with running statistics"),
]


@pytest.mark.parametrize(("module", "message"), REFUSED)
@pytest.mark.parametrize(
    "wrap", [WeightNetwork, lambda m: HeadNetwork(m, 2, 1), lambda m: PrototypeNetwork(m, 2, 3), lambda m: DecoderNetwork(m, 1)]
)
def test_modules_that_are_not_deterministic_are_refused(module, message, wrap):
    with pytest.raises(ValueError, match=message):
        wrap(module)


def test_what_does_no_harm_is_taken():
    WeightNetwork(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.InstanceNorm1d(2)))
    WeightNetwork(nn.GRU(2, 2))


def test_modules_of_the_wrong_size_are_named():
    with pytest.raises(ValueError, match="WeightNetwork: Tanh has no parameters to adapt"):
        WeightNetwork(nn.Tanh())
    for network in (HeadNetwork(nn.Linear(1, 3), 4, 1), PrototypeNetwork(nn.Linear(1, 3), 4, 1)):
        with pytest.raises(ValueError, match="features put out 3 numbers a point, expected num_features=4"):
            network(torch.zeros(T, network.dim), torch.zeros(T, N, 1))


# --- the prior


def test_the_prior_starts_where_it_is_told():
    network = WeightNetwork(nn.Linear(1, 1))
    prior = NormalPrior.of(network)
    assert torch.equal(prior.loc, network.initial())
    torch.testing.assert_close(prior.scale, network.initial_scale(), rtol=0, atol=1e-15)
    assert torch.equal(NormalPrior.of(network, 0.3).scale.detach(), torch.full((2,), 0.3).log().exp())
    vector = NormalPrior(torch.zeros(2), torch.tensor([0.1, 2.0]), learn_scale=False)
    assert vector.scale.tolist() == pytest.approx([0.1, 2.0])
    assert [n for n, p in vector.named_parameters() if p.requires_grad] == ["loc"]
    for wrong in (0.0, -1.0, torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="initial_scale must be positive"):
            NormalPrior(torch.zeros(2), wrong)


def test_the_hyperprior_is_scipys():
    prior = NormalPrior(torch.tensor([0.5, -2.0]), torch.tensor([0.1, 2.0]), hyperprior=(1.5, 0.3))
    wanted = scipy.stats.norm.logpdf([0.5, -2.0]).sum() + scipy.stats.gamma(1.5, scale=1 / 0.3).logpdf([100.0, 0.25]).sum()
    assert prior.log_hyperprior().item() == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ValueError, match="no hyperprior"):
        NormalPrior(torch.zeros(2), 1.0).log_hyperprior()


def test_the_hyperprior_is_a_loss_of_the_model_once():
    network = WeightNetwork(nn.Linear(1, 1))
    prior = NormalPrior.of(network, 0.4, hyperprior=(2.0, 1.0))
    model = HierarchicalModel.from_network(network, Gaussian(0.5), prior, example=episode())
    assert model.has_hyperprior
    assert model.global_loss().item() == pytest.approx(-prior.log_hyperprior().item(), abs=1e-12)
    gradients = torch.autograd.grad(model.global_loss(), list(prior.parameters()))
    assert all((g != 0).all() for g in gradients)
    phi = torch.randn(4, 2)
    wanted = scipy.stats.norm(prior.loc.detach(), 0.4).logpdf(phi).sum(-1)
    torch.testing.assert_close(model.log_prior(phi, episode()), torch.as_tensor(wanted), rtol=0, atol=1e-12)
