"""Checkpoints: written whole or not at all, checked before they are believed, and never able to run code.

A checkpoint is one file: a line of JSON (format, version, SHA-256 and length of the rest), then a torch archive that is read with
``weights_only=True``. The one before is kept beside it as ``NAME.previous``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT, VERSION = "bayesmeta checkpoint", 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read: missing, damaged, of another version or of another learner."""


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists, dicts) to ``path``: temporary file, fsync, rename.

    Raises OSError where it cannot be written; an old checkpoint is then still whole.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    head = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary, previous = Path(folder, "new"), Path(folder, "previous")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():  # a copy is moved, so that there is a whole checkpoint at ``path`` at any moment
            shutil.copy2(path, previous)
            os.replace(previous, path.with_name(path.name + ".previous"))
        os.replace(temporary, path)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote. Raises CheckpointError where the file is missing, damaged or of another version."""
    path = Path(path)
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        facts = json.loads(head)
        form, version, digest = facts["format"], facts["version"], facts["sha256"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not a bayesmeta checkpoint, or its first line is damaged") from None
    if form != FORMAT or version != VERSION:
        raise CheckpointError(f"{path}: expected {FORMAT} version {VERSION}, got {form} version {version}")
    if hashlib.sha256(body).hexdigest() != digest:
        raise CheckpointError(f"{path}: damaged (its SHA-256 does not match); the one before is at {path.name}.previous")
    if head != json.dumps({"format": form, "version": version, "sha256": digest, "bytes": len(body)}).encode():
        raise CheckpointError(f"{path}: its first line is damaged; the one before is at {path.name}.previous")
    try:
        state = torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")  # whoever takes a tensor over moves it
    except Exception as error:  # whatever a forged archive brings the safe reader to
        raise CheckpointError(f"{path}: its contents cannot be read safely ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(state).__name__}")
    return state
