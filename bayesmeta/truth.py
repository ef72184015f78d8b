"""What a family knows of its held-out tasks, worked out once: the best that any learner could say, and all that it should think of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, final

import torch
from torch import Tensor

from .episodes import Episode, Points
from .metrics import label_coverage, mode_coverage, task_mean
from .posteriors import Posterior
from .predictive import Predictive
from .report.measures import AMBIGUOUS, OPEN
from .tasks.base import TaskFamily

CHUNK = 100  # tasks whose exact predictive is worked out at once: bounds the memory
GRID_POINTS = 50
# A draw is of an explanation where it is nearer to it than this share of the way to the next one. Of the exact posterior of sines and
# lines, whose draws scatter round the mean curve of each, so 98% of the explanations count as found; a curve half way is of neither.
REACH = 0.4


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What is known of ``T`` tasks; None, empty or False where a family does not know it.

    ===================== ========= =============================================================================
    field                 shape
    ===================== ========= =============================================================================
    nll                   (T,)      −log of the exact predictive, mean over query points, in the units of the report
    probs                 (T, N)    exact P(y = 1) at the query points, where y is 0 or 1
    is_discrete                     whether the exact predictive is of classes or counts
    names                 M         the explanations
    probabilities         (M, T)    of the explanations, given the support
    ambiguous             (T,)      whether every one of several explanations has at least probability 0.2
    inputs                (A, G, I) where the curves of the A ambiguous tasks are looked at
    real                  (A, G)    which of them are no padding
    curves                (M, A, G) the explanations there
    ===================== ========= =============================================================================
    """

    ambiguous: Tensor
    nll: Tensor | None = None
    probs: Tensor | None = None
    is_discrete: bool = False
    names: tuple[str, ...] = ()
    probabilities: Tensor | None = None
    inputs: Tensor | None = None
    real: Tensor | None = None
    curves: Tensor | None = None

    def select(self, here: slice) -> Truth:
        """Of the chosen tasks, in order."""
        part: dict[str, Any] = {k: None if (v := getattr(self, k)) is None else v[here] for k in ("nll", "probs")}
        part["probabilities"] = None if self.probabilities is None else self.probabilities[:, here]
        rows = self.ambiguous.nonzero()[:, 0]
        start, stop, _ = here.indices(len(self.ambiguous))
        few = (rows >= start) & (rows < stop)
        part |= {k: None if (v := getattr(self, k)) is None else v[few] for k in ("inputs", "real")}
        part["curves"] = None if self.curves is None else self.curves[:, few]
        return replace(self, ambiguous=self.ambiguous[here], **part)

    def scored_tasks(self, query: Points) -> dict[str, Tensor]:
        """Which tasks each metric is of, ``(T,)``, where these are not all that have query points."""
        tasks = {"mode_coverage": self.ambiguous} if self.curves is not None else {}
        if self.nll is not None and bool((self.nll.isnan() & query.mask.any(-1)).any()):
            tasks |= {"nll_gap": ~self.nll.isnan()}
            tasks |= {"label_coverage": ~self.nll.isnan()} if self.probs is not None else {}
        return tasks

    def scores(
        self, posterior: Posterior, predictive: Predictive, nll: Tensor, mask: Tensor, *, num_draws: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What a learner's answer lacks of this truth, ``(T,)`` each, NaN at tasks that a metric is not of.

        "nll_gap": its ``nll (T,)`` minus the exact one. "label_coverage": of the labels that the support leaves open, at the query points
        ``mask (T, N)``, the share that its draws give. "mode_coverage": of the explanations of an ambiguous task, the share that its draws
        are near to. ``predictive``: at the query points; ``posterior``: for curves elsewhere, ``num_draws`` of them by ``generator``.
        """
        found = {}
        if self.nll is not None and predictive.is_discrete == self.is_discrete:
            found["nll_gap"] = nll - self.nll.to(nll)
            if self.probs is not None and has_two_classes(predictive):
                truth = self.probs.to(nll)
                found["label_coverage"] = label_coverage(probability_of_1(predictive), truth, mask, possible=OPEN)[0]
        if self.curves is not None and not predictive.is_classification and not len(predictive.event_shape):
            found["mode_coverage"] = self._mode_coverage(posterior, num_draws, generator).to(nll)
        return found

    def _mode_coverage(self, posterior: Posterior, num_draws: int, generator: torch.Generator) -> Tensor:
        assert self.curves is not None and self.real is not None
        tasks = self.ambiguous.nonzero()[:, 0]
        if not len(tasks):
            return torch.full(self.ambiguous.shape, torch.nan)
        here = posterior.select(tasks.tolist())
        draws = here.predict(self.inputs, None if posterior.is_point else num_draws, generator=generator).means.cpu().double()
        modes = self.curves.double()
        gaps = torch.stack([task_mean((a - b).square(), self.real).sqrt() for a, b in combinations(modes, 2)])
        found = mode_coverage(draws, modes, self.real, tolerance=REACH * gaps.amin(0)).covered
        return found.new_full(self.ambiguous.shape, torch.nan).index_put((tasks,), found)


def truth_of(family: TaskFamily | Episode, episode: Episode) -> Truth:
    """What ``family`` knows of the tasks of ``episode``; nothing where it is an Episode itself."""
    known: dict[str, Any] = {"ambiguous": torch.zeros(episode.num_tasks, dtype=torch.bool)}
    if hasattr(family, "exact_predictive"):
        known |= _exact(family, episode)
    if hasattr(family, "explanations"):
        known |= _explained(family, episode)
    return Truth(**known)


def has_two_classes(predictive: Predictive) -> bool:
    """Whether y is one of two classes."""
    return predictive.is_classification and predictive.probs.shape[-1] == 2


def probability_of_1(predictive: Predictive) -> Tensor:
    """P(y = 1) under each draw, ``(S, T, N)``, of a predictive of two classes."""
    one = torch.ones_like(predictive.probs[..., 1])
    return torch.cat([fn.log_prob(one) for fn in predictive.components]).exp()


def _exact(family: Any, episode: Episode) -> dict[str, Any]:
    support, query = episode.support, episode.query.filled()
    assert query.y is not None
    y = query.y[..., 0] if query.y.dim() == 3 and query.y.shape[-1] == 1 else query.y
    nll, probs, discrete = [], [], False
    for start in range(0, episode.num_tasks, CHUNK):
        here = slice(start, start + CHUNK)
        exact = family.exact_predictive(support.select(here), query.x[here])
        discrete = bool(exact.support.is_discrete)
        nll.append(task_mean(-exact.log_prob(y[here].to(query.x)), query.mask[here]))
        probs += [exact.mean] if isinstance(exact, torch.distributions.Bernoulli) else []
    unit = 0.0 if discrete else math.log(float(getattr(family, "target_scale", 1.0)))
    return {"nll": torch.cat(nll) + unit, "probs": torch.cat(probs) if probs else None, "is_discrete": discrete}


def _explained(family: Any, episode: Episode) -> dict[str, Any]:
    probabilities = family.probabilities_of_explanations(episode.support)
    if bool(probabilities.isnan().all()):  # this member of the family does not know
        return {}
    ambiguous = (probabilities >= AMBIGUOUS).all(0) & episode.query.mask.any(-1) & torch.tensor(len(probabilities) > 1)
    known = {"names": tuple(family.explanation_names), "probabilities": probabilities, "ambiguous": ambiguous}
    if not bool(ambiguous.any()):
        return known
    few = episode.select(ambiguous.nonzero()[:, 0])
    inputs, real = few.query.filled().x, few.query.mask
    if inputs.dim() == 3 and inputs.shape[-1] == 1:  # a curve: between all points, not just where a task happens to be asked
        every = torch.cat([points.x[points.mask] for points in episode])
        inputs = torch.linspace(float(every.min()), float(every.max()), GRID_POINTS).to(inputs).expand(len(inputs), -1)[..., None]
        real = torch.ones(inputs.shape[:2], dtype=torch.bool)
    return known | {"inputs": inputs, "real": real, "curves": family.explanations(few.support, inputs)}
