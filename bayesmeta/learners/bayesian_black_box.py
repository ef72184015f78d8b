"""Bayesian black box: a network goes from a set of points to q(φ | set), amortised variational inference.

    e = encoder(S),   φ = m_θ + s_θ u,   m_θ and s_θ the prior's mean and sd in packed space
    (b_j, t_j) = factors(x_j, y_j, e)                  each point a pseudo-observation t_j ~ N(b_jᵀu, 1) of u ~ N(0, I)
    C = (I + Σ_j b_j b_jᵀ)⁻¹,   c = C Σ_j b_j t_j       (see `factors.Factors`), and given S
    u ~ N( c, diag r(e)² / (1 + Σ_j b_j²) )            posterior="diagonal"
    u ~ N( c, r(e) C r(e) )                            "full"
    u = c + (1 + Σ_j b_j²)^−½ flow(ε; e)               "flow", ε ~ N(0, I) (`flows.ConditionalFlow`)

b and t start small and r near 1, so that an untrained q is near the prior; without points u ~ N(0, I) exactly, whatever was learned, and
q is the prior, where that is an independent Normal. For a linear-Gaussian model the best "diagonal" and "full" are of this form. φ is
what the model says: a latent code (`DecoderNetwork`: a neural process, Garnelo et al. 2018b), a head on shared features (`HeadNetwork`),
the sites of a user's program, all weights.

``encoder="per_class"`` goes another way, VERSA's (Gordon et al. 2019), for classes alone: the weights of each by one network for all,

    e_c = encoder({ j ∈ S : y_j = c }),   u_c ~ N( μ(e_c), diag r(e_c)² ),   u_c ~ N(0, I) without points of c     (see `per_class`)

with a `HeadNetwork` or `PrototypeNetwork`, a `Categorical` likelihood and a "diagonal" posterior; the paper's objective is "predictive".
Where labels are drawn anew for every task it learns in a fraction of the steps. Four objectives:

    "elbo"            −E_{q(φ|A)}[ log p(A | φ) ] + w KL( q(φ|A) ‖ p(φ|θ) )       the same A on both sides: its optimum is p(φ | A, θ)
    "lecture"         −E_{q(φ|S)}[ log p(Q | φ) ] + w KL( q(φ|S) ‖ p(φ|θ) )       its optimum is not p(φ | S, θ): see below
    "neural_process"  −E_{q(φ|S∪Q)}[ log p(Q | φ) ] + w KL( q(φ|S∪Q) ‖ q(φ|S) )   (Garnelo et al. 2018b, eq. 9)
    "predictive"      −Σ_j log 1/M Σ_m p(y_j | x_j, φ_m),  φ_m ~ q(φ|S), j ∈ Q    no KL (Gordon et al. 2019, eq. 4)

"elbo": A is S, or S and a random part of Q, of random size, for each task on its own; what is chosen hangs on the points' values, never
on their places. With ``subsets=False`` A = S ∪ Q. "lecture" (the form that lectures show): q sees S and must serve Q, the only likelihood
there is, so its sd shrinks with the number of *query* points as if they had been seen: with n of them of information i each and prior
precision λ it is (λ + n i)^−½ where, after N support points, the posterior's is (λ + N i)^−½.

| argument | symbol | |
|---|---|---|
| encoder | e | "deep_set", "recurrent", "attention", for classes "per_class", or an encoder of `bayesmeta.learners.encoders` |
| hidden | H | width of the named encoder and of the layers behind it |
| objective | | above |
| posterior | | "diagonal", "full" or "flow"; "diagonal" alone with encoder="per_class" |
| num_draws | M | draws of φ a task; default 10 for "predictive", else 1 |
| kl_weight | w | weight of the KL; 1 for a bound |
| min_scale | | floor under q's sd in any direction (of a flow, under its last scale), in prior sds |
| subsets | | for "elbo" alone: True draws A, False takes S ∪ Q |

The KL of a diagonal q is analytic site by site where Pyro knows it, that of two q's where both are Normal; else it is taken at the draws.
Noise is drawn as `pyro.infer` draws it, A after it: so on Points P, `TraceMeanField_ELBO` (`Trace_ELBO` for "full" and "flow") of the
model and ``learner.guide`` is ``meta_loss(Episode(P, no points)).sum() + global_loss()`` of "elbo" at the same seed. Given an Episode the
guide sees S only; of "elbo" with ``subsets=False`` it sees S ∪ Q, as the model does, and the two agree there too.
"""

