"""Curvature in φ: Hessian or Gauss–Newton, whole or in blocks, and the Normal it gives. All tasks at once, differentiable in θ and φ.

    exact          H = −∇² log p(y | φ)                           may have negative eigenvalues
    gauss_newton   H = ∇²_φ' KL( p(y | φ) ‖ p(y | φ') ) at φ' = φ  = Σ_j J_jᵀ F_j J_j, never negative

J_j: derivative of the parameters of the distribution of y_j in φ; F_j: their Fisher information. So it means the same for any program and
any way to write the likelihood, and where the network puts out natural parameters (Gaussian of fixed noise, Bernoulli, Categorical,
Poisson) it is the generalised Gauss–Newton matrix, F_j = −∇² log p(y_j | output) (Martens 2020, section 9.2). Squares of the observed
scores ("empirical Fisher") are neither.

| kind | H, one block of entries after another | backward passes |
|---|---|---|
| "full" | all of it | D |
| "diagonal" | its diagonal | D |
| "kronecker" | for each linear layer 1/N Σ_j G_j ⊗ Σ_j a_j a_jᵀ (Martens & Grosse 2015): a_j its inputs and 1 for a bias, G_j the curvature in its outputs | layer outputs |
| "last_layer" | the last layer's block, Σ_j G_j ⊗ a_j a_jᵀ where it is linear; the entries before it have none | layer outputs, or entries |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call, vmap
from torch.nn.functional import pad

from ..episodes import Points
from ..model import HierarchicalModel, point_divergence
from ..network_program import NetworkProgram
from ..networks import AbstractNetwork, HeadNetwork, WeightNetwork
from ..packing import peel
from .base import checked_choice
from .objectives import counts
from .steps import derivatives

KINDS = ("full", "diagonal", "kronecker", "last_layer")
HESSIANS = ("exact", "gauss_newton")


class Block(NamedTuple):
    """A block of a precision or curvature of ``T`` tasks: rows and columns ``where``, ``(T, d, d)``, or its diagonal ``(T, d)``.

    ``curved``: False where the likelihood's curvature was left out.
    """

    where: slice
    matrix: Tensor
    curved: bool = True


class Layer(NamedTuple):
    """A linear layer: its entries of φ (weights ``(outputs, inputs)`` row by row, then biases), and its sizes."""

    where: slice
    outputs: int
    inputs: int
    bias: bool


def likelihood_curvature(
    model: HierarchicalModel, phi: Tensor, points: Points, *, kind: str, hessian: str, create_graph: bool = False
) -> list[Block]:
    """H of the log-likelihood of ``points``, summed over them, at ``phi (T, D)``: see the module's docstring.

    ``create_graph``: keep it differentiable in φ and θ. Raises ValueError where the network has no such layers, or the likelihood no
    Gauss–Newton curvature.
    """

    def bend(moved: Tensor) -> Tensor:
        return -model.log_likelihood(moved, points) if hessian == "exact" else model.divergence(phi, moved, points)

    every = slice(0, model.dim)
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


def plus(blocks: Sequence[Block], precision: Tensor) -> list[Block]:
    """``blocks`` and a precision ``(T, D)`` or ``(T, D, D)``; what the latter has outside of the blocks is left out."""
    return [block._replace(matrix=block.matrix + _cut(precision, block)) for block in blocks]


def floored(blocks: Sequence[Block], sd: Tensor, least: float) -> list[Block]:
    """``blocks`` with no eigenvalue below ``least``, φ taken in units of ``sd (T, D)``: positive definite.

    A task without such an eigenvalue keeps its blocks as they are, to the last bit; in the others what drowns in rounding counts too.
    Differentiable once.
    """
    return [b._replace(matrix=_floored(b.matrix, sd[:, b.where], least)) for b in blocks]


def log_determinant(blocks: Sequence[Block]) -> Tensor:
    """log det of the block-diagonal matrix, ``(T,)``; NaN for a task where it is not positive definite."""
    return torch.stack([2 * _factor(b.matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1) if b.matrix.dim() == 3 else b.matrix.log().sum(-1)
                        for b in blocks]).sum(0)  # fmt: skip


def newton_step(blocks: Sequence[Block], gradient: Tensor) -> Tensor:
    """P⁻¹ g, ``(T, D)``, for ``gradient (T, D)``; 0 for entries that the likelihood's curvature leaves out."""
    steps = []
    for block in blocks:
        g = gradient[:, block.where]
        if not block.curved:
            steps.append(torch.zeros_like(g))
        elif block.matrix.dim() == 3:
            steps.append(torch.cholesky_solve(g[..., None], _factor(block.matrix))[..., 0])
        else:
            steps.append(g / block.matrix)
    return torch.cat(steps, -1)


