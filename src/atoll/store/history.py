"""The history of a SQLite store: what watches resume from, kept within bounds."""

from __future__ import annotations

from atoll.model.ports.store import Change, Revision
from atoll.store.database import SqliteTable

HISTORY_REVISIONS_MAX = 100_000
"""Revisions that a watch can resume from."""
HISTORY_BYTES_MAX = 256 << 20
"""Size of the history on disk, whatever its revisions."""
TRIM_REVISIONS = 1_000
"""The history is trimmed each time so many revisions have been added, and by at most four times as many."""


class History:
    """Writes within the caller's transaction; `mark` before it, and `restore` when it could not be committed."""

    def __init__(self, table: SqliteTable, revisions_max: int, bytes_max: int) -> None:
        self._table = table
        self._revisions_max = revisions_max
        self._bytes_max = bytes_max
        self._bytes = table.history_bytes()
        self.floor = table.floor()
        """The oldest revision that is held."""

    def mark(self) -> tuple[int, Revision]:
        return self._bytes, self.floor

    def restore(self, mark: tuple[int, Revision]) -> None:
        self._bytes, self.floor = mark

    def remember(self, revision: Revision, changes: tuple[Change, ...]) -> None:
        self._bytes += self._table.remember(revision, changes)

    def forget_before(self, revision: Revision) -> None:
        """Forget what was before `revision`, however much that is."""
        if revision > self.floor:
            self._table.forget_before(revision)
            self._bytes = self._table.history_bytes()
            self.floor = revision

    def trim(self, newest: Revision) -> None:
        """Forget the oldest revisions where there are more than a bound allows; the newest always stays."""
        over_bytes = self._bytes - self._bytes_max
        if over_bytes <= 0 and newest - self.floor < self._revisions_max + TRIM_REVISIONS:
            return
        floor = self.floor
        for revision, size_bytes in self._table.history_sizes(4 * TRIM_REVISIONS):
            if revision == newest or (over_bytes <= 0 and revision > newest - self._revisions_max):
                break
            floor = Revision(revision + 1)
            over_bytes -= size_bytes
            self._bytes -= size_bytes
        if floor > self.floor:
            self._table.forget_before(floor)
            self.floor = floor
