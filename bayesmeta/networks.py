"""Networks with one signature, ``network(phi, x)``: which of a module's numbers are a task's own φ, and which are θ's."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .batch_norm import BatchNorms, with_policy
from .convolutions import PatchConv2d


class AbstractNetwork(nn.Module, ABC):
    """A function of task parameters and inputs: ``phi (*S, T, D)``, ``x (T, N, *I)`` to outputs ``(*S, T, N, *O)``.

    Parameters that this module holds are θ's (shared by all tasks); φ is handed in. ``batch_norms``: those of the network, by
    `bayesmeta.batch_norm`'s policies; a network that has none need not take a ``mask``.
    """

    dim: int
    batch_norms: BatchNorms | None

    def __init__(self) -> None:
        super().__init__()
        self.batch_norms = None

    @property
    def is_transductive(self) -> bool:
        """Whether an output hangs on the other points of its set: batch norm by the statistics of the set at hand."""
        return self.batch_norms is not None and self.batch_norms.policy == "task"

    @abstractmethod
    def initial(self) -> Tensor:
        """Where φ starts, ``(D,)``."""

    @abstractmethod
    def initial_scale(self) -> Tensor:
        """A sensible prior sd for each entry of φ at the start, ``(D,)``."""

    @abstractmethod
    def forward(self, phi: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*S, T, D)`` and ``(T, N, *I)`` to ``(*S, T, N, *O)``; ``mask (T, N)``: which points are real, None for all."""


