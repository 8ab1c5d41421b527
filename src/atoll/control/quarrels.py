"""Decisions that could not be written because something had changed: made again at once, and ever later when that goes on.

Pure: sources of decisions in, delays out. What has been written in between begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable

AGAIN_MIN_S = 0.02
AGAIN_MAX_S = 5.0
SOURCES_MAX = 100_000
"""Sources remembered; beyond it the oldest is forgotten, and its next conflict counts as its first."""


class Quarrels:
    def __init__(self) -> None:
        self._in_a_row: dict[object, int] = {}

    def delay_s(self, source: object) -> float:
        """Count one more conflict of `source`; return when to decide again: at once after the first, then doubled up to
        `AGAIN_MAX_S`."""
        count = self._in_a_row.pop(source, 0) + 1
        if len(self._in_a_row) >= SOURCES_MAX:
            del self._in_a_row[next(iter(self._in_a_row))]
        self._in_a_row[source] = count
        return 0.0 if count == 1 else min(AGAIN_MAX_S, AGAIN_MIN_S * 2.0 ** min(count - 2, 30))

    def settled(self, sources: Iterable[object]) -> None:
        """These have been written."""
        if self._in_a_row:
            for source in sources:
                self._in_a_row.pop(source, None)
