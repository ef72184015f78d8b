"""The sample statements of a guide: q(θ) at a program's global sites, a posterior over packed φ at its task-level sites."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .handlers import Fill, Site, site_normal
from .packing import log_det, peel
from .posteriors import with_points_axis

Kinds = dict[str, tuple[Any, Any]]  # of each site, its distribution in the model and the bijection that packs it


def remember(kinds: Kinds, fill: Fill) -> Fill:
    """``fill``, which notes in ``kinds`` the sites that it meets."""

    def remembering(fn: Any, transform: Any, part: Any) -> tuple[Tensor, Any]:
        kinds[part.site.name] = (fn, transform)
        return fill(fn, transform, part)

    return remembering


def sample_theta(sites: Sequence[Site], kinds: Kinds, values: Tensor, q: tuple[Tensor, Tensor] | None) -> Tensor:
    """Samples the global ``sites`` from a Normal with the mean and sd of ``q``, or else a Delta at ``values``, all packed, ``(G,)``.

    Returns the draw, ``(G,)``, packed.
    """
    packed, start = [], 0
    frames = dict.fromkeys(frame for site in sites for frame in site.plates)
    plates = {(name, dim, size): pyro.plate(name, size, dim=dim) for name, dim, size in frames}  # each is announced once
    for site in sites:
        fn, transform = kinds[site.name]
        where = slice(start, start := start + site.size)
        events = len(site.event_shape) - max((-dim for _, dim, _ in site.plates), default=0)
        if q is not None:
            loc, sd = (v[where].reshape(site.shape) for v in q)
            guide = site_normal(loc, sd, transform, fn)
            guide = guide.to_event(events - len(guide.event_shape))
        else:
            guide = dist.Delta(transform(values[where].reshape(site.shape)), event_dim=events)
        with contextlib.ExitStack() as stack:
            for frame in site.plates:
                stack.enter_context(plates[frame])
            packed.append(transform.inv(pyro.sample(site.name, guide)).flatten())
    return torch.cat(packed)


def sample_phi(sites: Sequence[Site], kinds: Kinds, posterior: Any, tasks: int, plates: int) -> None:
    """Samples the task-level ``sites`` from ``posterior`` (`HierarchicalModel.sample_task_sites`); ``plates``: 2 with a points plate."""
    base, axes, _ = peel(posterior)
    normal = isinstance(base, dist.Normal) and axes == 1
    with pyro.plate("tasks", tasks, dim=-plates):
        if not normal:
            phi = pyro.sample("_phi", with_points_axis(posterior) if plates == 2 else posterior, infer={"is_auxiliary": True})
        start = 0
        for site in sites:
            fn, transform = kinds[site.name]
            where = slice(start, start := start + site.size)
            shape = (tasks, *(1,) * (plates - 1), *site.shape)
            if normal:
                loc, sd = (v[:, where].reshape(shape) for v in (base.loc, base.scale))
                pyro.sample(site.name, site_normal(loc, sd, transform, fn))
            else:
                u = phi[..., where].reshape(phi.shape[:-1] + site.shape)
                value = transform(u)
                density = -log_det(transform, u, value, phi.dim() - 1)
                pyro.sample(site.name, dist.Delta(value, log_density=density, event_dim=len(site.event_shape)))
