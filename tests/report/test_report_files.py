import os
import stat

import pytest

from bayesmeta.report import files
from bayesmeta.report.files import write_whole


def test_save_writes_all_of_it(report, tmp_path):
    folder = report.save(tmp_path / "runs" / "one")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    figures = ["bands", "calibration", "loss", "metrics", "pit", "shrinkage-1-level", "shrinkage-2-effect"]
    assert names == [*(f"figures/{name}.png" for name in figures), "metrics.csv", "metrics.json", "report.html"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names[:7])


@pytest.mark.parametrize("method", ["to_csv", "to_json"])
def test_a_folder_that_cannot_be_written_is_one_clear_line(report, method, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write here: .*'.*file.out'") as caught:
        getattr(report, method)(tmp_path / "file" / "out")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_save_into_what_is_no_folder_is_one_clear_line(report, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write here") as caught:
        report.save(tmp_path / "file")
    assert "\n" not in str(caught.value) and (tmp_path / "file").read_text() == "in the way"


def test_a_missing_folder_is_not_made_for_one_file(report, tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot write here"):
        report.to_csv(tmp_path / "nowhere" / "metrics.csv")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(moment, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, moment, full)
    with pytest.raises(OSError, match=r"No space left on device.*a\.txt"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", "old")
    replace, seen = os.replace, []
    monkeypatch.setattr(
        files.os, "replace", lambda a, b: (seen.append((path.read_text(), a.read_text())), replace(a, b))
    )
    write_whole(path, "new")
    assert seen == [("old", "new")] and path.read_text() == "new"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        path = write_whole(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
