"""The SQLite store when things end badly: killed, damaged, opened twice, out of disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from atoll.model.errors import Conflict, Corrupt, Unavailable, Unsupported
from atoll.model.ports.store import Put, Revision, WatchBatch
from atoll.store.sqlite import SqliteStore

DEADLINE_S = 20

WRITER = """
import asyncio, sys
from pathlib import Path
from atoll.store.sqlite import SqliteStore
from atoll.model.ports.store import Put

async def write(store, who):
    n = 0
    while True:
        if n % 3:
            await store.put(f"w/{who}/{n:06}", str(n).encode() * 50)
        else:
            await store.txn([], [Put(f"w/{who}/{n:06}", str(n).encode() * 50), Put(f"twin/{who}", str(n).encode())])
        print(who, n, flush=True)
        n += 1

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]), history_revisions_max=500)
    await store.lease_grant(3600)
    await asyncio.gather(*(write(store, who) for who in range(8)))

asyncio.run(main())
"""


def kill_in_the_middle(path: Path, after_acknowledged: int) -> dict[int, int]:
    """Run the writer until it has acknowledged so many writes, kill it, and return each task's last acknowledged number."""
    last: dict[int, int] = {}
    process = begin_writer(path)
    try:
        assert process.stdout is not None
        for _ in range(after_acknowledged):
            who, n = process.stdout.readline().split()
            last[int(who)] = int(n)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
    for line in process.stdout.read().splitlines(keepends=True):
        # What was in the pipe was acknowledged too, but for a last line that was cut.
        if line.endswith("\n"):
            who, n = line.split()
            last[int(who)] = int(n)
    return last


@pytest.mark.parametrize("after_acknowledged", [1, 40, 300, 1100, 2500])
async def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path, after_acknowledged: int) -> None:
    path = tmp_path / "state.db"
    last = kill_in_the_middle(path, after_acknowledged)
    store = await SqliteStore.open(path)
    try:
        items = {item.key: item for item in (await store.range("")).items}
        for who, n in last.items():
            for written in range(n + 1):
                assert items[f"w/{who}/{written:06}"].value == str(written).encode() * 50
            twin = int(items[f"twin/{who}"].value)
            assert twin >= n - n % 3
            assert f"w/{who}/{twin:06}" in items, "half of a transaction"
            numbers = sorted(int(key.rsplit("/", 1)[1]) for key in items if key.startswith(f"w/{who}/"))
            assert numbers == list(range(len(numbers))), "a later write is there, an earlier one is not"
        newest = await store.revision()
        assert newest == max(item.mod_revision for item in items.values())
        assert newest == sum(item.version for key, item in items.items() if not key.startswith("twin/"))
        seen = 0
        start = Revision(max(1, newest - 400))
        async for batch in store.watch("", start=start):
            assert batch.revision == start + seen
            seen += 1
            if batch.revision == newest:
                break
        assert await store.put("after", b"") == newest + 1
    finally:
        await store.close()


async def test_revision_history_and_leases_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    lease = await store.lease_grant(1)
    first = await store.put("a", b"1", lease=lease.id)
    await store.put("b", b"2")
    await store.close()
    store = await SqliteStore.open(path)
    try:
        assert await store.revision() == first + 1
        batch = await anext(store.watch("", start=first))
        assert (batch.revision, batch.changes[0].key) == (first, "a")
        await store.lease_keep_alive(lease.id)
        assert (await store.lease_grant(1)).id != lease.id
        async with asyncio.timeout(5):
            gone = await anext(store.watch("a", start=Revision(first + 1)))
        assert gone.changes[0].item is None
    finally:
        await store.close()


async def test_the_files_are_for_the_owner_alone(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "state.db")
    await store.put("a", b"")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    await store.close()
    assert set(modes) == {"state.db", "state.db-wal", "state.db-shm", "state.db.lock"}
    assert set(modes.values()) == {0o600}


def begin_writer(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)


async def test_a_second_process_is_told_who_holds_the_data(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    process = begin_writer(path)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(Conflict, match=f"process {process.pid}") as refused:
            await SqliteStore.open(path)
        assert str(process.pid) in (refused.value.mend or "")
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        process.stdout.close()
    store = await SqliteStore.open(path)
    with pytest.raises(Conflict, match=f"process {os.getpid()}"):
        await SqliteStore.open(path)
    await store.close()


async def filled(path: Path) -> None:
    store = await SqliteStore.open(path)
    await store.txn([], [Put(f"k/{n:04}", bytes(200)) for n in range(1000)])
    await store.close()


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if not p.name.endswith(".lock")}


@pytest.mark.parametrize(("offset", "junk"), [(0, b"junk" * 10), (4096 * 3, b"\xa5" * 4096), (4096 * 20, bytes(8192))])
async def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path: Path, offset: int, junk: bytes) -> None:
    path = tmp_path / "state.db"
    await filled(path)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(junk)
    before = digests(tmp_path)
    for _ in range(2):
        with pytest.raises(Corrupt, match=r"state\.db is damaged") as error:
            await SqliteStore.open(path)
        assert "backup" in (error.value.mend or "")
        assert digests(tmp_path) == before


