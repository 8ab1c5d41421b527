"""Backups, restores and moves between stores: what arrives is what was there, and what is damaged or in use changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aetcd import rpc

from atoll.entry.scratch import free_port
from atoll.model import codec, keys
from atoll.model.errors import Compacted, Conflict, Corrupt, NotFound, Unavailable, Unsupported
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.store import Delete, KeyValue, LeaseId, Put, Revision, Store
from atoll.model.records import Project
from atoll.store.backup import FORMAT, BackupSnapshot, write_backup
from atoll.store.etcd.filling import Filling
from atoll.store.etcd.private import PrivateEtcd
from atoll.store.etcd.store import FILLING, EtcdStore
from atoll.store.migrate import Filled, fill, migrate, snapshot_of
from atoll.store.place import Place, open_place
from atoll.store.snapshot import SqliteSnapshot, digest_of
from atoll.store.sqlite import SqliteStore

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="there is no etcd on this machine")
DEADLINE_S = 30
VALUES = {
    **{f"apps/p/{n:04}": bytes([n % 256]) * (n * 7 % 900) for n in range(1500)},
    "projects/é\U0010ffff": b"",
    "big/1": os.urandom(1 << 20),
    "big/2": bytes(1 << 20),
}


@pytest.fixture(scope="module")
def etcd() -> Iterator[PrivateEtcd]:
    with PrivateEtcd() as etcd:
        yield etcd


@pytest.fixture
async def empty_etcd(etcd: PrivateEtcd) -> AsyncIterator[Place]:
    await emptied(etcd)
    yield etcd.address
    await emptied(etcd)


async def emptied(etcd: PrivateEtcd) -> None:
    store = await EtcdStore.open(etcd.address, filling=True)
    await store.members.call(lambda m: m.kv.DeleteRange, rpc.DeleteRangeRequest(key=FILLING), repeat=True)
    await store.txn([], [Delete("", prefix=True)])
    await store.close()


async def filled(path: Path) -> Place:
    """A store with values, deletions and a lease that holds two keys."""
    store = await SqliteStore.open(path)
    for key in [key for key in VALUES if key.startswith("apps/p/00")]:
        await store.put(key, b"before")
    for start in range(0, len(VALUES), 500):
        await store.txn([], [Put(key, value) for key, value in list(VALUES.items())[start : start + 500]])
    lease = await store.lease_grant(600)
    await store.txn([], [Put("requests/1", b"1", lease.id), Put("requests/2", b"2", lease.id), Put("gone", b"")])
    await store.delete("gone")
    await store.close()
    return path


async def everything(store: Store) -> dict[str, KeyValue]:
    return {item.key: item for item in (await store.range("")).items}


async def check_arrived(place: Place, done: Filled) -> dict[str, KeyValue]:
    store = await open_place(place, SystemClock())
    try:
        items = await everything(store)
        assert {key: item.value for key, item in items.items()} == {**VALUES, "requests/1": b"1", "requests/2": b"2"}
        assert await store.revision() >= done.to_revision
        lease = items["requests/1"].lease
        assert lease != 0
        assert [item.lease for item in items.values() if item.lease] == [lease, lease]
        await store.lease_keep_alive(lease)
        await store.lease_revoke(lease)
        assert await store.get("requests/2") is None
        assert await store.put("after", b"") > done.to_revision
        if isinstance(place, Path):
            with pytest.raises(Compacted):
                await anext(store.watch("", start=Revision(1)))
        return items
    finally:
        await store.close()


@needs_etcd
async def test_everything_moves_from_sqlite_to_etcd_and_back(tmp_path: Path, empty_etcd: Place) -> None:
    source = await filled(tmp_path / "state.db")
    before = {item.key: item async for item in SqliteSnapshot(tmp_path / "state.db").items()}
    done = await migrate(source, empty_etcd)
    assert done.content.items == len(VALUES) + 2
    back = await migrate(empty_etcd, tmp_path / "back.db")
    assert back.content == done.content
    await check_arrived(empty_etcd, done)
    await check_arrived(tmp_path / "back.db", back)
    # The source is as it was, and can still be opened.
    assert {item.key: item async for item in SqliteSnapshot(tmp_path / "state.db").items()} == before


async def test_a_restored_file_has_every_revision_that_it_had(tmp_path: Path) -> None:
    source = await filled(tmp_path / "state.db")
    async with snapshot_of(source, offline=False) as snapshot:
        digest = await write_backup(snapshot, tmp_path / "backup", now=1_000.0)
    done = await fill(tmp_path / "new.db", BackupSnapshot.open(tmp_path / "backup"))
    assert (done.content, done.from_revision) == (digest, done.to_revision)
    with SqliteSnapshot(tmp_path / "state.db") as old, SqliteSnapshot(tmp_path / "new.db") as new:
        assert old.revision == new.revision
        assert [item async for item in old.items()] == [item async for item in new.items()]
        assert list(old.leases.values()) == list(new.leases.values())
    await check_arrived(tmp_path / "new.db", done)
    left = {p.name for p in tmp_path.iterdir()} - {"state.db-wal", "state.db-shm"}
    assert left == {"state.db", "state.db.lock", "backup", "new.db", "new.db.lock"}
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o600


@needs_etcd
async def test_a_backup_of_etcd_is_restored_into_etcd(tmp_path: Path, etcd: PrivateEtcd, empty_etcd: Place) -> None:
    await migrate(await filled(tmp_path / "state.db"), empty_etcd)
    async with snapshot_of(empty_etcd, offline=False) as snapshot:
        digest = await write_backup(snapshot, tmp_path / "backup", now=1_000.0)
    await emptied(etcd)
    done = await fill(empty_etcd, BackupSnapshot.open(tmp_path / "backup"))
    assert done.content == digest
    await check_arrived(empty_etcd, done)


async def test_a_backup_is_taken_while_the_store_is_written_to(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "state.db")
    writing = True

    async def write() -> None:
        n = 0
        while writing:
            await store.txn([], [Put("a", str(n).encode()), Put("b", str(n).encode()), Put(f"k/{n % 50}", b"x" * 1000)])
            n += 1

    task = asyncio.create_task(write())
    await asyncio.sleep(0.05)
    for n in range(5):
        async with snapshot_of(tmp_path / "state.db", offline=False) as snapshot:
            await write_backup(snapshot, tmp_path / f"backup-{n}", now=1.0)
        await asyncio.sleep(0.02)
    writing = False
    await task
    await store.close()
    for n in range(5):
        backup = BackupSnapshot.open(tmp_path / f"backup-{n}")
        items = {item.key: item async for item in backup.items()}
        assert items["a"].value == items["b"].value
        assert backup.revision == max(item.mod_revision for item in items.values())


@pytest.fixture
async def backup(tmp_path: Path) -> Path:
    async with snapshot_of(await filled(tmp_path / "state.db"), offline=True) as snapshot:
        await write_backup(snapshot, tmp_path / "backup", now=1_000.0)
    return tmp_path / "backup"


@pytest.mark.parametrize("where", [0.0, 0.0001, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("how", ["flip", "cut", "zero"])
async def test_a_damaged_backup_is_refused_and_changes_nothing(tmp_path: Path, backup: Path, where: float, how: str) -> None:
    data = bytearray(backup.read_bytes())
    place = int(where * (len(data) - 1))
    match how:
        case "flip":
            data[place] ^= 0x10
        case "cut":
            del data[place:]
        case "zero":
            data[place : place + 64] = bytes(64)
    backup.write_bytes(data)
    with pytest.raises((Corrupt, Unsupported), match="backup"):
        await fill(tmp_path / "new.db", BackupSnapshot.open(backup))
    assert not (tmp_path / "new.db").exists()


async def test_backups_of_another_kind_are_refused(tmp_path: Path, backup: Path) -> None:
    newer = tmp_path / "newer"
    newer.write_bytes(FORMAT + b"2\n" + backup.read_bytes())
    with pytest.raises(Unsupported, match="format 2"):
        BackupSnapshot.open(newer)
    longer = tmp_path / "longer"
    longer.write_bytes(backup.read_bytes() + backup.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(Corrupt, match="checksum"):
        BackupSnapshot.open(longer)
    with pytest.raises(Unsupported, match="no backup"):
        BackupSnapshot.open(tmp_path / "state.db")
    with pytest.raises(NotFound):
        BackupSnapshot.open(tmp_path / "nothing")
    with pytest.raises(Unavailable):
        BackupSnapshot.open(tmp_path)


async def test_a_backup_replaces_no_file(tmp_path: Path, backup: Path) -> None:
    before = hashlib.sha256(backup.read_bytes()).digest()
    with SqliteSnapshot(tmp_path / "state.db") as snapshot:
        with pytest.raises(Conflict, match="exists"):
            await write_backup(snapshot, backup, now=1.0)
    assert hashlib.sha256(backup.read_bytes()).digest() == before


async def test_a_store_in_use_or_not_empty_is_refused(tmp_path: Path, backup: Path) -> None:
    path = tmp_path / "state.db"
    with pytest.raises(Conflict, match="not empty"):
        await fill(path, BackupSnapshot.open(backup))
    store = await SqliteStore.open(path)
    for call in (migrate(path, tmp_path / "new.db"), fill(path, BackupSnapshot.open(backup))):
        with pytest.raises(Conflict, match=f"process {os.getpid()}"):
            await call
    await store.close()
    with pytest.raises(Conflict, match="itself"):
        await migrate(path, path)
    with pytest.raises(NotFound):
        await migrate(tmp_path / "nothing.db", tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()
    assert not (tmp_path / "nothing.db").exists()


@needs_etcd
async def test_an_etcd_in_use_or_not_empty_is_refused(tmp_path: Path, backup: Path, etcd: PrivateEtcd, empty_etcd: Place) -> None:
    store = await EtcdStore.open(etcd.address)
    lease = await store.lease_grant(60)
    await store.put(keys.LEADER, b"n1", lease=lease.id)
    with pytest.raises(Conflict, match="not empty"):
        await migrate(tmp_path / "state.db", empty_etcd)
    with pytest.raises(Conflict, match="not empty"):
        await fill(empty_etcd, BackupSnapshot.open(backup))
    with pytest.raises(Conflict, match="server n1 leads"):
        await migrate(empty_etcd, tmp_path / "new.db")
    assert [item.key for item in (await store.range("")).items] == [keys.LEADER]
    assert not (tmp_path / "new.db").exists()
    await store.close()


async def put_lasting(store: EtcdStore) -> None:
    await store.put("apps/p/0001", b"after")


async def put_leased(store: EtcdStore) -> None:
    await store.put("servers/late", b"", lease=(await store.lease_grant(60)).id)


async def delete_lasting(store: EtcdStore) -> None:
    await store.delete("apps/p/0001")


@needs_etcd
@pytest.mark.parametrize("change", [put_lasting, put_leased, delete_lasting])
async def test_an_etcd_that_was_written_to_meanwhile_is_not_moved_and_nothing_serves_from_the_target(
    tmp_path: Path, etcd: PrivateEtcd, empty_etcd: Place, change: Callable[[EtcdStore], Awaitable[object]]
) -> None:
    await migrate(await filled(tmp_path / "state.db"), empty_etcd)
    store = await EtcdStore.open(etcd.address)
    with PrivateEtcd() as other:
        for target in (tmp_path / "new.db", other.address):
            async with snapshot_of(empty_etcd, offline=True) as snapshot:
                await change(store)
                with pytest.raises(Conflict, match="written to meanwhile"):
                    await fill(target, snapshot)
            await store.put("apps/p/0001", b"there")
        with pytest.raises(Conflict, match="being filled"):
            await EtcdStore.open(other.address)
        done = await migrate(empty_etcd, other.address)  # again, to its end
        assert done.content.items >= len(VALUES)
        await (await EtcdStore.open(other.address)).close()
    assert not (tmp_path / "new.db").exists()
    await store.close()


@needs_etcd
async def test_leases_that_run_out_while_an_etcd_is_moved_away_stop_nothing(
    tmp_path: Path, etcd: PrivateEtcd, empty_etcd: Place
) -> None:
    store = await EtcdStore.open(etcd.address)
    await store.put("apps/p/1", b"stays")
    lease = await store.lease_grant(60)
    await store.put("servers/s1", b"killed", lease=lease.id)
    async with snapshot_of(empty_etcd, offline=True) as snapshot:
        await store.lease_revoke(lease.id)  # as its end would
        assert (await fill(tmp_path / "new.db", snapshot)).content.items == 2
    await store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_who_may_not_read_or_write_a_store_is_told_who_may(tmp_path: Path, backup: Path) -> None:
    path = tmp_path / "own" / "state.db"
    path.parent.mkdir(mode=0o700)
    path.write_bytes((tmp_path / "state.db").read_bytes())
    whole = BackupSnapshot.open(backup)
    os.seteuid(65_534)
    try:
        calls = [migrate(path, tmp_path / "new.db"), fill(path, whole), fill(path.parent / "below/new.db", whole)]
        for call in calls:
            with pytest.raises(Unavailable, match="Permission denied") as refused:
                await call
            assert "run as the user that owns" in (refused.value.mend or "")
        with pytest.raises(Unavailable, match="Permission denied"):
            SqliteSnapshot(path)
    finally:
        os.seteuid(0)


class BrokenOff:
    """A snapshot whose reader dies after some items."""

    def __init__(self, whole: BackupSnapshot) -> None:
        self._whole = whole
        self.revision: Revision = whole.revision
        self.leases: dict[LeaseId, float] = whole.leases

    async def items(self) -> AsyncIterator[KeyValue]:
        count = 0
        async for item in self._whole.items():
            count += 1
            if count == 900:
                raise Corrupt("broken off")
            yield item


@needs_etcd
async def test_a_move_that_was_broken_off_keeps_servers_away_and_begins_anew(
    tmp_path: Path, backup: Path, etcd: PrivateEtcd, empty_etcd: Place
) -> None:
    whole = BackupSnapshot.open(backup)
    for place in (empty_etcd, tmp_path / "new.db"):
        with pytest.raises(Corrupt, match="broken off"):
            await fill(place, BrokenOff(whole))
    assert not (tmp_path / "new.db").exists()
    with pytest.raises(Conflict, match="being filled"):
        await EtcdStore.open(etcd.address)
    done = await fill(empty_etcd, whole)
    await check_arrived(empty_etcd, done)


@needs_etcd
async def test_two_at_once_cannot_fill_one_etcd(backup: Path, etcd: PrivateEtcd, empty_etcd: Place) -> None:
    whole = BackupSnapshot.open(backup)
    store = await EtcdStore.open(etcd.address, filling=True)
    async with Filling(store) as first:
        async with Filling(store) as second:
            with pytest.raises(Conflict, match="another process"):
                await first.bring(whole)
            with pytest.raises(Conflict, match="another process"):
                await first.end()
            assert await second.bring(whole) == await digest_of(whole)
            await second.end()
    await store.close()


def atoll(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("ATOLL_")}
    command = [str(Path(sys.executable).with_name("atoll")), *arguments]
    return subprocess.run(command, env={**own, "NO_COLOR": "1", **environment}, capture_output=True, text=True, timeout=60)


@needs_etcd
async def test_the_commands(tmp_path: Path, etcd: PrivateEtcd, empty_etcd: Place) -> None:
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    await store.put(keys.project("shop"), codec.encode(Project(name="shop", created_at=1.0)))
    await store.close()
    where, file = f"sqlite:{path}", str(tmp_path / "b")
    done = atoll("store", "backup", file, "--json", ATOLL_STORE=where)
    assert (done.returncode, json.loads(done.stdout)["content"]["items"]) == (0, 1), done.stderr
    assert atoll("store", "backup", file, "--store", where).returncode == 6
    for what in ((file,), ("--store", where)):
        found = atoll("store", "check", *what, "--json")
        assert (found.returncode, json.loads(found.stdout)["found"]["kinds"]) == (0, {"projects": 1}), found.stderr
    moved = atoll("store", "migrate", "--from", where, "--to", etcd.url, "--json")
    assert (moved.returncode, json.loads(moved.stdout)["filled"]["content"]["items"]) == (0, 1), moved.stderr
    again = atoll("store", "migrate", "--from", where, "--to", etcd.url)
    assert (again.returncode, again.stderr.splitlines()[0]) == (
        6,
        "error: this etcd is not empty, or is being filled by another process",
    )
    restored = atoll("store", "restore", file, "--store", f"sqlite:{tmp_path / 'c.db'}")
    assert restored.returncode == 0, restored.stderr
    checked = atoll("store", "check", "--store", etcd.url)
    assert (checked.returncode, "leads" in checked.stderr) == (0, True), checked.stderr
    other = await SqliteStore.open(tmp_path / "c.db")
    await other.put(keys.project("bad"), b"{")
    await other.close()
    broken = atoll("store", "check", "--store", f"sqlite:{tmp_path / 'c.db'}")
    assert (broken.returncode, "1 records cannot be read: projects/bad" in broken.stderr) == (1, True)
    refused = atoll("store", "check", "--store", "etcd://user:secret@127.0.0.1")
    assert (refused.returncode, "secret" in refused.stdout + refused.stderr) == (2, False)
    assert "Traceback" not in broken.stderr + refused.stderr + again.stderr


class ServerProcess:
    """A private `atoll server` on some store."""

    def __init__(self, data: Path, store: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._data = data
        command = [
            sys.executable,
            "-m",
            "atoll.entry.server",
            f"--data={data}",
            f"--api={self.address}",
            "--node=n1",
            f"--store={store}",
        ]
        self._log = (data / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)

    async def __aenter__(self) -> httpx.AsyncClient:
        async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient() as probe:
            while True:
                assert self._process.poll() is None, (self._data / "log").read_text()
                try:
                    if (await probe.get(f"http://{self.address}/healthz")).status_code == 200:
                        break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        token = (self._data / "server" / "admin-token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        self._client = httpx.AsyncClient(base_url=f"http://{self.address}/v1", headers=headers, timeout=10)
        return self._client

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(DEADLINE_S)
        self._log.close()


async def instances(api: httpx.AsyncClient, count: int) -> None:
    """Return once the leader has made so many instances."""
    deadline = time.monotonic() + DEADLINE_S
    while len((await api.get("/projects/default/instances")).json()["items"]) < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


APP: dict[str, Any] = {"name": "web", "image": "registry.test/web@sha256:" + "0" * 64, "ports": [{"port": 8000}]}


@needs_etcd
async def test_a_server_moves_from_sqlite_to_a_cluster_of_etcd_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "server" / "state.db"
    async with ServerProcess(tmp_path, f"sqlite:{path}") as api:
        assert (await api.put("/projects/default/apps/web", json=APP)).status_code < 300
        assert (await api.get("/info")).json()["store"] == "sqlite"
    with PrivateEtcd(3) as cluster:
        await migrate(path, cluster.address)
        async with ServerProcess(tmp_path, cluster.url) as api:
            # The same token is good, and the leader's loops go on from what arrived.
            assert (await api.get("/info")).json()["store"] == "etcd"
            assert [view["app"]["name"] for view in (await api.get("/projects/default/apps")).json()["items"]] == ["web"]
            assert (await api.put("/projects/default/apps/second", json={**APP, "name": "second"})).status_code < 300
            await instances(api, 2)
            cluster.kill(cluster.leader())
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    answer = await api.put("/projects/default/apps/third", json={**APP, "name": "third"})
                    if answer.status_code < 300:
                        break
            await instances(api, 3)


@needs_etcd
def test_a_server_says_clearly_that_its_etcd_will_not_do(tmp_path: Path) -> None:
    with PrivateEtcd(flags="") as small:
        command = [sys.executable, "-m", "atoll.entry.server", f"--data={tmp_path}", f"--api=127.0.0.1:{free_port()}"]
        done = subprocess.run([*command, f"--store={small.url}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert "mend: start every member with --max-txn-ops=4096 --max-request-bytes=10485760" in done.stderr
    assert "Traceback" not in done.stderr
