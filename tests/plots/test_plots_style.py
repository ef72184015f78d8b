import matplotlib
import numpy as np
import pytest

from bayesmeta.plots.style import (
    PALETTE,
    axes_or_new,
    finite_limits,
    house_settings,
    key,
    legend,
    literal,
    looks,
    new_grid,
    shade,
    spread_ranks,
    tint,
)


def test_a_learner_keeps_its_look_by_its_place():
    three, four = looks("abc"), looks("abcd")
    assert all(three[name] == four[name] for name in "abc")
    assert looks("cba")["c"] == three["a"]


def test_twenty_eight_learners_can_be_told_apart():
    assert len(set(looks(range(28)).values())) == 28


def test_neighbours_differ_in_more_than_colour():
    first = list(looks("abcdefg").values())
    assert len({look.colour for look in first}) == len({look.marker for look in first}) == 7


def test_tints_lie_between_white_and_the_colour():
    assert tint(PALETTE[0], 1) == PALETTE[0] and tint(PALETTE[0], 0) == "#ffffff"


@pytest.mark.parametrize("colour", PALETTE)
def test_letters_are_dark_enough_to_read(colour):
    channels = np.array(matplotlib.colors.to_rgb(shade(colour)))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    contrast = 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    assert contrast > 3  # WCAG's bound for large or bold letters


def test_names_with_dollars_are_no_formulas():
    ax = axes_or_new(None)
    legend(ax, {"costs $5 to $6, \\frac": key(looks("a")["a"])})
    ax.set_title(literal("$a$ and $"))
    ax.figure.draw_without_rendering()  # a formula would raise on \frac


def test_the_legend_stands_outside_of_the_data():
    ax = axes_or_new(None)
    legend(ax, {"a": key(looks("a")["a"])})
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (4, 2, 2), (5, 2, 3), (7, 3, 3)])
def test_grids_are_as_even_as_can_be(count, rows, columns):
    axes = new_grid(count, cell=(1, 1), columns=3)
    assert len(axes) == count
    assert axes[0].get_gridspec().get_geometry() == (rows, columns)


def test_the_lowest_panel_of_each_column_has_its_numbers():
    axes = new_grid(5, cell=(1, 1), columns=3, sharex=True)
    labelled = [ax.xaxis.get_tick_params()["labelbottom"] for ax in axes]
    assert labelled == [False, False, True, True, True]


def test_limits_leave_out_what_is_not_finite():
    assert finite_limits([0.0, np.nan, 1.0], [np.inf], margin=0.1) == pytest.approx((-0.1, 1.1))
    assert finite_limits([np.nan]) == (0.0, 1.0)
    low, high = finite_limits([3.0])
    assert low < 3 < high


def test_spread_is_even_and_repeats():
    spread = spread_ranks(50)
    assert np.array_equal(spread, spread_ranks(50)) and spread[0] == 0
    assert -1 <= spread.min() < -0.9 and 0.9 < spread.max() < 1
    assert np.diff(np.sort(spread)).min() > 0.01


def test_house_settings_come_and_go():
    with matplotlib.rc_context({"font.size": 33.0}):
        with house_settings():
            assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"]
        assert matplotlib.rcParams["font.size"] == 33.0


def test_letters_that_the_font_lacks_are_no_warning(tmp_path):
    with house_settings():
        ax = axes_or_new(None)
        ax.set_title("county \N{CJK UNIFIED IDEOGRAPH-4E2D}")
        ax.figure.savefig(tmp_path / "a.png", dpi=30)


def test_long_names_are_broken_and_cut():
    assert literal("a name that is rather long", 10) == "a name\nthat is…"
    assert literal("costs $5", 20) == r"costs \$5" and literal("a\nb", 20, lines=1) == "a b"
