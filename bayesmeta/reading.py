"""What is known of a program once it has been read, and the checks that run it with its sites filled in.

`bayesmeta.survey` looks at a program's statements one by one; here are those of its rules that only a run shows: that it broadcasts
over draws, that the bounds of its sites do not follow from the data, that it depends on no parameters but the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from .episodes import Points
from .handlers import Moments, Packed, Parameters, Run, Site
from .packing import packing_transform, peel
from .parameters import own_parameters
from .survey import ModelError, Survey, made_up, read

SIZES = ((2, 4), (3, 5))  # tasks and points of the made-up data that a program is read on
Runs = Callable[..., Run]  # runs the program: (phi, points, theta=None, *, sites_only=False)


@dataclass(frozen=True)
class Reading:
    """What two surveys of a program have found: its sites in packing order, and what its likelihood expects of y."""

    sites: list[Site]
    theta_sites: list[Site]
    plates: int  # 1, or 2 with a points plate
    row: Points  # made-up data: what statements without data are run on
    target_support: Any  # of one point's y; None where it may differ from point to point
    num_classes: int | None
    global_factors: bool
    normal_prior: bool = False

    @classmethod
    def of(cls, small: Survey, large: Survey, row: Points) -> Reading:
        """From surveys on made-up data of both `SIZES`, copies of ``row``. Raises ModelError where the program breaks a rule."""
        sites, theta_sites, plates = read(small, large, SIZES)
        fn = small.statements["y"].fn
        factors = small.has_factors(in_tasks=False)
        return cls(sites, theta_sites, plates, made_up(row, *SIZES[0]), fixed_support(fn), _num_classes(fn), factors)

    @property
    def dim(self) -> int:
        """``D``, how many unconstrained reals a task's parameters take."""
        return sum(site.size for site in self.sites)


def surveyed(program: Callable[[Points], Any], points: Points, parameters: Parameters, like: Tensor) -> Survey:
    """A `Survey` of ``program`` run on ``points``, in the dtype and device of ``like``. Raises ModelError where it fails."""
    survey = Survey(parameters, like)
    try:
        with torch.no_grad(), poutine.block(), own_parameters(program, like.device), survey:
            program(points)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the program failed on {points.num_tasks} tasks of {points.num_points} points, x of shape {tuple(points.x.shape)}: "
            f"{type(error).__name__}: {error}"
            + ("; several values a task are an event: end the distribution with .to_event(1)" if "inside plate" in str(error) else "")
        ) from error
    return survey


