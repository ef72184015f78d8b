"""Networks of convolutions: the module run task by task; layers of few input channels by patches."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from bayesmeta.convolutions import PatchConv2d
from bayesmeta.networks import WeightNetwork

LAYERS = [
    nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(3, 4, (3, 2), dilation=(1, 2), bias=False), nn.Conv2d(2, 3, 3, stride=(3, 2)),
    nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), nn.Conv2d(3, 4, 1),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_is_what_it_was(layer):
    x, layer = torch.randn(5, layer.in_channels, 8, 9, dtype=torch.float64), layer.double()
    assert PatchConv2d.suits(layer)
    own = PatchConv2d.of(layer)
    assert own.weight is layer.weight and own.bias is layer.bias
    assert torch.allclose(own(x), layer(x), atol=1e-12)


def test_its_derivatives_of_first_and_second_order():
    layer = PatchConv2d.of(nn.Conv2d(2, 3, 3, stride=2, padding=1).double())
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def convolved(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, {"weight": w}, (x,))

    assert gradcheck(convolved, (x, w)) and gradgradcheck(convolved, (x, w))


OTHERS = [nn.Conv2d(8, 8, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(3, 4, 3, padding="same"), nn.Conv1d(2, 2, 3)]


@pytest.mark.parametrize("layer", OTHERS, ids=str)
def test_other_layers_stay_torchs_own(layer):
    assert not PatchConv2d.suits(layer)


@pytest.mark.parametrize("draws", [(), (4,), (2, 3)])
def test_a_network_of_convolutions_is_the_module_run_task_by_task(draws):
    torch.manual_seed(0)
    pool = nn.MaxPool2d(2)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), pool, nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), nn.Flatten(), nn.Linear(72, 2)]
    module = nn.Sequential(*layers).double()
    network = WeightNetwork(module)
    assert sum(isinstance(part, PatchConv2d) for part in network.module.modules()) == 1
    assert not any(isinstance(part, PatchConv2d) for part in module.modules())  # the caller's own is as it was
    phi = network.initial() + 0.1 * torch.randn(*draws, 3, network.dim, dtype=torch.float64)
    x = torch.randn(3, 5, 1, 8, 8, dtype=torch.float64)
    names, shapes = zip(*((n, p.shape) for n, p in module.named_parameters()), strict=True)

    def one(phi: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        parts = phi.split([shape.numel() for shape in shapes])
        return functional_call(module, {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}, (x,))

    wanted = torch.stack([torch.stack([one(p, v) for p, v in zip(draw, x, strict=True)]) for draw in phi.view(-1, 3, network.dim)])
    assert torch.allclose(network(phi, x), wanted.view(*draws, 3, 5, 2), atol=1e-12)
