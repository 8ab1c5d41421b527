"""Files that hold what nobody else may read."""

from __future__ import annotations

import os
from pathlib import Path

from atoll.store.lock import unavailable


def make_private(directory: Path, mode: int = 0o700) -> None:
    """Make a directory for its owner alone where it is not there. Raises Unavailable. Safe to repeat."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise unavailable(directory, error) from None


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all; its directory is made where it is not there.

    Raises Unavailable: a full disk, a directory of somebody else. Safe to repeat.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        make_private(path.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unavailable(path, error) from None
