"""The command line: what it writes, what it prints, and one plain line for every mistake a user can mend."""

import csv
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

import bayesmeta
from bayesmeta import Report, cli
from bayesmeta.cli import main
from bayesmeta.comparison import FAMILIES

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def table(tmp_path):
    """A CSV file of pupils in schools; returns its path."""
    rng = np.random.default_rng(0)
    path = tmp_path / "pupils.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["district", "school", "ses", "female", "math"])
        for school in range(14):
            level = rng.normal()
            for _ in range(8):
                ses = rng.normal()
                writer.writerow(["north", f"s{school}", f"{ses:.4f}", rng.integers(2), f"{50 + 10 * (level + ses) + 3 * rng.normal():.3f}"])
    return path


def run(*arguments):
    return main(["compare", *map(str, arguments)])


def columns(path, *extra):
    return [path, "--group", "school", "--features", "ses", "female", "--target", "math", *extra]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Sent(Exception):
    """Carries what the command line asked of `compare`."""


@pytest.fixture
def sent(monkeypatch, tmp_path):
    """Runs the command up to `compare` and returns what that was called with."""
    def catch(family, **options):
        raise Sent(family, options)

    def ask(*arguments):
        with pytest.raises(Sent) as caught:
            run(*arguments, *(() if "--out" in arguments else ("--out", tmp_path / "out")))
        return caught.value.args

    monkeypatch.setattr(cli, "compare", catch)
    return ask


# --- what it writes


def checked_folder(out, names):
    assert sorted(p.name for p in out.iterdir()) == ["figures", "metrics.csv", "metrics.json", "report.html"]
    figures = list((out / "figures").iterdir())
    assert {"calibration.png", "metrics.png"} <= {p.name for p in figures}
    assert all(p.read_bytes().startswith(PNG) for p in figures)
    html = (out / "report.html").read_text()
    assert html.lstrip().lower().startswith("<!doctype html") and "<script" not in html and all(name in html for name in names)
    found = rows(out)
    assert list(dict.fromkeys(row["learner"] for row in found)) == names
    report = Report.from_json(out / "metrics.json")
    for row in report.summary():
        (same,) = [r for r in found if (r["learner"], r["metric"]) == (row["learner"], row["metric"])]
        assert same["estimate"] == ("" if np.isnan(row["estimate"]) else repr(row["estimate"]))
    return report


