"""Room on the disk that the agent's record has at hand, so that what ends is recorded on a disk that others have filled, too.

While the record is open the room lies in its own files: free pages in the database, and a write-ahead log that is written anew
from its beginning after each checkpoint, both over blocks that they have already. SQLite removes the log when the record is closed
in order; from then on a file beside it holds the blocks for the next agent. A file system that never writes in place (Btrfs, ZFS)
gives no such surety: there an end is told only when the disk has room again (`runner.py`).
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import structlog

SPARE_BYTES = 1 << 20
"""In the database: it is needed for what is new, or much longer than before."""
CHECKPOINT_PAGES = 512
"""Pages of the log after which it is taken into the database, and begun anew; a state that is written takes one."""
LOG_BYTES = (CHECKPOINT_PAGES + 64) * 4_120
"""In the log: up to a checkpoint, and a large write more."""
KEPT_BYTES = LOG_BYTES + SPARE_BYTES // 2
"""What the file beside a closed record holds: the log, its index, and what a start writes."""

ROUNDS_MAX = 8

log = structlog.get_logger()


def kept(path: Path) -> Path:
    """Return the file that holds the room of the closed record `path`."""
    return path.with_name(path.name + ".room")


def give_room(path: Path) -> None:
    """Let the record `path`, about to be opened, have the blocks that were kept for it. Safe to repeat."""
    kept(path).unlink(missing_ok=True)


def keep_room(path: Path) -> None:
    """Keep for the next agent what the record `path`, just closed, had while it was open. No room for it is no error."""
    try:
        descriptor = os.open(kept(path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, KEPT_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:  # no block is left, or no inode for the file itself
        log.warning("no room is kept for the record", path=str(path), error=str(error))


def make_room(database: sqlite3.Connection, path: Path) -> bool:
    """See to it that an open record has its room, and say whether it has. A disk without it is no error: the next start tries it
    again."""
    wal = path.with_name(path.name + "-wal")
    (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
    (secure,) = database.execute("PRAGMA secure_delete").fetchone()
    try:
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute("PRAGMA secure_delete = 0")  # else what is removed is written once more, as zeros
        database.execute("DROP TABLE IF EXISTS room")  # left behind where an agent was killed just here
        for _ in range(ROUNDS_MAX):
            (free,) = database.execute("PRAGMA freelist_count").fetchone()
            spare_bytes = free * page_bytes
            missing_bytes = LOG_BYTES - (wal.stat().st_size if wal.exists() else 0)
            if spare_bytes >= SPARE_BYTES and missing_bytes <= 0:
                break
            # What fits into free pages makes the log longer, and the database not. Two writes: of what is made and removed
            # within one, SQLite writes nothing.
            made_bytes = min(spare_bytes - 16 * page_bytes, missing_bytes) if spare_bytes >= SPARE_BYTES else 2 * SPARE_BYTES
            database.execute("CREATE TABLE room (body BLOB)")
            database.execute("INSERT INTO room VALUES (zeroblob(?))", (made_bytes,))
            database.execute("DROP TABLE room")
        database.execute("PRAGMA wal_checkpoint(RESTART)")
    except sqlite3.OperationalError as error:
        log.warning("the record has no room at hand on a full disk", path=str(path), error=str(error))
        return False
    finally:
        database.execute(f"PRAGMA secure_delete = {secure}")
        database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    return True
