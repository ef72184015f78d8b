"""`HierarchicalModel`: any Pyro program p(θ) ∏_i p(φ_i | θ) ∏_j p(y_ij | x_ij, φ_i), with φ packed for inference.

How the program is held, read and run is in `bayesmeta.program_module`; here is what it means: where θ stands, and densities of φ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from .batch_norm import BatchNorms
from .episodes import Episode, Points
from .guide_sites import Kinds, remember, sample_phi, sample_theta
from .handlers import Condition, Fill, MeanField, Moments, Packed, Run
from .likelihoods import point_divergence
from .network_program import NetworkProgram
from .networks import AbstractNetwork, NormalPrior, WeightNetwork
from .parameters import announce, redraw
from .posteriors import as_inputs
from .program_module import AbstractProgramModule, refuse_unread
from .program_prior import ProgramPrior
from .randomness import rng
from .reading import start_of_theta
from .survey import ModelError, Survey

THETA_KINDS = ("map", "variational", "nuts")


class HierarchicalModel(AbstractProgramModule):
    """A Pyro program seen as a hierarchical model; θ is the parameters of this module.

    ``program(points)`` is any function or `PyroModule` with a plate ``"tasks"`` and an observed site ``"y"``; the rules
    are in `bayesmeta.survey`. Task-level sites are φ, packed as unconstrained reals ``(*S, T, D)`` in site order.
    ``pyro.param`` statements and global ``pyro.sample`` sites are θ. ``example`` is data to read the program with; without
    it the first data that any call sees are used, and until then `dim` and θ are unknown.

    ``theta`` says how global sample sites are held: ``"map"`` (a point, trained with log p(θ)), ``"variational"`` (a diagonal
    Normal over their unconstrained values) or ``"nuts"`` (draws, set by `bayesmeta.sample_theta`).

    Raises ModelError where the program breaks a rule, ValueError for an unknown ``theta``.
    """

    def __init__(self, program: Callable[[Points], Any], example: Points | Episode | None = None, *, theta: str = "map") -> None:
        super().__init__(program)
        if theta not in THETA_KINDS:
            raise ValueError(f"theta: expected one of {', '.join(map(repr, THETA_KINDS))}, got {theta!r}")
        self.theta_kind = theta
        self.theta_draws: Tensor
        self._theta_now: Tensor | None = None
        self.register_load_state_dict_pre_hook(_make_room)
        if example is not None:
            self.materialise(example)

    @classmethod
    def from_network(
        cls, network: AbstractNetwork, likelihood: nn.Module, prior: NormalPrior | None = None,
        *, example: Points | Episode | None = None, theta: str = "map",
    ) -> HierarchicalModel:
        """A network's φ under a learned Normal prior: p(φ | θ) = N(μ_θ, diag σ_θ²), y ~ likelihood(network(φ, x)).

        ``network``: one of `bayesmeta.networks`. ``likelihood``: one of `bayesmeta.likelihoods`. ``prior``: a `NormalPrior`
        to set the initial scale or a hyperprior; by default it starts at the network's own initial weights. ``theta``: with
        "variational" or "nuts", μ_θ and 1/σ_θ² are global sample sites "mean" and "precision" under the prior's hyperprior, which
        it then needs (ValueError without one); the likelihood's parameters and shared features stay a point.
        """
        if not isinstance(network, AbstractNetwork):
            raise TypeError(
                f"network: expected one of bayesmeta.networks, got {type(network).__name__}: wrap an nn.Module, say WeightNetwork(module)"
            )
        if isinstance(likelihood, type):
            raise TypeError(f"likelihood: got the class {likelihood.__name__}: construct it, say {likelihood.__name__}()")
        prior = prior or NormalPrior.of(network)
        if theta != "map" and prior.hyperprior is None:
            raise ValueError(f"theta={theta!r} needs a hyperprior: give prior=NormalPrior.of(network, hyperprior=(a, b)), say (1.0, 0.01)")
        return cls(NetworkProgram(network, likelihood, prior, sampled=theta != "map"), example, theta=theta)

    # --- θ

    @contextmanager
    def theta_at(self, theta: Tensor | None) -> Iterator[None]:
        """Inside, the global sample sites stand at ``theta`` ``(G,)``, packed; None leaves them where they are."""
        before = self._theta_now
        self._theta_now = before if theta is None else theta
        try:
            yield
        finally:
            self._theta_now = before

    @property
    def theta_given(self) -> Tensor | None:
        """What `theta_at` has set, ``(G,)``; None outside of it."""
        return self._theta_now

    def draw_theta(self, generator: torch.Generator | None = None) -> Tensor | None:
        """A draw ``(G,)`` of θ's posterior, packed: variational (differentiable) or NUTS; None where θ is a point."""
        if not self.theta_sites or self.theta_kind == "map":
            return None
        with rng(generator):
            if self.theta_kind == "nuts":
                return self.theta_draws[torch.randint(len(self.theta_draws), ())]
            noise = [torch.randn(site.shape, dtype=self._anchor.dtype, device=self._anchor.device).flatten() for site in self.theta_sites]
            return self.theta_loc + self.theta_log_scale.exp() * torch.cat(noise)

    def theta(self) -> dict[str, Tensor]:
        """The global sample sites' constrained values where they stand: the point, the centre of q(θ), or the draw inside `theta_at`."""
        return self._hyper_run().theta_values

    def log_hyperprior(self) -> Tensor:
        """log p(θ) of the global sample sites, and of global ``pyro.factor`` statements, where θ stands; ``()``, 0 without any.

        A density of the constrained values, as `pyro.infer.autoguide.AutoDelta` has it.
        """
        return torch.as_tensor(self._hyper_run(Packed(self._theta_values(), jacobian=False)).hyper, dtype=self._anchor.dtype)

    def global_loss(self) -> Tensor:
        """What θ adds to a training loss, once: −log p(θ) for a point, KL(q(θ) ‖ p(θ)) where θ is variational; ``()``."""
        if not self.has_hyperprior:
            return self._anchor.new_zeros(())
        return -torch.as_tensor(self._hyper_run().hyper, dtype=self._anchor.dtype)

    @property
    def has_hyperprior(self) -> bool:
        """Whether the program says anything of θ: a global sample site or a global ``pyro.factor``."""
        return bool(self.theta_sites) or self._known.global_factors

    def _make_theta(self, survey: Survey) -> None:
        if not self.theta_sites:
            return
        loc, sd = start_of_theta(self._run, self._known, survey, self._anchor)
        self.theta_loc = nn.Parameter(loc)
        if self.theta_kind == "variational":
            self.theta_log_scale = nn.Parameter(sd.log())
        if self.theta_kind == "nuts":
            self.register_buffer("theta_draws", self.theta_loc.detach()[None].clone())

    def _theta_values(self) -> Tensor:
        if self._theta_now is not None:
            return self._theta_now
        if not self.theta_sites:
            return self._anchor.new_zeros(0)
        return self.theta_draws.mean(0) if self.theta_kind == "nuts" else self.theta_loc

    def _default_theta(self) -> Fill:
        values = self._theta_values()
        if self.theta_kind == "variational" and self.theta_sites:
            return MeanField(values, self.theta_loc, self.theta_log_scale.exp())
        return Packed(values, jacobian=False)

    def _hyper_run(self, theta: Fill | None = None) -> Run:
        row = self.made_up_points(2, 1)
        return self._run(Packed(self._anchor.new_zeros(row.num_tasks, self.dim)), row, theta)

    # --- φ

    def pack(self, sites: dict[str, Tensor]) -> Tensor:
        """Constrained task-level sites, each ``(*S, T, *event)``, packed to ``(*S, T, D)``."""
        missing = {site.name for site in self.sites} ^ set(sites)
        if missing:
            raise ValueError(f"expected exactly the sites {[site.name for site in self.sites]}, got {sorted(sites)}")
        first = self.sites[0]
        tasks = sites[first.name].shape[sites[first.name].dim() - len(first.event_shape) - 1]
        condition = Condition(sites)
        self._run(condition, self.made_up_points(tasks, 1), sites_only=True)
        return torch.cat(condition.packed, -1)

    def unpack(self, phi: Tensor) -> dict[str, Tensor]:
        """``(*S, T, D)`` unpacked to constrained task-level sites by name, each ``(*S, T, *event)``."""
        return self._run(Packed(self._checked(phi)), self.made_up_points(phi.shape[-2], 1), sites_only=True).values

    def prior(self, points: Points | Episode) -> Any:
        """p(φ | θ) of the tasks in ``points`` as a distribution in packed space, batch ``(T,)``, event ``(D,)``.

        An independent Normal where the program's task-level sites are Normal and do not look at each other, else a
        distribution whose log density runs the program.
        """
        points = self.prepare(points)
        mean, sd = self.prior_moments(points)
        if not self._known.normal_prior:
            return ProgramPrior(self, points, mean, sd)
        return dist.Normal(mean, sd, validate_args=False if self._data_ready else None).to_event(1)

    def prior_moments(self, points: Points | Episode) -> tuple[Tensor, Tensor]:
        """Mean and sd of p(φ | θ) in packed space, each ``(T, D)``, differentiable in θ.

        A site that depends on earlier ones is taken at their means. See `bayesmeta.packing.packed_moments`.
        """
        moments = Moments()
        self._run(moments, self.prepare(points), sites_only=True)
        return torch.cat(moments.means, -1).to(self._anchor), torch.cat(moments.sds, -1).to(self._anchor)

    def initial(self, points: Points | Episode) -> Tensor:
        """The prior's mean in packed space, ``(T, D)``, differentiable in θ: where gradient-based learners start."""
        return self.prior_moments(points)[0]

    def log_joint(self, phi: Tensor, points: Points | Episode) -> Tensor:
        """log p(y, φ | θ) of each task, Jacobian of the packing included: ``(*S, T, D)`` to ``(*S, T)``."""
        prior, likelihood = self.log_parts(phi, points)
        return prior + likelihood

    def log_prior(self, phi: Tensor, points: Points | Episode) -> Tensor:
        """log p(φ | θ) of each task in packed space, Jacobian included: ``(*S, T, D)`` to ``(*S, T)``."""
        return self.log_parts(phi, points)[0]

    def log_likelihood(self, phi: Tensor, points: Points | Episode) -> Tensor:
        """log p(y | φ, θ) of each task, summed over its real points: ``(*S, T, D)`` to ``(*S, T)``."""
        return self.log_parts(phi, points)[1]

    def log_full_joint(self, phi: Tensor, theta: Tensor, points: Points | Episode) -> Tensor:
        """log p(y, φ, θ) of all tasks together, ``()``, at ``phi (T, D)`` and ``theta (G,)``, both packed, Jacobians included."""
        points = self.prepare(points)
        run = self._run(Packed(self._checked(phi)), points, Packed(theta))
        return run.hyper + torch.as_tensor(run.prior).sum() + torch.as_tensor(run.likelihood).sum()

    def mean_field_parts(self, phi: Tensor, mean: Tensor, sd: Tensor, points: Points | Episode) -> tuple[Tensor, Tensor]:
        """For draws ``phi (*S, T, D)`` of q = N(mean, sd²) per task: −KL(q ‖ p(φ | θ)) and log p(y | φ, θ), each ``(*S, T)``.

        The KL is analytic site by site where Pyro knows it, else taken at the draw (as `TraceMeanField_ELBO` has it).
        """
        points = self.prepare(points)
        return self._parts(self._run(MeanField(self._checked(phi), mean, sd), points), phi)

    def divergence(self, phi: Tensor, other: Tensor, points: Points | Episode) -> Tensor:
        """KL(p(y | φ, θ) ‖ p(y | φ', θ)) of each task, summed over its real points: two ``(*S, T, D)`` to ``(*S, T)``.

        Its Hessian in φ' at φ' = φ is the Fisher information. Raises ValueError where the likelihood has no divergence in closed form.
        """
        points = self.prepare(points)
        here, there = (self._run(Packed(self._checked(value)), points).target for value in (phi, other))
        assert here is not None and there is not None
        value = torch.where(here.full_mask(), point_divergence(here.base, there.base), 0.0) * here.scale
        return value.flatten(value.dim() - here.point_axes - 1).sum(-1).expand(other.shape[:-1])

    def imagined_log_likelihood(self, phi: Tensor, points: Points | Episode, draws: int) -> Tensor:
        """log p(ỹ | φ, θ) of each task at ``draws`` targets ỹ ~ p(y | φ, θ) drawn here, ``(*S, T, D)`` to ``(draws, *S, T)``.

        The squares of its gradient in φ have the diagonal of the Fisher information as their mean. Draws from torch's global stream.
        """
        points = self.prepare(points)
        target = self._run(Packed(self._checked(phi)), points).target
        assert target is not None
        with torch.no_grad():
            y = target.base.sample((draws,))
        # a likelihood that counts c times has c times the information: √c in the score
        value = torch.where(target.full_mask(), target.base.log_prob(y), 0.0) * torch.as_tensor(target.scale).sqrt()
        return value.flatten(value.dim() - target.point_axes - 1).sum(-1).expand(draws, *phi.shape[:-1])

    def predict(self, phi: Tensor, x: Tensor, mask: Tensor | None = None) -> Any:
        """The distribution of one point's y at inputs ``x (T, N, *I)``, batch ``(*S, T, N)``.

        ``mask (T, N)``: which points are real, None for all; only a network that normalises by the set at hand looks at it.
        """
        x = as_inputs(x)
        x = x.to(device=self._anchor.device, dtype=self._anchor.dtype if x.is_floating_point() else x.dtype)
        if x.dim() < 2 or x.shape[0] != phi.shape[-2]:
            raise ValueError(f"x: expected shape (T, N, *I) with T = {phi.shape[-2]} tasks, got {tuple(x.shape)}")
        points = Points(x, None, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask)
        try:
            target = self._run(Packed(self._checked(phi)), points).target
        except (AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"the program must run without targets (points.y is None) to predict: {reason}") from error
        assert target is not None
        fn = target.point()
        batch = phi.shape[:-1] + x.shape[1:2]
        return fn if fn.batch_shape == batch else fn.expand(batch)

    # --- Pyro's door

    def sample_theta_sites(self) -> Tensor | None:
        """Inside a guide: samples the global sites from q(θ) (a Delta where θ is a point); returns the draw ``(G,)``."""
        if not self.theta_sites:
            return None
        for name in ("theta_loc", "theta_log_scale"):
            parameter = self._parameters.get(name)
            if parameter is not None:
                announce(name, parameter)  # so that SVI trains them
        kinds: Kinds = {}
        values = self._theta_values()
        with poutine.block():
            self._hyper_run(remember(kinds, Packed(values, jacobian=False)))
        q = (self.theta_loc, self.theta_log_scale.exp()) if self.theta_kind == "variational" else None
        return sample_theta(self.theta_sites, kinds, values, q)

    def sample_task_sites(self, posterior: Any, points: Points) -> None:
        """Inside a guide: samples the task-level sites from ``posterior``, batch ``(T,)``, event ``(D,)`` in packed space.

        A diagonal Normal becomes one statement a site, so that Pyro finds its analytic KLs. Anything else is one auxiliary
        site ``_phi`` and a Delta a site that carries the Jacobian, as Pyro's own autoguides do.
        """
        kinds: Kinds = {}
        with poutine.block():
            self._run(remember(kinds, Packed(posterior.mean)), points, sites_only=True)
        sample_phi(self.sites, kinds, posterior, points.num_tasks, self._known.plates)

    def noise(self, tasks: int) -> Tensor:
        """Standard normal noise ``(T, D)`` from torch's global stream, drawn site by site as `sample_task_sites` does."""
        dtype, device = self._anchor.dtype, self._anchor.device
        return torch.cat([torch.randn(tasks, *site.shape, dtype=dtype, device=device).reshape(tasks, -1) for site in self.sites], -1)

    # --- the network, and another starting point

    @property
    def network(self) -> AbstractNetwork | None:
        """The network of a model made by `from_network`; None for a user's program."""
        return self.program.network if isinstance(self.program, NetworkProgram) else None

    @property
    def batch_norms(self) -> BatchNorms | None:
        """Those of the network; None without one, or where it has none."""
        return None if self.network is None else self.network.batch_norms

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The embedding that the model's network has, of ``x``, in the precision that is asked for. Raises AttributeError without one."""
        with self.lowered():
            return self.network.embed(x, mask).to(self._anchor.dtype)  # type: ignore[union-attr, operator]

    def renew_statistics(self, data: Points | Episode) -> None:
        """After a step of training on ``data``: running batch-norm statistics, if any, move towards those at φ's starting point.

        Raises ValueError where inner steps have their own: those are the learner's to renew (`AbstractMetaLearner.renew_statistics`).
        """
        norms = self.batch_norms
        if norms is not None and norms.have_running:
            with torch.no_grad():
                points = self.prepare(data)
                norms.renew(self.initial(points), points.x, points.mask)

    def reinitialise(self, seed: int, *, jitter: float = 0.1) -> None:
        """Another starting point for θ, drawn by ``seed``: for the members of an ensemble.

        Modules with ``reset_parameters`` (PyTorch's layers) are drawn anew, and a network's prior starts at its new weights. Every
        parameter of a user's program that is not redrawn so is moved by ``jitter`` times a standard normal, in unconstrained space.
        Where the program has not been read yet this happens as soon as it is.
        """
        if not self.has_seen_data:
            self._start = (seed, jitter)
            return
        network = self.network
        inner = network.module.modules() if isinstance(network, WeightNetwork) else ()
        with rng(torch.Generator().manual_seed(seed)), torch.no_grad():
            settled = redraw([*self.modules(), *inner])
            if isinstance(self.program, NetworkProgram):
                self.program.prior.loc.copy_(self.program.network.initial())
                settled |= {id(p) for p in self.program.parameters()}
                if self.theta_sites:  # "mean" comes first
                    self.theta_loc[: self.dim] = self.program.prior.loc
                    settled |= {id(p) for p in self.parameters(recurse=False)}
            for parameter in self.parameters():
                if id(parameter) not in settled:
                    parameter.add_(jitter * torch.randn_like(parameter))


def _make_room(model: HierarchicalModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: `refuse_unread`, and room for as many draws of θ as there are."""
    refuse_unread(model, state_dict, prefix)
    ours, theirs = model._buffers.get("theta_draws"), state_dict.get(f"{prefix}theta_draws")
    if ours is not None and theirs is not None and ours.shape[1:] == theirs.shape[1:]:
        model.theta_draws = ours.new_zeros(theirs.shape)
