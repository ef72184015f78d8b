"""Amortisation: networks from a set of points ``(x, y, mask)`` to an encoding ``(T, H)``, and from an encoding to numbers (`Head`).

An encoder sees a task's real points as a set: their order does not matter, nor what stands in the padding or how much of it there is,
and without any points it gives a learned answer. What each is, with f_j the features of point j and N the number of points:

    DeepSet     ρ( 1/N Σ_j g(f_j), 1/N Σ_j f_j, log(1 + N) )          Zaheer et al. 2017, eq. 4; Garnelo et al. 2018, eq. 1
    Recurrent   ρ( 1/K Σ_k last state of a GRU or LSTM, log(1 + N) )  memory-augmented in spirit (Santoro et al. 2016)
    Attention   ρ( a learned query's attention, log(1 + N) )          self-attention over points first (Mishra et al. 2018 in spirit)
    PerClass    DeepSet's means and count of each class by itself     f_j without y; no ρ. As in VERSA (Gordon et al. 2019)

f_j is x flattened and y (classes one-hot, counts as log(1 + y)); with at most `PRODUCTS_UP_TO` numbers all their products of two as well,
whose means are a linear-Gaussian model's sufficient statistics. Where the model's network has features of its own (`HeadNetwork`,
`PrototypeNetwork`) x goes through them, as in VERSA; ``features`` is any other module to put it through, for images say. Inputs of
about unit scale learn best.

A recurrent network depends on order, and averaging over all N! of them is out of reach. So the points are put into a canonical order first,
along K fixed directions in the space of (x, y), each followed by its reverse, and the K last states are averaged: exactly invariant, at the
price of jumps where two points change places along a direction.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..episodes import Points
from ..model import HierarchicalModel
from ..packing import peel
from ..randomness import rng
from .base import AbstractLazyModule, checked_choice, checked_steps
from .layers import mlp, near_zero

PRODUCTS_UP_TO = 8


class PointFeatures(AbstractLazyModule):
    """A point's features f_j; see the module's docstring. ``features``: a module from ``(N, *I)`` to ``(N, …)`` that x goes through."""

    def __init__(self, features: nn.Module | None = None) -> None:
        super().__init__()
        self.features = features
        self.size, self.num_inputs, self.num_targets = 0, 0, 0
        self.num_classes, self.is_count, self.exposure = 0, False, False
        self._embedding: list[HierarchicalModel] = []  # of the model's own network, which registers its parameters itself
        self._anchor: Tensor
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # knows device and dtype

    def build(self, model: HierarchicalModel) -> None:
        """Reads off the sizes, once: ``size`` features, the first ones x (``num_inputs``), then y (``num_targets``)."""
        if self.size:
            return
        row = model.made_up_points(1, 1)
        with torch.no_grad():
            phi = model.initial(row)
            self.to(phi)
            target = peel(model.predict(phi, row.x))[0]
            if isinstance(target, dist.Categorical):
                self.num_classes = target.probs.shape[-1]
            self.is_count = bool(target.support.is_discrete) and not isinstance(target, dist.Categorical | dist.Bernoulli)
            self.exposure = model.network is not None and getattr(getattr(model.program, "likelihood", None), "exposure", False)
            if self.features is None and hasattr(model.network, "embed"):
                self._embedding = [model]
            self.num_inputs, self.num_targets = self.inputs(row.x).shape[-1], self._targets(row).shape[-1]
            self.size = self.forward(row).shape[-1]

    def forward(self, points: Points) -> Tensor:
        """``(T, N, F)``."""
        f = torch.cat([self.inputs(points.x, points.mask), self._targets(points)], -1)
        if f.shape[-1] > PRODUCTS_UP_TO:
            return f
        first, second = torch.triu_indices(f.shape[-1], f.shape[-1], device=f.device)
        return torch.cat([f, f[..., first] * f[..., second]], -1)

    def inputs(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x flattened, or its features, ``(T, N, ·)``; a log exposure stays by itself."""
        embed = self._embedding[0].embed if self._embedding else self._through_features
        if self.exposure:
            return torch.cat([_flat(embed(x[..., :-1], mask)), x[..., -1:]], -1).to(self._anchor)
        return _flat(embed(x, mask)).to(self._anchor)

    def values(self, points: Points) -> Tensor:
        """x and y as they are, ``(T, N, ·)``: what tells points apart, whatever the features have learned."""
        return torch.cat([_flat(points.x).to(self._anchor), self._targets(points)], -1)

    def _through_features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if self.features is None else self.features(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _targets(self, points: Points) -> Tensor:
        assert points.y is not None
        y = _flat(points.y)
        if self.num_classes:
            classes = torch.arange(self.num_classes, device=y.device)  # torch's one_hot looks at values and cannot be traced
            return (y.long().clamp(0, self.num_classes - 1) == classes).to(self._anchor)
        return y.to(self._anchor).clamp(min=0).log1p() if self.is_count else y.to(self._anchor)


class AbstractEncoder(AbstractLazyModule, ABC):
    """A support set of each task to an encoding ``(T, H)``, blind to the order of points and to padding.

    ``hidden``: H. ``features``: see `PointFeatures`. Raises ValueError for sizes that make no sense.
    """

    def __init__(self, hidden: int = 64, *, features: nn.Module | None = None) -> None:
        super().__init__()
        self.size = checked_steps("hidden", hidden, least=1)
        self.points = PointFeatures(features)
        # as any module it takes its first weights from torch's stream where it is made, not where the first data come in
        self._seed = int(torch.randint(2**62, ()))
        self._built = False

    def build(self, model: HierarchicalModel) -> None:
        """Makes the layers for the sizes that the program has, once."""
        if self._built:
            return
        self.points.build(model)
        with rng(torch.Generator().manual_seed(self._seed)):
            self.make(self.points.size)
        self.to(self.points._anchor)
        self._built = True

    def forward(self, points: Points) -> Tensor:
        """The encoding of each task, ``(T, H)``; of a task without points a learned constant."""
        points = points.filled()
        return self.encode(points, self.points(points))

    @abstractmethod
    def make(self, size: int) -> None:
        """Makes the layers for ``size`` features a point."""

    @abstractmethod
    def encode(self, points: Points, f: Tensor) -> Tensor:
        """``f (T, N, F)`` of ``points``, some of them padded, to ``(T, H)``."""


class DeepSet(AbstractEncoder):
    """Means over the points of learned features and of the features themselves: a conditional neural process's encoder."""

    def make(self, size: int) -> None:
        """Makes g and ρ."""
        self.each = mlp(size, self.size, self.size)
        self.out = mlp(self.size + size + 1, self.size, self.size)

    def encode(self, points: Points, f: Tensor) -> Tensor:
        """``f (T, N, F)`` to ``(T, H)``."""
        f = torch.cat([self.each(f), f], -1)
        mean = torch.where(points.mask[..., None], f, 0.0).sum(1) / points.counts.clamp(min=1)[:, None]
        return self.out(torch.cat([mean, _log_count(points, f)], -1))


class Recurrent(AbstractEncoder):
    """The last state of a recurrent network over the points in canonical orders, averaged; see the module's docstring.

    ``cell``: "gru" or "lstm". ``orders``: K, along how many directions the points are put in order; every second is the first reversed.
    """

    def __init__(self, hidden: int = 64, *, cell: str = "gru", orders: int = 2, features: nn.Module | None = None) -> None:
        super().__init__(hidden, features=features)
        self.cell, self.orders = checked_choice("cell", cell, ("gru", "lstm")), checked_steps("orders", orders, least=1)

    def make(self, size: int) -> None:
        """Makes the recurrent network, the state of an empty set, and ρ."""
        self.network = (nn.GRU if self.cell == "gru" else nn.LSTM)(size, self.size, batch_first=True)
        self.empty = nn.Parameter(torch.zeros(self.size))
        self.out = mlp(self.size + 1, self.size, self.size)

    def encode(self, points: Points, f: Tensor) -> Tensor:
        """``f (T, N, F)`` to ``(T, H)``."""
        place = projections(self.points.values(points), self.orders)
        order = torch.where(points.mask[..., None], place, torch.inf).argsort(dim=1, stable=True)  # padding last
        f = torch.stack([f.gather(1, order[..., k, None].expand_as(f)) for k in range(self.orders)])
        with torch.backends.cudnn.flags(enabled=False):  # whose recurrence a graph cannot hold and has no second derivative
            states = self.network(f.flatten(0, 1))[0].unflatten(0, (self.orders, -1))  # (K, T, N, H)
        last = (points.counts - 1).clamp(min=0)[:, None, None].expand(self.orders, -1, 1, self.size)
        state = states.gather(2, last)[:, :, 0].mean(0)
        state = torch.where(points.mask.any(1)[:, None], state, self.empty)
        return self.out(torch.cat([state, _log_count(points, f)], -1))


class Attention(AbstractEncoder):
    """Self-attention over the points, without positions, and a learned query that pools them; a learned token stands beside them.

    ``blocks``: layers of self-attention (each followed by a layer for every point). ``heads``: into how many parts H is cut.
    """

    def __init__(self, hidden: int = 64, *, blocks: int = 2, heads: int = 4, features: nn.Module | None = None) -> None:
        super().__init__(hidden, features=features)
        self.blocks, self.heads = checked_steps("blocks", blocks), checked_steps("heads", heads, least=1)
        if hidden % heads:
            raise ValueError(f"heads: expected a divisor of hidden={hidden}, got {heads}")

    def make(self, size: int) -> None:
        """Makes the embedding, the token, the blocks, the pooling query, and ρ."""
        h = self.size
        self.embed = nn.Linear(size, h)
        self.token, self.query = (nn.Parameter(torch.randn(h) / math.sqrt(h)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(2 * self.blocks + 1))
        self.queries, self.mixes = (nn.ModuleList(nn.Linear(h, h) for _ in range(self.blocks + 1)) for _ in range(2))
        self.keys = nn.ModuleList(nn.Linear(h, 2 * h) for _ in range(self.blocks + 1))
        self.layers = nn.ModuleList(mlp(h, h, h) for _ in range(self.blocks))
        self.out = mlp(h + 1, h, h)

    def encode(self, points: Points, f: Tensor) -> Tensor:
        """``f (T, N, F)`` to ``(T, H)``."""
        tasks = len(f)
        e = torch.cat([self.token.expand(tasks, 1, -1), self.embed(f)], 1)
        mask = torch.cat([points.mask.new_ones(tasks, 1), points.mask], 1)
        for k in range(self.blocks):
            normal = self.norms[2 * k](e)
            e = e + self._attend(k, normal, normal, mask)
            e = e + self.layers[k](self.norms[2 * k + 1](e))
        pooled = self._attend(self.blocks, self.query.expand(tasks, 1, -1), self.norms[-1](e), mask)[:, 0]
        return self.out(torch.cat([pooled, _log_count(points, f)], -1))

    def _attend(self, k: int, queries: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        parts = (self.queries[k](queries), *self.keys[k](values).chunk(2, -1))
        q, key, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.mixes[k](scaled_dot_product_attention(q, key, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2))


class PerClass(AbstractEncoder):
    """The deep set's means over each class's points alone, one g for all classes: ``(T, C, H)``, where others give ``(T, H)``.

    For classes and a network with features of its own, which g sees without y: see `bayesmeta.learners.per_class`. ``hidden``: width of g.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__(hidden)

    def make(self, size: int) -> None:
        """Makes g."""
        inputs = self.points.num_inputs
        self.each = mlp(inputs, self.size, self.size)
        self.size += inputs + 1  # what is put out: means of g and of the features, and a count

    def encode(self, points: Points, f: Tensor) -> Tensor:
        """``f (T, N, F)`` to ``(T, C, H)``; of a class without points zeros."""
        x, y = f[..., : self.points.num_inputs], f[..., self.points.num_inputs :][..., : self.points.num_targets]
        members = torch.where(points.mask[..., None], y, 0.0)
        n = members.sum(1)[..., None]
        mean = members.mT @ torch.cat([self.each(x), x], -1) / n.clamp(min=1)
        return torch.cat([mean, n.log1p()], -1)


ENCODERS: dict[str, Callable[[int], AbstractEncoder]] = {
    "deep_set": DeepSet, "recurrent": Recurrent, "attention": Attention, "per_class": PerClass,
}  # fmt: skip


def make_encoder(encoder: str | AbstractEncoder, hidden: int) -> AbstractEncoder:
    """The encoder of that name with H = ``hidden``, or the given one as it is."""
    return encoder if isinstance(encoder, AbstractEncoder) else ENCODERS[checked_choice("encoder", encoder, tuple(ENCODERS))](hidden)


class Head(AbstractLazyModule):
    """A network from an encoding, and features of x where ``with_inputs``, to ``size(model)`` numbers (D unless told), near 0 at first."""

    def __init__(
        self, encoder: AbstractEncoder, hidden: int, size: Callable[[HierarchicalModel], int] | None = None, *, with_inputs: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        self._encoder = [encoder]  # the learner's, which registers its parameters
        self.hidden, self.num_outputs, self.with_inputs = checked_steps("hidden", hidden, least=1), size, with_inputs
        self._seed = int(torch.randint(2**62, ()))
        self.network: nn.Sequential | None = None

    def build(self, model: HierarchicalModel) -> None:
        """Makes the layers, once; after the encoder."""
        if self.network is None:
            inputs = self._encoder[0].size + (self._encoder[0].points.num_inputs if self.with_inputs else 0)
            outputs = model.dim if self.num_outputs is None else self.num_outputs(model)
            with rng(torch.Generator().manual_seed(self._seed)):
                self.network = near_zero(mlp(inputs, self.hidden, outputs)).to(model.initial(model.made_up_points(1, 1)))

    def forward(self, value: Tensor) -> Tensor:
        """``(…, H)``, features of x behind it where asked for, to ``(…, size)``."""
        assert self.network is not None
        return self.network(value)


def projections(values: Tensor, count: int) -> Tensor:
    """``values (T, N, V)`` along ``count`` fixed directions, every second the one before reversed, ``(T, N, count)``."""
    return values @ _directions(values.shape[-1], count).to(values)


@functools.cache  # a constant: a traced step would draw from a generator of its own again at every call
def _directions(size: int, count: int) -> Tensor:
    half = torch.randn(size, (count + 1) // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([half, -half], -1).flatten(1)[:, :count]


def random_part(points: Points, values: Tensor, share: Tensor) -> Tensor:
    """The mask ``(T, N)`` of ⌊share (N_i + 1)⌋ (at most N_i) points of each task, chosen at random from torch's global stream.

    ``share (T,)`` in [0, 1]. What is chosen hangs on a point's ``values (T, N, V)``, not on its place: they are hashed to a random number.
    """
    direction = 30 * torch.randn(values.shape[-1], dtype=values.dtype, device=values.device)
    phase = 2 * math.pi * torch.rand((), dtype=values.dtype, device=values.device)
    key = (100 * ((values * direction).sum(-1) + phase).sin()).remainder(1.0)
    rank = torch.where(points.mask, key, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return points.mask & (rank < (share * (points.counts + 1)).floor()[:, None])


def _flat(value: Tensor) -> Tensor:
    return value[..., None].flatten(2)


def _log_count(points: Points, like: Tensor) -> Tensor:
    return points.counts.to(like)[:, None].log1p()
