"""Convolutions with weights of their own for each set: against torch's own, and their derivatives of first and second order."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap

from bayesmeta.convolutions import TaskConv2d, convolve
from bayesmeta.networks import WeightNetwork

HOWS = ([1, 1, 0, 0, 1, 1], [2, 1, 1, 0, 1, 2], [3, 2, 2, 1, 1, 1])


def data(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2, channels, 6, 7), (3, 4, channels, 3, 2))
    x, w = (torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes)
    return x, w


def one_by_one(x: torch.Tensor, w: torch.Tensor, how: list[int]) -> torch.Tensor:
    return torch.stack([torch.conv2d(a, b, None, how[:2], how[2:4], how[4:]) for a, b in zip(x, w, strict=True)])


@pytest.mark.parametrize("channels", [1, 5])  # few input channels go another way
@pytest.mark.parametrize("how", HOWS)
def test_each_set_is_convolved_with_its_own_weights(how, channels):
    x, w = data(channels)
    assert torch.allclose(convolve(x, w, how), one_by_one(x, w, how), atol=1e-12)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("how", HOWS)
def test_derivatives_of_first_and_second_order(how, channels):
    x, w = data(channels)
    assert gradcheck(lambda x, w: convolve(x, w, how), (x, w))
    assert gradgradcheck(lambda x, w: convolve(x, w, how), (x, w))


@pytest.mark.parametrize("channels", [1, 5])
def test_weights_that_all_sets_share(channels):
    x, w = data(channels)
    shared = w[:1].detach().expand(3, -1, -1, -1, -1)
    assert shared.stride(0) == 0
    assert torch.allclose(convolve(x, shared, HOWS[1]), one_by_one(x, shared, HOWS[1]), atol=1e-12)


def test_what_torch_asks_of_an_operation():
    x, w = data(2)
    torch.library.opcheck(convolve, (x, w, HOWS[1]))


def test_under_vmap_twice():
    x, w = data(2)
    several = torch.stack([w, 2 * w, -w]).detach()
    x = x.detach()

    def one(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return convolve(x[None], w[None], HOWS[1])[0]

    found = vmap(vmap(one), in_dims=(None, 0))(x, several)
    wanted = torch.stack([one_by_one(x, v, HOWS[1]) for v in several])
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(3, 4, (3, 2), dilation=(1, 2), bias=False),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(3, 4, 3, padding="same"),
])  # fmt: skip
def test_a_layer_is_what_it_was(layer):
    x, layer = torch.randn(5, 3, 8, 9, dtype=torch.float64), layer.double()
    own = TaskConv2d.of(layer)
    assert own.weight is layer.weight and own.bias is layer.bias
    assert torch.allclose(own(x), layer(x), atol=1e-12)


def test_a_network_of_convolutions_is_the_module_run_task_by_task():
    torch.manual_seed(0)
    pool = nn.MaxPool2d(2)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), pool, nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), nn.Flatten(), nn.Linear(72, 2)]
    module = nn.Sequential(*layers).double()
    network = WeightNetwork(module)
    assert sum(isinstance(part, TaskConv2d) for part in network.module.modules()) == 2
    assert not any(isinstance(part, TaskConv2d) for part in module.modules())  # the caller's own is as it was
    phi = network.initial() + 0.1 * torch.randn(4, 3, network.dim, dtype=torch.float64)
    x = torch.randn(3, 5, 1, 8, 8, dtype=torch.float64)
    names, shapes = zip(*((n, p.shape) for n, p in module.named_parameters()), strict=True)

    def one(phi: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        parts = phi.split([shape.numel() for shape in shapes])
        return functional_call(module, {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}, (x,))

    wanted = torch.stack([torch.stack([one(p, v) for p, v in zip(draw, x, strict=True)]) for draw in phi])
    assert torch.allclose(network(phi, x), wanted, atol=1e-12)
