"""Pyro's NUTS on a log density of named tensors, and what its chains say of themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pyro
import pyro.infer
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

Values = dict[str, Tensor]


def nuts_chain(
    log_density: Callable[[Values], Tensor], start: Values, *, num_draws: int, warmup: int, target_accept: float
) -> tuple[Values, int]:
    """One chain: draws by name, ``(num_draws, *shape)``, and the number of divergences. Randomness is torch's global stream."""
    with pyro.validation_enabled(False):
        kernel = pyro.infer.NUTS(potential_fn=lambda values: -log_density(values), target_accept_prob=target_accept)
        mcmc = pyro.infer.MCMC(kernel, num_draws, warmup_steps=warmup, initial_params=start, disable_progbar=True)
        mcmc.run()
    draws = {name: value.detach() for name, value in mcmc.get_samples().items()}
    return draws, len(mcmc.diagnostics()["divergences"]["chain 0"])


def chain_diagnostics(draws: Tensor, divergences: int) -> dict[str, float | str]:
    """Divergences, largest split R̂ and smallest effective number of draws of ``draws (chains, S, *shape)``."""
    return {
        "divergences": float(divergences),
        "max_r_hat": float(split_gelman_rubin(draws, chain_dim=0, sample_dim=1).max()),
        "min_effective_draws": float(effective_sample_size(draws, chain_dim=0, sample_dim=1).min()),
    }


def warn_of_chains(diagnostics: dict[str, float | str], chains: int, *, stacklevel: int = 3) -> None:
    """A RuntimeWarning with advice for divergences, R̂ > 1.01 and fewer than 100 effective draws a chain (NaN is none of them good)."""
    value = {name: float(v) for name, v in diagnostics.items()}
    advice = {
        "divergences": (value["divergences"] > 0, "raise target_accept (0.95) or write the program non-centred"),
        "max_r_hat": (not value["max_r_hat"] <= 1.01, "take more warmup and draws"),
        "min_effective_draws": (not value["min_effective_draws"] >= 100 * chains, "take more draws"),
    }
    for name, (wrong, what) in advice.items():
        if wrong:
            warnings.warn(f"NUTS: {name} is {value[name]:.4g}: {what}", RuntimeWarning, stacklevel=stacklevel)
