"""What every store promises (`atoll.model.ports.store`), held against each that there is."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from atoll.model.errors import Compacted, Invalid, NotFound, TooLarge, Unavailable
from atoll.model.ports.store import (
    KEY_BYTES_MAX,
    RANGE_LIMIT_MAX,
    TXN_OPS_MAX,
    VALUE_BYTES_MAX,
    Change,
    Compare,
    Consistency,
    Delete,
    Get,
    LeaseId,
    Put,
    Revision,
    Store,
    Target,
    WatchBatch,
    absent,
    unchanged,
)
from atoll.store.etcd.private import PrivateEtcd
from atoll.store.etcd.store import EtcdStore
from atoll.store.memory import MemoryStore
from atoll.store.sqlite import SqliteStore

DEADLINE_S = 10


@pytest.fixture(scope="module")
def etcd_members() -> Iterator[dict[str, PrivateEtcd]]:
    """Real etcds on loopback, made when they are first asked for: one member alone, and a cluster of three."""
    with ExitStack() as stack:
        yield _Made(stack)


class _Made(dict[str, PrivateEtcd]):
    def __init__(self, stack: ExitStack) -> None:
        super().__init__()
        self._stack = stack

    def __missing__(self, name: str) -> PrivateEtcd:
        self[name] = self._stack.enter_context(PrivateEtcd({"etcd": 1, "etcd-cluster": 3}[name]))
        return self[name]


@pytest.fixture(params=["memory", "sqlite", "etcd", "etcd-cluster"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, etcd_members: dict[str, PrivateEtcd]) -> AsyncIterator[Store]:
    opened: Store
    match request.param:
        case "memory":
            opened = MemoryStore()
        case "sqlite":
            opened = await SqliteStore.open(tmp_path / "state.db")
        case _ if shutil.which("etcd") is None:
            pytest.skip("there is no etcd on this machine")
        case name:
            opened = await EtcdStore.open(etcd_members[name].address)
            await opened.txn([], [Delete("", prefix=True)])
    yield opened
    await opened.close()


async def take(watch: AsyncIterator[WatchBatch], count: int) -> list[Change]:
    """Return the next `count` changes."""
    found: list[Change] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(found) < count:
            found.extend((await anext(watch)).changes)
    return found


async def keys(store: Store, prefix: str) -> list[str]:
    return [item.key for item in (await store.range(prefix)).items]


async def test_a_written_value_is_read_back_with_its_revisions(store: Store) -> None:
    first = await store.put("a", b"1")
    second = await store.put("a", b"2")
    item = await store.get("a")
    assert item is not None
    assert (item.value, item.create_revision, item.mod_revision, item.version) == (b"2", first, second, 2)
    assert second == first + 1
    assert await store.revision() == second


async def test_an_absent_key_is_none_and_deleting_it_changes_nothing(store: Store) -> None:
    before = await store.revision()
    assert await store.get("a") is None
    assert await store.delete("a") == before
    assert await store.revision() == before


async def test_a_key_made_again_begins_at_version_one(store: Store) -> None:
    await store.put("a", b"1")
    await store.put("a", b"2")
    await store.delete("a")
    revision = await store.put("a", b"")
    item = await store.get("a")
    assert item is not None
    assert (item.value, item.create_revision, item.version) == (b"", revision, 1)


@pytest.mark.parametrize("key", ["", "a\0b", "x" * (KEY_BYTES_MAX + 1), "é" * (KEY_BYTES_MAX // 2 + 1), "\ud800"])
async def test_what_cannot_be_a_key_is_refused_by_every_call(store: Store, key: str) -> None:
    for call in (store.get(key), store.put(key, b""), store.delete(key), store.txn([absent(key)], [], [])):
        with pytest.raises(Invalid):
            await call
    if key:
        with pytest.raises(Invalid):
            await store.range(key)
        with pytest.raises(Invalid):
            await anext(store.watch(key, start=Revision(1)))


async def test_keys_and_values_up_to_their_bounds_are_kept(store: Store) -> None:
    for key in ("x" * KEY_BYTES_MAX, "é" * (KEY_BYTES_MAX // 2), "\U0010ffff", "a b\n/\x01"):
        await store.put(key, key.encode())
        item = await store.get(key)
        assert item is not None
        assert item.value == key.encode()
    await store.put("big", bytes(VALUE_BYTES_MAX))
    with pytest.raises(TooLarge):
        await store.put("big", bytes(VALUE_BYTES_MAX + 1))
    item = await store.get("big")
    assert item is not None
    assert len(item.value) == VALUE_BYTES_MAX


async def test_a_range_is_in_key_order_and_pages(store: Store) -> None:
    names = ["p/", "p/b", "p/a/1", "p/a", "p/é", "p/\U0010ffff", "p0", "o/z"]
    for name in names:
        await store.put(name, name.encode())
    inside = sorted((n for n in names if n.startswith("p/")), key=str.encode)
    assert await keys(store, "p/") == inside
    assert await keys(store, "") == sorted(names, key=str.encode)
    paged: list[str] = []
    after = ""
    while True:
        page = await store.range("p/", after=after, limit=2)
        paged += [item.key for item in page.items]
        if not page.more:
            break
        after = paged[-1]
    assert paged == inside


async def test_a_full_last_page_says_that_there_is_no_more(store: Store) -> None:
    await store.put("a/1", b"")
    await store.put("a/2", b"")
    assert not (await store.range("a/", limit=2)).more
    assert (await store.range("a/", limit=1)).more


@pytest.mark.parametrize("limit", [0, -1, RANGE_LIMIT_MAX + 1])
async def test_an_absurd_limit_is_refused(store: Store, limit: int) -> None:
    with pytest.raises(Invalid):
        await store.range("", limit=limit)


@pytest.mark.parametrize("consistency", Consistency)
async def test_a_range_at_a_revision_is_what_was_there_then(store: Store, consistency: Consistency) -> None:
    await store.put("a/1", b"old")
    await store.put("a/2", b"gone soon")
    at = await store.put("b", b"")
    before = await store.range("a/")
    await store.put("a/1", b"new")
    await store.put("a/1", b"newer")
    await store.delete("a/2")
    await store.put("a/0", b"not yet")
    await store.put("a/3", b"not yet")
    then = await store.range("a/", at=at, consistency=consistency)
    assert (then.items, then.revision, then.more) == (before.items, at, False)
    first = await store.range("a/", at=at, limit=1, consistency=consistency)
    rest = await store.range("a/", at=at, limit=1, after=first.items[-1].key, consistency=consistency)
    assert (first.items + rest.items, first.more, rest.more) == (before.items, True, False)
    with pytest.raises(Invalid):
        await store.range("a/", at=Revision(await store.revision() + 1), consistency=consistency)
    await store.compact(Revision(at + 1))
    with pytest.raises(Compacted):
        await store.range("a/", at=at, consistency=consistency)


async def test_a_read_that_may_be_old_is_the_state_of_some_moment(store: Store) -> None:
    begin = await store.revision()
    for n in range(20):
        await store.txn([], [Put("a", b"%d" % n), Put("b", b"%d" % n)])
        page = await store.range("", consistency=Consistency.SERIALIZABLE)
        assert begin <= page.revision <= await store.revision()
        assert page.items == (await store.range("", at=page.revision)).items
    newest = await store.range("")
    async with asyncio.timeout(DEADLINE_S):
        while (await store.get("a", consistency=Consistency.SERIALIZABLE)) != newest.items[0]:
            pass
        while (await store.range("", consistency=Consistency.SERIALIZABLE)) != newest:
            pass
    assert await store.get("c", consistency=Consistency.SERIALIZABLE) is None
    with pytest.raises(Invalid):
        await store.get("", consistency=Consistency.SERIALIZABLE)


async def test_a_transaction_is_all_of_one_branch_at_one_revision(store: Store) -> None:
    await store.put("a", b"1")
    held = await store.get("a")
    assert held is not None
    done = await store.txn([unchanged("a", held.mod_revision), absent("b")], [Put("b", b"2"), Delete("a"), Put("c", b"3")])
    assert done.succeeded
    assert await store.get("a") is None
    made = [await store.get("b"), await store.get("c")]
    assert [item.mod_revision for item in made if item] == [done.revision, done.revision]
    refused = await store.txn([absent("b")], [Put("x", b"")], [Get("b"), Get("nothing")])
    assert (refused.succeeded, refused.revision, refused.found) == (False, done.revision, (made[0], None))
    assert await store.get("x") is None


async def test_every_comparison_counts(store: Store) -> None:
    revision = await store.put("a", b"1")
    for compare, holds in [
        (Compare("a", Target.MOD, revision), True),
        (Compare("a", Target.MOD, revision - 1), False),
        (Compare("a", Target.CREATE, revision), True),
        (Compare("a", Target.VERSION, 1), True),
        (Compare("a", Target.VERSION, 2), False),
        (Compare("a", Target.VALUE, b"1"), True),
        (Compare("a", Target.VALUE, b""), False),
        (Compare("none", Target.VERSION, 0), True),
        (Compare("none", Target.VALUE, b""), False),
    ]:
        assert (await store.txn([compare], [])).succeeded is holds, compare
    assert not (await store.txn([absent("none"), absent("a")], [])).succeeded
    with pytest.raises(Invalid):
        await store.txn([Compare("a", Target.VALUE, 1)], [])


async def test_gets_of_a_transaction_see_the_writes_before_them(store: Store) -> None:
    done = await store.txn([], [Get("a"), Put("a", b"1"), Get("a")])
    assert done.found[0] is None
    assert done.found[1] is not None
    assert done.found[1].value == b"1"


async def test_deleting_by_prefix_takes_those_keys_and_no_other(store: Store) -> None:
    for key in ("a/1", "a/2", "a", "ab", "b"):
        await store.put(key, b"")
    done = await store.txn([], [Delete("a/", prefix=True)])
    assert await keys(store, "") == ["a", "ab", "b"]
    assert done.revision == await store.revision()
    again = await store.txn([], [Delete("a/", prefix=True)])
    assert again.revision == done.revision


@pytest.mark.parametrize(
    "ops",
    [
        [Put("a", b""), Put("a", b"")],
        [Put("a", b""), Delete("a")],
        [Delete("a"), Delete("a")],
        [Put("p/x", b""), Put("z", b""), Delete("p/", prefix=True)],
        [Delete("p/", prefix=True), Delete("p/q/", prefix=True)],
    ],
)
async def test_a_key_written_twice_in_one_branch_is_refused(store: Store, ops: list[Put | Delete]) -> None:
    for branches in ((ops, []), ([], ops)):
        with pytest.raises(Invalid):
            await store.txn([], *branches)
    assert await keys(store, "") == []


async def test_a_transaction_takes_so_many_operations_and_no_more(store: Store) -> None:
    most = [Put(f"k/{n:05}", b"") for n in range(TXN_OPS_MAX)]
    revision = (await store.txn([], most)).revision
    page = await store.range("k/")
    assert len(page.items) == TXN_OPS_MAX
    assert {item.mod_revision for item in page.items} == {revision}
    with pytest.raises(TooLarge):
        await store.txn([], [*most, Put("one more", b"")])


async def test_a_watch_brings_every_change_in_order_and_each_once(store: Store) -> None:
    start = Revision(await store.put("before", b"") + 1)
    watch = store.watch("a/", start=start)
    await store.put("a/1", b"1")
    await store.put("other", b"")
    await store.txn([], [Put("a/2", b"2"), Delete("a/1"), Put("b", b"")])
    await store.put("a/2", b"3")
    changes = await take(watch, 4)
    assert [(c.key, c.item.value if c.item else None) for c in changes] == [
        ("a/1", b"1"),
        ("a/2", b"2"),
        ("a/1", None),
        ("a/2", b"3"),
    ]
    assert changes[2].previous is not None
    assert changes[2].previous.value == b"1"
    assert changes[3].previous == changes[1].item


async def test_a_watch_that_waits_hears_of_the_next_write(store: Store) -> None:
    watch = store.watch("", start=Revision(await store.revision() + 1))
    waiting = asyncio.ensure_future(take(watch, 1))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await store.put("a", b"")
    assert (await waiting)[0].key == "a"


async def test_a_watch_resumes_from_any_revision_that_is_held(store: Store) -> None:
    revisions = [await store.put(f"a/{n}", b"") for n in range(20)]
    for n in (0, 7, 19):
        changes = await take(store.watch("a/", start=revisions[n]), 20 - n)
        assert [c.key for c in changes] == [f"a/{i}" for i in range(n, 20)]


async def test_a_watch_batch_holds_whole_revisions(store: Store) -> None:
    start = Revision(await store.revision() + 1)
    done = await store.txn([], [Put(f"a/{n}", b"") for n in range(100)])
    batch = await anext(store.watch("", start=start))
    assert len(batch.changes) == 100
    assert batch.revision == done.revision


async def test_watches_see_concurrent_writers_in_one_order(store: Store) -> None:
    start = Revision(await store.revision() + 1)

    async def write(who: int) -> None:
        for n in range(25):
            await store.put(f"w/{who}/{n}", b"")

    first = asyncio.ensure_future(take(store.watch("w/", start=start), 200))
    await asyncio.gather(*(write(who) for who in range(8)))
    changes = await first
    assert [c.item.mod_revision for c in changes if c.item] == list(range(start, start + 200))
    assert changes == await take(store.watch("w/", start=start), 200)


async def test_compaction_forgets_what_was_before_it_and_nothing_else(store: Store) -> None:
    revisions = [await store.put("a", bytes([n])) for n in range(10)]
    await store.compact(revisions[5])
    with pytest.raises(Compacted):
        await anext(store.watch("", start=revisions[4]))
    with pytest.raises(Compacted):
        await store.range("", at=revisions[4])
    assert [i.value for i in (await store.range("", at=revisions[5])).items] == [b"\x05"]
    assert len(await take(store.watch("", start=revisions[5]), 5)) == 5
    assert (await store.get("a")) is not None
    for again in (revisions[5], revisions[1]):
        with pytest.raises(Compacted):
            await store.compact(again)
    with pytest.raises(Invalid):
        await store.compact(Revision(revisions[-1] + 1))


async def test_a_watch_that_waited_through_a_compaction_goes_on(store: Store) -> None:
    revision = await store.put("a", b"")
    watch = store.watch("", start=Revision(revision + 1))
    waiting = asyncio.ensure_future(take(watch, 1))
    await asyncio.sleep(0)
    await store.compact(revision)
    await store.put("b", b"")
    assert (await waiting)[0].key == "b"


async def test_a_lease_that_is_not_kept_alive_takes_its_keys_along(store: Store) -> None:
    lease = await store.lease_grant(1)
    await store.txn([], [Put("a", b"", lease.id), Put("b", b"", lease.id), Put("free", b"")])
    held = await store.get("a")
    assert held is not None
    assert held.lease == lease.id
    start = Revision(await store.revision() + 1)
    gone = await take(store.watch("", start=start), 2)
    assert [(c.key, c.item) for c in gone] == [("a", None), ("b", None)]
    assert await keys(store, "") == ["free"]
    with pytest.raises(NotFound):
        await store.lease_keep_alive(lease.id)
    with pytest.raises(NotFound):
        await store.put("a", b"", lease=lease.id)


async def test_a_lease_kept_alive_outlives_its_time(store: Store) -> None:
    lease = await store.lease_grant(1)
    await store.put("a", b"", lease=lease.id)
    for _ in range(3):
        await asyncio.sleep(0.5)
        await store.lease_keep_alive(lease.id)
    assert await store.get("a") is not None
    await store.lease_revoke(lease.id)
    assert await store.get("a") is None
    await store.lease_revoke(lease.id)


async def test_writing_a_key_without_its_lease_frees_it(store: Store) -> None:
    lease = await store.lease_grant(60)
    await store.put("a", b"", lease=lease.id)
    await store.put("b", b"", lease=lease.id)
    await store.put("a", b"")
    await store.delete("b")
    await store.put("b", b"")
    before = await store.revision()
    await store.lease_revoke(lease.id)
    assert await keys(store, "") == ["a", "b"]
    assert await store.revision() == before


async def test_a_write_under_an_unknown_lease_writes_nothing(store: Store) -> None:
    lease = await store.lease_grant(5)
    with pytest.raises(NotFound):
        await store.txn([], [Put("x", b""), Put("a", b"", lease.id), Put("b", b"", LeaseId(lease.id + 1))])
    assert await keys(store, "") == []


@pytest.mark.parametrize("ttl_s", [0, 0.5, -1, 1e12, float("nan")])
async def test_a_lease_of_absurd_length_is_refused(store: Store, ttl_s: float) -> None:
    with pytest.raises(Invalid):
        await store.lease_grant(ttl_s)


async def test_counting_up_from_many_tasks_loses_nothing(store: Store) -> None:
    await store.put("n", b"0")

    async def increment() -> None:
        for _ in range(10):
            while True:
                item = await store.get("n")
                assert item is not None
                done = await store.txn([unchanged("n", item.mod_revision)], [Put("n", str(int(item.value) + 1).encode())])
                if done.succeeded:
                    break

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(increment() for _ in range(8)))
    item = await store.get("n")
    assert item is not None
    assert item.value == b"80"


async def test_a_closed_store_says_so(store: Store) -> None:
    start = Revision(await store.revision() + 1)
    waiting = asyncio.ensure_future(anext(store.watch("", start=start)))
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    with pytest.raises(Unavailable):
        await waiting
    for call in (store.put("a", b""), store.get("a"), store.range("")):
        with pytest.raises(Unavailable):
            await call
