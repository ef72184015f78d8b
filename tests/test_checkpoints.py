"""Checkpoints: whole or not at all, never believed where a bit is wrong, never able to run code."""

import hashlib
import io
import json
import os
import random

import pytest
import torch

from bayesmeta import CheckpointError
from bayesmeta.checkpoints import FORMAT, VERSION, load_checkpoint, save_checkpoint


def state(value=0.0):
    return {
        "learner": "MAML", "parameters": {"a": torch.arange(5.0) + value, "b": torch.tensor(3, dtype=torch.int64)},
        "history": {"loss": [1.5, value], "best_step": None, "stopped_early": False}, "generator": torch.Generator().get_state(),
        "nested": [{"step": torch.tensor(1.0)}, (1, "two", 3.0)],
    }  # fmt: skip


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        [assert_equal(a[k], b[k]) for k in a]
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        [assert_equal(x, y) for x, y in zip(a, b, strict=True)]
    else:
        assert a == b


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "c.pt", state())
    return tmp_path / "c.pt"


def forged(path, body, **changes):
    """A file whose first line is right, or wrong only in ``changes``, round any body."""
    head = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)} | changes
    path.write_bytes(json.dumps(head).encode() + b"\n" + body)


def test_what_goes_in_comes_out(path):
    assert_equal(load_checkpoint(path), state())
    assert_equal(load_checkpoint(str(path)), state())


def test_the_first_line_is_readable_and_true(path):
    head, _, body = path.read_bytes().partition(b"\n")
    facts = json.loads(head)
    assert facts == {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}


def test_folders_are_made(tmp_path):
    save_checkpoint(tmp_path / "a" / "b" / "c", state())
    assert_equal(load_checkpoint(tmp_path / "a" / "b" / "c"), state())


def test_the_one_before_is_kept_and_nothing_else(path):
    previous = path.with_name("c.pt.previous")
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]
    for value in (1.0, 2.0, 3.0):
        save_checkpoint(path, state(value))
        assert_equal(load_checkpoint(path), state(value))
        assert_equal(load_checkpoint(previous), state(value - 1))
        assert sorted(p.name for p in path.parent.iterdir()) == ["c.pt", "c.pt.previous"]


# --- damage


def test_every_bit_of_the_first_line_counts(path):
    """One bit at a time, all of them: each is noticed."""
    good = path.read_bytes()
    end = good.index(b"\n") + 1
    unnoticed = []
    for i in range(end):
        for bit in range(8):
            bad = bytearray(good)
            bad[i] ^= 1 << bit
            path.write_bytes(bad)
            try:
                load_checkpoint(path)
            except CheckpointError:
                continue
            unnoticed.append((good[max(0, i - 12) : i + 1], bytes(bad[i : i + 1])))
    assert unnoticed == []


def test_flipped_bits_and_bytes_in_the_body_are_noticed(path):
    good = path.read_bytes()
    start = good.index(b"\n") + 1
    numbers = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(numbers.choice((1, 1, 1, 2, 30))):
            bad[numbers.randrange(start, len(bad))] ^= numbers.randrange(1, 256)
        if bytes(bad) == good:
            continue
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"c\.pt: damaged \(its SHA-256 does not match\); the one before is at c\.pt\.previous"):
            load_checkpoint(path)


def test_truncated_files_are_noticed(path):
    good = path.read_bytes()
    for length in [*range(0, 250, 7), *range(250, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    path.write_bytes(good)
    assert_equal(load_checkpoint(path), state())


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}\n", b"[]\n", b"null\n", b"3\n", b"\xff\xfe\x00\n", bytes(range(256)), b'{"format": 1}\nabc'], ids=repr
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(CheckpointError, match="c: not a bayesmeta checkpoint, or its first line is damaged"):
        load_checkpoint(tmp_path / "c")


def test_other_versions_and_formats_are_named(path):
    body = path.read_bytes().partition(b"\n")[2]
    for changes, match in (
        ({"version": 2}, f"expected {FORMAT} version 1, got {FORMAT} version 2"), ({"version": None}, "version None"),
        ({"format": "bayesmeta report"}, "got bayesmeta report version 1"),
    ):  # fmt: skip
        forged(path, body, **changes)
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt: cannot be read \(No such file or directory\)"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


# --- no code


class Mischief:
    """Unpickled by an ordinary unpickler, it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_cannot_run_code(tmp_path):
    """A forged file whose checksum is right: it is refused, and nothing in it has run."""
    buffer = io.BytesIO()
    torch.save({"learner": "MAML", "x": Mischief(tmp_path / "ran")}, buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert (tmp_path / "ran").exists()  # the attack works on who is careless
    (tmp_path / "ran").rmdir()
    forged(tmp_path / "c", buffer.getvalue())
    with pytest.raises(CheckpointError, match="c: "):
        load_checkpoint(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_a_body_that_is_no_archive_is_refused(tmp_path):
    forged(tmp_path / "c", b"some bytes with a right checksum")
    with pytest.raises(CheckpointError, match="c: "):
        load_checkpoint(tmp_path / "c")


# --- writing that fails


@pytest.mark.parametrize("broken", ["fsync", "replace", "fdopen"])
def test_a_write_that_fails_leaves_the_old_one_and_no_litter(path, monkeypatch, broken):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(path, state(1.0))
    assert_equal(load_checkpoint(path), state())
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_wherever_it_breaks_off_a_whole_checkpoint_stands_at_the_path(path, monkeypatch, survives):
    """Killed between any two moves of a file: a run that resumes must find it, not start anew because there is none."""
    save_checkpoint(path, state(1.0))
    real, moves = os.replace, []

    def replace(*arguments):
        moves.append(arguments)
        if len(moves) > survives:
            raise OSError(5, "Input/output error")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            save_checkpoint(path, state(2.0))
            written = 2.0
        except OSError:
            written = None
    found = load_checkpoint(path)
    assert_equal(found, state(found["history"]["loss"][1]))
    assert found["history"]["loss"][1] in ((2.0,) if written else (1.0, 2.0))


def test_a_state_that_cannot_be_saved_leaves_the_old_one(path):
    with pytest.raises(Exception, match=r"pickle|local"):
        save_checkpoint(path, {"f": lambda: None})
    assert_equal(load_checkpoint(path), state())
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "file" / "c", state())


def test_a_folder_is_not_moved_out_of_the_way(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("somebody's work")
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "folder", state())
    assert (tmp_path / "folder" / "inside").exists()
