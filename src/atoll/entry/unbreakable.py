"""stderr that cannot fail: a log on a full disk, or to a reader that has gone, loses lines and ends no work."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TextIO, cast


class Unbreakable(io.TextIOBase):
    """A text stream that drops what its target does not take."""

    def __init__(self, target: TextIO) -> None:
        self._target = target

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # there is nowhere left to say so
            self._target.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._target.flush()

    def isatty(self) -> bool:
        return self._target.isatty()

    def fileno(self) -> int:
        return self._target.fileno()


def guard_stderr() -> None:
    """Let nothing that this process says on stderr raise from now on. Safe to repeat."""
    if not isinstance(sys.stderr, Unbreakable):
        sys.stderr = cast(TextIO, Unbreakable(sys.stderr))
