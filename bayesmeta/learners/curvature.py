"""Curvature in φ: Hessian or Gauss–Newton, whole or in blocks. All tasks at once, differentiable in θ and φ.

    exact          H = −∇² log p(y | φ)                           may have negative eigenvalues
    gauss_newton   H = ∇²_φ' KL( p(y | φ) ‖ p(y | φ') ) at φ' = φ  = Σ_j J_jᵀ F_j J_j, never negative
    sampled        H ≈ 1/L Σ_l ( ∇ log p(ỹ_l | φ) )²,  ỹ_l ~ p(y | φ): Gauss–Newton's diagonal on average, in L backward passes

J_j: derivative of the parameters of the distribution of y_j in φ; F_j: their Fisher information. So it means the same for any program and
any way to write the likelihood, and where the network puts out natural parameters (Gaussian of fixed noise, Bernoulli, Categorical,
Poisson) it is the generalised Gauss–Newton matrix, F_j = −∇² log p(y_j | output) (Martens 2020, section 9.2). Squares of the observed
scores ("empirical Fisher") are neither; those of targets that the model itself draws are right on average, since scores of different points
have mean 0 and no correlation (Martens 2020, section 5): an entry's relative error is about √(2/L). Its gradient takes ỹ as given.

| kind | H, one block of entries after another | backward passes |
|---|---|---|
| "full" | all of it | D |
| "diagonal" | its diagonal | D; "sampled" L |
| "kronecker" | for each linear layer 1/N Σ_j G_j ⊗ Σ_j a_j a_jᵀ (Martens & Grosse 2015): a_j its inputs and 1 for a bias, G_j the curvature in its outputs | layer outputs |
| "last_layer" | the last layer's block, Σ_j G_j ⊗ a_j a_jᵀ where it is linear; the entries before it have none | layer outputs, or entries |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import pad

from ..episodes import Points
from ..likelihoods import point_divergence
from ..model import HierarchicalModel
from ..network_program import NetworkProgram
from ..networks import AbstractNetwork, HeadNetwork, WeightNetwork
from ..packing import peel
from .base import checked_choice
from .blocks import Block
from .objectives import counts
from .steps import derivatives

KINDS = ("full", "diagonal", "kronecker", "last_layer")
HESSIANS = ("exact", "gauss_newton", "sampled")


class Layer(NamedTuple):
    """A linear layer: its entries of φ (weights ``(outputs, inputs)`` row by row, then biases), and its sizes."""

    where: slice
    outputs: int
    inputs: int
    bias: bool


def likelihood_curvature(
    model: HierarchicalModel, phi: Tensor, points: Points, *, kind: str, hessian: str, draws: int = 20, create_graph: bool = False
) -> list[Block]:
    """H of the log-likelihood of ``points``, summed over them, at ``phi (T, D)``: see the module's docstring.

    ``draws``: L. ``create_graph``: keep it differentiable in φ and θ. Raises ValueError for "sampled" of more than the diagonal, where the
    network has no such layers, and where the likelihood has no Gauss–Newton curvature.
    """

    def bend(moved: Tensor) -> Tensor:
        return -model.log_likelihood(moved, points) if hessian == "exact" else model.divergence(phi, moved, points)

    every = slice(0, model.dim)
    if hessian == "sampled":
        checked_pair(kind, hessian)
        return [Block(every, sampled_diagonal(model, phi, points, draws, create_graph=create_graph))]
    if kind == "full":
        return [Block(every, second(bend, phi, every, create_graph=create_graph))]
    if kind == "diagonal":
        return [Block(every, second_diagonal(bend, phi, create_graph=create_graph))]
    by_layer = ByLayer(model, phi, points, exact=hessian == "exact", create_graph=create_graph)
    if kind == "kronecker":
        return [Block(layer.where, by_layer.kronecker(layer, k)) for k, layer in enumerate(linear_layers(model.network))]
    last, layer = last_layer(model.network), last_linear_layer(model.network)
    rest = [Block(slice(0, last.start), torch.zeros_like(phi[:, : last.start]), curved=False)] if last.start else []
    return [*rest, Block(last, by_layer.whole(layer, -1) if layer else second(bend, phi, last, create_graph=create_graph))]


def prior_precision(model: HierarchicalModel, phi: Tensor, points: Points, *, create_graph: bool = False) -> Tensor:
    """Λ_θ = −∇² log p(φ | θ) in packed space: ``(T, D)``, 1/σ_θ², for an independent Normal prior; else ``(T, D, D)``, at ``phi``."""
    normal = peel(model.prior(points))[0]
    if isinstance(normal, dist.Normal):
        return normal.scale**-2
    return second(lambda moved: -model.log_prior(moved, points), phi, slice(0, model.dim), create_graph=create_graph)


def second(f: Callable[[Tensor], Tensor], phi: Tensor, where: slice, *, create_graph: bool = False) -> Tensor:
    """The block ``where`` of the Hessian of ``f: (T, D) -> (T,)`` at ``phi``, ``(T, d, d)``; one backward pass a row."""
    return derivatives(_moved(f, phi, where), torch.zeros_like(phi[:, where]).detach(), create_graph=create_graph)[2]


def second_diagonal(f: Callable[[Tensor], Tensor], phi: Tensor, *, create_graph: bool = False) -> Tensor:
    """The Hessian's diagonal ``(T, D)``: as many passes as `second`, but D numbers a task in memory."""
    with torch.enable_grad():
        move = torch.zeros_like(phi).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_moved(f, phi, slice(0, phi.shape[-1]))(move).sum(), move, create_graph=True)
        rows = [_entry(gradient, move, d, create_graph) for d in range(phi.shape[-1])]
    diagonal = torch.stack(rows, -1)
    return diagonal if create_graph else diagonal.detach()


