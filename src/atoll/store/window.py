"""The newest part of a log that is ordered by revision, shared by all its readers.

A reader keeps nothing but the revision that it wants next, so that a slow one costs no memory: what it has not read when the
window moves on is answered with Compacted.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from typing import Generic, TypeVar

from atoll.model.errors import Compacted, Unavailable
from atoll.model.ports.store import Revision

T = TypeVar("T")

WINDOW_ENTRIES_MAX = 4_096
"""Revisions that a window keeps at least, once it has so many; up to a quarter more before it is trimmed."""
WINDOW_BYTES_MAX = 4 << 20
"""Payload bytes that a window keeps at most, beside its newest entry."""


class Window(Generic[T]):
    """Entries by revision, bounded by count and by bytes; everything happens on one event loop.

    `floor` is the oldest revision that can still be read, `newest` the last that was appended.
    """

    def __init__(
        self, newest: Revision, *, floor: Revision, entries_max: int = WINDOW_ENTRIES_MAX, bytes_max: int = WINDOW_BYTES_MAX
    ) -> None:
        self.newest = newest
        self.floor = floor
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._revisions: list[Revision] = []
        self._entries: list[tuple[T, int]] = []
        self._bytes = 0
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._closed: str | None = None

    def append(self, revision: Revision, entry: T, size_bytes: int) -> None:
        """Add the entry of a revision above `newest`, and wake whoever waits for it."""
        self._revisions.append(revision)
        self._entries.append((entry, size_bytes))
        self._bytes += size_bytes
        self.newest = revision
        if len(self._entries) > self._entries_max + self._entries_max // 4:
            self._drop(len(self._entries) - self._entries_max)
        while self._bytes > self._bytes_max and len(self._entries) > 1:
            self._drop(max(1, len(self._entries) // 8))
        self._wake()

    def pass_by(self, revision: Revision) -> None:
        """Say that everything up to `revision` has been seen and brought no entry."""
        self.newest = revision
        self._wake()

    def read(self, start: Revision, count_max: int | None = None) -> list[tuple[Revision, T]]:
        """Return the entries from revision `start` on, oldest first. Raises Compacted if some of them are gone."""
        if start < self.floor:
            raise Compacted(f"revision {start} is no longer held; the oldest is {self.floor}")
        first = bisect_left(self._revisions, start)
        last = len(self._revisions) if count_max is None else first + count_max
        return [(self._revisions[i], self._entries[i][0]) for i in range(first, min(last, len(self._revisions)))]

    def forget_before(self, revision: Revision) -> None:
        """Drop the entries of revisions below `revision`."""
        self._drop(bisect_left(self._revisions, revision))
        self.floor = max(self.floor, revision)

    async def reach(self, revision: Revision) -> None:
        """Return once `newest` is at least `revision`; the caller sets the deadline. Raises Unavailable when it is closed."""
        while self.newest < revision:
            if self._closed is not None:
                raise Unavailable(self._closed)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters[waiter] = None
            try:
                await waiter
            finally:
                self._waiters.pop(waiter, None)

    def close(self, reason: str) -> None:
        """Let everyone who waits now or later know that nothing more will come."""
        self._closed = reason
        self._wake()

    def _drop(self, count: int) -> None:
        if count == 0:
            return
        self.floor = Revision(self._revisions[count - 1] + 1)
        self._bytes -= sum(size for _, size in self._entries[:count])
        del self._revisions[:count]
        del self._entries[:count]

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
