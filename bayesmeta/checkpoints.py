"""Checkpoints: written whole or not at all, checked before they are believed, and never able to run code.

A checkpoint is one file: a line of JSON (format, version, SHA-256 and length of the rest), then a torch archive that is read with
``weights_only=True``. The one before is kept beside it as ``NAME.previous``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, path.with_name(path.name + ".previous"))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    return torch.load(io.BytesIO(body), weights_only=True)
