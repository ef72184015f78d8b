"""Pictures of what was measured."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from .scaling import TITLES

COLOURS = {
    "compiled": "#d55e00", "eager": "#e69f00", "loop": "#4d4d4d", "unbatched": "#8c8c8c", "batched": "#009e73", "vmap": "#56b4e9",
    "jax": "#0072b2", "numpyro": "#cc79a7",
}  # fmt: skip
LABELS = {
    "compiled": "this package, compiled", "eager": "this package, eager", "loop": "loop over tasks", "unbatched": "loop over tasks and φ",
    "batched": "torch by hand, compiled", "vmap": "torch.func.vmap", "jax": "JAX, jitted", "numpyro": "NumPyro, jitted",
}  # fmt: skip
Rows = list[dict[str, object]]


def ratios(rows: Rows, path: Path) -> None:
    """A panel for each workload: time a step as a multiple of the compiled step's."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (4.9 * columns, 2.15 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    values = [float(row["ratio"]) for row in rows]
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names, strict=False):
        own = [row for row in rows if row["workload"] == name]
        at = range(len(own))
        colours = [COLOURS[str(row["contender"])] for row in own]
        ax.barh(at, [float(row["ratio"]) - 1 for row in own], left=1, color=colours, height=0.72)  # faster to the left, slower to the right
        for i, row in enumerate(own):
            ratio, ms = float(row["ratio"]), float(row["ms"])
            times, unit = f"{ratio:.{0 if ratio >= 100 else 2}f}×", f"{ms:.{0 if ms >= 100 else 2}f} ms"
            ax.text(max(ratio, 1) * 1.12, i, f"{times}   {unit}", va="center", fontsize=7.5)
        ax.set_yticks(at, [LABELS[str(row["contender"])] for row in own], fontsize=8)
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlim(min(values) / 1.5, max(values) * 20)
        ax.axvline(1, color="#1c2127", linewidth=0.8)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
        ax.tick_params(labelbottom=True, labelsize=8)
        ax.set_title(str(name), fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Time of a training step: {LABELS[str(rows[0]['contender'])]}, is 1; to the left is faster", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def scaling(rows: Rows, path: Path) -> None:
    """Time and memory of a step against T, K and M."""
    kinds = list(dict.fromkeys(str(row["workload"])[0] for row in rows))
    figure, axes = plt.subplots(2, len(kinds), figsize=(4.2 * len(kinds), 6.4), sharex="col", squeeze=False, layout="constrained")
    for column, kind in enumerate(kinds):
        for row_of_axes, (key, label) in enumerate((("ms", "ms a step"), ("step_memory_mib", "memory of a step (MiB)"))):
            ax = axes[row_of_axes, column]
            for contender in dict.fromkeys(str(row["contender"]) for row in rows):
                own = [row for row in rows if str(row["workload"])[0] == kind and row["contender"] == contender]
                x = [int(str(row["workload"]).split("= ")[1]) for row in own]
                y = [max(float(row[key]), 0.01) for row in own]
                ax.plot(x, y, "o-", color=COLOURS[contender], label=LABELS[contender], markersize=4)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xticks(x, [str(v) for v in x])
            ax.minorticks_off()
            ax.set_ylabel(label)
            ax.spines[["top", "right"]].set_visible(False)
        axes[1, column].set_xlabel(TITLES[kind])
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