@pytest.mark.parametrize(
    ("family", "learners"),
    [("radon", ["NoPooling", "Exact"]), ("sinusoid", ["MAML"]), ("sine-or-line", ["CompletePooling"]), ("linear-gaussian", ["ABML"])],
)
def test_every_family_writes_its_report(family, learners, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run(family, "--steps", 2, "--tasks", 8, "--learners", *learners, "--out", out) == 0
    report = checked_folder(out, learners)
    printed = capsys.readouterr()
    assert report.table() in printed.out and printed.err == ""
    lines = printed.out.splitlines()
    assert [line.split(":")[0] for line in lines[: len(learners)]] == [f"trained {name}" for name in learners]
    assert re.fullmatch(rf"\d+ s\. Report: {re.escape(str(out / 'report.html'))}", lines[-1])


def test_a_csv_file_of_ones_own(table, tmp_path, capsys):
    assert run(*columns(table, "--support", 3, "--steps", 2, "--learners", "CompletePooling", "Exact", "--out", tmp_path / "out")) == 0
    report = checked_folder(tmp_path / "out", ["CompletePooling", "Exact"])
    out = capsys.readouterr().out
    assert out.startswith("pupils.csv: 14 groups by school, 112 rows\n")
    assert any("8 groups to train on, 3 held out, of 14" in note for note in report.notes)
    assert "3 groups, a validation split, are neither trained on nor held out." in report.notes
    assert report.target == "math" and report.support_sizes.tolist() == [3, 3, 3] and report.query_sizes.tolist() == [5, 5, 5]
    # standardised inside, and in points of the test outside: nothing learned in two steps is near a unit
    assert 3 < float(next(row["estimate"] for row in rows(tmp_path / "out") if row["metric"] == "rmse")) < 40


def test_quiet_prints_the_table_only(tmp_path, capsys):
    assert run("linear-gaussian", "--steps", 1, "--tasks", 4, "--learners", "CompletePooling", "--quiet", "--out", tmp_path) == 0
    printed = capsys.readouterr()
    assert printed.out == Report.from_json(tmp_path / "metrics.json").table() + "\n" and printed.err == ""


def test_the_same_seed_writes_the_same_numbers(tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        options = ["--steps", 2, "--tasks", 5, "--learners", "ABML", "--seed", seed, "--quiet", "--out", tmp_path / name]
        assert run("linear-gaussian", *options) == 0
    one, two, other = ([row for row in rows(tmp_path / name) if row["metric"] != "seconds"] for name in ("one", "two", "other"))
    assert one == two and one != other


# --- what it passes on


def test_everything_is_passed_on(sent):
    family, options = sent("sinusoid", "--steps", "7", "--seed", "3", "--tasks", "11")
    assert family == "sinusoid"
    assert {k: options[k] for k in ("learners", "steps", "seed", "num_tasks", "progress")} == {
        "learners": None, "steps": 7, "seed": 3, "num_tasks": 11, "progress": None,
    }  # fmt: skip
    _, options = sent("--quiet")
    assert options["progress"] is False and options["steps"] is None and options["seed"] == 0


def test_radon_is_the_default(sent):
    assert sent()[0] == "radon"


@pytest.mark.parametrize(
    "given", [["MAML,NUTS"], ["MAML", "NUTS"], ["MAML,", "NUTS"], ["MAML,NUTS,"], ["MAML", ",NUTS"], ["MAML, NUTS"]], ids=str
)
def test_learners_by_comma_or_by_blank(sent, given):
    assert sent("radon", "--learners", *given)[1]["learners"] == ["MAML", "NUTS"]


def test_a_csv_file_becomes_a_panel(sent, table):
    panel, _ = sent(*columns(table, "--support", "2", "--seed", "5"))
    assert (panel.num_tasks, panel.num_rows, panel.feature_names, panel.target_name) == (14, 112, ("ses", "female"), "math")
    assert panel.num_support == 2 and panel.target_scale > 5  # standardised
    other, _ = sent(*columns(table, "--support", "2", "--seed", "6"))
    assert panel.split("test").task_names() != other.split("test").task_names()
    joint, _ = sent(table, "--group", "district", "school", "--features", "ses", "--target", "math")
    assert joint.task_names()[0] == "north s0"


def test_without_out_the_folder_is_named_after_the_family(monkeypatch, tmp_path, table):
    folders = []

    @dataclass
    class Done:
        notes: tuple[str, ...] = ()

        def save(self, folder):
            folders.append(folder.resolve())

        def table(self):
            return "table"

    monkeypatch.setattr(cli, "compare", lambda family, **_: Done())
    monkeypatch.chdir(tmp_path)
    assert run("sinusoid") == 0 and run(*columns(table)) == 0
    assert folders == [tmp_path / "runs" / "sinusoid", tmp_path / "runs" / "pupils"]


# --- mistakes


def refused(capsys, *arguments):
    """The one line on standard error of a command that ends with status 2 and writes nothing else."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("bayesmeta: ") and printed.err.endswith("\n")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sinusiod"], "'omniglot', got 'sinusiod'; did you mean 'sinusoid'?"),
        (["Radon"], "did you mean 'radon'?"),
        (["RADON"], "did you mean 'radon'?"),
        (["linear_gaussian"], "did you mean 'linear-gaussian'?"),
        (["radon", "--learners", "NoPoolling"], "got 'NoPoolling'; did you mean 'NoPooling'?"),
        (["radon", "--learners", "MAML,Nuts"], "got 'Nuts'; did you mean 'NUTS'?"),
        (["radon", "--learners", "mamal"], "did you mean 'MAML'?"),
        (["sinusoid", "--learners", "Exact"], "got 'Exact'"),
        (["linear-gaussian", "--steps", "-1", "--learners", "MAML"], "steps >= 0"),
        (["linear-gaussian", "--steps", "0", "--tasks", "0", "--learners", "MAML"], "task"),
        (["linear-gaussian", "--steps", "0", "--tasks", "-2", "--learners", "MAML"], "task"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistyped_names_and_numbers(arguments, said, capsys, tmp_path):
    assert said in refused(capsys, *arguments, "--out", tmp_path / "out")


def test_a_mistyped_learner_leaves_no_folder_behind(capsys, tmp_path):
    refused(capsys, "radon", "--learners", "NoPoolling", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file(capsys, tmp_path):
    said = refused(capsys, *columns(tmp_path / "none.csv"), "--out", tmp_path / "out")
    assert "none.csv" in said and "No such file" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--target": "maths"}, "no column 'maths'; did you mean 'math'?"),
        ({"--group": "School"}, "no column 'School'; did you mean 'school'?"),
        ({"--features": "sex"}, "no column 'sex'; did you mean 'ses'?"),
        ({"--features": "zzz"}, "(columns: district, school, ses, female, math)"),
        ({"--target": None}, "a CSV file needs --target"),
        ({"--group": None, "--features": None}, "a CSV file needs --group, --features"),
        ({"--target": "district"}, "line 2, column 'district': expected a number, got 'north'"),
        ({"--support": "-1"}, "num_support"),
        ({"--group": "district"}, "too few"),
    ],
    ids=str,
)
def test_a_csv_file_that_does_not_fit(change, said, table, capsys, tmp_path):
    options = {"--group": "school", "--features": "ses", "--target": "math"} | change
    arguments = [v for pair in options.items() if pair[1] is not None for v in pair]
    assert said in refused(capsys, table, *arguments, "--out", tmp_path / "out")


def test_a_cell_that_is_no_number_is_named(capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("g,x,y\na,1,2\na,two,3\n")
    said = refused(capsys, path, "--group", "g", "--features", "x", "--target", "y", "--out", tmp_path / "out")
    assert "t.csv, line 3, column 'x': expected a number, got 'two'" in said


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xfa", b"g,x,y\n", b"g,x,y\na,1\n", b"g,x,x\na,1,2\n"], ids=repr)
def test_files_that_are_no_tables(content, capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert "t.csv" in refused(capsys, path, "--group", "g", "--features", "x", "--target", "y", "--out", tmp_path / "out")


def test_a_target_that_never_changes_is_named(capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("g,x,height\n" + "".join(f"g{i % 8},{i},3\n" for i in range(48)))
    assert "height" in refused(capsys, path, "--group", "g", "--features", "x", "--target", "height", "--out", tmp_path / "out")


@pytest.mark.parametrize("below", [False, True])
def test_a_place_that_cannot_be_written_is_said_before_any_work(capsys, tmp_path, monkeypatch, below):
    monkeypatch.setattr(cli, "compare", lambda *_, **__: pytest.fail("worked for nothing"))
    (tmp_path / "file").write_text("in the way")
    said = refused(capsys, "radon", "--out", tmp_path / "file" / "out" if below else tmp_path / "file")
    assert "file" in said
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_interrupted_command_says_so(capsys, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compare", interrupt)
    assert run("radon", "--out", tmp_path) == 130
    assert capsys.readouterr().err == "bayesmeta: interrupted; nothing was written\n"


@pytest.mark.parametrize("arguments", [[], ["compare", "radon", "--stpes", "3"], ["compare", "--steps", "many"], ["comapre"]], ids=str)
def test_what_the_parser_does_not_know_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "bayesmeta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["radon", "--stps", "3"], "got '--stps'; did you mean '--steps'?"),
        (["--leaners=MAML"], "got '--leaners'; did you mean '--learners'?"),
        (["radon", "-q"], "options: expected one of '--learners', '--steps'"),
        (["radon", "sinusoid"], "expected one family, got also sinusoid"),
    ],
)
def test_a_misspelt_option_gets_the_nearest(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# --- help


def test_help_mentions_everything(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    options = ["--learners", "--steps", "--seed", "--tasks", "--out", "--group", "--features", "--target", "--support", "--quiet"]
    for word in [*options, *FAMILIES, "report.html", "metrics.csv", "metrics.json", "figures/", "CSV", "NoPooling", "NUTS", "default"]:
        assert word in text, word
    # and nothing is offered that the help does not explain
    parser = cli._parser()
    (compare,) = [action.choices["compare"] for action in parser._actions if action.choices and "compare" in action.choices]
    assert all(action.help for action in compare._actions)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "python -m bayesmeta compare sinusoid" in capsys.readouterr().out


def test_the_version_from_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "bayesmeta", "--version"], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"bayesmeta {bayesmeta.__version__}\n" and done.stderr == ""
