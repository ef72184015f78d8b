"""Full Bayes for θ: draws of the global sample sites from p(θ | training tasks), all φ's integrated out by sampling them too."""

from __future__ import annotations

import torch

from .episodes import Episode, Points
from .model import HierarchicalModel
from .randomness import rng
from .sampling import chain_diagnostics, nuts_chain, warn_of_chains


def sample_theta(
    model: HierarchicalModel, data: Points | Episode, *, num_draws: int = 500, warmup: int = 500, chains: int = 2,
    target_accept: float = 0.8, generator: torch.Generator | None = None,
) -> dict[str, float | str]:
    """Samples θ and all φ_i jointly with Pyro's NUTS and keeps the θ draws in ``model.theta_draws (chains · num_draws, G)``.

    For a model with ``theta="nuts"``: afterwards θ stands at the mean of the draws (in packed space), ``model.draw_theta()`` picks
    one, and ``with model.theta_at(draw):`` puts any learner there. ``data``: the training tasks, an Episode as S ∪ Q.
    ``pyro.param`` statements have no prior and stay where they are. Returns divergences, the largest split R̂ and the smallest
    effective number of draws of θ; warns with advice where they are bad.

    Raises ValueError for a model of another kind or without global sample sites.
    """
    points = model.prepare(data)
    if model.theta_kind != "nuts" or not model.theta_sites:
        raise ValueError(
            f"sample_theta needs global sample sites and HierarchicalModel(program, theta='nuts'), got theta={model.theta_kind!r} "
            f"and the global sites {[site.name for site in model.theta_sites]}"
        )
    with rng(generator):
        runs = []
        for _ in range(chains):
            start = {"theta": model.theta_loc.detach().clone(), "phi": model.prior(points).sample()}
            runs.append(nuts_chain(
                lambda values: model.log_full_joint(values["phi"], values["theta"], points), start,
                num_draws=num_draws, warmup=warmup, target_accept=target_accept,
            ))  # fmt: skip
    draws = torch.stack([values["theta"] for values, _ in runs])
    diagnostics = chain_diagnostics(draws, sum(count for _, count in runs))
    warn_of_chains(diagnostics, chains)
    model.theta_draws = draws.flatten(0, 1)
    return diagnostics
