"""The Pyro program of a network: what `HierarchicalModel.from_network` wraps."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from .episodes import Points
from .networks import AbstractNetwork, NormalPrior


class NetworkProgram(nn.Module):
    """The Pyro program of a network: φ ~ N(μ_θ, σ_θ²) for each task, y ~ likelihood(network(φ, x)) for each point."""

    def __init__(self, network: AbstractNetwork, likelihood: nn.Module, prior: NormalPrior, *, sampled: bool = False) -> None:
        super().__init__()
        self.network, self.likelihood = network, likelihood
        self.prior, self.sampled = prior.requires_grad_(False) if sampled else prior, sampled

    def forward(self, points: Points) -> None:
        """Runs the program on ``points``; a trailing axis of one in y is dropped."""
        x, y = points.x, points.y
        if y is not None and y.dim() == 3 and y.shape[-1] == 1:
            y = y[..., 0]
        log_exposure = None
        if getattr(self.likelihood, "exposure", False):
            x, log_exposure = x[..., :-1], x[..., -1]
        mean, scale = self._theta()
        with pyro.plate("tasks", points.num_tasks):
            phi = pyro.sample("phi", dist.Normal(mean, scale).to_event(1))
            masked = (points.mask,) if self.network.batch_norms is not None else ()
            output = self.network(phi, x, *masked).to(phi.dtype)  # where its arithmetic is autocast, the likelihood's is not
            y_given_output = self.likelihood(output) if log_exposure is None else self.likelihood(output, log_exposure)
            pyro.sample("y", y_given_output.mask(points.mask).to_event(1), obs=y)

    def _theta(self) -> tuple[Tensor, Tensor]:
        """μ_θ and σ_θ: parameters, or global sample sites under the hyperprior that start where the parameters are."""
        prior = self.prior
        if not self.sampled:
            if prior.hyperprior is not None:
                pyro.factor("log_hyperprior", prior.log_hyperprior())
            return prior.loc, prior.scale
        normal, gamma = prior.hyperpriors()
        width = 0.1 * prior.scale  # a q(θ) that leaves the network working
        mean = pyro.sample("mean", normal.to_event(1), infer={"start": prior.loc, "start_sd": width})
        precision = pyro.sample("precision", gamma.to_event(1), infer={"start": prior.scale**-2})
        return mean, precision.rsqrt()
