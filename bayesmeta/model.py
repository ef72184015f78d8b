"""`HierarchicalModel`: any Pyro program p(θ) ∏_i p(φ_i | θ) ∏_j p(y_ij | x_ij, φ_i), with φ packed for inference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from .batch_norm import BatchNorms
from .episodes import Episode, Points
from .handlers import AllSitesSeen, Ancestral, Condition, Fill, MeanField, Moments, Packed, Program, Run, Site, attach_leaf, site_normal
from .network_program import NetworkProgram
from .networks import AbstractNetwork, NormalPrior, WeightNetwork
from .packing import log_det, packing_transform, peel
from .posteriors import as_inputs, with_points_axis
from .randomness import rng
from .survey import ModelError, Survey, made_up, read

THETA_KINDS = ("map", "variational", "nuts")
TAKEN = frozenset(dir(nn.ParameterDict()))  # attributes of torch's own ("half", "values"): no names for its entries


class HierarchicalModel(nn.Module):
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
        super().__init__()
        if theta not in THETA_KINDS:
            raise ValueError(f"theta: expected one of {', '.join(map(repr, THETA_KINDS))}, got {theta!r}")
        self.program = program
        self.theta_kind = theta
        self.params = nn.ParameterDict()
        self._keys: dict[str, str] = {}  # the names of pyro.param statements, and of their entries in params
        self._sites: list[Site] | None = None
        self._theta_sites: list[Site] = []
        self._plates = 1
        self._normal_prior = self._global_factors = False
        self._row: Points | None = None  # made-up data: what statements without data are run on
        self._theta_now: Tensor | None = None
        self._data_ready = False
        self._precision: torch.dtype | None = None
        self._target_support: Any = None
        self._num_classes: int | None = None
        self._start: tuple[int, float] | None = None  # another starting point, asked for before the program was read
        self._anchor: Tensor
        self.theta_draws: Tensor
        self.gradient_evaluations = 0.0
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # knows the device and dtype that .to() asked for
        self._default_dtype = torch.get_default_dtype()
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

    # --- the program and its parameters

    def forward(self, data: Points | Episode) -> Any:
        """Runs the program, for `SVI`, `NUTS`, `Predictive` and autoguides; an Episode is observed as S ∪ Q."""
        points = self.prepare(data)
        with own_parameters(self.program, self.device), Program(self._parameter, points):
            if isinstance(self.program, nn.Module) and not isinstance(self.program, PyroModule):
                for name, parameter in self.program.named_parameters():  # a PyroModule announces its own
                    announce(name, parameter)
            return self.program(points)

    def prepare(self, data: Points | Episode, *, full: bool = False) -> Points:
        """Points with the model's dtype and device and only real values in them; reads the program if need be.

        ``data``: Points, or an Episode taken as S ∪ Q. Floating-point tensors take the model's dtype. ``full``: there is no padding.
        """
        points = data.union() if isinstance(data, Episode) else data
        if self._data_ready:
            return points
        self.materialise(points)
        points = points.to(device=self._anchor.device, dtype=self._anchor.dtype)
        return points if full else points.filled()

    @property
    def device(self) -> torch.device:
        """Where the model is, and where data go."""
        return self._anchor.device

    @contextmanager
    def in_precision(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Inside, matrix products and convolutions of the program and of embeddings run in ``dtype`` (see `lowered`); None: as ever."""
        before, self._precision = self._precision, dtype
        try:
            yield
        finally:
            self._precision = before

    def lowered(self) -> contextlib.AbstractContextManager[Any]:
        """What a network is run under: `torch.autocast` to the dtype of `in_precision`, if any. Log densities are taken outside of it."""
        if self._precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._precision, cache_enabled=False)  # a cached cast would not show in a graph

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The embedding that the model's network has, of ``x``, in the precision that is asked for. Raises AttributeError without one."""
        with self.lowered():
            return self.network.embed(x, mask).to(self._anchor.dtype)  # type: ignore[union-attr, operator]

    @contextmanager
    def data_ready(self) -> Iterator[None]:
        """Inside, data count as checked and prepared and are taken as they are: nothing looks at their values from Python."""
        before = self._data_ready
        self._data_ready = True
        try:
            yield
        finally:
            self._data_ready = before

    @property
    def takes_data_as_ready(self) -> bool:
        """Whether this is inside `data_ready`."""
        return self._data_ready

    def check_targets(self, points: Points, role: str = "points") -> None:
        """Raises ValueError naming task and point where a real y is no possible value of the program's likelihood (−1 for a count).

        Bounds that differ from point to point (a binomial's trials) are left to the likelihood itself.
        """
        bad = None if self._data_ready else self.impossible_targets(points)
        if bad is not None and bad.any():
            assert points.y is not None
            task, point = (int(i) for i in bad.nonzero()[0])
            wanted, got = self._target_support, points.y[task, point].squeeze().tolist()
            raise ValueError(f"{role}.y: task {task}, point {point}: the likelihood expects a value in {wanted}, got {got}")

    def impossible_targets(self, points: Points) -> Tensor | None:
        """Which real y are no possible values of the likelihood, ``(T, N)``; None where that is not known beforehand."""
        self.sites  # noqa: B018 - raises before the program is read
        if points.y is None or self._target_support is None:
            return None
        y = points.y[..., 0] if points.y.dim() == 3 and points.y.shape[-1] == 1 else points.y
        bad = ~self._target_support.check(y)
        return (bad.flatten(2).any(-1) if bad.dim() > 2 else bad) & points.mask

    def materialise(self, data: Points | Episode) -> None:
        """Reads the program on made-up copies of the first real point of ``data``, and makes θ's parameters. Once.

        Raises ModelError where the program breaks a rule; the model is then as it was before.
        """
        if self._sites is not None:
            return
        points = data.union() if isinstance(data, Episode) else data
        points.check()
        if points.y is None or not points.mask.any():
            raise ModelError(
                "the first data that a model sees must have a real point and its y, got none; "
                "give HierarchicalModel(program, example=points)"
            )
        before, first = self._anchor, next(self.parameters(), None)
        if first is not None:
            self._anchor = first.detach().new_zeros(())
        elif self._anchor.dtype == self._default_dtype and points.x.is_floating_point():
            self._anchor = self._anchor.to(points.x.dtype)  # a plain function's θ takes the dtype of the data
        task, point = points.mask.nonzero()[0].tolist()
        here = (slice(task, task + 1), slice(point, point + 1))
        row = Points(points.x[here].detach(), points.y[here].detach(), points.mask[here])
        row = row.to(device=self._anchor.device, dtype=self._anchor.dtype)
        sizes = ((2, 4), (3, 5))
        try:
            small, large = (self._survey(made_up(row, *size)) for size in sizes)
            self._sites, self._theta_sites, self._plates = read(small, large, sizes)
            self._row = made_up(row, *sizes[0])
            self._target_support = _fixed_support(small.statements["y"].fn)
            self._num_classes = _num_classes(small.statements["y"].fn)
            for role, part in zip(data._fields, data, strict=True) if isinstance(data, Episode) else [("points", data)]:
                self.check_targets(part, role)
            self._make_theta(small)
            self._check_draws()
            self._check_bounds(small)
            self._check_owned()
            weighed = any(small.statements[site.name].weighed for site in self._sites)
            self._normal_prior = self._has_normal_prior() and not weighed and not small.has_factors(in_tasks=True)
            self._global_factors = small.has_factors(in_tasks=False)
            if self._start is not None:
                self.reinitialise(self._start[0], jitter=self._start[1])
        except BaseException:
            self._sites, self._row, self._theta_sites, self.params, self._keys = None, None, [], nn.ParameterDict(), {}
            self._anchor = before
            for name in ("theta_loc", "theta_log_scale", "theta_draws"):
                if hasattr(self, name):
                    delattr(self, name)
            raise

    def _parameter(self, name: str, args: tuple[Any, ...], constraint: Any) -> Tensor:
        """Answers the statement ``pyro.param(name, *args, constraint=)`` from ``params``; makes it when the program is first read."""
        key = self._keys.get(name)
        if key is None:
            if self._sites is not None:
                raise ModelError(
                    f"pyro.param('{name}') was not there when the program was first run: parameters must not depend on the data"
                )
            if not args:
                raise ModelError(f"pyro.param('{name}') has no initial value: write pyro.param('{name}', tensor)")
            if isinstance(args[0], nn.Parameter):
                raise ModelError(
                    f"'{name}' is the parameter of a module that the function only refers to, so a copy of the model could not own it: "
                    "write the program as a PyroModule that holds the module"
                )
            value, key = self._new_parameter(name, args[0], constraint), name.replace(".", "__")
            while key in TAKEN or key in self.params:  # "a.b" and "a__b" are two parameters
                key += "_"
            self.params[key], self._keys[name] = value, key
        leaf = self.params[key]
        value = transform_to(constraint)(leaf)
        if self._sites is None and args and isinstance(args[0], Tensor) and args[0].shape != value.shape:
            raise ModelError(
                f"pyro.param('{name}') has shape {tuple(value.shape)} in one run and {tuple(args[0].shape)} in another: a parameter's "
                "shape must not depend on the numbers of tasks and points; sample what belongs to a task inside "
                '`with pyro.plate("tasks", points.num_tasks):`'
            )
        return attach_leaf(value, leaf)

    def _new_parameter(self, name: str, init: Any, constraint: Any) -> nn.Parameter:
        with torch.no_grad():
            value = torch.as_tensor(init() if callable(init) else init).detach()
            value = value.to(device=self._anchor.device, dtype=self._anchor.dtype)
            if not constraint.check(value).all():
                raise ModelError(f"pyro.param('{name}'): the initial value {value.tolist()} does not satisfy {constraint}")
            return nn.Parameter(transform_to(constraint).inv(value).clone())

    # --- reading the program, once

    def _survey(self, points: Points) -> Survey:
        survey = Survey(self._parameter, self._anchor)
        try:
            with torch.no_grad(), poutine.block(), own_parameters(self.program, self.device), survey:
                self.program(points)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"the program failed on {points.num_tasks} tasks of {points.num_points} points, x of shape {tuple(points.x.shape)}: "
                f"{type(error).__name__}: {error}"
                + ("; several values a task are an event: end the distribution with .to_event(1)" if "inside plate" in str(error) else "")
            ) from error
        return survey

    def _check_draws(self) -> None:
        assert self._row is not None
        hint = "index from the right: `level[..., None] + effect[..., None] * points.x[..., 0]`"
        tasks, points = self._row.mask.shape
        try:
            with torch.no_grad():
                target = self._run(Packed(self._anchor.new_zeros(2, tasks, self.dim)), self._row).target
        except Exception as error:
            raise ModelError(f"the program does not broadcast over draws in front of the tasks axis ({error}); {hint}") from error
        assert target is not None
        got = tuple(target.point().batch_shape)
        if got not in ((2, tasks, points), (tasks, points)):
            raise ModelError(f"with 2 draws of φ the distribution of y has batch shape {got}, expected {(2, tasks, points)}; {hint}")

    def _check_bounds(self, survey: Survey) -> None:
        """The bounds of a task-level site may follow from θ and other sites, not from the data, which `unpack` does not see."""
        assert self._row is not None
        moving = [site.name for site in self.sites if _fixed_support(survey.statements[site.name].fn) is None]
        if not moving:
            return
        leaves, values = [], []
        with torch.enable_grad():
            for size in ((2, 4), (3, 5)):
                row = made_up(self._row, *size)
                data = {k: v.clone().requires_grad_() for k, v in (("x", row.x), ("y", row.y)) if v is not None and v.is_floating_point()}
                row = row._replace(**{name: leaf.clone() for name, leaf in data.items()})
                leaves.append(tuple(data.values()))
                values.append(self._run(Packed(self._anchor.new_zeros(size[0], self.dim)), row, sites_only=True).values)
        for name in moving:
            same = torch.equal(values[0][name][0], values[1][name][0])
            if not same or any(_reaches(values[0][name], leaf) for leaf in leaves[0]):
                raise ModelError(
                    f"task-level site '{name}': the bounds of its support are taken from the data (points.x, points.y or their number), so "
                    "its value does not follow from φ and θ: sample it between fixed bounds, say Uniform(0, 1), and stretch it afterwards"
                )

    def _check_owned(self) -> None:
        """What is learned must be the model's own: nothing else would be trained, copied and moved with it."""
        assert self._row is not None
        with torch.enable_grad():
            run = self._run(Packed(self._anchor.new_zeros(self._row.num_tasks, self.dim)), self._row)
            total = sum(torch.as_tensor(part).sum() for part in (run.hyper, run.prior, run.likelihood))
        own = {id(p) for p in self.parameters()}
        foreign = [tuple(leaf.shape) for leaf in _leaves(total) if id(leaf) not in own]
        if foreign:
            raise ModelError(
                f"the program depends on tensors that require a gradient and are not the model's, of shapes {foreign}: a module that the "
                "function only refers to? Write the program as a PyroModule that holds it, or freeze it with .requires_grad_(False)"
            )

    def _make_theta(self, survey: Survey) -> None:
        if not self._theta_sites:
            return
        assert self._row is not None
        moments = Moments()
        with torch.no_grad():
            self._run(Packed(self._anchor.new_zeros(self._row.num_tasks, self.dim)), self._row, moments)
        loc, at = torch.cat(moments.means).to(self._anchor).clone(), 0
        sd = torch.full_like(loc, 0.1)
        for site in self._theta_sites:  # a program may say where a global site starts, and how wide q(θ) does
            statement, where = survey.statements[site.name], slice(at, at := at + site.size)
            if "start" in statement.infer:
                loc[where] = packing_transform(statement.fn.support).inv(torch.as_tensor(statement.infer["start"]).detach()).reshape(-1)
            if "start_sd" in statement.infer:
                sd[where] = torch.as_tensor(statement.infer["start_sd"]).detach().expand(site.shape).reshape(-1)
        self.theta_loc = nn.Parameter(loc)
        if self.theta_kind == "variational":
            self.theta_log_scale = nn.Parameter(sd.log())
        if self.theta_kind == "nuts":
            self.register_buffer("theta_draws", self.theta_loc.detach()[None].clone())

    def _has_normal_prior(self) -> bool:
        """Whether every task-level site is an unconstrained Normal that does not look at another one."""
        assert self._row is not None
        phi = self._anchor.new_zeros(self._row.num_tasks, self.dim, requires_grad=True)
        packed, seen = Packed(phi), []

        def fill(fn: Any, transform: Any, part: Any) -> tuple[Tensor, Tensor]:
            base, _, masks = peel(fn)
            seen.append(fn if masks else base)  # a masked prior counts less than its density
            return packed(fn, transform, part)

        with torch.enable_grad():
            self._run(fill, self._row)
            return all(isinstance(fn, dist.Normal) and not _reaches(fn.loc, phi) and not _reaches(fn.scale, phi) for fn in seen)

    # --- θ

    @property
    def dim(self) -> int:
        """``D``, how many unconstrained reals a task's parameters take."""
        return sum(site.size for site in self.sites)

    @property
    def has_seen_data(self) -> bool:
        """Whether the program has been read, so that θ and `dim` are known."""
        return self._sites is not None

    @property
    def sites(self) -> list[Site]:
        """The task-level sites, in packing order."""
        if self._sites is None:
            raise RuntimeError(
                "this model has not seen data yet, so its parameters are unknown: give HierarchicalModel(program, example=points), "
                "or call model.materialise(points)"
            )
        return self._sites

    @property
    def theta_sites(self) -> list[Site]:
        """The global sample sites, in packing order."""
        self.sites  # noqa: B018 - raises before the program is read
        return self._theta_sites

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
            return self._draw_theta()

    def _draw_theta(self) -> Tensor | None:
        if not self.theta_sites or self.theta_kind == "map":
            return None
        if self.theta_kind == "nuts":
            return self.theta_draws[torch.randint(len(self.theta_draws), ())]
        noise = [torch.randn(site.shape, dtype=self._anchor.dtype, device=self._anchor.device).flatten() for site in self._theta_sites]
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
        return bool(self.theta_sites) or self._global_factors

    def _theta_values(self) -> Tensor:
        if self._theta_now is not None:
            return self._theta_now
        if not self._theta_sites:
            return self._anchor.new_zeros(0)
        return self.theta_draws.mean(0) if self.theta_kind == "nuts" else self.theta_loc

    def _default_theta(self) -> Fill:
        values = self._theta_values()
        if self.theta_kind == "variational" and self._theta_sites:
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
        if not self._normal_prior:
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

    def log_parts(self, phi: Tensor, points: Points | Episode) -> tuple[Tensor, Tensor]:
        """log p(φ | θ) and log p(y | φ, θ), each ``(*S, T)``, in one run of the program."""
        points = self.prepare(points)
        return self._parts(self._run(Packed(self._checked(phi)), points), phi)

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
        kinds: dict[str, tuple[Any, Any]] = {}
        values = self._theta_values()
        with poutine.block():
            self._hyper_run(_remember(kinds, Packed(values, jacobian=False)))
        packed, start = [], 0
        frames = dict.fromkeys(frame for site in self.theta_sites for frame in site.plates)
        plates = {(name, dim, size): pyro.plate(name, size, dim=dim) for name, dim, size in frames}  # each is announced once
        for site in self.theta_sites:
            fn, transform = kinds[site.name]
            where = slice(start, start := start + site.size)
            events = len(site.event_shape) - max((-dim for _, dim, _ in site.plates), default=0)
            if self.theta_kind == "variational":
                loc, sd = (v[where].reshape(site.shape) for v in (self.theta_loc, self.theta_log_scale.exp()))
                guide = site_normal(loc, sd, transform, fn)
                guide = guide.to_event(events - len(guide.event_shape))
            else:
                guide = dist.Delta(transform(values[where].reshape(site.shape)), event_dim=events)
            with contextlib.ExitStack() as stack:
                for frame in site.plates:
                    stack.enter_context(plates[frame])
                packed.append(transform.inv(pyro.sample(site.name, guide)).flatten())
        return torch.cat(packed)

    def sample_task_sites(self, posterior: Any, points: Points) -> None:
        """Inside a guide: samples the task-level sites from ``posterior``, batch ``(T,)``, event ``(D,)`` in packed space.

        A diagonal Normal becomes one statement a site, so that Pyro finds its analytic KLs. Anything else is one auxiliary
        site ``_phi`` and a Delta a site that carries the Jacobian, as Pyro's own autoguides do.
        """
        kinds: dict[str, tuple[Any, Any]] = {}
        with poutine.block():
            self._run(_remember(kinds, Packed(posterior.mean)), points, sites_only=True)
        base, axes, _ = peel(posterior)
        normal = isinstance(base, dist.Normal) and axes == 1
        with pyro.plate("tasks", points.num_tasks, dim=-self._plates):
            if not normal:
                phi = pyro.sample("_phi", with_points_axis(posterior) if self._plates == 2 else posterior, infer={"is_auxiliary": True})
            start = 0
            for site in self.sites:
                fn, transform = kinds[site.name]
                where = slice(start, start := start + site.size)
                shape = (points.num_tasks, *(1,) * (self._plates - 1), *site.shape)
                if normal:
                    loc, sd = (v[:, where].reshape(shape) for v in (base.loc, base.scale))
                    pyro.sample(site.name, site_normal(loc, sd, transform, fn))
                else:
                    u = phi[..., where].reshape(phi.shape[:-1] + site.shape)
                    value = transform(u)
                    density = -log_det(transform, u, value, phi.dim() - 1)
                    pyro.sample(site.name, dist.Delta(value, log_density=density, event_dim=len(site.event_shape)))

    def noise(self, tasks: int) -> Tensor:
        """Standard normal noise ``(T, D)`` from torch's global stream, drawn site by site as `sample_task_sites` does."""
        dtype, device = self._anchor.dtype, self._anchor.device
        return torch.cat([torch.randn(tasks, *site.shape, dtype=dtype, device=device).reshape(tasks, -1) for site in self.sites], -1)

    @property
    def network(self) -> AbstractNetwork | None:
        """The network of a model made by `from_network`; None for a user's program."""
        return self.program.network if isinstance(self.program, NetworkProgram) else None

    @property
    def batch_norms(self) -> BatchNorms | None:
        """Those of the network; None without one, or where it has none."""
        return None if self.network is None else self.network.batch_norms

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
        if self._sites is None:
            self._start = (seed, jitter)
            return
        network, settled = self.network, set()
        inner = network.module.modules() if isinstance(network, WeightNetwork) else ()
        with rng(torch.Generator().manual_seed(seed)), torch.no_grad():
            for module in [*self.modules(), *inner]:
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
                    settled |= {id(p) for p in module.parameters(recurse=False)}
            if isinstance(self.program, NetworkProgram):
                self.program.prior.loc.copy_(self.program.network.initial())
                settled |= {id(p) for p in self.program.parameters()}
                if self._theta_sites:  # "mean" comes first
                    self.theta_loc[: self.dim] = self.program.prior.loc
                    settled |= {id(p) for p in self.parameters(recurse=False)}
            for parameter in self.parameters():
                if id(parameter) not in settled:
                    parameter.add_(jitter * torch.randn_like(parameter))

    # --- running the program

    def _run(self, phi: Fill, points: Points, theta: Fill | None = None, *, sites_only: bool = False) -> Run:
        theta = theta or self._default_theta()
        run = Run(self._parameter, points, self._plates, self.sites, phi, self._theta_sites, theta, sites_only=sites_only)
        # No validation inside: a task whose φ has diverged gives NaN of its own, not an exception for all. Data are checked before.
        unvalidated = pyro.validation_enabled(False)
        own = own_parameters(self.program, self.device)
        with contextlib.suppress(AllSitesSeen), poutine.block(), own, unvalidated, run, self.lowered():
            self.program(points)
        return run

    def _parts(self, run: Run, phi: Tensor) -> tuple[Tensor, Tensor]:
        if phi.requires_grad and torch.is_grad_enabled():
            self.gradient_evaluations += phi[..., 0].numel() / phi.shape[-2]
        return tuple(torch.as_tensor(v).expand(phi.shape[:-1]) for v in (run.prior, run.likelihood))  # type: ignore[return-value]

    def _checked(self, phi: Tensor) -> Tensor:
        if phi.dim() < 2 or phi.shape[-1] != self.dim:
            raise ValueError(f"phi: expected shape (*S, T, D) with D = {self.dim}, got {tuple(phi.shape)}")
        return phi

    @property
    def num_classes(self) -> int | None:
        """C where y is one of the classes 0 … C − 1 (a Categorical), else None."""
        self.sites  # noqa: B018 - raises before the program is read
        return self._num_classes

    def made_up_points(self, tasks: int, points: int) -> Points:
        """``tasks`` equal tasks of ``points`` points at one x, made of the first point the model has seen: for what needs no data.

        y is that point's own; where it is a class, every class in turn.
        """
        self.sites  # noqa: B018 - raises before the program is read
        assert self._row is not None
        same = made_up(self._row.to(device=self._anchor.device, dtype=self._anchor.dtype), tasks, points)
        if self._num_classes is None or same.y is None:
            return same
        classes = (torch.arange(points) % self._num_classes).to(same.y)
        return same._replace(y=classes.view(1, points, *(1,) * (same.y.dim() - 2)).expand_as(same.y))


