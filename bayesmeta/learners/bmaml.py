"""BMAML, Bayesian MAML (Kim, Yoon et al. 2018; Stein steps of Liu & Wang 2016): q(φ | S_i) is M particles after K Stein steps.

    φ_m,0 = the m-th starting point, learned                                   (M points of φ's packed space, shared by all tasks)
    φ_m ← φ_m + ε/M Σ_n [ k(φ_n, φ_m) ∇ log p(S_i, φ_n | θ) + ∇_{φ_n} k(φ_n, φ_m) ]      K times (section 3.1; `stein`)

log p(S_i, φ | θ) is the model's own log joint: likelihoods summed, the prior p(φ | θ) in it. Its gradient grows with N, with 1/noise²
and with 1/σ_θ², so ε has to stay below 2 / (its largest curvature), as in any ascent. Two things break that. A prior with a small σ_θ: a
`NormalPrior` starts at a tenth of a network's weights, and ε = 1e-3 needs 0.03 or more; give it an ``initial_scale`` of 0.1, say, and keep
the starting points near the network with ``start_scale``. And a noise that training makes small: lower ``inner_lr`` then, or the
optimiser's learning rate.

The starting points begin as draws from the prior as it stands when the learner is materialised (after training, or of a model that
another learner has trained, these are draws from what was learned), pulled to its mean by ``start_scale``; from then on they are parameters
of their own, next to the prior's mean and scale, which act through log p(S_i, φ | θ).

    "predictive"   loss_i = −1/N_Q Σ_j log 1/M Σ_m p(y_j | x_j, φ_m,K), j ∈ Q_i
    "chaser"       loss_i = Σ_m ‖φ_m,K − stop_grad(leader_m)‖²                 (section 3.2)
                   leader = L more Stein steps from φ_·,K on log p(S_i ∪ Q_i, φ | θ)

The chaser loss trains the starting points alone. All other parameters (noise, shared features, the prior) cannot learn from it: they would
only change how far a step goes. They are trained on the "predictive" loss from the same particles, the starting points held fixed.

A task without support points takes its K steps on the prior: the particles drift from where they start towards it, and reach it only as
well as M particles can. With the median bandwidth 30 particles converge to an sd that is about 0.95 of the posterior's at D = 1,
0.91 at 2, 0.86 at 3, 0.7–0.8 at 5: SVGD's own property. A program's own precisions (the paper's Gamma priors on those of
noise and weights) are task-level sites like any other, and so part of each particle.

| argument | symbol | |
|---|---|---|
| num_particles | M | 1: gradient ascent on log p(S_i, φ given θ) |
| inner_steps, inner_lr | K, ε | ``adapt_steps``: K at test |
| objective | | "chaser" (the paper's) or "predictive" |
| leader_steps, leader_lr | L, the leader's ε | None: as ``inner_lr`` |
| bandwidth | h | "scalar", "per_dimension" or a number, see `stein` |
| first_order | | take the steps as constants: the loss then moves a starting point as it would φ_K, and does not reach the prior |
| start_scale, seed | | spread of the starting points as a share of the prior's, and their draw |
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import Particles, TaskPosterior
from ..predictive import Predictive
from ..randomness import rng
from .base import AbstractMetaLearner, LazyParameter, checked_choice, checked_steps
from .objectives import counts, value_of
from .stein import checked_bandwidth, transport

OBJECTIVES = ("chaser", "predictive")


class BMAML(AbstractMetaLearner):
    """Bayesian MAML; see the module's docstring for the maths and the arguments."""

    def __init__(
        self, model: HierarchicalModel, *, num_particles: int = 10, inner_steps: int = 5, inner_lr: float = 1e-3,
        adapt_steps: int | None = None, objective: str = "chaser", leader_steps: int = 1, leader_lr: float | None = None,
        bandwidth: str | float = "scalar", first_order: bool = False, start_scale: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.num_particles = checked_steps("num_particles", num_particles, least=1)
        self.inner_steps, self.inner_lr = checked_steps("inner_steps", inner_steps), inner_lr
        self.adapt_steps = inner_steps if adapt_steps is None else checked_steps("adapt_steps", adapt_steps)
        self.takes_steps(self.inner_steps, self.adapt_steps)
        self.objective = checked_choice("objective", objective, OBJECTIVES)
        self.leader_steps = checked_steps("leader_steps", leader_steps, least=1)
        self.leader_lr = inner_lr if leader_lr is None else leader_lr
        self.bandwidth, self.first_order = checked_bandwidth(bandwidth), first_order
        if not start_scale > 0:
            raise ValueError(f"start_scale: expected a positive number (particles must not coincide), got {start_scale}")
        self.start_scale, self.seed = start_scale, seed
        self.starts = LazyParameter(self._first_starts)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """`Particles` after ``adapt_steps`` steps; without support points, steps on the prior."""
        support = self.prepared(support)
        with rng(generator):
            start = self._starts(support)
            return self.posterior(Particles(self._steps(start, support, self.adapt_steps, self.inner_lr, keep_graph=False)))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """The chaser loss or the mixture's mean query NLL, ``(T,)``."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        with rng(generator):
            if self.objective == "chaser":
                return self._chaser_loss(support, query, self.prepared(episode.union(), "episode"))
            follower = self._steps(self._starts(support), support, self.inner_steps, self.inner_lr)
            return self._mixture_nll(follower, query)

    def _chaser_loss(self, support: Points, query: Points, both: Points) -> Tensor:
        starts = self._starts(support)
        with torch.enable_grad():
            fixed = starts.detach().requires_grad_()
            follower = self._steps(fixed, support, self.inner_steps, self.inner_lr)
            leader = self._steps(follower, both, self.leader_steps, self.leader_lr, keep_graph=False, first=self.inner_steps)
            chaser = (follower - leader).square().sum((0, -1))
            (gradient,) = torch.autograd.grad(chaser.sum(), fixed, retain_graph=True)
        # the first term's gradient reaches the starting points alone, the second's everything else
        return value_of(chaser, (gradient * starts).sum((0, -1)) + self._mixture_nll(follower, query))

    def _mixture_nll(self, phi: Tensor, query: Points) -> Tensor:
        """−1/N_Q Σ_j log 1/M Σ_m p(y_j | x_j, φ_m) at ``phi (M, T, D)``, ``(T,)``; 0 for a task without points."""
        assert query.y is not None
        log_density = Predictive(self.model.predict(phi, query.x, query.mask)).log_prob(query.y)
        return -torch.where(query.mask, log_density, 0.0).sum(-1) / counts(query)

    def _steps(
        self, start: Tensor, points: Points, steps: int, step_size: float, *, keep_graph: bool = True, first: int = 0
    ) -> Tensor:
        return transport(
            lambda phi: self.model.log_joint(phi, points), start, steps=steps, step_size=step_size, bandwidth=self.bandwidth,
            first_order=self.first_order, keep_graph=keep_graph, first=first,
        )  # fmt: skip

    def _starts(self, points: Points) -> Tensor:
        """``(M, T, D)``, the same for every task."""
        return self.starts.value[:, None].expand(-1, points.num_tasks, -1)

    def _first_starts(self, model: HierarchicalModel) -> Tensor:
        prior = model.prior(model.made_up_points(1, 1))
        with rng(torch.Generator().manual_seed(self.seed)), torch.no_grad():
            draws = prior.sample((self.num_particles,))
        return (prior.mean + self.start_scale * (draws - prior.mean))[:, 0]
