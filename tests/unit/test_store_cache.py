"""`State`: a typed copy of the store that never skips a change in silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from atoll.model import codec, keys
from atoll.model.errors import Compacted, Unavailable
from atoll.model.ports.store import LINEARIZABLE, RANGE_LIMIT_MAX, Consistency, Delete, Put, Range, Revision, WatchBatch
from atoll.model.records import NodePolicy, Project
from atoll.store.cache import DELTAS_BYTES_MAX, RECORD_FACTOR, Deltas, State
from atoll.store.memory import MemoryStore

KINDS = {keys.PROJECTS: Project, keys.NODE_POLICIES: NodePolicy}
DEADLINE_S = 10


def project(name: str, created_at: float = 0) -> Put:
    return Put(keys.project(name), codec.encode(Project(name=name, created_at=created_at)))


def policy(name: str) -> Put:
    return Put(keys.node_policy(name), codec.encode(NodePolicy(name=name, cordoned=True)))


class FlakyStore(MemoryStore):
    """Its watches can be cut, and its listing refused."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = asyncio.Event()
        self.lists = 0

    async def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        watch = super().watch(prefix, start=start)
        while True:
            following = asyncio.ensure_future(anext(watch))
            cut = asyncio.ensure_future(self.cut.wait())
            await asyncio.wait({following, cut}, return_when=asyncio.FIRST_COMPLETED)
            if cut.done():
                following.cancel()
                raise Unavailable("the watch was cut")
            cut.cancel()
            yield await following


class LaggingStore(MemoryStore):
    """Whose member knows no more than revision `known`, which is what those get that ask for no more."""

    def __init__(self) -> None:
        super().__init__()
        self.known: Revision | None = None
        self.asked: list[Consistency] = []

    async def range(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = RANGE_LIMIT_MAX,
        at: Revision | None = None,
        consistency: Consistency = LINEARIZABLE,
    ) -> Range:
        self.asked.append(consistency)
        if consistency is Consistency.SERIALIZABLE and at is None:
            at = self.known
        return await super().range(prefix, after=after, limit=limit, at=at)


async def take(changes: AsyncIterator[Deltas]) -> list[tuple[str, bool, bool]]:
    async with asyncio.timeout(DEADLINE_S):
        return [(delta.key, delta.old is not None, delta.new is not None) for delta in (await anext(changes)).deltas]


async def test_all_kinds_are_loaded_and_then_followed() -> None:
    store = MemoryStore()
    await store.txn([], [project("a"), policy("n1")])
    async with State(store, KINDS) as state:
        assert set(state.records(Project)) == {"a"}
        revision = (await store.txn([], [project("b"), Delete(keys.project("a")), policy("n2")])).revision
        assert await state.reach(revision) == revision
        assert set(state.records(Project)) == {"b"}
        assert set(state.records(NodePolicy)) == {"n1", "n2"}
        held = state.get(Project, "b")
        assert held is not None
        assert (held.record.name, held.revision, held.created) == ("b", revision, revision)
        assert state.get(Project, "a") is None


async def test_all_is_loaded_from_one_member_unless_that_one_is_behind() -> None:
    store = LaggingStore()
    old = (await store.txn([], [project("a")])).revision
    async with State(store, KINDS) as state:
        assert set(store.asked) == {Consistency.SERIALIZABLE}
        assert set(state.records(Project)) == {"a"}
    await store.txn([], [project("b")])
    store.known = old
    async with State(store, KINDS) as state:
        assert Consistency.LINEARIZABLE in store.asked
        assert set(state.records(Project)) == {"a", "b"}, "what had been written before it began is there"
        assert state.revision == await store.revision()


async def test_it_is_current_to_revisions_that_hold_nothing_of_its_kinds() -> None:
    store = MemoryStore()
    async with State(store, KINDS) as state:
        revision = await store.put("other/x", b"")
        assert await state.reach(revision) == revision
        waiting = asyncio.ensure_future(state.wait_past(revision))
        await asyncio.sleep(0)
        assert not waiting.done()
        await store.put("leader", b"")
        assert await waiting == revision + 1


async def test_kinds_change_together_at_one_revision() -> None:
    store = MemoryStore()
    async with State(store, KINDS) as state:
        seen: list[tuple[int, int]] = []

        async def observe() -> None:
            revision = state.revision
            while len(state.records(Project)) < 50:
                revision = await state.wait_past(revision)
                seen.append((len(state.records(Project)), len(state.records(NodePolicy))))

        observing = asyncio.ensure_future(observe())
        for n in range(50):
            await store.txn([], [project(f"p{n}"), policy(f"n{n}")])
            await asyncio.sleep(0)
        await asyncio.wait_for(observing, DEADLINE_S)
    assert all(projects == policies for projects, policies in seen)


async def test_changes_bring_old_and_new_from_the_moment_of_the_call() -> None:
    store = MemoryStore()
    await store.txn([], [project("a")])
    async with State(store, KINDS) as state:
        changes = state.changes()
        await store.txn([], [project("a", 1), project("b")])
        await store.put("other/x", b"")
        await store.delete(keys.project("a"))
        assert await take(changes) == [("a", True, True), ("b", False, True)]
        assert await take(changes) == [("a", True, False)]


