"""The networks of few-shot image classification: blocks of convolutions, and MAML's fully connected one. Their batch norms need a policy.

A policy is an argument of what wraps them, ``WeightNetwork(convolutional((1, 28, 28), 5), batch_norm="task")``; see `bayesmeta.batch_norm`.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn


def convolutional(
    image_shape: tuple[int, int, int], outputs: int | None = None, *, filters: int = 64, blocks: int = 4, pooled: bool = False
) -> nn.Sequential:
    """``blocks`` of 3 × 3 convolution, batch norm and ReLU, each of which halves height and width: ``(N, C, H, W)`` to ``(N, outputs)``.

    By strides, with the mean over the places that are left, as in MAML's code for Omniglot (Finn et al. 2017): ``filters`` features. Or
    ``pooled``, by 2 × 2 max-pooling, without a mean, as in matching and prototypical networks (Vinyals et al. 2016, Snell et al. 2017):
    ``filters`` times the places that are left, one of 28 × 28; two to four times as dear. ``outputs``: of a linear layer at the end; None
    puts out the features. Raises ValueError where pooling leaves nothing of the image.
    """
    channels, height, width = image_shape
    layers: list[nn.Module] = []
    for before in (channels, *[filters] * (blocks - 1)):
        layers += [nn.Conv2d(before, filters, 3, 1 if pooled else 2, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pooled
    features = filters
    if pooled:
        places = (height >> blocks) * (width >> blocks)
        if not places:
            raise ValueError(f"blocks: {blocks} poolings leave nothing of an image of {height} x {width}")
        features *= places
    else:
        layers.append(nn.AdaptiveAvgPool2d(1))
    layers.append(nn.Flatten())
    return nn.Sequential(*layers, *([] if outputs is None else [nn.Linear(features, outputs)]))


def fully_connected(
    image_shape: tuple[int, int, int], outputs: int | None = None, *, sizes: tuple[int, ...] = (256, 128, 64, 64)
) -> nn.Sequential:
    """Linear layers with batch norm and ReLU after each, ``(N, C, H, W)`` to ``(N, outputs)``: MAML's other network for Omniglot.

    ``outputs``: of a linear layer at the end; None puts out the ``sizes[-1]`` features.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise((math.prod(image_shape), *sizes)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, *([] if outputs is None else [nn.Linear(sizes[-1], outputs)]))
