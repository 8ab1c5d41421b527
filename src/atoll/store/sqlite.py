"""The store on SQLite: durable on one machine.

Statements run on the event loop (microseconds), and only COMMIT, which waits for the disk, in a thread: the interpreter's lock
changes hands once for each commit. All writes that arrive while one commit waits go into the next together (group commit). Reads
use a connection of their own and see exactly what is committed.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import structlog

from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.clock import Clock, SystemClock
from atoll.model.ports.store import LINEARIZABLE, Consistency, KeyValue, LeaseId, Revision, TxnResult
from atoll.store.base import BaseStore, Changes
from atoll.store.database import SqliteTable, connect, open_file, translate
from atoll.store.history import HISTORY_BYTES_MAX, HISTORY_REVISIONS_MAX, History
from atoll.store.lock import FileLock
from atoll.store.transaction import Transaction, apply, check_key, remove_all, size_bytes
from atoll.store.window import Window

WAITING_MAX = 10_000
"""Writes that wait for a commit; one more is refused with Unavailable."""
GROUP_OPS_MAX = 512
"""Operations in one commit, beside those of its first write: what the event loop is held for at a time."""
log = structlog.get_logger()

Work = Callable[[SqliteTable, Revision], tuple[Any, Changes]]


class _Waiting(NamedTuple):
    work: Work
    cost_ops: int
    done: asyncio.Future[Any]


class _Done(NamedTuple):
    done: asyncio.Future[Any]
    result: Any
    changes: Changes
    revision: Revision


class SqliteStore(BaseStore):
    """`Store` on a SQLite file; make it with `open`. One process at a time may have it open."""

    def __init__(self, path: Path, lock: FileLock, clock: Clock, *, history_revisions_max: int, history_bytes_max: int) -> None:
        self._path = path
        self._lock = lock
        self._reader = connect(path)
        self._writer = connect(path)
        self._table = SqliteTable(self._writer)
        self._seen = SqliteTable(self._reader)
        self._history = History(self._table, history_revisions_max, history_bytes_max)
        self._held_from = self._history.floor
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store commit")
        newest = self._table.revision()
        super().__init__(clock, Window(newest, floor=Revision(newest + 1)), self._table.leases())
        self._commits = asyncio.create_task(self._run_commits(), name="store commits")

    @classmethod
    async def open(
        cls,
        path: Path,
        clock: Clock | None = None,
        *,
        history_revisions_max: int = HISTORY_REVISIONS_MAX,
        history_bytes_max: int = HISTORY_BYTES_MAX,
    ) -> Self:
        """Return the store in the file `path`, made new if absent (mode 0600), after checking all of it.

        Raises Conflict: another process has it open. Corrupt: the file is damaged, and was not touched. Unsupported: made by a
        newer Atoll, or by another program. Unavailable: it cannot be read or written.
        """
        lock = FileLock.acquire(path.with_name(path.name + ".lock"), what=f"the database {path}")
        try:
            await asyncio.to_thread(open_file, path)
            return cls(
                path,
                lock,
                clock or SystemClock(),
                history_revisions_max=history_revisions_max,
                history_bytes_max=history_bytes_max,
            )
        except sqlite3.Error as error:
            lock.release()
            raise translate(path, error) from None
        except BaseException:
            lock.release()
            raise

    async def close(self) -> None:
        """End after the writes that wait have been committed. Safe to repeat."""
        if self._closing:
            return
        self._closing = True
        await super().close()
        self._arrived.set()
        await asyncio.gather(self._commits, return_exceptions=True)
        self._thread.shutdown()
        self._reader.close()
        self._writer.close()
        self._lock.release()

    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None:
        check_key(key)
        self._check_open()
        try:
            return self._seen.get(key)
        except sqlite3.Error as error:
            raise translate(self._path, error) from None

    @contextmanager
    def _snapshot(self) -> Iterator[Revision]:
        self._check_open()
        try:
            self._reader.execute("BEGIN")
            try:
                yield self._seen.revision()
            finally:
                self._reader.execute("COMMIT")
        except sqlite3.Error as error:
            raise translate(self._path, error) from None

    def _items(self, prefix: str, after: str, limit: int) -> list[KeyValue]:
        return self._seen.slice(prefix, after, limit)

    def _since(self, start: Revision) -> list[tuple[Revision, Changes]]:
        found: list[tuple[Revision, Changes]] = []
        while part := self._seen.history(start, HISTORY_REVISIONS_MAX):
            found.extend(part)
            start = Revision(part[-1][0] + 1)
        return found

    @property
    def _floor(self) -> Revision:
        return self._held_from

    def _log(self, start: Revision, count_max: int) -> list[tuple[Revision, Changes]]:
        if start >= self._window.floor:
            return self._window.read(start, count_max)
        self._check_start(start)
        self._check_open()
        try:
            return self._seen.history(start, count_max)
        except sqlite3.Error as error:
            raise translate(self._path, error) from None

    def _check_open(self) -> None:
        if self._closing:
            raise Unavailable("the store is closed")

    async def _commit(self, transaction: Transaction) -> TxnResult:
        def work(table: SqliteTable, newest: Revision) -> tuple[TxnResult, Changes]:
            applied = apply(table, transaction, newest)
            return applied.result, applied.changes

        cost_ops = len(transaction.compare) + max(len(transaction.then), len(transaction.otherwise))
        result: TxnResult = await self._submit(work, cost_ops)
        return result

    async def _grant(self, ttl_s: float) -> LeaseId:
        lease: LeaseId = await self._submit(lambda table, newest: (table.grant(ttl_s), ()))
        return lease

    async def _revoke(self, lease: LeaseId) -> None:
        def work(table: SqliteTable, newest: Revision) -> tuple[None, Changes]:
            table.end_lease(lease)
            return None, tuple(remove_all(table, table.leased(lease)))

        await self._submit(work)

    async def _compact(self, revision: Revision) -> None:
        def work(table: SqliteTable, newest: Revision) -> tuple[None, Changes]:
            self._history.forget_before(revision)
            return None, ()

        await self._submit(work)

    async def _submit(self, work: Work, cost_ops: int = 1) -> Any:
        """Do `work` in the next commit and return its result once that is durable.

        A caller that is cancelled meanwhile does not undo it.
        """
        self._check_open()
        if len(self._waiting) >= WAITING_MAX:
            raise Unavailable(f"{WAITING_MAX} writes wait for the disk already; nothing was written")
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(work, cost_ops, done))
        self._arrived.set()
        return await done

    async def _run_commits(self) -> None:
        while True:
            if not self._waiting:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
                continue
            group = self._take()
            try:
                await self._commit_group(group)
            except Exception as error:  # noqa: BLE001 (the outer edge: one group's failure must not end all later writes)
                self._roll_back()
                log.error("a commit failed", path=str(self._path), cause=repr(error), writes=len(group))
                _fail(group, error if isinstance(error, AtollError) else Unavailable(f"the store failed: {error!r}"))

    def _take(self) -> list[_Waiting]:
        group = [self._waiting.popleft()]
        ops = 0
        while self._waiting and ops + self._waiting[0].cost_ops <= GROUP_OPS_MAX:
            ops += self._waiting[0].cost_ops
            group.append(self._waiting.popleft())
        return group

    async def _commit_group(self, group: list[_Waiting]) -> None:
        """Make all of `group` durable, or none of it; then publish in order, before any caller goes on."""
        before = self._history.mark()
        committing = False
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            finished, newest = self._execute(group)
            self._history.trim(newest)
            committing = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._writer.execute, "COMMIT")
        except BaseException as error:
            self._history.restore(before)
            if isinstance(error, sqlite3.Error):
                raise translate(self._path, error, committing=committing) from None
            raise
        self._held_from = self._history.floor
        for write in finished:
            if write.changes:
                self._window.append(write.revision, write.changes, size_bytes(write.changes))
            if not write.done.done():
                write.done.set_result(write.result)

    def _execute(self, group: list[_Waiting]) -> tuple[list[_Done], Revision]:
        """Run the statements of every write. One that is refused has written nothing, and the others go on."""
        before = newest = self._window.newest
        finished: list[_Done] = []
        for write in group:
            try:
                result, changes = write.work(self._table, newest)
            except AtollError as error:
                if not write.done.done():
                    write.done.set_exception(error)
                continue
            if changes:
                newest = Revision(newest + 1)
                self._history.remember(newest, changes)
            finished.append(_Done(write.done, result, changes, newest))
        if newest != before:
            self._table.set_revision(newest)
        return finished, newest

    def _roll_back(self) -> None:
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        except sqlite3.Error as error:
            log.error("rolling back failed", path=str(self._path), cause=str(error))


def _fail(group: list[_Waiting], error: Exception) -> None:
    for write in group:
        if not write.done.done():
            write.done.set_exception(error)
