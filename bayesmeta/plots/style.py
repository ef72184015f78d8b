"""How our pictures look: one colour, marker and dash per learner, thin grey axes, readable letters.

Figures are made without pyplot: nothing is registered, no backend is chosen, no rcParams change.
"""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

Array = npt.NDArray[Any]

INK, GREY, FAINT = "#1c2127", "#6a737d", "#d3d8de"

# Okabe and Ito's colours, told apart under the common colour blindnesses; without their yellow, too pale for a line.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
MARKERS = "osD^vph"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
TICKS = (0, 0.25, 0.5, 0.75, 1)  # of every axis that runs from 0 to 1


class Look(NamedTuple):
    """Colour, marker and line style of one learner: never colour alone, for print and for colour-blind readers."""

    colour: str
    marker: str
    dash: Any


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A `Look` for each learner by its place in ``names``: the same in every picture of a report.

    After seven learners the colours come again with the next dash.
    """
    count = len(PALETTE)
    return {
        name: Look(PALETTE[i % count], MARKERS[i % count], DASHES[i // count % len(DASHES)])
        for i, name in enumerate(names)
    }


def tint(colour: str, strength: float) -> str:
    """``colour`` mixed with white: strength 1 leaves it, 0 gives white. Opaque: layers do not darken each other."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(colour))
    return to_hex((red, green, blue))


def shade(colour: str) -> str:
    """``colour`` dark enough for letters on white."""
    red, green, blue = (0.72 * channel for channel in to_rgb(colour))
    return to_hex((red, green, blue))


def literal(text: str, width: int | None = None, *, lines: int = 2) -> str:
    """``text`` (a name that a user chose) so that matplotlib shows every dollar sign and sets no formula.

    ``width``: broken into at most ``lines`` lines of so many letters, the rest left out.
    """
    if width is not None:
        text = textwrap.fill(text, width, max_lines=lines, placeholder="…")
    return text.replace("$", r"\$")


def halo() -> list[Any]:
    """White round letters that may lie on data."""
    return [withStroke(linewidth=2.5, foreground="white")]


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, in inches, that belongs to no window and no pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_or_new(ax: Axes | None, width: float = 5.6, height: float = 4.0) -> Axes:
    """``ax``, or the only axes of a new figure."""
    return new_figure(width, height).subplots() if ax is None else ax


def new_grid(count: int, *, cell: tuple[float, float], columns: int, **options: Any) -> list[Axes]:
    """``count`` axes of one new figure, row by row, at most ``columns`` in a row and rows as even as can be.

    ``cell``: width and height of one, in inches; ``options`` go to ``Figure.subplots``.
    """
    columns = even_columns(count, columns)
    rows = -(-count // columns)
    figure = new_figure(columns * cell[0] + 0.4, rows * cell[1] + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for spare in axes.flat[count:]:
        spare.set_axis_off()
    for last in axes.flat[max(0, count - columns) : count]:  # the lowest of its column, spare axes or not
        last.tick_params(labelbottom=True)
    return list(axes.flat[:count])


def even_columns(count: int, columns: int) -> int:
    """How many columns `new_grid` has: at most ``columns``, and rows as even as can be."""
    return -(-count // -(-count // max(columns, 1)))


def share_labels(axes: Sequence[Axes], *, x: str, y: str) -> None:
    """One label for all x axes and one for all y axes of a grid."""
    figure = axes[0].figure
    figure.supxlabel(literal(x), fontsize=9.5, color=INK)
    figure.supylabel(literal(y), fontsize=9.5, color=INK)


def name_panel(ax: Axes, name: str, look: Look, *, note: str = "") -> None:
    """A learner's name over its panel of a grid, in its colour, and below it a small ``note``."""
    ax.set_title(
        literal(name, 24), color=shade(look.colour), fontsize=10, loc="left", fontweight="bold", pad=16 if note else 5
    )
    if note:
        place: dict[str, Any] = {
            "xy": (0, 1),
            "xycoords": "axes fraction",
            "xytext": (0, 4),
            "textcoords": "offset points",
        }
        ax.annotate(literal(note), color=GREY, fontsize=8.5, **place)


def dress(ax: Axes, *, x: str = "", y: str = "", grid: str = "") -> Axes:
    """Thin grey axes without a box, labels in ink; ``grid``: "x", "y" or "both" for faint lines behind the data."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set(color=GREY, linewidth=0.6)
    ax.tick_params(color=GREY, labelcolor=INK, labelsize=8.5, width=0.6, length=3)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(True, axis=grid, color=FAINT, linewidth=0.5, alpha=0.7)  # type: ignore[arg-type]
    if x:
        ax.set_xlabel(literal(x), color=INK, fontsize=9.5)
    if y:
        ax.set_ylabel(literal(y), color=INK, fontsize=9.5)
    return ax


def legend(ax: Axes, entries: Mapping[str, Any]) -> None:
    """One legend at the right, outside of the data; ``entries``: handle by label, in reading order."""
    ax.legend(
        list(entries.values()),
        [literal(label) for label in entries],
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=2.0,
        borderaxespad=0.0,
    )


def key(look: Look) -> Line2D:
    """A learner's sample for a legend."""
    return Line2D([], [], color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4.5, linewidth=1.6)


def finite_limits(*values: Array | Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """Limits round all finite numbers in ``values`` with a relative margin; (0, 1) where there is none."""
    everything = np.concatenate([np.ravel(np.asarray(v, dtype=float)) for v in values])
    everything = everything[np.isfinite(everything)]
    if everything.size == 0:
        return 0.0, 1.0
    low, high = float(everything.min()), float(everything.max())
    room = margin * (high - low) or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def spread_ranks(count: int) -> Array:
    """``count`` numbers in [-1, 1), even and in an order that puts neighbours far apart: jitter without chance."""
    return 2 * ((0.5 + 0.618034 * np.arange(count)) % 1) - 1  # golden-ratio steps


@contextlib.contextmanager
def house_settings() -> Iterator[None]:
    """Matplotlib as shipped while a report is drawn and written, whatever the caller has set; all of it comes back.

    A task's name may have letters that the font lacks: a box in the picture is no reason for a warning.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
