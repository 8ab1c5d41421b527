"""Filling an empty store from a snapshot, checked to the last byte: restores, and moves from one kind of store to another.

What arrives is every key with its value, and leases with their whole time again. SQLite takes over every revision, too. etcd counts
its own: there a record's revisions are those of its arrival, `version` is 1, and whoever watches has to list anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from atoll.model import keys
from atoll.model.errors import Conflict, Corrupt
from atoll.model.ports.store import KeyValue, LeaseId, Revision
from atoll.store.backup import sync_directory
from atoll.store.database import SqliteTable, connect, open_file, translate
from atoll.store.etcd.address import EtcdAddress
from atoll.store.lock import FileLock, unavailable
from atoll.store.place import Place, name_of, open_etcd
from atoll.store.snapshot import Digest, EtcdSnapshot, Snapshot, SqliteSnapshot, digest_of

COMMIT_ITEMS = 10_000


class Filled(Struct, frozen=True):
    """What arrived. The state at `from_revision` of the source is that at `to_revision` of the target."""

    content: Digest
    from_revision: Revision
    to_revision: Revision


@contextlib.asynccontextmanager
async def snapshot_of(place: Place, *, offline: bool) -> AsyncIterator[Snapshot]:
    """Hold the newest state of a store; with `offline`, be sure that nobody has it in use, and hold its lock where it has one.

    Raises Conflict: a process has the file open, or a server leads by this etcd. NotFound, Corrupt, Unavailable.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(place, Path):
            with _naming(place):
                there = place.exists()
            if offline and there:
                lock = FileLock.acquire(place.with_name(place.name + ".lock"), what=f"the database {place}")
                stack.callback(lock.release)
            yield stack.enter_context(SqliteSnapshot(place))
            return
    store = await open_etcd(place)
    try:
        leader = await store.get(keys.LEADER)
        if offline and leader is not None:
            raise Conflict(
                f"the server {leader.value.decode(errors='replace')} leads by {place}",
                mend="stop every server first; one that was killed is forgotten after a few seconds",
            )
        yield await EtcdSnapshot.take(store)
    finally:
        await store.close()


async def migrate(source: Place, target: Place) -> Filled:
    """Copy everything from a store that nobody uses into one that is empty.

    Raises Conflict: `source` is in use, was written to meanwhile, or `target` is not empty; NotFound, Corrupt, Unavailable. Then
    nothing serves from `target`: a file is not there, and an etcd stays closed to servers until this was run again to its end.
    """
    if source == target:
        raise Conflict("a store cannot be moved to itself")
    async with snapshot_of(source, offline=True) as snapshot:
        return await fill(target, snapshot)


async def fill(target: Place, snapshot: Snapshot) -> Filled:
    """Bring `snapshot` into an empty store and compare what is there then. Raises as `migrate`."""
    if isinstance(target, Path):
        with _naming(target):
            return await _fill_sqlite(target, snapshot)
    return await _fill_etcd(target, snapshot)


async def _fill_sqlite(path: Path, snapshot: Snapshot) -> Filled:
    """Make the whole file beside its place first, so that it is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock.acquire(path.with_name(path.name + ".lock"), what=f"the database {path}")
    new = path.with_name(path.name + ".filling")
    try:
        if path.exists():
            with SqliteSnapshot(path) as held:
                if (await digest_of(held)).items:
                    raise Conflict(f"{path} holds a store that is not empty", mend="choose another path, or move it away first")
        _remove(new)
        await asyncio.to_thread(open_file, new)
        expected = await _write_sqlite(new, snapshot)
        with SqliteSnapshot(new) as written:
            _compare(name_of(path), expected, await digest_of(written))
        await _check_source(snapshot)
        _remove(path)
        new.replace(path)
        sync_directory(path.parent)
    finally:
        _remove(new)
        lock.release()
    return Filled(expected, snapshot.revision, snapshot.revision)


async def _write_sqlite(path: Path, snapshot: Snapshot) -> Digest:
    try:
        with contextlib.closing(connect(path)) as connection:
            table = SqliteTable(connection)
            connection.execute("BEGIN IMMEDIATE")
            leases = {id: table.grant(ttl_s) for id, ttl_s in snapshot.leases.items()}
            table.set_revision(snapshot.revision)
            # No history comes along: a watch from before now is told to list.
            table.forget_before(Revision(snapshot.revision + 1))
            count = 0

            def write(item: KeyValue) -> None:
                nonlocal count
                table.set(replace(item, lease=leases.get(item.lease, LeaseId(0))))
                count += 1
                if count % COMMIT_ITEMS == 0:
                    connection.execute("COMMIT")
                    connection.execute("BEGIN IMMEDIATE")

            digest = await digest_of(snapshot, write)
            connection.execute("COMMIT")
            return digest
    except sqlite3.Error as error:
        raise translate(path, error) from None


async def _fill_etcd(address: EtcdAddress, snapshot: Snapshot) -> Filled:
    from atoll.store.etcd.filling import Filling

    store = await open_etcd(address, filling=True)
    try:
        async with Filling(store) as filling:
            expected = await filling.bring(snapshot)
            written = await EtcdSnapshot.take(store)
            _compare(name_of(address), expected, await digest_of(written))
            await _check_source(snapshot)
            await filling.end()
        return Filled(expected, snapshot.revision, written.revision)
    finally:
        await store.close()


async def _check_source(snapshot: Snapshot) -> None:
    """Raise Conflict where somebody has written to where the snapshot is from; a file's lock keeps everyone away."""
    if isinstance(snapshot, EtcdSnapshot) and not await snapshot.unchanged():
        raise Conflict("the source was written to meanwhile", mend="stop every server, and run it again")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have what the operating system refuses name the path, and what helps."""
    try:
        yield
    except OSError as error:
        raise unavailable(path, error) from None


def _compare(where: str, expected: Digest, found: Digest) -> None:
    if found != expected:
        raise Corrupt(
            f"what arrived in {where} is not what was sent: {found.items} items of {found.bytes} bytes"
            f" instead of {expected.items} of {expected.bytes}",
            mend="see that nothing else writes there, and run it again",
        )


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
