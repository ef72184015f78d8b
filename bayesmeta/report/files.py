"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` under a passing name in the same folder, then move it to ``path``; returns the path.

    Whoever reads ``path`` meanwhile sees the old file or the new one. Raises OSError, in one line that says which file
    and why, and leaves nothing behind.
    """
    path = Path(path)
    passing = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Not tempfile: its files are readable by their owner only, and a report is for others too.
        with open(passing, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(passing, path)
    except OSError as error:
        raise _one_line(error, path) from None
    finally:
        with contextlib.suppress(OSError):
            passing.unlink(missing_ok=True)
    return path


def folder_for(path: str | os.PathLike[str]) -> Path:
    """The folder ``path``, made if need be. Raises OSError in one line where that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _one_line(error, Path(path)) from None
    return Path(path)


def _one_line(error: OSError, path: Path) -> OSError:
    reason = error.strerror or str(error)
    return (
        OSError(error.errno, f"cannot write here: {reason}", str(path)) if error.errno else OSError(f"{path}: {reason}")
    )