async def test_changes_resume_from_a_revision_that_it_has_seen_and_from_no_older() -> None:
    store = MemoryStore()
    before = await store.put(*_pair(project("a")))
    async with State(store, KINDS) as state:
        first = await store.put(*_pair(project("b")))
        await store.put(*_pair(project("c")))
        await state.reach(Revision(first + 1))
        changes = state.changes(first)
        assert [await take(changes), await take(changes)] == [[("b", False, True)], [("c", False, True)]]
        with pytest.raises(Compacted):
            await anext(state.changes(before))


async def test_a_consumer_far_behind_is_told_so() -> None:
    store = MemoryStore()
    async with State(store, KINDS) as state:
        changes = state.changes()
        big = project("a" * 30)
        for _ in range(40_000):
            await store.put(big.key, big.value)
            if state.revision + 1000 < await store.revision():
                await state.reach(await store.revision())
        await state.reach(await store.revision())
        with pytest.raises(Compacted):
            await anext(changes)


async def test_it_lists_again_when_the_store_has_forgotten_what_it_missed() -> None:
    store = FlakyStore()
    await store.txn([], [project("a"), project("b"), project("c")])
    async with State(store, KINDS) as state:
        changes = state.changes()
        middle = Revision(state.revision + 2)
        store.cut.set()
        await asyncio.sleep(0)
        await store.delete(keys.project("a"))
        await store.txn([], [project("b", 1)])
        last = (await store.txn([], [project("d")])).revision
        await store.compact(last)
        store.cut.clear()
        async with asyncio.timeout(DEADLINE_S):
            await state.reach(last)
        assert set(state.records(Project)) == {"b", "c", "d"}
        assert sorted(await take(changes)) == [("a", True, False), ("b", True, True), ("d", False, True)]
        with pytest.raises(Compacted):
            await anext(state.changes(middle))
        await store.txn([], [project("e")])
        assert await take(changes) == [("e", False, True)]


async def test_a_cut_watch_resumes_without_a_gap() -> None:
    store = FlakyStore()
    async with State(store, KINDS) as state:
        changes = state.changes()
        await store.txn([], [project("a")])
        await state.reach(await store.revision())
        store.cut.set()
        await asyncio.sleep(0)
        await store.txn([], [project("b")])
        store.cut.clear()
        await store.txn([], [project("c")])
        found = [await take(changes) for _ in range(3)]
        assert [key for part in found for key, _, _ in part] == ["a", "b", "c"]


async def test_a_record_that_does_not_decode_counts_as_absent() -> None:
    store = MemoryStore()
    await store.put(keys.project("bad"), b"{not json")
    async with State(store, KINDS) as state:
        await store.put(keys.project("worse"), b"[]")
        await store.txn([], [project("good")])
        await state.reach(await store.revision())
        assert set(state.records(Project)) == {"good"}
        await store.put(keys.project("good"), b"")
        await state.reach(await store.revision())
        assert set(state.records(Project)) == set()


async def test_a_record_that_does_not_decode_is_told_from_one_that_is_gone() -> None:
    store = MemoryStore()
    await store.put(keys.project("bad"), b"{not json")
    async with State(store, KINDS) as state:
        assert set(state.broken(Project)) == {"bad"}
        await store.put(keys.project("worse"), b"[]")
        await store.txn([], [project("bad")])
        await state.reach(await store.revision())
        assert set(state.broken(Project)) == {"worse"}
        await store.delete(keys.project("worse"))
        await state.reach(await store.revision())
        assert set(state.broken(Project)) == set()


async def test_what_is_kept_for_slow_readers_is_bounded_by_what_the_records_weigh() -> None:
    store = MemoryStore()
    weight = 20_000
    async with State(store, KINDS) as state:
        changes = state.changes(Revision(1))
        for number in range(2 * DELTAS_BYTES_MAX // (RECORD_FACTOR * weight)):
            await store.txn([], [Put(keys.project("a"), codec.encode(Project(name="x" * weight, created_at=number)))])
            await state.reach(await store.revision())
        with pytest.raises(Compacted):
            await take(changes)


async def test_closing_frees_everyone_who_waits() -> None:
    state = State(MemoryStore(), KINDS)
    await state.start()
    waiting = [asyncio.ensure_future(state.wait_past(state.revision)), asyncio.ensure_future(anext(state.changes()))]
    await asyncio.sleep(0)
    await state.close()
    await state.close()
    for waiter in waiting:
        with pytest.raises(Unavailable):
            await waiter


async def test_a_store_that_does_not_answer_at_the_start_is_an_error() -> None:
    store = MemoryStore()
    await store.close()
    with pytest.raises(Unavailable):
        await State(store, KINDS).start()


def _pair(op: Put) -> tuple[str, bytes]:
    return op.key, op.value
