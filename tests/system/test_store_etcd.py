"""The etcd store when members end badly, are stopped, cut off or set up wrongly; and its users and certificates."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aetcd import rpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from atoll.control.keeping import ThreadKeeper
from atoll.control.leader import LEASE_S, Term, check, lead
from atoll.model import keys
from atoll.model.errors import (
    Compacted,
    Conflict,
    Corrupt,
    Forbidden,
    Invalid,
    NotFound,
    OutcomeUnknown,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.store import VALUE_BYTES_MAX, Consistency, Delete, Put, Revision, WatchBatch
from atoll.store.etcd.address import EtcdAddress, load, members_of
from atoll.store.etcd.keeping import EtcdLeaseKeeper
from atoll.store.etcd.private import PrivateEtcd
from atoll.store.etcd.store import FILLING, EtcdStore

DEADLINE_S = 30
pytestmark = pytest.mark.skipif(shutil.which("etcd") is None, reason="there is no etcd on this machine")


@pytest.fixture
def cluster() -> Iterator[PrivateEtcd]:
    with PrivateEtcd(3) as etcd:
        yield etcd


@pytest.fixture(scope="module")
def single() -> Iterator[PrivateEtcd]:
    with PrivateEtcd() as etcd:
        yield etcd


@pytest.fixture
async def store(single: PrivateEtcd) -> AsyncIterator[EtcdStore]:
    opened = await EtcdStore.open(single.address)
    await opened.txn([], [Delete("", prefix=True)])
    yield opened
    await opened.close()


class Load:
    """Writers that count up, each under its own prefix, and remember what was acknowledged and what may be there."""

    def __init__(self, store: EtcdStore) -> None:
        self._store = store
        self.acknowledged: set[str] = set()
        self.unknown: set[str] = set()
        self.refused: set[str] = set()
        self._more = asyncio.Event()

    async def write(self, who: int) -> None:
        n = 0
        while True:
            key = f"w/{who}/{n:05}"
            try:
                await self._store.put(key, key.encode())
                self.acknowledged.add(key)
                self._more.set()
            except OutcomeUnknown:
                self.unknown.add(key)
            except Unavailable:
                self.refused.add(key)
            n += 1

    async def reach(self, count: int) -> None:
        while len(self.acknowledged) < count:
            self._more.clear()
            await self._more.wait()

    def check(self, there: set[str]) -> None:
        assert self.acknowledged <= there, "an acknowledged write is lost"
        assert there <= self.acknowledged | self.unknown, "a write is there that was refused"


async def seen(watch: AsyncIterator[WatchBatch], start: int, until: int) -> set[str]:
    """Follow a watch of everything and return the keys, checking that no revision is missing and none comes twice."""
    found: set[str] = set()
    expected = start
    async for batch in watch:
        assert batch.revision == expected, "a gap, or a revision out of its order"
        expected += 1
        found.update(change.key for change in batch.changes)
        if batch.revision == until:
            break
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_nothing_acknowledged_is_lost_when_the_leading_member_ends(cluster: PrivateEtcd, how: signal.Signals) -> None:
    leader = cluster.leader()
    # The member in use is first the leader itself.
    order = [leader, *(n for n in range(3) if n != leader)]
    store = await EtcdStore.open(EtcdAddress(tuple(cluster.target(n) for n in order)))
    start = await store.revision() + 1
    following = asyncio.create_task(seen(store.watch("", start=Revision(start)), start, 1 << 60))
    load = Load(store)
    async with asyncio.timeout(DEADLINE_S):
        writers = [asyncio.create_task(load.write(who)) for who in range(8)]
        await load.reach(500)
        cluster.signal(leader, how)
        await load.reach(len(load.acknowledged) + 500)
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        # What was under way may still come, or be one that was broken off by us.
        await store.put("last", b"")
        newest = await store.revision()
        there = {item.key for item in (await store.range("w/")).items}
        following.cancel()
        watched = await seen(store.watch("", start=Revision(start)), start, newest)
    load.unknown |= there - load.acknowledged - load.refused
    load.check(there)
    assert watched == there | {"last"}
    assert not load.refused, "while most members run, writes wait for the new leader"
    await store.close()


async def test_a_watch_goes_on_at_another_member_without_a_gap(cluster: PrivateEtcd) -> None:
    store = await EtcdStore.open(cluster.address)
    start = await store.revision() + 1
    following = asyncio.create_task(seen(store.watch("", start=Revision(start)), start, start + 299))
    async with asyncio.timeout(DEADLINE_S):
        for n in range(300):
            if n == 100:
                cluster.kill(0)
            if n == 200:
                cluster.start(0)
            while True:
                try:
                    done = await store.txn([], [Put(f"a/{n:03}", b"")])
                    break
                except OutcomeUnknown:
                    if await store.get(f"a/{n:03}") is not None:
                        break
        assert done.revision >= start + 299
        assert await following == {f"a/{n:03}" for n in range(300)}
    await store.close()


async def test_a_silent_member_is_left_within_seconds(cluster: PrivateEtcd) -> None:
    store = await EtcdStore.open(cluster.address)
    start = Revision(await store.revision() + 1)
    waiting = asyncio.ensure_future(anext(store.watch("a/", start=start)))
    await asyncio.sleep(0.1)
    cluster.signal(0, signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        assert await store.get("nothing") is None
        while True:
            try:
                await store.put("a/1", b"")
                break
            except OutcomeUnknown:
                continue
        assert (await waiting).changes[0].key == "a/1"
    await store.close()


async def test_a_minority_refuses_writes_and_forgets_none(cluster: PrivateEtcd) -> None:
    left = next(n for n in range(3) if n != cluster.leader())
    store = await EtcdStore.open(EtcdAddress((cluster.target(left),)))
    await store.put("before", b"1")
    others = [n for n in range(3) if n != left]
    for n in others:
        cluster.kill(n)
    calls = (store.put("cut-off/0", b""), store.put("cut-off/1", b""), store.get("before"))
    *refused, unread = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(unread, Unavailable)
    async with asyncio.timeout(DEADLINE_S):
        item = await store.get("before", consistency=Consistency.SERIALIZABLE)
        page = await store.range("b", consistency=Consistency.SERIALIZABLE)
        then = await store.range("b", at=page.revision, consistency=Consistency.SERIALIZABLE)
    assert item is not None
    assert item.value == b"1", "one member alone gives what it has to who asks for no more"
    assert page.items == then.items == (item,)
    with pytest.raises(Unavailable):
        await store.range("b", at=page.revision)
    assert all(isinstance(cause, (Unavailable, OutcomeUnknown)) for cause in refused), refused
    for n in others:
        cluster.start(n)
    cluster.wait()
    async with asyncio.timeout(DEADLINE_S):
        item = await store.get("before")
        there = [item.key for item in (await store.range("cut-off/")).items]
    assert item is not None
    for n, cause in enumerate(refused):
        assert f"cut-off/{n}" not in there or isinstance(cause, OutcomeUnknown)
    await store.put("after", b"")
    await store.close()


async def test_without_any_member_all_calls_say_so_in_time() -> None:
    with PrivateEtcd() as etcd:
        store = await EtcdStore.open(etcd.address)
        etcd.kill(0)
        async with asyncio.timeout(DEADLINE_S):
            calls = (store.put("a", b""), store.get("a"), store.lease_grant(5), anext(store.watch("", start=Revision(1))))
            for answer in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(answer, (Unavailable, OutcomeUnknown)), answer
            with pytest.raises(Unavailable, match="does not answer"):
                await EtcdStore.open(etcd.address)
        await store.close()


async def test_leases_outlive_the_leading_member_and_its_keys_go_when_nobody_keeps_them(cluster: PrivateEtcd) -> None:
    store = await EtcdStore.open(cluster.address)
    kept, left = await store.lease_grant(5), await store.lease_grant(2)
    await store.txn([], [Put("kept", b"", kept.id), Put("left", b"", left.id)])
    cluster.kill(cluster.leader())
    start = Revision(await store.revision() + 1)
    async with asyncio.timeout(DEADLINE_S):
        await store.lease_keep_alive(kept.id)
        gone = await anext(store.watch("left", start=start))
    assert gone.changes[0].item is None
    await store.lease_keep_alive(kept.id)
    assert await store.get("kept") is not None
    await store.close()


async def test_a_watch_that_is_behind_a_compaction_says_so(store: EtcdStore) -> None:
    first = await store.put("a", b"")
    watch = store.watch("", start=first)
    await anext(watch)
    await watch.aclose()  # type: ignore[attr-defined]
    for n in range(20):
        await store.put("a", str(n).encode())
    await store.compact(Revision(first + 10))
    with pytest.raises(Compacted):
        await anext(store.watch("", start=Revision(first + 1)))
    assert (await anext(store.watch("", start=Revision(first + 10)))).revision == first + 10


async def test_a_deletion_at_the_oldest_revision_is_not_left_out(store: EtcdStore) -> None:
    await store.put("a", b"1")
    gone = await store.delete("a")
    await store.put("b", b"")
    await store.compact(gone)
    batch = await anext(store.watch("", start=gone))
    assert (batch.revision, batch.changes[0].key, batch.changes[0].item) == (gone, "a", None)
    assert batch.changes[0].previous is not None
    assert batch.changes[0].previous.value == b"1"


async def test_the_history_keeps_to_its_bound(single: PrivateEtcd) -> None:
    store = await EtcdStore.open(single.address, history_revisions_max=100)
    first = await store.put("a", b"")
    await asyncio.gather(*(store.put("a", b"") for _ in range(1_200)))
    await store.trim()
    await store.trim()
    newest = await store.revision()
    with pytest.raises(Compacted):
        await anext(store.watch("", start=first))
    assert (await anext(store.watch("", start=Revision(newest - 100)))).revision == newest - 100
    await store.close()


async def test_one_large_revision_is_one_batch_and_large_listings_come_in_parts(store: EtcdStore) -> None:
    start = Revision(await store.revision() + 1)
    revisions = []
    for part in range(9):
        ops = [Put(f"big/{part}/{n}", bytes([n]) * VALUE_BYTES_MAX) for n in range(9)]
        revisions.append((await store.txn([], ops)).revision)
    watch = store.watch("big/", start=start)
    for revision in revisions:
        batch = await anext(watch)
        assert (batch.revision, len(batch.changes)) == (revision, 9)
    page = await store.range("big/")
    assert [item.value[:1] for item in page.items] == [bytes([n]) for n in range(9)] * 9
    assert not page.more


async def test_what_is_over_etcds_own_limit_is_refused_whole(store: EtcdStore) -> None:
    with pytest.raises(TooLarge, match="size of a transaction") as refused:
        await store.txn([], [Put(f"k/{n}", bytes(VALUE_BYTES_MAX)) for n in range(11)])
    assert "--max-request-bytes" in (refused.value.mend or "")
    assert (await store.range("k/")).items == ()


async def test_a_member_that_takes_only_small_transactions_is_refused_at_once() -> None:
    with PrivateEtcd(flags="") as etcd:
        with pytest.raises(Unsupported, match="4096 operations") as refused:
            await EtcdStore.open(etcd.address)
    assert "--max-txn-ops=4096" in (refused.value.mend or "")


async def test_an_etcd_that_is_being_filled_is_not_opened(single: PrivateEtcd, store: EtcdStore) -> None:
    await store.put("kept", b"")
    await store.members.call(lambda m: m.kv.Put, rpc.PutRequest(key=FILLING, value=b"x"), repeat=False)
    try:
        with pytest.raises(Conflict, match="being filled"):
            await EtcdStore.open(single.address)
        assert [item.key for item in (await store.range("")).items] == ["kept"], (
            "what the store keeps for itself shows in no listing"
        )
    finally:
        await store.members.call(lambda m: m.kv.DeleteRange, rpc.DeleteRangeRequest(key=FILLING), repeat=False)


async def test_anothers_key_is_named(single: PrivateEtcd, store: EtcdStore) -> None:
    assert single.control("put", "--", b"\xff\xfe".decode("utf-8", "surrogateescape"), "x").returncode == 0
    try:
        with pytest.raises(Corrupt, match="not Atoll's"):
            await store.range("")
    finally:
        assert single.control("del", "--", b"\xff\xfe".decode("utf-8", "surrogateescape")).stdout == "1\n"


async def test_users_and_passwords() -> None:
    with PrivateEtcd() as etcd:
        for command in ("user add root:r00t", "role add atoll", "user add atoll:secret", "user grant-role atoll atoll"):
            assert etcd.control(*command.split()).returncode == 0, command
        assert etcd.control("user", "add", "nobody:secret").returncode == 0
        assert etcd.control("role", "grant-permission", "atoll", "readwrite", "--from-key", "").returncode == 0
        assert etcd.control("user", "grant-role", "root", "root").returncode == 0
        with pytest.raises(Unauthenticated, match="knows no users"):
            await EtcdStore.open(EtcdAddress(etcd.address.members, user="atoll", password="secret"))
        assert etcd.control("auth", "enable").returncode == 0
        with pytest.raises(Unauthenticated, match="user name is empty"):
            await EtcdStore.open(etcd.address)
        with pytest.raises(Unauthenticated, match="invalid user ID or password") as refused:
            await EtcdStore.open(EtcdAddress(etcd.address.members, user="atoll", password="wrong"))
        assert "wrong" not in str(refused.value)
        with pytest.raises(Forbidden, match="permission denied"):
            await EtcdStore.open(EtcdAddress(etcd.address.members, user="nobody", password="secret"))
        address = EtcdAddress(etcd.address.members, user="atoll", password="secret")
        assert "secret" not in repr(address)
        store = await EtcdStore.open(address)
        start = await store.put("a", b"")
        assert (await anext(store.watch("", start=start))).revision == start
        # A member that starts again knows no token of before.
        etcd.kill(0)
        etcd.start(0)
        async with asyncio.timeout(DEADLINE_S):
            assert await store.get("a") is not None
            await store.put("b", b"")
            assert (await anext(store.watch("b", start=Revision(1)))).changes[0].key == "b"
        await store.close()


def authority(name: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    return key, certificate(name, key.public_key(), key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), is_ca=True)


def certificate(
    name: str, public: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePrivateKey, issuer: x509.Name, *, is_ca: bool = False
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signer, hashes.SHA256())
    )


def write_pair(directory: Path, name: str, ca: tuple[ec.EllipticCurvePrivateKey, x509.Certificate]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    made = certificate(name, key.public_key(), ca[0], ca[1].subject)
    (directory / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / f"{name}-key.pem").write_bytes(pem)


async def test_members_and_clients_show_certificates(tmp_path: Path) -> None:
    ours, foreign = authority("ours"), authority("foreign")
    for name, ca in (("ca", ours), ("foreign-ca", foreign)):
        (tmp_path / f"{name}.pem").write_bytes(ca[1].public_bytes(serialization.Encoding.PEM))
    write_pair(tmp_path, "member", ours)
    write_pair(tmp_path, "client", ours)
    write_pair(tmp_path, "stranger", foreign)
    files = {"ca": tmp_path / "ca.pem", "cert": tmp_path / "client.pem", "key": tmp_path / "client-key.pem"}
    stranger = {"cert": tmp_path / "stranger.pem", "key": tmp_path / "stranger-key.pem"}
    with PrivateEtcd(certificates=tmp_path) as etcd:
        store = await EtcdStore.open(load(etcd.url, **files))
        await store.put("a", b"")
        await store.close()
        for refused in (
            load(etcd.url),
            load(etcd.url, ca=files["ca"]),
            load(etcd.url, **{**files, "ca": tmp_path / "foreign-ca.pem"}),
            load(etcd.url, **{**files, **stranger}),
        ):
            with pytest.raises(Unavailable, match="does not answer"):
                await EtcdStore.open(refused)


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("etcd://a", ("a:2379",)),
        ("etcd://a:1,b:2,c/", ("a:1", "b:2", "c:2379")),
        ("etcd://[::1],[::1]:99", ("[::1]:2379", "[::1]:99")),
    ],
)
async def test_addresses_of_members(text: str, members: tuple[str, ...]) -> None:
    assert members_of(text) == members


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://a",
        "etcd://",
        "etcd://a,,b",
        "etcd://a:x",
        "etcd://a:0",
        "etcd://u:secret@a",
        "etcd://a,a:2379",
        "etcd://a/b",
        "etcd://::1",
    ],
)
async def test_bad_addresses_are_refused_and_no_password_repeated(text: str) -> None:
    with pytest.raises(Invalid) as refused:
        members_of(text)
    assert "secret" not in str(refused.value)


async def test_half_of_a_pair_of_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for given, field in (
        ({"cert": file}, "store-cert"),
        ({"cert": file, "key": file}, "store-ca"),
        ({"ca": file}, "store-ca"),
        ({"user": "u"}, "store-user"),
        ({"user": "u", "password_file": file}, "store-password-file"),
    ):
        with pytest.raises(Invalid) as refused:
            load("etcd://a", **given)  # type: ignore[arg-type]
        assert refused.value.field == field


async def test_a_leader_whose_event_loop_is_busy_for_longer_than_its_lease_leads_on(single: PrivateEtcd, store: EtcdStore) -> None:
    terms: list[Term] = []
    affirmed = [0.0]
    begun = asyncio.Event()

    async def work(term: Term) -> None:
        terms.append(term)
        begun.set()
        await asyncio.Event().wait()

    keep = ThreadKeeper(lambda: EtcdLeaseKeeper(single.address), SystemClock()).keep
    leading = asyncio.create_task(lead(store, SystemClock(), "busy", work, affirmed.append, keep=keep))
    try:
        async with asyncio.timeout(DEADLINE_S):
            await begun.wait()
        time.sleep(LEASE_S + 2.0)  # noqa: ASYNC251 (to hold the loop up is what this is about)
        assert affirmed[-1] > time.monotonic(), "while it was held up, nobody else could lead"
        await check(store, terms[0])
        await asyncio.sleep(1.0)
        assert len(terms) == 1
    finally:
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
    assert await store.get(keys.LEADER) is None, "an orderly end gives the lease up"


async def test_a_lease_that_is_gone_is_not_kept_alive_and_nor_is_any_where_no_member_answers(
    single: PrivateEtcd, store: EtcdStore
) -> None:
    lease = (await store.lease_grant(60.0)).id
    keeper, lost = EtcdLeaseKeeper(single.address), EtcdLeaseKeeper(EtcdAddress(("127.0.0.1:1",)))
    for _ in range(2):
        await asyncio.to_thread(keeper.keep_alive, lease, 5.0)
    await store.lease_revoke(lease)
    with pytest.raises(NotFound):
        await asyncio.to_thread(keeper.keep_alive, lease, 5.0)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await asyncio.to_thread(lost.keep_alive, lease, 0.3)
    for one in (keeper, lost):
        one.close()


async def test_a_lease_is_kept_alive_though_the_member_that_was_asked_ends(cluster: PrivateEtcd) -> None:
    opened = await EtcdStore.open(cluster.address)
    lease = (await opened.lease_grant(60.0)).id
    keeper = EtcdLeaseKeeper(cluster.address)
    await asyncio.to_thread(keeper.keep_alive, lease, 5.0)
    cluster.kill(0)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.to_thread(keeper.keep_alive, lease, float(DEADLINE_S))
    keeper.close()
    await opened.close()
