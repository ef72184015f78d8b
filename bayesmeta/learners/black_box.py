"""Black box: a network goes from the support set to a point estimate of φ, or to the prediction itself.

    e_i = encoder(S_i)                                            a set of points to H numbers (see `encoders`)
    φ_i = m_θ + s_θ · A(e_i)                                      m_θ, s_θ: the prior's mean and sd in packed space; A near 0 at the start
    loss_i(θ) = −1/N_Q Σ_j log p(y_j | x_j, φ_i),   j ∈ Q_i

q(φ | S_i) is a Delta at φ_i; without support points it is at m_θ. What φ is the model says: a latent code (`DecoderNetwork`), a head
(`HeadNetwork`), all weights, or the sites of a user's program. The encoder's kinds are after Garnelo et al. 2018 (deep set), Santoro et al.
2016 (recurrent) and Mishra et al. 2018 (attention); those two read a sequence, here a set is read, whose order does not matter.

``encoder="per_class"`` makes each class's weights from that class's points alone, by one network for all classes, as VERSA does (Gordon et
al. 2019; see `per_class`): for a `HeadNetwork` or `PrototypeNetwork` with a `Categorical` likelihood. A class without points has m_θ. Where
labels are drawn anew for every task the other encoders have to learn first that classes can change places; this one cannot do otherwise.

``predictive_head=True`` does without φ (conditional neural process, Garnelo et al. 2018, eq. 1–3): with a model made by `from_network`

    p(y | x, S_i) = likelihood( h(e_i, x) ),   h a network that puts out as many numbers as the model's own

trained by the same loss; the posterior is a `FunctionPosterior`. The encoder's learned answer to an empty set is then used.

| argument | symbol | |
|---|---|---|
| encoder | | "deep_set", "recurrent", "attention", for classes "per_class", or an encoder of `bayesmeta.learners.encoders` |
| hidden | H | width of the named encoder and of the layers behind it |
| predictive_head | | no φ: from encoding and x to the likelihood's parameters; not with encoder="per_class" |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..episodes import Episode, Points
from ..model import HierarchicalModel
from ..posteriors import FunctionPosterior, TaskPosterior, delta
from ..predictive import Predictive
from ..randomness import rng
from .base import AbstractMetaLearner
from .encoders import AbstractEncoder, Head, PerClass, make_encoder
from .objectives import counts, mean_nll
from .per_class import ClassHead, check_model


class BlackBox(AbstractMetaLearner):
    """Black-box adaptation to a point; see the module's docstring for the maths and the arguments.

    Raises ValueError for ``predictive_head`` or ``encoder="per_class"`` with a model of another kind, and for both at once.
    """

    def __init__(
        self, model: HierarchicalModel, *, encoder: str | AbstractEncoder = "deep_set", hidden: int = 64, predictive_head: bool = False
    ) -> None:  # fmt: skip
        super().__init__(model)
        if predictive_head and model.network is None:
            raise ValueError(
                "predictive_head: expected a model made by HierarchicalModel.from_network, whose likelihood takes a network's output; "
                "got a user's program, whose likelihood takes φ: use predictive_head=False"
            )
        self.encoder, self.predictive_head = make_encoder(encoder, hidden), predictive_head
        self.head: Head | ClassHead
        if isinstance(self.encoder, PerClass):
            check_model(model)
            if predictive_head:
                raise ValueError("predictive_head: expected False with encoder='per_class', which makes each class's part of φ, got True")
            self.head = ClassHead(self.encoder, hidden, linear=True)
        else:
            self.head = Head(self.encoder, hidden, _num_outputs if predictive_head else None, with_inputs=predictive_head)

    def adapt(self, support: Points, *, generator: torch.Generator | None = None) -> TaskPosterior | FunctionPosterior:
        """A Delta at φ_i, at `initial` without support points; with ``predictive_head`` a `FunctionPosterior`."""
        support = self.prepared(support)
        with rng(generator), torch.no_grad():
            if self.predictive_head:
                return FunctionPosterior(self.model, self._predictive, support)
            return self.posterior(delta(self._phi(support)))

    def meta_loss(self, episode: Episode, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean query NLL, ``(T,)``."""
        support, query = self.prepared(episode.support), self.prepared(episode.query, "query")
        assert query.y is not None
        with rng(generator):
            if not self.predictive_head:
                return mean_nll(self.model, self._phi(support), query)
            log_prob = Predictive(self._predictive(support, query.x, query.mask)).log_prob(query.y)
            return -torch.where(query.mask, log_prob, 0.0).sum(-1) / counts(query)

    def _phi(self, support: Points) -> Tensor:
        mean, sd = self.model.prior_moments(support)
        seen = support.mask.any(1)[:, None].to(mean)
        return mean + sd * seen * self.head(self.encoder(support))

    def _predictive(self, support: Points, x: Tensor, mask: Tensor | None = None) -> Any:
        """The distribution of one point's y at ``x (T, N, *I)``, batch ``(1, T, N)``."""
        points, likelihood = self.encoder.points, self.model.program.likelihood  # type: ignore[attr-defined]
        inputs = points.inputs(x, mask)
        encoding = self.encoder(support)[:, None].expand(*inputs.shape[:2], -1)
        output = self.head(torch.cat([encoding, inputs], -1))[None]
        return likelihood(output, x[..., -1]) if points.exposure else likelihood(output)


def _num_outputs(model: HierarchicalModel) -> int:
    """How many numbers a point the model's network puts out."""
    assert model.network is not None
    row = model.made_up_points(1, 1)
    x = row.x[..., :-1] if getattr(model.program.likelihood, "exposure", False) else row.x  # type: ignore[attr-defined]
    with torch.no_grad():
        return model.network(model.initial(row), x).shape[-1]