class ProgramPrior(dist.TorchDistribution):
    """p(φ | θ) of a program in packed space, batch ``(T,)``, event ``(D,)``: its log density and its draws run the program."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, model: HierarchicalModel, points: Points, mean: Tensor, sd: Tensor) -> None:
        self.model, self.points = model, points
        self._mean, self._sd = mean, sd
        super().__init__(mean.shape[:1], mean.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(T, D)``, as `HierarchicalModel.initial`."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """``(T, D)``."""
        return self._sd**2

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, T, D)``, site after site."""
        with torch.no_grad():
            ancestral = Ancestral(torch.Size(sample_shape))
            self.model._run(ancestral, self.points, sites_only=True)
            return torch.cat(ancestral.packed, -1).to(self._mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*S, T, D)`` to ``(*S, T)``, the Jacobian of the packing included."""
        return self.model.log_prior(value, self.points)


def refuse_unread(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: RuntimeError where a model in ``module`` that has not seen data would not keep all of it."""
    unread = [part for part in module.modules() if isinstance(part, HierarchicalModel) and not part.has_seen_data]
    if not unread:
        return
    known = module.state_dict(prefix=prefix)
    unknown = sorted(name for name in state_dict if name.startswith(prefix) and name not in known)
    if unknown or any(model._start is not None for model in unread):
        raise RuntimeError(
            f"load_state_dict: this {type(module).__name__} has not seen data yet, so "
            + (f"it has no place for {', '.join(map(repr, unknown))}" if unknown else "its starting point is still to come")
            + ": give HierarchicalModel(program, example=points), or call materialise(points) first"
        )