def start_of_theta(run: Runs, reading: Reading, survey: Survey, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the global sample sites start in packed space, and the sd that q(θ) starts with, each ``(G,)``."""
    moments = Moments()
    with torch.no_grad():
        run(Packed(_zeros(reading, like)), reading.row, moments)
    loc, at = torch.cat(moments.means).to(like).clone(), 0
    sd = torch.full_like(loc, 0.1)
    for site in reading.theta_sites:  # a program may say where a global site starts, and how wide q(θ) does
        statement, where = survey.statements[site.name], slice(at, at := at + site.size)
        if "start" in statement.infer:
            loc[where] = packing_transform(statement.fn.support).inv(torch.as_tensor(statement.infer["start"]).detach()).reshape(-1)
        if "start_sd" in statement.infer:
            sd[where] = torch.as_tensor(statement.infer["start_sd"]).detach().expand(site.shape).reshape(-1)
    return loc, sd


def check_draws(run: Runs, reading: Reading, like: Tensor) -> None:
    """The program broadcasts over draws of φ in front of the tasks axis."""
    hint = "index from the right: `level[..., None] + effect[..., None] * points.x[..., 0]`"
    tasks, points = reading.row.mask.shape
    try:
        with torch.no_grad():
            target = run(Packed(like.new_zeros(2, tasks, reading.dim)), reading.row).target
    except Exception as error:
        raise ModelError(f"the program does not broadcast over draws in front of the tasks axis ({error}); {hint}") from error
    assert target is not None
    got = tuple(target.point().batch_shape)
    if got not in ((2, tasks, points), (tasks, points)):
        raise ModelError(f"with 2 draws of φ the distribution of y has batch shape {got}, expected {(2, tasks, points)}; {hint}")


def check_bounds(run: Runs, reading: Reading, survey: Survey, like: Tensor) -> None:
    """The bounds of a task-level site may follow from θ and other sites, not from the data, which `unpack` does not see."""
    moving = [site.name for site in reading.sites if fixed_support(survey.statements[site.name].fn) is None]
    if not moving:
        return
    leaves, values = [], []
    with torch.enable_grad():
        for size in SIZES:
            row = made_up(reading.row, *size)
            data = {k: v.clone().requires_grad_() for k, v in (("x", row.x), ("y", row.y)) if v is not None and v.is_floating_point()}
            row = row._replace(**{name: leaf.clone() for name, leaf in data.items()})
            leaves.append(tuple(data.values()))
            values.append(run(Packed(like.new_zeros(size[0], reading.dim)), row, sites_only=True).values)
    for name in moving:
        same = torch.equal(values[0][name][0], values[1][name][0])
        if not same or any(_reaches(values[0][name], leaf) for leaf in leaves[0]):
            raise ModelError(
                f"task-level site '{name}': the bounds of its support are taken from the data (points.x, points.y or their number), so "
                "its value does not follow from φ and θ: sample it between fixed bounds, say Uniform(0, 1), and stretch it afterwards"
            )


def check_owned(run: Runs, reading: Reading, parameters: Iterable[Tensor], like: Tensor) -> None:
    """What is learned must be the model's own ``parameters``: nothing else would be trained, copied and moved with it."""
    with torch.enable_grad():
        found = run(Packed(_zeros(reading, like)), reading.row)
        total = sum(torch.as_tensor(part).sum() for part in (found.hyper, found.prior, found.likelihood))
    own = {id(p) for p in parameters}
    foreign = [tuple(leaf.shape) for leaf in _leaves(total) if id(leaf) not in own]
    if foreign:
        raise ModelError(
            f"the program depends on tensors that require a gradient and are not the model's, of shapes {foreign}: a module that the "
            "function only refers to? Write the program as a PyroModule that holds it, or freeze it with .requires_grad_(False)"
        )


def has_normal_prior(run: Runs, reading: Reading, survey: Survey, like: Tensor) -> bool:
    """Whether p(φ | θ) is an independent Normal: every task-level site is one, does not look at another, and counts in full."""
    phi = _zeros(reading, like).requires_grad_()
    packed, seen = Packed(phi), []

    def fill(fn: Any, transform: Any, part: Any) -> tuple[Tensor, Tensor]:
        base, _, masks = peel(fn)
        seen.append(fn if masks else base)  # a masked prior counts less than its density
        return packed(fn, transform, part)

    with torch.enable_grad():
        run(fill, reading.row)
        normal = all(isinstance(fn, dist.Normal) and not _reaches(fn.loc, phi) and not _reaches(fn.scale, phi) for fn in seen)
    weighed = any(survey.statements[site.name].weighed for site in reading.sites)
    return normal and not weighed and not survey.has_factors(in_tasks=True)


def fixed_support(fn: Any) -> Any:
    """The support of one point's y, or of a site; None where it may differ from point to point."""
    support = peel(fn)[0].support
    bounds = [b for b in vars(support).values() if isinstance(b, Tensor)]
    return None if any(b.dim() for b in bounds) else support


def _num_classes(fn: Any) -> int | None:
    base = peel(fn)[0]
    return int(base.probs.shape[-1]) if isinstance(base, dist.Categorical) else None


def _zeros(reading: Reading, like: Tensor) -> Tensor:
    """φ of the made-up data, ``(T, D)``, in the middle of packed space."""
    return like.new_zeros(reading.row.num_tasks, reading.dim)


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