async def test_a_cut_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await filled(path)
    os.truncate(path, 4096 * 10 + 100)
    before = digests(tmp_path)
    with pytest.raises(Corrupt):
        await SqliteStore.open(path)
    assert digests(tmp_path) == before


async def test_data_of_a_newer_atoll_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await filled(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(Unsupported, match="schema 99"):
        await SqliteStore.open(path)


async def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    with pytest.raises(Unsupported, match="another program"):
        await SqliteStore.open(path)


async def test_a_path_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="file"):
        await SqliteStore.open(tmp_path / "file" / "state.db")


async def test_history_keeps_to_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path, history_revisions_max=100, history_bytes_max=200_000)
    try:
        await asyncio.gather(*(store.put("a", bytes(10)) for _ in range(3000)))
        await asyncio.gather(*(store.put("b", bytes(50_000)) for _ in range(40)))
    finally:
        await store.close()
    connection = sqlite3.connect(path)
    count, size = connection.execute("SELECT count(*), sum(length(changes)) FROM history").fetchone()
    connection.close()
    assert count <= 1100
    assert size <= 300_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "atoll-test", str(disk)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.system
async def test_a_full_disk_refuses_writes_keeps_reads_and_recovers(small_disk: Path) -> None:
    path = small_disk / "state.db"
    ballast = small_disk / "ballast"
    store = await SqliteStore.open(path)
    try:
        await store.put("kept", b"1")
        ballast.write_bytes(bytes(1 << 20))
        acknowledged: list[int] = []
        with pytest.raises(Unavailable, match="full") as refused:
            await write_until_refused(store, acknowledged)
        assert "make room" in (refused.value.mend or "")
        before = await store.revision()
        item = await store.get("kept")
        assert item is not None
        for _ in range(3):
            with pytest.raises(Unavailable):
                await store.txn([], [Put("x", bytes(500_000)), Put("y", b"")])
        assert await store.get("y") is None
        assert await store.revision() == before
        ballast.unlink()
        assert await store.put("again", b"2") == before + 1
        assert len((await store.range("k/")).items) == len(acknowledged)
        last = [b.revision async for b in limited(store, Revision(1), before + 1)][-1]
        assert last == before + 1
    finally:
        await store.close()
    store = await SqliteStore.open(path)
    assert len((await store.range("k/")).items) == len(acknowledged)
    await store.close()


async def write_until_refused(store: SqliteStore, acknowledged: list[int]) -> None:
    for n in range(200):
        await store.put(f"k/{n:03}", bytes(20_000))
        acknowledged.append(n)


async def limited(store: SqliteStore, start: Revision, end: int) -> AsyncIterator[WatchBatch]:
    expected = start
    async for batch in store.watch("", start=start):
        assert batch.revision == expected, "a gap"
        expected = Revision(expected + 1)
        yield batch
        if batch.revision >= end:
            return


@pytest.mark.system
async def test_a_store_that_cannot_be_made_leaves_nothing(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes((2 << 20) - 3 * 4096))
    with pytest.raises(Unavailable, match=r"full"):
        await SqliteStore.open(small_disk / "state.db")
    assert {p.name for p in small_disk.iterdir()} <= {"ballast", "state.db.lock"}
    (small_disk / "ballast").unlink()
    store = await SqliteStore.open(small_disk / "state.db")
    await store.put("a", b"")
    await store.close()


async def test_writes_that_come_together_share_their_commits(tmp_path: Path) -> None:
    """One by one they are as fast as the disk flushes; together far faster. (`bench api` measures; here a busy disk has room.)"""
    store = await SqliteStore.open(tmp_path / "state.db")
    began = time.perf_counter()
    await asyncio.gather(*(store.put(f"k/{n}", bytes(800)) for n in range(2_000)))
    spent_s = time.perf_counter() - began
    await store.close()
    assert spent_s < 4


FILE_LIMIT = """
import asyncio, resource, signal, sys
from pathlib import Path
from atoll.model.errors import AtollError
from atoll.store.sqlite import SqliteStore

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    await store.put("first", b"1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    refused = acknowledged = 0
    for n in range(40):
        try:
            await store.put(f"k/{n:02}", bytes(20_000))
            acknowledged += 1
        except AtollError as error:
            refused += 1
            code = error.code
    newest = await store.revision()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = await store.put("after", b"2")
    there = len((await store.range("k/")).items)
    print(acknowledged, refused, there, code, after - newest)
    await store.close()

asyncio.run(main())
"""


async def test_a_commit_that_the_disk_breaks_off_says_that_its_outcome_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    done = run_limited(path)
    assert done.returncode == 0, done.stderr
    acknowledged, refused, there, code, step = done.stdout.splitlines()[-1].split()
    assert int(refused) > 0
    assert (int(acknowledged), code, step) == (int(there), "outcome-unknown", "1")
    store = await SqliteStore.open(path)
    items = (await store.range("")).items
    assert len(items) == int(acknowledged) + 2
    assert [b.revision async for b in limited(store, Revision(1), len(items))] == list(range(1, len(items) + 1))
    await store.close()


def run_limited(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", FILE_LIMIT, str(path)], capture_output=True, text=True, timeout=DEADLINE_S)