def sampled_diagonal(model: HierarchicalModel, phi: Tensor, points: Points, draws: int, *, create_graph: bool = False) -> Tensor:
    """The diagonal of the Gauss–Newton matrix from ``draws`` targets of the model's own, ``(T, D)``: one backward pass each."""
    with torch.enable_grad():
        move = torch.zeros_like(phi).detach().requires_grad_()
        values = _moved(lambda moved: model.imagined_log_likelihood(moved, points, draws), phi, slice(0, phi.shape[-1]))(move)
        if not values.requires_grad:  # the likelihood does not hang on φ
            return torch.zeros_like(phi)
        scores = [torch.autograd.grad(v.sum(), move, retain_graph=True, create_graph=create_graph)[0] for v in values]
    return torch.stack(scores).square().mean(0)


def checked_pair(kind: str, hessian: str) -> None:
    """ValueError where ``hessian`` is not to be had of this ``kind``."""
    if hessian == "sampled" and kind != "diagonal":
        raise ValueError(f"hessian='sampled' is for curvature='diagonal' (its draws are too few for more); got curvature={kind!r}")


def checked_kind(kind: str, network: AbstractNetwork | None) -> str:
    """``kind`` where it is one of `KINDS` and ``network`` has the layers it speaks of, else ValueError."""
    by_layer: dict[str, Callable[..., object]] = {"kronecker": linear_layers, "last_layer": last_layer}
    by_layer.get(checked_choice("curvature", kind, KINDS), lambda _: None)(network)
    return kind


def linear_layers(network: AbstractNetwork | None) -> list[Layer]:
    """The linear layers that φ is made of, in φ's order. Raises ValueError where φ is anything else."""
    if isinstance(network, HeadNetwork):
        return [Layer(slice(0, network.dim), network.num_outputs, network.num_features, network.bias)]
    wanted = "curvature='kronecker' needs a WeightNetwork whose parameters are all those of nn.Linear layers, or a HeadNetwork"
    if not isinstance(network, WeightNetwork):
        raise ValueError(f"{wanted}; got {_kind(network)}")
    layers, start = [], 0
    for name, part in network.module.named_modules():
        if not list(part.parameters(recurse=False)):
            continue
        if type(part) is not nn.Linear:
            raise ValueError(f"{wanted}; got '{name}', a {type(part).__name__}")
        size = part.out_features * (part.in_features + (part.bias is not None))
        layers.append(Layer(slice(start, start := start + size), part.out_features, part.in_features, part.bias is not None))
    if start != network.dim:
        raise ValueError(f"{wanted}; got layers that share parameters")
    return layers


def last_layer(network: AbstractNetwork | None) -> slice:
    """The entries of φ of the last module with parameters of its own (in the order of ``named_parameters``); all of a `HeadNetwork`'s."""
    if isinstance(network, HeadNetwork):
        return slice(0, network.dim)
    if not isinstance(network, WeightNetwork):
        raise ValueError(f"curvature='last_layer' needs a WeightNetwork or a HeadNetwork; got {_kind(network)}")
    owners = [(name.rpartition(".")[0], p.numel()) for name, p in network.module.named_parameters()]
    return slice(network.dim - sum(size for owner, size in owners if owner == owners[-1][0]), network.dim)


def last_linear_layer(network: AbstractNetwork | None) -> Layer | None:
    """The layer that `last_layer` speaks of, where it is a linear one; else None."""
    if isinstance(network, HeadNetwork):
        return linear_layers(network)[0]
    assert isinstance(network, WeightNetwork)
    *_, part = (part for part in network.module.modules() if list(part.parameters(recurse=False)))
    last = last_layer(network)
    if type(part) is not nn.Linear or sum(p.numel() for p in part.parameters()) != last.stop - last.start:
        return None
    return Layer(last, part.out_features, part.in_features, part.bias is not None)


