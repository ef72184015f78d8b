import numpy as np

from bayesmeta.plots import metric_intervals

USUAL = {"a": (1.0, 0.9, 1.2), "b": (1.5, 1.3, 1.6), "c": (1.2, 1.0, 1.4)}


def rows_of(ax):
    return [text.get_text() for text in ax.get_yticklabels()]


def test_the_numbers_drawn_are_the_numbers():
    ax = metric_intervals(USUAL)
    for row, (estimate, lower, upper) in enumerate(USUAL.values()):
        span, dot = ax.lines[2 * row : 2 * row + 2]
        assert list(span.get_xdata()) == [lower, upper] and list(span.get_ydata()) == [row, row]
        assert dot.get_xydata().tolist() == [[estimate, row]]
    assert rows_of(ax) == ["a", "b", "c"]
    bottom, top = ax.get_ylim()
    assert bottom > top  # the first learner stands on top


def test_numbers_are_written_with_equal_decimals():
    written = [text.get_text() for text in metric_intervals(USUAL).texts]
    assert written == ["1.00  [0.90, 1.20]", "1.50  [1.30, 1.60]", "1.20  [1.00, 1.40]"]
    assert not metric_intervals(USUAL, numbers=False).texts


def test_a_learner_far_out_is_an_arrow_and_flattens_nobody():
    ax = metric_intervals(USUAL | {"wild": (1e4, 9e3, 2e4), "deep": (-1e4, -2e4, -9e3)}, numbers=False)
    assert ax.get_xlim()[1] < 3 and ax.get_xlim()[0] > 0
    arrows = [text.get_text() for text in ax.texts]
    assert arrows == ["10000.00 →", "← -10000.00"]
    assert len(ax.lines) == 6


def test_what_is_no_number_keeps_its_row_and_says_so():
    ax = metric_intervals(USUAL | {"lost": (np.nan,) * 3, "endless": (np.inf, np.nan, np.nan)}, numbers=False)
    assert rows_of(ax)[3:] == ["lost", "endless"]
    assert [text.get_text() for text in ax.texts] == ["not a number", "inf"]
    metric_intervals({"lost": (np.nan,) * 3}).figure.draw_without_rendering()


def test_the_reference_is_a_line_in_view():
    ax = metric_intervals(USUAL, reference=0.2)
    assert list(ax.lines[0].get_xdata()) == [0.2, 0.2] and ax.get_xlim()[0] < 0.2


def test_one_learner_without_interval_can_be_drawn():
    ax = metric_intervals({"a": (1.0, np.nan, np.nan)})
    ax.figure.draw_without_rendering()
    assert ax.get_xlim()[0] < 1 < ax.get_xlim()[1]