from __future__ import annotations

import copy
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import TaskPosterior
from ..predictive import Predictive
from ..randomness import rng
from .base import AbstractMetaLearner, checked_choice, checked_steps
from .encoders import AbstractEncoder, Head, PerClass, make_encoder, random_part
from .factors import Factors, cholesky, pseudo_posterior
from .flows import ConditionalFlow, FlowNormal
from .layers import positive
from .per_class import ClassHead, check_model

OBJECTIVES = ("elbo", "lecture", "neural_process", "predictive")
POSTERIORS = ("diagonal", "full", "flow")


class BayesianBlackBox(AbstractMetaLearner):
    """Amortised variational inference; see the module's docstring for the maths and the arguments.

    Raises ValueError for an argument out of range, and with ``encoder="per_class"`` for a model or posterior of another kind.
    """

    def __init__(
        self, model: HierarchicalModel, *, encoder: str | AbstractEncoder = "deep_set", hidden: int = 64, objective: str = "elbo",
        posterior: str = "diagonal", num_draws: int | None = None, kl_weight: float = 1.0, min_scale: float = 1e-3, subsets: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.objective, self.kind = checked_choice("objective", objective, OBJECTIVES), checked_choice("posterior", posterior, POSTERIORS)
        default = 10 if objective == "predictive" else 1
        self.num_draws = default if num_draws is None else checked_steps("num_draws", num_draws, least=1)
        if not 0 < min_scale < 1:
            raise ValueError(f"min_scale: expected a number between 0 and 1, in prior sds, got {min_scale}")
        self.kl_weight, self.min_scale, self.subsets = kl_weight, min_scale, subsets
        self.encoder = make_encoder(encoder, hidden)
        self.head: Head | ClassHead
        if isinstance(self.encoder, PerClass):
            check_model(model)
            if self.kind != "diagonal":
                raise ValueError(f"posterior: expected 'diagonal' with encoder='per_class', whose classes are apart, got {posterior!r}")
            self.shift, self.head = (ClassHead(self.encoder, hidden, linear=linear) for linear in (True, False))
        else:
            self.factors = Factors(self.encoder, hidden)
            if self.kind == "flow":
                self.flow = ConditionalFlow(self.encoder.size, hidden, floor=min_scale)
            else:
                self.head = Head(self.encoder, hidden)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior:
        """q(φ | S_i); nothing is drawn."""
        support = self.prepared(support)
        with rng(generator), torch.no_grad():
            return self.posterior(self._q(support, frozen=True))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """The objective, ``(T,)``, in nats a task: likelihoods are summed over points."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        both = support.union(query)
        with rng(generator):
            noise = self._noise(support.num_tasks)
            if self.objective == "elbo":
                chosen = self._chosen(support, query)
                return self._minus_elbo(self._q(chosen), noise, chosen)
            if self.objective == "lecture":
                return self._minus_elbo(self._q(support), noise, query)
            if self.objective == "neural_process":
                return self._neural_process(self._q(both), self._q(support), noise, query)
            return self._predictive(self._q(support), noise, query)

    def guide(self, data: Points | Episode) -> None:
        """The same q as a Pyro guide: given an Episode it sees only S ("elbo" with ``subsets=False``: S ∪ Q); given Points, all."""
        if isinstance(data, Episode) and self.objective == "elbo" and not self.subsets:
            data = data.union()
        self.run_guide(data, self._q)

    def _q(self, points: Points, *, frozen: bool = False) -> Any:
        """q(φ | points), batch ``(T,)``, event ``(D,)``; ``frozen``: a flow of its own, that further training leaves as it is."""
        mean, sd = self.model.prior_moments(points)
        f, seen = self.encoder.points(points), points.mask.any(1)[:, None].to(mean)
        encoding = self.encoder.encode(points, f)
        if isinstance(self.encoder, PerClass):
            u, spread = self.shift(encoding), torch.ones_like(mean)
        else:
            u, spread = pseudo_posterior(*self.factors(f, encoding, points.mask), mean_field=self.kind != "full")
        loc, floor = mean + sd * u, self.min_scale**2
        if self.kind == "flow":
            flow = copy.deepcopy(self.flow).requires_grad_(False) if frozen else self.flow
            return FlowNormal(flow, encoding, seen, loc, sd * (floor + (1 - floor) * spread).sqrt())
        r = positive(seen * self.head(encoding), 0.0)
        if self.kind == "diagonal":
            return dist.Normal(loc, sd * (floor + (1 - floor) * r.square() * spread).sqrt(), validate_args=False).to_event(1)
        one = torch.eye(self.model.dim, dtype=mean.dtype, device=mean.device)
        root = cholesky(floor * one + (1 - floor) * r[..., None] * spread * r[..., None, :])
        return dist.MultivariateNormal(loc, scale_tril=sd[..., None] * root, validate_args=False)

    def _noise(self, tasks: int) -> Tensor:
        """Standard normal noise ``(M, T, D)``, in the order in which Pyro's particles draw it, one after the other."""
        like = next(self.parameters())
        if self.kind == "diagonal":
            return torch.stack([self.model.noise(tasks) for _ in range(self.num_draws)])
        return torch.stack([torch.randn(tasks, self.model.dim, dtype=like.dtype, device=like.device) for _ in range(self.num_draws)])

    def _chosen(self, support: Points, query: Points) -> Points:
        """A: S with probability ½, else S and a random part of Q of any size; all of S ∪ Q where ``subsets`` is False."""
        if self.subsets:
            share = (2 * torch.rand(query.num_tasks, device=query.mask.device) - 1).clamp(min=0)
            query = query._replace(mask=random_part(query, self.encoder.points.values(query), share))
        return support.union(query)

    def _minus_elbo(self, q: Any, noise: Tensor, points: Points) -> Tensor:
        """−E_q[log p(points | φ)] + w KL(q ‖ p(φ | θ)), ``(T,)``."""
        phi = _draws(q, noise)
        if self.kind == "diagonal":
            minus_kl, log_likelihood = self.model.mean_field_parts(phi, q.base_dist.loc, q.base_dist.scale, points)
        else:
            log_prior, log_likelihood = self.model.log_parts(phi, points)
            minus_kl = log_prior - q.log_prob(phi)
        return -(log_likelihood + self.kl_weight * minus_kl).mean(0)

    def _neural_process(self, q: Any, prior: Any, noise: Tensor, query: Points) -> Tensor:
        """−E_q[log p(Q | φ)] + w KL(q(φ|S∪Q) ‖ q(φ|S)), ``(T,)``."""
        phi = _draws(q, noise)
        kl = (q.log_prob(phi) - prior.log_prob(phi)).mean(0) if self.kind == "flow" else torch.distributions.kl_divergence(q, prior)
        return self.kl_weight * kl - self.model.log_likelihood(phi, query).mean(0)

    def _predictive(self, q: Any, noise: Tensor, query: Points) -> Tensor:
        """−Σ_j log 1/M Σ_m p(y_j | x_j, φ_m), ``(T,)``."""
        assert query.y is not None
        log_prob = Predictive(self.model.predict(_draws(q, noise), query.x, query.mask)).log_prob(query.y)
        return -torch.where(query.mask, log_prob, 0.0).sum(-1)


def _draws(q: Any, noise: Tensor) -> Tensor:
    """The draws ``(M, T, D)`` of q that standard normal ``noise`` stands for."""
    if isinstance(q, FlowNormal):
        return q.push(noise)
    if isinstance(q, dist.MultivariateNormal):
        return q.loc + (q.scale_tril @ noise[..., None])[..., 0]
    return q.base_dist.loc + noise * q.base_dist.scale