class ByLayer:
    """Curvature of single linear layers at ``phi (T, D)``, through the curvature G_j in each point's outputs of the layer."""

    def __init__(self, model: HierarchicalModel, phi: Tensor, points: Points, *, exact: bool, create_graph: bool) -> None:
        self.model, self.phi, self.points, self.exact, self.create_graph = model, phi, points, exact, create_graph

    def whole(self, layer: Layer, k: int) -> Tensor:
        """Σ_j G_j ⊗ a_j a_jᵀ of the ``k``-th linear layer, ``(T, d, d)``: its block of H where nothing before it moves."""
        g, a = self._parts(layer, k)
        return _weights_first(torch.einsum("tnoq,tni,tnp->toiqp", g, a, a), layer)

    def kronecker(self, layer: Layer, k: int) -> Tensor:
        """1/N Σ_j G_j ⊗ Σ_j a_j a_jᵀ, ``(T, d, d)``."""
        g, a = self._parts(layer, k)
        return _weights_first(torch.einsum("toq,tip->toiqp", g.sum(1), a.mT @ a) / counts(self.points).view(-1, 1, 1, 1, 1), layer)

    def _parts(self, layer: Layer, k: int) -> tuple[Tensor, Tensor]:
        """G_j ``(T, N, outputs, outputs)`` and a_j ``(T, N, inputs)``, 1 for a bias behind them, of real points; 0 of the others."""
        points, shape, y = self.points, (*self.points.mask.shape, layer.outputs), self.points.y
        assert y is not None
        y = y[..., 0] if y.dim() == 3 and y.shape[-1] == 1 else y

        def bend(shift: Tensor) -> Tensor:
            fn = self._target(shift.view(shape), k)[0]
            value = -fn.log_prob(y) if self.exact else point_divergence(peel(here)[0], peel(fn)[0])
            value = value.flatten(2).sum(-1) if value.dim() > 2 else value
            return torch.where(points.mask, value, 0.0).flatten()

        still = self.phi.new_zeros(shape)
        with pyro.validation_enabled(False):  # a task that has diverged is NaN of its own, as in the model
            here, a = self._target(still, k)
            g = derivatives(bend, still.flatten(0, 1), create_graph=self.create_graph)[2]
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if layer.bias else a
        return g.view(*shape, layer.outputs), torch.where(points.mask[..., None], a, 0.0)

    def _target(self, shift: Tensor, k: int) -> tuple[Any, Tensor]:
        """The distribution of y with ``shift (T, N, outputs)`` added to the layer's outputs, and the layer's inputs."""
        program = self.model.program
        assert isinstance(program, NetworkProgram)
        x, mask, given = self.points.x, self.points.mask, ()
        if getattr(program.likelihood, "exposure", False):
            x, given = x[..., :-1], (x[..., -1],)  # type: ignore[assignment]
        output, inputs = _run(program.network, self.phi, x, mask, shift, k)
        return program.likelihood(output, *given), inputs


def _weights_first(block: Tensor, layer: Layer) -> Tensor:
    """``(T, outputs, inputs, outputs, inputs)``, the bias an input, as ``(T, d, d)`` in φ's order: the biases behind the weights."""
    outputs, inputs = block.shape[1:3]
    order = torch.arange(outputs * inputs, device=block.device).view(outputs, inputs)
    order = torch.cat([order[:, : layer.inputs].flatten(), order[:, layer.inputs :].flatten()])
    return block.flatten(3, 4).flatten(1, 2)[:, order[:, None], order]


def _run(network: AbstractNetwork, phi: Tensor, x: Tensor, mask: Tensor, shift: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The network's output with ``shift (T, N, outputs)`` added to its ``k``-th linear layer's, and that layer's inputs."""
    if isinstance(network, HeadNetwork):
        return network(phi, x, mask) + shift, network.embed(x, mask)
    assert isinstance(network, WeightNetwork)
    module = network.module
    layer = [part for part in module.modules() if type(part) is nn.Linear][k]

    def one(phi: Tensor, x: Tensor, mask: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def remember(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            if seen or args[0].dim() != 2:
                raise ValueError("a curvature by layers needs layers that see each point once, as a vector")
            seen.append(args[0])
            return output + shift

        handle = layer.register_forward_hook(remember)
        try:
            output = functional_call(module, network.handed(phi, mask), (x,))
        finally:
            handle.remove()
        return output, seen[0]

    return vmap(one)(phi, x, mask, shift)


def _moved(f: Callable[[Tensor], Tensor], phi: Tensor, where: slice) -> Callable[[Tensor], Tensor]:
    """``f`` of a move ``(T, d)`` of the entries ``where`` away from ``phi``: its derivatives at 0 stay differentiable in ``phi``."""
    return lambda move: f(phi + pad(move, (where.start, phi.shape[-1] - where.stop)))


def _entry(gradient: Tensor, move: Tensor, d: int, create_graph: bool) -> Tensor:
    if not gradient.requires_grad:  # f is linear
        return torch.zeros_like(move[:, d])
    (row,) = torch.autograd.grad(gradient[:, d].sum(), move, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(move[:, d]) if row is None else row[:, d]


def _kind(network: AbstractNetwork | None) -> str:
    return "a program without layers" if network is None else f"a {type(network).__name__}"