class WeightNetwork(AbstractNetwork):
    """φ is all the weights of ``module``, any `nn.Module` that maps ``(N, *I)`` to ``(N, *O)`` deterministically.

    The module's own weights are where φ starts; it is called functionally and never changed. ``batch_norm``: "task", "running", "per_step"
    or "none", what its batch norms normalise by (`bayesmeta.batch_norm`). Raises ValueError for a module without parameters, with dropout,
    or with batch norm where ``batch_norm`` is None.
    """

    batch_norms: BatchNorms

    def __init__(self, module: nn.Module, *, batch_norm: str | None = None) -> None:
        super().__init__()
        own = with_policy(copy.deepcopy(module), batch_norm)
        _check_deterministic(own)
        parameters = dict(own.named_parameters())
        if not parameters:
            raise ValueError(f"WeightNetwork: {type(module).__name__} has no parameters to adapt")
        self._names = list(parameters)
        self._shapes = [p.shape for p in parameters.values()]
        self._sizes = [p.numel() for p in parameters.values()]
        self.dim = sum(self._sizes)
        # A copy, so that the caller's is never changed; called with weights handed in, so its own must not show up as θ.
        self._module = [_fast(own).requires_grad_(False)]
        self.batch_norms = BatchNorms(self.module, self._one)
        self._has_convolutions = any(isinstance(part, nn.modules.conv._ConvNd) for part in self.module.modules())

    @property
    def module(self) -> nn.Module:
        """The module whose weights φ replaces; its own are where φ starts."""
        return self._module[0]

    def initial(self) -> Tensor:
        """The module's own weights, ``(D,)``."""
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    def initial_scale(self) -> Tensor:
        """A tenth of each weight tensor's root mean square at the start (0.01 for a tensor of zeros), ``(D,)``.

        Small against the weights themselves, so that draws from the prior still look like the network it starts at.
        """
        parts = self.initial().split(self._sizes)
        return torch.cat([torch.full_like(p, 0.1 * float(p.square().mean().sqrt()) or 0.01) for p in parts])

    def forward(self, phi: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*S, T, D)`` and ``(T, N, *I)`` to ``(*S, T, N, *O)``."""
        x, mask = _real(x, mask if self.batch_norms.names else None)
        if self.batch_norms.notes is not None:
            return self.batch_norms.noted(lambda: self._in_turn(phi, x, mask), mask.sum(1).repeat(phi.shape[:-2].numel()))
        if self._has_convolutions and x.device.type == "cpu":
            return self._in_turn(phi, x, mask)
        run = vmap(self._one)
        for _ in phi.shape[:-2]:
            run = vmap(run, in_dims=(0, None, None))
        return run(phi, x, mask)

    def handed(self, phi: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """One task's weights and batch-norm statistics by name, for `torch.func.functional_call`: ``phi (D,)``, ``mask (N,)``."""
        weights = {n: v.view(s) for n, v, s in zip(self._names, phi.split(self._sizes), self._shapes, strict=True)}
        return weights | self.batch_norms.handed(mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightNetwork:
        self.module._apply(fn, recurse)  # its buffers move along
        return super()._apply(fn, recurse)

    def _in_turn(self, phi: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """`forward` as a loop: vmap makes convolutions grouped ones, and CPUs take two to three times as long for those."""
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]) if x.dim() == 5 else x
        pairs = list(zip(x, mask, strict=True))
        each = [self._one(one, *pairs[i % len(pairs)]) for i, one in enumerate(phi.flatten(0, -2))]
        return torch.stack(each).unflatten(0, phi.shape[:-1])

    def _one(self, phi: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return functional_call(self.module, self.handed(phi, mask), (x,))


class HeadNetwork(AbstractNetwork):
    """φ is a linear last layer on features that all tasks share: output = features(x) Wᵀ + b (ANIL, last-layer Bayes).

    ``features``: an `nn.Module` mapping ``(N, *I)`` to ``(N, F)``, whose weights are θ's. ``num_features``: F.
    ``num_outputs``: O. ``batch_norm``: as for `WeightNetwork`; a copy of ``features`` is then taken. Not "per_step" (ValueError): no inner
    step changes the features, so it would be "running".
    """

    batch_norms: BatchNorms

    def __init__(
        self, features: nn.Module, num_features: int, num_outputs: int, *, bias: bool = True, batch_norm: str | None = None
    ) -> None:
        super().__init__()
        self.features = _features(features, batch_norm)
        self.batch_norms = BatchNorms(self.features, self._one)
        self.num_features, self.num_outputs, self.bias = num_features, num_outputs, bias
        self.dim = num_outputs * (num_features + bias)

    def initial(self) -> Tensor:
        """Zeros, ``(D,)``: no output is preferred before a task is seen."""
        return torch.zeros(self.dim)

    def initial_scale(self) -> Tensor:
        """1/√F, so that outputs have unit scale for features of unit scale, ``(D,)``."""
        return torch.full((self.dim,), 1.0 / math.sqrt(self.num_features))

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(T, N, *I)`` to features ``(T, N, F)``."""
        return _embed(self.features, self.batch_norms, x, mask, self.num_features)

    def forward(self, phi: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*S, T, D)`` and ``(T, N, *I)`` to ``(*S, T, N, O)``."""
        features = self.embed(x, mask)
        weight, bias = phi.split([self.num_outputs * self.num_features, self.num_outputs * self.bias], -1)
        out = features @ weight.unflatten(-1, (self.num_outputs, self.num_features)).mT
        return out + bias[..., None, :] if self.bias else out

    def _one(self, phi: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return functional_call(self.features, self.batch_norms.handed(mask), (x,))


class PrototypeNetwork(AbstractNetwork):
    """φ is a point for each class in an embedding that all tasks share; logits are −‖e(x) − c_k‖² (Snell et al. 2017, eq. 2).

    ``features``: an `nn.Module` mapping ``(N, *I)`` to ``(N, F)``, whose weights are θ's. ``num_features``: F. ``num_classes``: C.
    ``batch_norm``: as for `HeadNetwork`.
    """

    batch_norms: BatchNorms

    def __init__(self, features: nn.Module, num_features: int, num_classes: int, *, batch_norm: str | None = None) -> None:
        super().__init__()
        self.features = _features(features, batch_norm)
        self.batch_norms = BatchNorms(self.features, self._one)
        self.num_features, self.num_classes = num_features, num_classes
        self.dim = num_classes * num_features

    def initial(self) -> Tensor:
        """Zeros, ``(D,)``: all classes at one place, none preferred."""
        return torch.zeros(self.dim)

    def initial_scale(self) -> Tensor:
        """1, ``(D,)``: features of unit scale."""
        return torch.ones(self.dim)

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(T, N, *I)`` to features ``(T, N, F)``."""
        return _embed(self.features, self.batch_norms, x, mask, self.num_features)

    def _one(self, phi: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return functional_call(self.features, self.batch_norms.handed(mask), (x,))

    def forward(self, phi: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*S, T, C · F)`` and ``(T, N, *I)`` to logits ``(*S, T, N, C)``."""
        e, c = self.embed(x, mask), phi.unflatten(-1, (self.num_classes, self.num_features))
        # ‖e − c‖² multiplied out: (*S, T, N, C, F) would be large
        return 2 * e @ c.mT - e.square().sum(-1, keepdim=True) - c.square().sum(-1)[..., None, :]


class DecoderNetwork(AbstractNetwork):
    """φ is a latent code z of ``latent_dim`` numbers; output = decoder([x, z]), the decoder's weights shared by all tasks.

    ``decoder``: an `nn.Module` mapping ``(…, I + latent_dim)`` to ``(…, O)``; x is flattened.
    """

    def __init__(self, decoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        _check_deterministic(decoder)
        self.decoder, self.dim = decoder, latent_dim

    def initial(self) -> Tensor:
        """Zeros, ``(D,)``."""
        return torch.zeros(self.dim)

    def initial_scale(self) -> Tensor:
        """1, ``(D,)``: the code's own scale is the decoder's to choose."""
        return torch.ones(self.dim)

    def forward(self, phi: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*S, T, D)`` and ``(T, N, *I)`` to ``(*S, T, N, O)``."""
        x = x.flatten(2)
        shape = (*phi.shape[:-1], x.shape[1])
        inputs = torch.cat([x.expand(*shape, -1), phi[..., None, :].expand(*shape, -1)], -1)
        return self.decoder(inputs)


class NormalPrior(nn.Module):
    """p(φ | θ) = N(loc, diag scale²), both learned: θ = (μ_θ, σ_θ).

    ``loc``, ``initial_scale``: where they start, ``(D,)`` (the scale may be a number). ``learn_scale``: False fixes σ_θ.
    ``hyperprior``: None, or (a, b) for log p(θ) = Σ log N(μ_θ; 0, 1) + Σ log Gamma(1/σ_θ²; a, b), the form of Ravi &
    Beatson (2019).
    """

    def __init__(
        self, loc: Tensor, initial_scale: Tensor | float, *, learn_scale: bool = True, hyperprior: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        scale = torch.as_tensor(initial_scale, dtype=loc.dtype).expand(loc.shape)
        if not bool((scale > 0).all()):
            raise ValueError("NormalPrior: initial_scale must be positive")
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(scale.log().clone(), requires_grad=learn_scale)
        self.hyperprior = hyperprior

    @classmethod
    def of(
        cls, network: AbstractNetwork, initial_scale: Tensor | float | None = None, *, learn_scale: bool = True,
        hyperprior: tuple[float, float] | None = None,
    ) -> NormalPrior:
        """The prior that starts at the network's own initial weights and, by default, its own initial scale."""
        scale = network.initial_scale() if initial_scale is None else initial_scale
        return cls(network.initial(), scale, learn_scale=learn_scale, hyperprior=hyperprior)

    @property
    def scale(self) -> Tensor:
        """σ_θ, ``(D,)``."""
        return self.log_scale.exp()

    def log_hyperprior(self) -> Tensor:
        """log p(θ), ``()``; raises where there is none."""
        normal, gamma = self.hyperpriors()
        return normal.log_prob(self.loc).sum() + gamma.log_prob((-2 * self.log_scale).exp()).sum()

    def hyperpriors(self) -> tuple[dist.Normal, dist.Gamma]:
        """N(0, 1) of μ_θ and Gamma(a, b) of 1/σ_θ², both with batch ``(D,)``; raises ValueError where there is none."""
        if self.hyperprior is None:
            raise ValueError("this prior has no hyperprior")
        zeros, (a, b) = torch.zeros_like(self.loc), self.hyperprior
        return dist.Normal(zeros, 1.0), dist.Gamma(zeros + a, zeros + b)


def _features(features: nn.Module, batch_norm: str | None) -> nn.Module:
    if batch_norm == "per_step":
        raise ValueError("batch_norm: features that all tasks share are the same at every inner step: expected 'running', got 'per_step'")
    own = features if batch_norm is None else with_policy(copy.deepcopy(features), batch_norm)
    _check_deterministic(own)
    return own


def _embed(features: nn.Module, norms: BatchNorms, x: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """``(T, N, *I)`` to ``(T, N, F)``: task by task where batch norm is, else all points at once."""

    def one(x: Tensor, mask: Tensor) -> Tensor:
        return functional_call(features, norms.handed(mask), (x,))

    x, mask = _real(x, mask if norms.names else None)
    e = vmap(one)(x, mask) if norms.policy == "task" else one(x.flatten(0, 1), mask.flatten()).unflatten(0, x.shape[:2])
    if e.shape[-1] != size:
        raise ValueError(f"features put out {e.shape[-1]} numbers a point, expected num_features={size}")
    return e


def _real(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x (T, N, *I)`` with nothing but zeros in its padding, and ``mask``: all real where it is None."""
    if mask is None:
        return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return torch.where(mask.view(*mask.shape, *(1,) * (x.dim() - 2)), x, torch.zeros_like(x)), mask


def _fast(module: nn.Module) -> nn.Module:
    """The module with faster layers in it, where there are any."""
    for name, part in module.named_children():
        setattr(module, name, _fast(part))
    return PatchConv2d.of(module) if PatchConv2d.suits(module) else module


def _check_deterministic(module: nn.Module) -> None:
    for name, part in module.named_modules():
        kind = type(part).__name__
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            raise ValueError(f"module '{name}' is {kind}: a network must be deterministic given φ; leave dropout out")
        if isinstance(part, nn.RNNBase | nn.MultiheadAttention) and part.dropout > 0:
            raise ValueError(f"module '{name}' is {kind} with dropout={part.dropout}: a network must be deterministic given φ; set it to 0")
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"module '{name}' is {kind}: its statistics would mix tasks and padding; say what it normalises by, batch_norm='task' "
                "(the set at hand), 'running' (the training tasks) or 'none', or use GroupNorm or LayerNorm"
            )
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
            raise ValueError(f"module '{name}' is {kind} with running statistics: use track_running_stats=False, GroupNorm or LayerNorm")
