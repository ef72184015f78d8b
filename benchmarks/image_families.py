"""How hard are Omniglot and Glyphs? 5-way 1-shot accuracy on test classes, of pixels alone and of a small prototypical network.

    python benchmarks/image_families.py path/to/omniglot --steps 1000

Nearest neighbour: of each query image the support image at the smallest angle, both blurred by 1.5 pixels; 600 tasks. The network: four
blocks of 16 filters, 8 tasks a step, Adam at 0.002, batch norm over the batch at hand in training and test alike; 300 tasks.
"""

import argparse

import torch
from torch import nn

from bayesmeta.metrics import bootstrap_interval
from bayesmeta.tasks import Glyphs, Omniglot
from bayesmeta.tasks.shift import blurred


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def nearest_neighbour(family):
    support, query = family.sample(600, generator=seeded(0))
    flat = [nn.functional.normalize(blurred(p.x.flatten(0, 1), 1.5).view_as(p.x).flatten(2), dim=-1) for p in (support, query)]
    nearest = torch.cdist(flat[1], flat[0]).argmin(-1)
    return (support.y.gather(1, nearest) == query.y).double().mean(1)


def network():
    layers, channels = [], 1
    for _ in range(4):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        channels = 16
    return nn.Sequential(*layers, nn.Flatten())


def logits(embed, episode):
    support, query = (embed(p.x.flatten(0, 1)).unflatten(0, p.mask.shape) for p in episode)
    members = nn.functional.one_hot(episode.support.y, 5).float()
    prototypes = (members.mT @ support) / members.sum(1)[..., None]
    return -torch.cdist(query, prototypes) ** 2


def trained_network(family, steps):
    torch.manual_seed(0)
    embed, train, generator = network(), family.split("train"), seeded(0)
    optimiser = torch.optim.Adam(embed.parameters(), 2e-3)
    for _ in range(steps):
        episode = train.sample(8, generator=generator)
        loss = nn.functional.cross_entropy(logits(embed, episode).flatten(0, 1), episode.query.y.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    episode = family.split("test").sample(300, generator=seeded(1))
    with torch.no_grad():
        return (logits(embed, episode).argmax(-1) == episode.query.y).double().mean(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="the folder of Omniglot's data")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, family in (("Omniglot", Omniglot(options.root)), ("Glyphs", Glyphs())):
        scores = {"nearest neighbour": nearest_neighbour(family.split("test")), "network": trained_network(family, options.steps)}
        for what, accuracies in scores.items():
            mean, low, high = (100 * value for value in bootstrap_interval(accuracies))
            print(f"{name:9} {what:18} {mean:.1f}% ({low:.1f} to {high:.1f})", flush=True)


if __name__ == "__main__":
    main()
