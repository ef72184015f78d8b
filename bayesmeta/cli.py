"""The command line: ``python -m bayesmeta compare [family]``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from . import __version__
from .comparison import compare, is_csv
from .learners.base import checked_choice
from .meta_gradient import TrainingError
from .recipes import FAMILIES
from .tasks import Panel

EXAMPLES = """\
families:
  radon                              homes in Minnesota counties (the default; six learners, about a minute)
  linear-gaussian                    regression with the exact answer at hand
  sinusoid                           MAML's sine curves, with a neural network (minutes)
  sine-or-line, circles              ambiguous on purpose: who sees both explanations? (ten learners, about half an hour)
  gp-rbf, gp-matern, gp-periodic     draws of Gaussian processes, scored by their distance to the exact predictive
  glyphs                             letters nobody has seen, by one image each (13 learners, ten minutes of one core; nothing to download)
  omniglot                           the same of handwritten characters, from --root or the folder that BAYESMETA_DATA names
  FILE.csv                           your own table: --group --features --target

examples:
  python -m bayesmeta compare
  python -m bayesmeta compare sinusoid --steps 5000    MAML's sinusoids with a neural network
  python -m bayesmeta compare radon --learners NoPooling MAML NUTS
  python -m bayesmeta compare pupils.csv --group school --features ses female --target math
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status (0, or 2 with one line on standard error for what a user can mend)."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_unknown(unknown, options))
    try:
        return _compare(options)
    except (ValueError, TrainingError, OSError) as error:
        print(f"bayesmeta: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bayesmeta: interrupted; nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bayesmeta", description="Fit hierarchical Bayesian meta-models with several learners and see whose uncertainty is right.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"bayesmeta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare")
    one = commands.add_parser(
        "compare", help="train learners on one family of tasks and write a report on held-out ones", epilog=EXAMPLES,
        description="Trains every learner on the same training tasks, scores all on the same held-out tasks, prints a table with 95% "
        "intervals over tasks and writes report.html, metrics.csv, metrics.json and figures/ to --out.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    one.add_argument("family", nargs="?", default="radon", help="one of the families below, or a CSV file of grouped rows (default: radon)")
    one.add_argument(
        "--learners", nargs="+", metavar="NAME",
        help="which learners, say NoPooling MAML BMAML NUTS, or all (default: those that suit the family)",
    )
    one.add_argument("--steps", type=int, help="training steps of each learner (default: the family's own)")
    one.add_argument("--seed", type=int, default=0, help="seed of everything: data splits, initial weights, training, draws (default: 0)")
    one.add_argument("--tasks", type=int, help="how many held-out tasks of an endless family (default: 1000)")
    one.add_argument("--root", type=Path, metavar="FOLDER", help="the data of omniglot (default: what BAYESMETA_DATA names)")
    one.add_argument("--out", type=Path, help="folder for the report (default: runs/FAMILY)")
    table = one.add_argument_group("a CSV file", "one row a measurement, with a header line; each group is a task")
    table.add_argument("--group", nargs="+", metavar="COLUMN", help="the column, or columns, that say which group a row belongs to")
    table.add_argument("--features", nargs="+", metavar="COLUMN", help="columns of numbers to predict from; they are standardised")
    table.add_argument("--target", metavar="COLUMN", help="the column to predict")
    table.add_argument(
        "--support", type=int, default=5, metavar="N", help="rows of each group that are seen; the rest are predicted (default: 5)"
    )
    one.add_argument("--quiet", action="store_true", help="print the table only")
    return parser


def _unknown(words: list[str], options: argparse.Namespace) -> str:
    """What to say of arguments that the parser does not know: of a misspelt option the nearest one."""
    option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if option is None:
        return f"expected one family, got also {' '.join(words)}"
    try:
        return checked_choice("options", option, tuple(f"--{name}" for name in vars(options) if name not in ("command", "family")))
    except ValueError as error:
        return str(error)


def _compare(options: argparse.Namespace) -> int:
    start = time.monotonic()
    say = (lambda line: None) if options.quiet else (lambda line: print(line, flush=True))
    family = _panel(options, say) if is_csv(options.family) else checked_choice("family", options.family, FAMILIES)
    out = options.out or Path("runs") / Path(options.family).stem
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)  # say so now, not after minutes of work
    try:
        report = compare(
            family, learners=_names(options.learners), steps=options.steps, seed=options.seed, num_tasks=options.tasks, root=options.root,
            say=say, progress=False if options.quiet else None,
        )  # fmt: skip
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    report.save(out)
    print(report.table())
    say(f"\n{time.monotonic() - start:.0f} s. Report: {out / 'report.html'}")
    return 0


def _names(given: list[str] | None) -> list[str] | None:
    return None if given is None else [name for part in given for name in map(str.strip, part.split(",")) if name]


def _panel(options: argparse.Namespace, say: object) -> Panel:
    missing = [f"--{name}" for name in ("group", "features", "target") if not getattr(options, name)]
    if missing:
        raise ValueError(f"a CSV file needs {', '.join(missing)}: which columns are the group, the features and the target")
    panel = Panel.from_csv(
        options.family, group=options.group if len(options.group) > 1 else options.group[0], features=options.features,
        target=options.target, num_support=options.support, standardize=True, seed=options.seed,
    )  # fmt: skip
    say(panel.summary())  # type: ignore[operator]
    return panel
