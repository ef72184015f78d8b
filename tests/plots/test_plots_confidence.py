import numpy as np
import pytest
import torch

from bayesmeta import metrics
from bayesmeta.plots import reliability, reliability_diagram, reliability_grid

RNG = np.random.default_rng(0)
PROBS = RNG.dirichlet(np.full(4, 0.5), (10, 12))
LABELS = RNG.integers(0, 4, (10, 12))
LABELS[2, 6:] = -1


def test_bins_are_those_of_metrics():
    ours = reliability(PROBS, LABELS)
    y = torch.as_tensor(LABELS)
    theirs = metrics.reliability_curve(torch.as_tensor(PROBS), y, y >= 0)
    assert np.array_equal(ours.counts, theirs.counts)
    np.testing.assert_allclose(ours.confidence, theirs.confidence, rtol=1e-12)
    np.testing.assert_allclose(ours.accuracy, theirs.accuracy, rtol=1e-12)
    np.testing.assert_allclose(ours.edges, theirs.edges, atol=1e-15)


def test_a_bin_is_closed_above():
    probs = np.array([[[0.6, 0.4], [0.61, 0.39], [1.0, 0.0]]])  # 0.6 is the edge of the third of five bins
    ours = reliability(probs, np.zeros((1, 3)), bins=5)
    y = torch.zeros(1, 3, dtype=torch.long)
    theirs = metrics.reliability_curve(torch.as_tensor(probs), y, y >= 0, bins=5)
    assert ours.counts.tolist() == theirs.counts.tolist() == [0, 0, 1, 1, 1]


def test_padding_is_never_looked_at():
    spoiled = PROBS.copy()
    spoiled[2, 6:] = np.nan
    for a, b in zip(reliability(spoiled, LABELS), reliability(PROBS, LABELS), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_the_band_holds_the_accuracy_and_empty_bins_have_none():
    r = reliability(PROBS, LABELS)
    full = r.counts > 0
    assert (r.lower[full] <= r.accuracy[full]).all() and (r.accuracy[full] <= r.upper[full]).all()
    assert not full.all() and np.isnan(np.stack([r.confidence, r.accuracy, r.lower, r.upper])[:, ~full]).all()


def test_dots_bars_and_count_are_the_numbers():
    ax, r = reliability_diagram(PROBS, LABELS), reliability(PROBS, LABELS)
    full = r.counts > 0
    dots = ax.collections[-1].get_offsets()
    np.testing.assert_allclose(dots, np.stack([r.confidence, r.accuracy], 1)[full])
    bars = np.array([bar.get_height() for bar in ax.patches])
    np.testing.assert_allclose(bars / bars.max(), r.counts / r.counts.max())
    assert [text.get_text() for text in ax.texts] == [f"{int(r.counts.max()):,} points"]


def test_a_grid_has_a_panel_a_learner():
    axes = reliability_grid({"a": PROBS, "b": PROBS}, {"a": LABELS, "b": LABELS}, notes={"b": "ECE 0.1"})
    assert [ax.get_title("left") for ax in axes] == ["a", "b"]
    assert "ECE 0.1" in [text.get_text() for text in axes[1].texts]


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(T, N, C\).*\(10, 12, 4\) and \(10, 11\)"):
        reliability(PROBS, LABELS[:, :-1])
    with pytest.raises(ValueError, match="no point"):
        reliability(PROBS, np.full_like(LABELS, -1))
    spoiled = PROBS.copy()
    spoiled[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN at a point"):
        reliability(spoiled, LABELS)