def normal(mean: Tensor, blocks: Sequence[Block]) -> Any:
    """N(mean, P⁻¹), P of ``blocks`` that cover φ in order: a Normal for one diagonal, a MultivariateNormal for one matrix, a `BlockNormal`.

    Not validated: a task that has diverged is NaN of its own.
    """
    parts = [_part(mean[:, b.where], b.matrix.rsqrt() if b.matrix.dim() == 2 else _scale_tril(b.matrix)) for b in blocks]
    return parts[0] if len(parts) == 1 else BlockNormal(parts)


class BlockNormal(dist.TorchDistribution):
    """Independent ``parts`` behind each other, each a Normal or MultivariateNormal with batch ``(T,)``, event ``(d,)``: event ``(D,)``."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        self._sizes = [part.event_shape[0] for part in self.parts]
        super().__init__(parts[0].batch_shape, torch.Size((sum(self._sizes),)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(T, D)``."""
        return torch.cat([part.mean for part in self.parts], -1)

    @property
    def variance(self) -> Tensor:
        """``(T, D)``."""
        return torch.cat([part.variance for part in self.parts], -1)

    @property
    def covariance_matrix(self) -> Tensor:
        """``(T, D, D)``, written out: zeros between the parts."""
        whole = self.mean.new_zeros(*self.batch_shape, *self.event_shape * 2)
        start = 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            where = slice(start, start := start + size)
            whole[..., where, where] = getattr(part, "covariance_matrix", torch.diag_embed(part.variance))
        return whole

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own default
        """Draws ``(*sample_shape, T, D)``, differentiable."""
        return torch.cat([part.rsample(sample_shape) for part in self.parts], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*S, T, D)`` to ``(*S, T)``."""
        return torch.stack([part.log_prob(v) for part, v in zip(self.parts, value.split(self._sizes, -1), strict=True)]).sum(0)

    def select(self, tasks: Tensor) -> BlockNormal:
        """The chosen tasks."""
        return BlockNormal([_part(p.mean[tasks], p.scale_tril[tasks] if hasattr(p, "scale_tril") else p.stddev[tasks]) for p in self.parts])


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


def _floored(matrix: Tensor, sd: Tensor, least: float) -> Tensor:
    if matrix.dim() == 2:
        return torch.maximum(matrix, _least(least, matrix) * sd**-2)
    floored: Tensor = _raised(matrix, sd[:, :, None] * sd[:, None, :], least)
    return floored


# Which tasks need it hangs on values: an operation of its own, so that a step with it can be written down as a graph.
@torch.library.custom_op("bayesmeta::raised", mutates_args=())
def _raised(matrix: Tensor, units: Tensor, least: float) -> Tensor:
    """``matrix (T, d, d)``, in the tasks where ``matrix * units`` has an eigenvalue below ``least`` with those raised to it."""
    low, raised = _low(matrix * units, least), matrix.clone(memory_format=torch.contiguous_format)
    if len(low):
        values, vectors, floor = _eigen((matrix * units)[low], least)
        raised[low] = (vectors * torch.maximum(values, floor)[:, None, :]) @ vectors.mT / units[low]
    return raised


@torch.library.custom_op("bayesmeta::raised_backward", mutates_args=())
def _raised_backward(gradient: Tensor, matrix: Tensor, units: Tensor, raised: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """V (K ∘ Vᵀ G V) Vᵀ, K the divided differences of max(λ, floor) (Daleckii & Krein 1965), in ``matrix`` and ``units``.

    Its own derivative, because that of eigenvectors does not exist where eigenvalues are equal.
    """
    low, in_units = _low(matrix * units, least), units.new_zeros(units.shape)
    in_matrix = gradient.clone(memory_format=torch.contiguous_format)
    if len(low):
        g = gradient[low] / units[low]
        values, vectors, floor = _eigen((matrix * units)[low], least)
        above = values > floor
        row, column = above[:, :, None], above[:, None, :]
        high = torch.maximum(values[:, :, None], values[:, None, :])
        distance = torch.where(row ^ column, (values[:, :, None] - values[:, None, :]).abs(), torch.ones_like(high))
        slope = torch.where(row & column, 1.0, torch.where(row ^ column, (high - floor[..., None]) / distance, 0.0))
        scaled = vectors @ (slope * (vectors.mT @ ((g + g.mT) / 2) @ vectors)) @ vectors.mT
        in_matrix[low], in_units[low] = scaled * units[low], scaled * matrix[low] - g * raised[low]
    return in_matrix, in_units


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    matrix, units, ctx.least = inputs
    ctx.save_for_backward(matrix, units, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_raised_backward(gradient, *ctx.saved_tensors, ctx.least), None


_raised.register_autograd(_backward, setup_context=_keep)
_raised.register_fake(lambda matrix, units, least: matrix.new_empty(matrix.shape))
_raised_backward.register_fake(lambda g, matrix, units, raised, least: (matrix.new_empty(matrix.shape), units.new_empty(units.shape)))


def _low(scaled: Tensor, least: float) -> Tensor:
    """Which tasks have an eigenvalue below ``least``: a factor is far cheaper than eigenvalues. One that has diverged stays NaN."""
    eye = torch.eye(scaled.shape[-1]).to(scaled)
    return (torch.linalg.cholesky_ex(torch.where(_finite(scaled), scaled, (1 + least) * eye) - least * eye)[1] != 0).nonzero()[:, 0]


def _eigen(scaled: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors, and ``least`` or rounding where that is larger."""
    values, vectors = torch.linalg.eigh(scaled)
    floor = (torch.finfo(scaled.dtype).eps * values.abs().amax(-1, keepdim=True)).clamp(min=_least(least, scaled))
    return values, vectors, floor


