"""How classifiers hold up where a test is not what training was: images under shift, and questions that no class of the task answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .evaluation import evaluate, named_adapters
from .learners.base import AbstractAdapter, checked_choice, checked_steps
from .metrics import auroc, bootstrap_interval, bootstrap_statistic
from .tasks import SHIFTS, AbstractFewShot, Shifted, TaskFamily

Row = dict[str, Any]
SCORES = ("confidence", "entropy", "information")
METRICS = ("accuracy", "nll", "brier", "ece")
RESAMPLES = 500  # of an AUROC, each of which is a sort of all points


def under_shift(
    adapters: AbstractAdapter | Mapping[str, AbstractAdapter], family: TaskFamily, *, kinds: str | Sequence[str] = SHIFTS,
    severities: float | Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), on: str = "query", num_tasks: int = 200, seed: int = 0,
    **options: Any,
) -> list[Row]:  # fmt: skip
    """`evaluate` on the same tasks under each shift at each severity (`bayesmeta.tasks.Shifted`), as rows.

    ``{shift, severity, learner, metric, estimate, lower, upper}``, metrics "accuracy", "nll", "brier", "ece" and "confidence", the mean
    probability of the likeliest class; 95% intervals by resampling tasks. Where accuracy falls and confidence does not, a learner has
    become overconfident. ``on``: what is shifted, "query", "support" or "both". ``options`` go to `evaluate`: ``task_chunk``,
    ``num_draws``, ….

    Severity 0 is the same for all kinds, and done once. Raises TypeError for what is no family, ValueError for an unknown kind, for none,
    and where y is no class, and as `evaluate` does.
    """
    checked_steps("num_tasks", num_tasks, least=1)
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    severities = [float(severities)] if isinstance(severities, int | float) else list(severities)
    if not kinds or not severities:
        raise ValueError(f"expected one kind and one severity at least, got {len(kinds)} and {len(severities)}")
    if not isinstance(family, TaskFamily):
        raise TypeError(f"family: expected a family of tasks, got {type(family).__name__}")
    for kind in kinds:
        checked_choice("kinds", kind, SHIFTS)
    rows: list[Row] = []
    unshifted: list[Row] | None = None
    for kind in kinds:
        for severity in severities:
            if severity == 0 and unshifted is not None:
                found = unshifted
            else:
                shifted = Shifted(family, kind, severity=severity, on=on)  # type: ignore[arg-type]
                found = _calibration(adapters, shifted, num_tasks=num_tasks, seed=seed, options=options)
                unshifted = found if severity == 0 else unshifted
            rows += [{"shift": kind, "severity": float(severity), **row} for row in found]
    return rows


def out_of_episode(
    adapters: AbstractAdapter | Mapping[str, AbstractAdapter], family: AbstractFewShot, *, outside: AbstractFewShot | None = None,
    num_tasks: int = 200, num_draws: int = 100, task_chunk: int = 50, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """How well a learner's uncertainty tells questions of its task's classes from as many others (`AbstractFewShot.detection`), as rows.

    ``{learner, score, auroc, lower, upper}``, with 95% intervals by resampling tasks: 1 tells all apart, 0.5 is chance. Three scores:
    "confidence", the probability of the likeliest class (Hendrycks & Gimpel 2017); "entropy" of the predictive; "information", the part of
    that entropy that comes of not knowing φ and θ (Depeweg et al. 2018), NaN where a predictive is of one draw: a
    point estimate's, or a tempered one.

    ``outside``: the family whose images are the others; by default they are of the other classes of ``family``. With batch norm by the
    set at hand they are in the query set's statistics too. Raises TypeError for families without classes to leave out, ValueError where
    a model is not one of classes, and as `AbstractFewShot.detection` does.
    """
    named = named_adapters(adapters)
    checked_steps("num_tasks", num_tasks, least=1)
    checked_steps("task_chunk", task_chunk, least=1)
    for name, given in (("family", family), ("outside", outside)):
        if not isinstance(given, AbstractFewShot) and not (given is None and name == "outside"):
            raise TypeError(f"{name}: expected few-shot tasks of images (FewShot, Omniglot, Glyphs), got {type(given).__name__}")
    d = family.detection(num_tasks, outside=outside, generator=torch.Generator().manual_seed(seed))
    masks = d.query.mask & d.inside, d.query.mask & ~d.inside
    rows: list[Row] = []
    for name, adapter in named.items():
        generator, parts = torch.Generator().manual_seed(seed), []
        for first in range(0, num_tasks, task_chunk):
            here = slice(first, first + task_chunk)
            posterior = adapter.adapt_over_theta(d.support.select(here), generator=generator)
            draws = None if posterior.is_point else num_draws
            predictive = posterior.predict(d.query.x[here], draws, generator=generator, mask=d.query.mask[here])
            if not predictive.is_classification:
                raise ValueError(f"{name}: expected a model of classes, whose predictions are probabilities")
            parts.append(_scores(predictive))
        for score in SCORES:
            values = torch.cat([part[score] for part in parts])
            found = bootstrap_statistic(_auroc, values, *masks, resamples=RESAMPLES, seed=seed)
            rows.append({"learner": name, "score": score, "auroc": found.estimate, "lower": found.lower, "upper": found.upper})
    return rows


def _calibration(adapters: Any, family: Any, *, num_tasks: int, seed: int, options: Mapping[str, Any]) -> list[Row]:
    report = evaluate(adapters, family, num_tasks=num_tasks, seed=seed, **{"examples": 0, **options})
    kept = ("learner", "metric", "estimate", "lower", "upper")
    rows = [{key: row[key] for key in kept} for row in report.summary() if row["metric"] in METRICS]
    for name, result in report.results.items():
        if result.probs is None or result.labels is None:
            raise ValueError(f"{name}: expected a model of classes, whose predictions are probabilities")
        known = result.labels >= 0
        confidence = np.where(known, result.probs.max(-1), 0.0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
        if np.isnan(confidence[known.any(1)]).any():  # as in every mean: a task without an answer leaves none
            confidence = np.full_like(confidence, np.nan)
        found = bootstrap_interval(torch.tensor(confidence), seed=seed)
        rows.append({"learner": name, "metric": "confidence", "estimate": found.estimate, "lower": found.lower, "upper": found.upper})
    return rows


def _scores(predictive: Any) -> dict[str, Tensor]:
    """Of each point, the higher the likelier it is of the task's classes, ``(T, N)``."""
    parts = predictive.decompose()
    information = parts.phi + parts.theta
    return {
        "confidence": predictive.probs.amax(-1), "entropy": -parts.total,
        "information": -information if predictive.num_draws > 1 else torch.full_like(information, torch.nan),
    }  # fmt: skip


def _auroc(scores: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    return auroc(scores, scores, mask_in=inside, mask_out=outside)
