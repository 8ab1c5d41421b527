"""What is remembered of directories until all of a layer is there: their times come last, and how many there are it says itself."""

from __future__ import annotations

import sys

from atoll.model.errors import ImageError

KEPT_BYTES_MAX = 256 << 20
_ENTRY_BYTES = 128
"""Of a path's place in a dictionary, and of the times there."""


class Kept:
    """Counts the memory that kept paths take."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0

    def add(self, path: bytes | str) -> None:
        """Count one path more, before it is kept. Raises ImageError where that is too much."""
        self._bytes += sys.getsizeof(path) + _ENTRY_BYTES
        if self._bytes > self._bytes_max:
            raise ImageError(f"the image has too many directories: to remember their paths takes more than {self._bytes_max} bytes")
