"""The networks of few-shot image classification: their shapes, and that batch norm's policy goes through them."""

import pytest
import torch
from torch import nn

from bayesmeta.image_networks import convolutional, fully_connected
from bayesmeta.networks import HeadNetwork, PrototypeNetwork, WeightNetwork


@pytest.mark.parametrize(
    ("options", "features"),
    [({}, 64), ({"filters": 3}, 3), ({"pooled": True}, 64), ({"pooled": True, "filters": 2, "blocks": 3}, 18), ({"blocks": 2}, 64)],
)
def test_features_and_outputs_of_blocks(options, features):
    x = torch.rand(6, 1, 28, 28)
    assert convolutional((1, 28, 28), **options)(x).shape == (6, features)
    assert convolutional((1, 28, 28), 5, **options)(x).shape == (6, 5)


def test_any_size_and_number_of_channels():
    assert convolutional((3, 84, 60), 5, filters=2)(torch.rand(2, 3, 84, 60)).shape == (2, 5)
    assert convolutional((3, 32, 48), filters=2, pooled=True)(torch.rand(2, 3, 32, 48)).shape == (2, 2 * 2 * 3)
    assert fully_connected((3, 6, 5), 4, sizes=(7, 6))(torch.rand(2, 3, 6, 5)).shape == (2, 4)


def test_pooling_that_leaves_nothing_is_an_error():
    with pytest.raises(ValueError, match="4 poolings leave nothing of an image of 8 x 28"):
        convolutional((1, 8, 28), pooled=True)


def test_the_paper_sizes():
    """MAML's networks on Omniglot: four 3 × 3 convolutions of 64 filters with batch norm, and 256-128-64-64."""
    net = convolutional((1, 28, 28), 5)
    assert [tuple(p.shape) for p in net.parameters() if p.dim() == 4] == [(64, 1, 3, 3)] + [(64, 64, 3, 3)] * 3
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in net) == sum(isinstance(layer, nn.ReLU) for layer in net) == 4
    linear = [tuple(layer.weight.shape) for layer in fully_connected((1, 28, 28), 5) if isinstance(layer, nn.Linear)]
    assert linear == [(256, 784), (128, 256), (64, 128), (64, 64), (5, 64)]


@pytest.mark.parametrize("policy", ["task", "running", "none"])
@pytest.mark.parametrize("make", [convolutional, fully_connected])
def test_they_go_into_every_network(make, policy):
    small = {"filters": 4} if make is convolutional else {"sizes": (6, 4)}
    x, shape = torch.rand(3, 5, 1, 8, 8), (1, 8, 8)
    for network in (
        WeightNetwork(make(shape, 2, **small), batch_norm=policy),
        HeadNetwork(make(shape, **small), 4, 2, batch_norm=policy),
        PrototypeNetwork(make(shape, **small), 4, 2, batch_norm=policy),
    ):
        out = network(network.initial().expand(3, -1), x)
        assert out.shape == (3, 5, 2) and out.isfinite().all()
        assert network.is_transductive == (policy == "task")