def _make_room(model: HierarchicalModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: `refuse_unread`, and room for as many draws of θ as there are."""
    refuse_unread(model, state_dict, prefix)
    ours, theirs = model._buffers.get("theta_draws"), state_dict.get(f"{prefix}theta_draws")
    if ours is not None and theirs is not None and ours.shape[1:] == theirs.shape[1:]:
        model.theta_draws = ours.new_zeros(theirs.shape)


def point_divergence(here: Any, there: Any) -> Tensor:
    """KL(here ‖ there) of the distributions of one point's y. Raises ValueError where their family has none in closed form."""
    try:
        return torch.distributions.kl_divergence(here, there)
    except NotImplementedError as error:
        raise ValueError(
            f"the likelihood {type(here).__name__} has no Kullback–Leibler divergence in closed form, so no Gauss–Newton curvature: "
            "take hessian='exact'"
        ) from error


def _fixed_support(fn: Any) -> Any:
    """The support of one point's y, or None where it may differ from point to point."""
    support = peel(fn)[0].support
    bounds = [b for b in vars(support).values() if isinstance(b, Tensor)]
    return None if any(b.dim() for b in bounds) else support


@contextmanager
def own_parameters(program: Any, device: torch.device) -> Iterator[None]:
    """Inside, PyroModules in ``program`` announce their parameters and keep them out of Pyro's store; new tensors are made on ``device``.

    Their contexts count as entered: entering one itself would swap the contents of the store, and a guide's parameters there would
    lose what Pyro's optimisers find them by.
    """
    modules = program.modules() if isinstance(program, nn.Module) else ()
    contexts = {id(c): c for c in (module.__dict__.get("_pyro_context") for module in modules) if c is not None}.values()
    here = contextlib.nullcontext() if device.type == "cpu" else device  # Normal(0.0, 1.0) has tensors too
    with pyro.settings.context(module_local_params=bool(contexts)), here:
        for context in contexts:
            context.active += 1
            context.used = True
        try:
            yield
        finally:
            for context in contexts:
                context.active -= 1
                if not context.active:
                    context.cache.clear()


def _num_classes(fn: Any) -> int | None:
    base = peel(fn)[0]
    return int(base.probs.shape[-1]) if isinstance(base, dist.Categorical) else None


def announce(name: str, parameter: nn.Parameter) -> None:
    """Tells Pyro's handlers of a module's parameter, as a ``pyro.param`` statement would; the global store stays empty."""
    value = attach_leaf(parameter, parameter)
    effectful(lambda *_, **__: value, type="param")(name, name=name)


def _remember(kinds: dict[str, tuple[Any, Any]], fill: Fill) -> Fill:
    def remember(fn: Any, transform: Any, part: Any) -> tuple[Tensor, Any]:
        kinds[part.site.name] = (fn, transform)
        return fill(fn, transform, part)

    return remember


def _leaves(value: Any) -> Iterator[Tensor]:
    """The tensors at the end of the graph of ``value``."""
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable


def _reaches(value: Tensor, leaf: Tensor) -> bool:
    return value.requires_grad and torch.autograd.grad(value.sum(), leaf, allow_unused=True, retain_graph=True)[0] is not None