def _least(least: float, like: Tensor) -> float:
    return max(least, torch.finfo(like.dtype).tiny)  # 0 has no logarithm


def _finite(matrix: Tensor) -> Tensor:
    return matrix.isfinite().all(-1).all(-1)[:, None, None]


def _factor(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor ``(T, d, d)``; NaN for a task that has none, so that it does not stop the others."""
    finite = _finite(matrix)
    factor, failed = torch.linalg.cholesky_ex(torch.where(finite, matrix, torch.eye(matrix.shape[-1]).to(matrix)))
    return torch.where(finite & (failed == 0)[:, None, None], factor, torch.nan)


def _scale_tril(precision: Tensor) -> Tensor:
    """The lower Cholesky factor of the inverse, from the upper one of the precision itself: the inverse is never formed."""
    upper = _factor(precision.flip(-2, -1)).flip(-2, -1)
    return torch.linalg.solve_triangular(upper.mT, torch.eye(precision.shape[-1]).to(precision), upper=False)


def _part(mean: Tensor, scale: Tensor) -> Any:
    if scale.dim() == 2:
        return dist.Normal(mean, scale, validate_args=False).to_event(1)
    return dist.MultivariateNormal(mean, scale_tril=scale, validate_args=False)


def _cut(precision: Tensor, block: Block) -> Tensor:
    diagonal = block.matrix.dim() == 2
    if precision.dim() == 2:
        return precision[:, block.where] if diagonal else torch.diag_embed(precision[:, block.where])
    cut = precision[:, block.where, block.where]
    return cut.diagonal(dim1=-2, dim2=-1) if diagonal else cut


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
