"""NUTS (Hoffman & Gelman 2014), Pyro's: draws from the exact p(φ_i | S_i, θ), the reference for everything else.

    q(φ | S_i) = particles, draws from  p(φ | S_i, θ) ∝ p(S_i | φ, θ) p(φ | θ)

It adapts and does not learn: the model's θ as it stands is used. All tasks are sampled jointly (one trajectory in T·D dimensions,
one gradient for all), or one at a time with ``per_task``. Chains start from draws of the prior. The posterior's ``diagnostics``
hold divergences, the largest split R̂ and the smallest effective sample size, over all tasks and dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..episodes import Points
from ..model import HierarchicalModel
from ..posteriors import Particles, TaskPosterior
from ..randomness import rng
from ..sampling import chain_diagnostics, nuts_chain, warn_of_chains
from .base import AbstractAdapter, checked_steps


class NUTS(AbstractAdapter):
    """The No-U-Turn sampler on φ.

    ``num_draws``: draws kept of each chain. ``warmup``: steps before, for step size and mass matrix. ``chains``: run one after
    the other. ``target_accept``: acceptance rate aimed at. A divergence, R̂ > 1.01 or fewer than 100 effective draws a chain
    give a warning that says what to do.
    """

    def __init__(
        self, model: HierarchicalModel, *, num_draws: int = 500, warmup: int = 300, chains: int = 2, per_task: bool = False,
        target_accept: float = 0.8,
    ) -> None:
        super().__init__(model)
        self.num_draws, self.warmup = checked_steps("num_draws", num_draws, least=4), checked_steps("warmup", warmup)
        self.chains, self.per_task, self.target_accept = checked_steps("chains", chains, least=1), per_task, target_accept

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """Particles ``(chains · num_draws, T, D)``, chain after chain, with diagnostics.

        Where no task has a support point the posterior is the prior, and its draws are independent.
        """
        support = self.prepared(support)
        if not support.mask.any():
            with rng(generator):
                return TaskPosterior(self.model, Particles(self.model.prior(support).sample((self.chains * self.num_draws,)).detach()))
        groups = [support.select([i]) for i in range(support.num_tasks)] if self.per_task else [support]
        with rng(generator):
            runs = [[self._chain(group) for _ in range(self.chains)] for group in groups]
        draws = torch.cat([torch.stack([phi for phi, _ in chains]) for chains in runs], 2)  # (chains, S, T, D)
        diagnostics = chain_diagnostics(draws, sum(count for chains in runs for _, count in chains))
        warn_of_chains(diagnostics, self.chains, stacklevel=4)
        return TaskPosterior(self.model, Particles(draws.flatten(0, 1), chains=self.chains), diagnostics)

    def _chain(self, support: Points) -> tuple[Tensor, int]:
        draws, divergences = nuts_chain(
            lambda values: self.model.log_joint(values["phi"], support).sum(), {"phi": self.model.prior(support).sample()},
            num_draws=self.num_draws, warmup=self.warmup, target_accept=self.target_accept,
        )  # fmt: skip
        return draws["phi"], divergences
