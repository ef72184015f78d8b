"""Every picture: the caller's axes come back, pyplot and rcParams know nothing of it, chance is left alone."""

from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bayesmeta import plots

RNG = np.random.default_rng(0)
PITS = {"a": RNG.random((6, 5)), "b": RNG.random((6, 5)) ** 2}
PROBS = RNG.dirichlet(np.ones(3), (6, 5))
LABELS = RNG.integers(0, 3, (6, 5))
GRID = np.linspace(-1, 1, 20)
CURVES = SimpleNamespace(
    grid=GRID,
    mean=GRID,
    lower50=GRID - 1,
    upper50=GRID + 1,
    lower90=GRID - 2,
    upper90=GRID + 2,
    draws=np.stack([GRID, -GRID]),
)
BAND = SimpleNamespace(
    name="one",
    before=CURVES,
    after=CURVES,
    support_x=GRID[:3],
    support_y=GRID[:3],
    query_x=GRID[5:7],
    query_y=GRID[5:7],
)
EXPLANATIONS = [SimpleNamespace(name="up", probability=0.5, curve=GRID), SimpleNamespace(name="down", probability=0.5, curve=-GRID)]
BAND.explanations = EXPLANATIONS
MAP = SimpleNamespace(
    name="one",
    first=GRID,
    second=GRID[:5],
    probs=RNG.random((5, 20)),
    draws=RNG.random((3, 5, 20)),
    support_x=np.zeros((1, 2)),
    support_y=np.ones(1),
)
STEPS = np.arange(100)
SHIFTS = [
    {"shift": "blur", "severity": severity, "learner": "a", "metric": metric, "estimate": 0.5, "lower": 0.4, "upper": 0.6}
    for severity in (0, 1)
    for metric in ("accuracy", "confidence", "ece")
]

SINGLE = {
    "calibration_curve": lambda ax: plots.calibration_curve(PITS, ax=ax),
    "calibration_curve quantile": lambda ax: plots.calibration_curve(PITS["a"], kind="quantile", ax=ax),
    "pit_histogram": lambda ax: plots.pit_histogram(PITS["a"], ax=ax),
    "reliability_diagram": lambda ax: plots.reliability_diagram(PROBS, LABELS, ax=ax),
    "predictive_bands": lambda ax: plots.predictive_bands(CURVES, support=(GRID[:2], GRID[:2]), x="x", ax=ax),
    "explained_draws": lambda ax: plots.explained_draws(CURVES, EXPLANATIONS, x="x", ax=ax),
    "probability_map": lambda ax: plots.probability_map(MAP, x="x", ax=ax),
    "shrinkage": lambda ax: plots.shrinkage(GRID, GRID / 2, 0.0, np.arange(20), ax=ax),
    "loss_curve": lambda ax: plots.loss_curve(STEPS, 1 / (1 + STEPS), ax=ax),
    "metric_intervals": lambda ax: plots.metric_intervals({"a": (1, 0, 2), "b": (2, 1, 3)}, label="NLL", ax=ax),
}
GRIDS = {
    "calibration_grid": lambda: plots.calibration_grid(PITS),
    "pit_grid": lambda: plots.pit_grid(PITS),
    "reliability_grid": lambda: plots.reliability_grid({"a": PROBS}, {"a": LABELS}),
    "bands_grid": lambda: plots.bands_grid({"a": [BAND], "b": [BAND]})[0],
    "explained_grid": lambda: plots.explained_grid({"a": [BAND], "b": [BAND]}),
    "severity_curves": lambda: plots.severity_curves(SHIFTS),
    "confidence_under_shift": lambda: plots.confidence_under_shift(SHIFTS),
    "map_grid": lambda: plots.map_grid([MAP], {"a": [MAP], "b": [MAP]}),
}


@pytest.fixture(autouse=True)
def no_trace():
    settings, torch_state = dict(matplotlib.rcParams), torch.get_rng_state()
    drawn = np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings
    assert np.array_equal(np.random.get_state()[1], drawn)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("name", SINGLE)
def test_the_given_axes_come_back_drawn_on(name):
    ax = Figure().subplots()
    assert SINGLE[name](ax) is ax
    assert ax.has_data() and ax.get_xlabel()


@pytest.mark.parametrize("name", SINGLE)
def test_without_axes_a_new_figure_that_can_be_written_at_once(name, tmp_path):
    ax = SINGLE[name](None)
    assert isinstance(ax.figure.canvas, FigureCanvasAgg)
    ax.figure.savefig(tmp_path / "picture.png", dpi=40)
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize("name", GRIDS)
def test_grids_share_one_figure(name):
    axes = GRIDS[name]()
    assert len({id(ax.figure) for ax in axes}) == 1 and all(ax.has_data() for ax in axes)
    axes[0].figure.draw_without_rendering()


@pytest.mark.parametrize("name", SINGLE)
def test_the_callers_rc_params_are_obeyed_and_kept(name):
    with matplotlib.rc_context({"axes.facecolor": "#123456"}):
        ax = SINGLE[name](None)
        assert matplotlib.rcParams["axes.facecolor"] == "#123456"
    assert matplotlib.colors.to_hex(ax.get_facecolor()) == "#123456"
