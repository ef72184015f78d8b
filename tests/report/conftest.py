"""Small reports of known numbers."""

from dataclasses import replace

import numpy as np
import pytest

from bayesmeta.report import Bands, Curves, Explanation, LearnerResult, ProbabilityMap, Report

TASKS, POINTS = 8, 5
SUPPORT, QUERY = np.array([1, 1, 2, 3, 5, 8, 13, 20]), np.array([5, 5, 4, 5, 3, 5, 5, 2])
NAMES = ("NoPooling", "NUTS", "CompletePooling", "<b>x")


def curves(shift):
    grid = np.array([0.0, 1.0])
    mean = grid + shift
    ends = {"lower50": mean - 0.7, "upper50": mean + 0.7, "lower90": mean - 1.6, "upper90": mean + 1.6}
    return Curves(grid=grid, mean=mean, draws=np.stack([mean, mean + 0.5]), **ends)


def bands(task, shift):
    x, y = np.array([0.0, 0.0, 1.0]), np.array([0.1, 0.2, 1.3]) + task
    options = {"support_x": x[:2], "support_y": y[:2], "query_x": x[2:], "query_y": y[2:]}
    return Bands(task=task, name=f"county {task} & <Co>", before=curves(0), after=curves(shift), **options)


def result(seed, shift):
    rng = np.random.default_rng(seed)
    pit = rng.random((TASKS, POINTS))
    pit[np.arange(POINTS) >= QUERY[:, None]] = np.nan
    names = ("nll", "rmse", "crps", "width50", "width90")
    metrics = {name: np.abs(rng.normal(1.0, 0.2, TASKS)) + shift for name in names}
    metrics |= {"coverage50": rng.random(TASKS), "coverage90": rng.random(TASKS) / 4 + 0.75}
    return LearnerResult(
        metrics=metrics,
        pit=pit,
        seconds=12.5,
        gradient_evaluations=7_400,
        sites={"level": rng.normal(size=TASKS), "effect": rng.normal(size=TASKS)},
        bands=(bands(2, shift), bands(5, shift)),
        diagnostics={"divergences": 3, "max R-hat": 1.02, "lost": float("nan")},
        settings={"inner_steps": 5, "inner_lr": 0.1, "first_order": False, "objective": "<elbo>"},
    )


def fields():
    steps = np.arange(60.0)
    history = {"step": steps, "loss": np.exp(-steps), "validation_step": steps[::20], "validation": np.ones(3)}
    return {
        "results": {name: result(i, 0.3 * i) for i, name in enumerate(NAMES)},
        "support_sizes": SUPPORT,
        "query_sizes": QUERY,
        "title": "Radon & <co>",
        "target": "log radon",
        "feature": "floor",
        "seed": 4,
        "notes": ("Query targets are <noisy>.",),
        "environment": {"torch": "2.13", "machine": "<x86>"},
        "histories": {"NUTS": history},
    }


@pytest.fixture(scope="session")
def report():
    return Report(**fields())


@pytest.fixture
def parts():
    """Fields of the same report, to be changed."""
    return fields()


@pytest.fixture(scope="session")
def classification():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, (TASKS, POINTS))
    labels[np.arange(POINTS) >= QUERY[:, None]] = -1
    results = {}
    for name in ("MAML", "ProtoNet"):
        probs = rng.dirichlet(np.ones(3), (TASKS, POINTS))
        scores = {"nll": rng.random(TASKS), "accuracy": rng.random(TASKS), "brier": rng.random(TASKS)}
        results[name] = LearnerResult(metrics=scores, probs=probs, labels=labels)
    return Report(results=results, support_sizes=SUPPORT, query_sizes=QUERY, title="Glyphs")


SCORED = np.array([1, 0, 1, 0, 0, 1, 1, 0], dtype=bool)


def explained(band, flat):
    curves = {"sine": band.after.grid * 0 + flat, "line": band.after.grid}
    likely = {"sine": 0.25, "line": 0.75}
    return replace(band, explanations=tuple(Explanation(name=n, probability=likely[n], curve=c) for n, c in curves.items()))


def probability_map(task, seed, draws=0):
    rng = np.random.default_rng(seed)
    grid = {"first": np.linspace(0, 5, 6), "second": np.linspace(0, 5, 4), "support_x": rng.random((2, 2)), "support_y": [1.0, 0.0]}
    probs = {"probs": rng.random((4, 6)), "draws": rng.random((draws, 4, 6))}
    return ProbabilityMap(task=task, name=f"task {task}", **grid, **probs)


@pytest.fixture
def ambiguous():
    """Fields of a report whose family knows its explanations: 4 of 8 tasks are ambiguous."""
    found = {"NUTS": [1.0, 1.0, 0.5, 1.0], "MAML": [0.5, 0.0, 0.5, 0.5]}
    results = {}
    for i, (name, coverage) in enumerate(found.items()):
        plain, values = result(i, 0.3 * i), np.full(TASKS, np.nan)
        values[SCORED] = coverage
        bands = tuple(explained(band, 0.5) for band in plain.bands)
        metrics = dict(plain.metrics) | {"mode_coverage": values, "nll_gap": plain.metrics["nll"] - 0.9}
        results[name] = replace(plain, metrics=metrics, bands=bands)
    named = {"explanation_names": ("sine", "line"), "scored_tasks": {"mode_coverage": SCORED}}
    return fields() | {"results": results, "histories": {}} | named


@pytest.fixture
def circles(classification):
    """Fields of a report of two classes with maps of two tasks, and the exact ones."""
    results = {
        name: replace(r, metrics=dict(r.metrics) | {"label_coverage": np.linspace(0.2, 0.8, TASKS) / (1 + i)}, maps=(
            probability_map(1, i, draws=2), probability_map(4, i + 9, draws=2)))
        for i, (name, r) in enumerate(classification.results.items())
    }  # fmt: skip
    exact = (probability_map(1, 20), probability_map(4, 21))
    return {"results": results, "support_sizes": SUPPORT, "query_sizes": QUERY, "exact_maps": exact}
