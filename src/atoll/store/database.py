"""The SQLite file of a store: opened with all checks, its schema, and the newest state in it as a `Table`."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from atoll.model.errors import AtollError, Corrupt, OutcomeUnknown, Unavailable, Unsupported
from atoll.model.ports.store import Change, KeyValue, Lease, LeaseId, Revision
from atoll.store.lock import unavailable

SCHEMA_VERSION = 1
APPLICATION_ID = 0x41544F4C
"""`ATOL` in the file's header, so that no other program's database is taken for ours."""
BUSY_TIMEOUT_MS = 2_000
LOG_BYTES_MAX = 64 << 20
"""Size to which the write-ahead log is cut back after a burst."""
READ_BYTES_MAX = 4 << 20
"""History that is read at a time, in bytes, beside the first revision of it."""
FREE_BYTES_MIN = 256 << 10
"""With less room than this, an unexplained I/O error is put down to the full disk."""

_HEADER = b"SQLite format 3\0"
_SCHEMA = """
CREATE TABLE items (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL,
    version INTEGER NOT NULL, lease INTEGER NOT NULL
) STRICT;
CREATE INDEX items_by_lease ON items (lease) WHERE lease != 0;
CREATE TABLE history (revision INTEGER PRIMARY KEY, changes BLOB NOT NULL) STRICT;
CREATE TABLE leases (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL) STRICT;
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
INSERT INTO meta VALUES ('revision', 0), ('floor', 0);
"""
_GET = "SELECT key, value, create_revision, mod_revision, version, lease FROM items WHERE key = ?"
_SLICE = (
    "SELECT key, value, create_revision, mod_revision, version, lease FROM items WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
)
_LEASED = "SELECT key, value, create_revision, mod_revision, version, lease FROM items WHERE lease = ? AND lease != 0 ORDER BY key"
_SET = (
    "INSERT INTO items (key, value, create_revision, mod_revision, version, lease) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (key) DO UPDATE SET value = excluded.value, mod_revision = excluded.mod_revision,"
    " version = excluded.version, lease = excluded.lease"
)
_ABOVE_ALL_TEXT = b""
"""SQLite sorts every blob behind every text."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[Change, ...]).decode


def open_file(path: Path) -> None:
    """Make sure that `path` is a sound database of ours, made new if it is not there. Writes nothing into one that is not.

    Raises Corrupt, Unsupported (made by a newer Atoll), Unavailable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            header = os.pread(descriptor, len(_HEADER), 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unavailable(path, error) from None
    if not header:
        try:
            _create(path)
        except AtollError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            raise
        return
    if header != _HEADER:
        raise _corrupt(path, "it does not begin as a SQLite database does")
    _check(path)


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection on which a commit is durable once it returns."""
    # The store uses each connection from one thread at a time: the event loop's, or the one that commits.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES_MAX}")
    return connection


def translate(path: Path, error: sqlite3.Error, *, committing: bool = False) -> AtollError:
    """Return SQLite's error as ours. While `committing`, all but a full disk leaves open whether the data will be there."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_IOERR and not committing and _is_full(path):
        # The index of the write-ahead log found no room; SQLite has no word of its own for it.
        code = sqlite3.SQLITE_FULL
    match code:
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return _corrupt(path, str(error))
        case sqlite3.SQLITE_FULL:
            return Unavailable(f"the disk of {path} is full; nothing was written", mend=f"make room on the disk of {path.parent}")
        case _ if committing:
            return OutcomeUnknown(f"{path} could not be written to its end: {error}", mend="look at the disk and the kernel's log")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_AUTH:
            return Unavailable(f"{path} cannot be written: {error}", mend="run as the user that owns it; is the disk read-only?")
        case _:
            return Unavailable(f"{path} does not answer: {error}; nothing was written")


class SqliteTable:
    """The newest state on one connection; see `transaction.Table`. Raises sqlite3.Error."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._run = connection.execute

    def get(self, key: str) -> KeyValue | None:
        row = self._run(_GET, (key,)).fetchone()
        return KeyValue(*row) if row else None

    def under(self, prefix: str) -> Sequence[KeyValue]:
        return self.slice(prefix, "", -1)

    def slice(self, prefix: str, after: str, limit: int) -> list[KeyValue]:
        """Return items under `prefix` and behind `after` in key order, at most `limit`; all with -1."""
        end = prefix_end(prefix)
        # No key holds NUL, so that nothing lies between `after` and this.
        begin = max(prefix, after + "\0") if after else prefix
        rows = self._run(_SLICE, (begin, _ABOVE_ALL_TEXT if end is None else end, limit))
        return [KeyValue(*row) for row in rows.fetchall()]

    def leased(self, lease: LeaseId) -> Sequence[KeyValue]:
        rows = self._run(_LEASED, (lease,))
        return [KeyValue(*row) for row in rows.fetchall()]

    def has_lease(self, lease: LeaseId) -> bool:
        return self._run("SELECT 1 FROM leases WHERE id = ?", (lease,)).fetchone() is not None

    def set(self, item: KeyValue) -> None:
        self._run(
            _SET,
            (item.key, item.value, item.create_revision, item.mod_revision, item.version, item.lease),
        )

    def remove(self, key: str) -> None:
        self._run("DELETE FROM items WHERE key = ?", (key,))

    def leases(self) -> list[Lease]:
        return [Lease(LeaseId(id), ttl_s) for id, ttl_s in self._run("SELECT id, ttl_s FROM leases").fetchall()]

    def grant(self, ttl_s: float) -> LeaseId:
        return LeaseId(self._run("INSERT INTO leases (ttl_s) VALUES (?)", (ttl_s,)).lastrowid or 0)

    def end_lease(self, lease: LeaseId) -> None:
        self._run("DELETE FROM leases WHERE id = ?", (lease,))

    def revision(self) -> Revision:
        return Revision(self._meta("revision"))

    def set_revision(self, revision: Revision) -> None:
        self._run("UPDATE meta SET value = ? WHERE name = 'revision'", (revision,))

    def floor(self) -> Revision:
        """The oldest revision that is held."""
        return Revision(self._meta("floor"))

    def remember(self, revision: Revision, changes: tuple[Change, ...]) -> int:
        """Enter a revision into the history and return its size in bytes."""
        data = _encode(changes)
        self._run("INSERT INTO history VALUES (?, ?)", (revision, data))
        return len(data)

    def forget_before(self, revision: Revision) -> None:
        self._run("DELETE FROM history WHERE revision < ?", (revision,))
        self._run("UPDATE meta SET value = ? WHERE name = 'floor'", (revision,))

    def history_bytes(self) -> int:
        return int(self._run("SELECT coalesce(sum(length(changes)), 0) FROM history").fetchone()[0])

    def history_sizes(self, count_max: int) -> list[tuple[Revision, int]]:
        """Return the oldest revisions with their sizes in bytes."""
        rows = self._run("SELECT revision, length(changes) FROM history ORDER BY revision LIMIT ?", (count_max,))
        return [(Revision(revision), size) for revision, size in rows.fetchall()]

    def history(self, start: Revision, count_max: int) -> list[tuple[Revision, tuple[Change, ...]]]:
        """Return the changes from `start` on, oldest first: at most `count_max` revisions and about `READ_BYTES_MAX`."""
        return list(self._history(start, count_max))

    def _history(self, start: Revision, count_max: int) -> Iterator[tuple[Revision, tuple[Change, ...]]]:
        read_bytes = 0
        query = "SELECT revision, changes FROM history WHERE revision >= ? ORDER BY revision LIMIT ?"
        with closing(self._run(query, (start, count_max))) as rows:
            for revision, data in rows:
                yield Revision(revision), _decode(data)
                read_bytes += len(data)
                if read_bytes > READ_BYTES_MAX:
                    return

    def _meta(self, name: str) -> int:
        return int(self._run("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0])


def prefix_end(prefix: str) -> str | None:
    """Return the least text that is above all that begins with `prefix`; None when there is none."""
    for place in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[place])
        if code < 0x10FFFF:
            # Surrogates are no characters of their own: the one before them is followed by U+E000.
            return prefix[:place] + chr(0xE000 if code == 0xD7FF else code + 1)
    return None


def _create(path: Path) -> None:
    try:
        with closing(connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        _sync_directory(path.parent)
    except sqlite3.Error as error:
        raise translate(path, error) from None


def _check(path: Path) -> None:
    """Read all pages without writing any. The file is locked by us; without a log to read, not even an index is made."""
    log = path.with_name(path.name + "-wal")
    how = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            application, version = (_pragma(connection, name) for name in ("application_id", "user_version"))
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            verdict = _pragma(connection, "quick_check(1)")
    except sqlite3.Error as error:
        raise translate(path, error) from None
    if verdict != "ok":
        raise _corrupt(path, verdict)
    if (application, version, tables) == (0, 0, 0):
        # The file was made, but the first transaction never ended: nothing was ever acknowledged.
        _create(path)
    elif application != APPLICATION_ID:
        raise Unsupported(f"{path} is a database of another program", mend="use another data directory")
    elif version > SCHEMA_VERSION:
        raise Unsupported(
            f"{path} has schema {version}, made by a newer Atoll; this one knows up to {SCHEMA_VERSION}",
            mend="run the newer Atoll, or restore the data from before the upgrade",
        )


def _pragma(connection: sqlite3.Connection, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _corrupt(path: Path, cause: str) -> Corrupt:
    return Corrupt(
        f"the database {path} is damaged: {cause}",
        mend=f"nothing was changed; restore {path.name} from a backup, or move it and its -wal file away to begin anew "
        f"(`sqlite3 {path} .recover` may save what is left)",
    )


def _is_full(path: Path) -> bool:
    disk = os.statvfs(path.parent)
    return disk.f_bavail * disk.f_frsize < FREE_BYTES_MIN


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
