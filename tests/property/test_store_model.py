"""Every store against a model of a hundred lines: whatever calls come in whatever order, both give the same answers."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from atoll.model.errors import Compacted, NotFound
from atoll.model.ports.store import Compare, Delete, Get, LeaseId, Op, Put, Revision, Store, Target
from atoll.store.etcd.private import PrivateEtcd
from atoll.store.etcd.store import EtcdStore
from atoll.store.memory import MemoryStore
from atoll.store.sqlite import SqliteStore

T = TypeVar("T")
KEYS = st.sampled_from(["a/1", "a/2", "a/2/x", "a", "b/1", "b/é", "c"])
PREFIXES = st.sampled_from(["", "a/", "a/2", "b/", "none/"])
VALUES = st.binary(max_size=3)
TARGETS = st.sampled_from(list(Target))


class ManualClock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.at = 1_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class Item(tuple[bytes, int, int, int, int]):
    """(value, created, modified, version, lease)."""


class Model:
    """What a store is: a list of states, one for each revision."""

    def __init__(self) -> None:
        self.states: list[dict[str, Item]] = [{}]
        self.leases: dict[int, tuple[float, float]] = {}
        self.floor = 0

    @property
    def now(self) -> dict[str, Item]:
        return self.states[-1]

    def holds(self, compare: Compare) -> bool:
        item = self.now.get(compare.key)
        value, created, modified, version, _ = item or (None, 0, 0, 0, 0)
        actual = {Target.MOD: modified, Target.CREATE: created, Target.VERSION: version, Target.VALUE: value}
        return actual[compare.target] == compare.expected

    def do(self, ops: list[Op]) -> list[Item | None]:
        state, found, written = dict(self.now), [], False
        revision = len(self.states)
        for op in ops:
            match op:
                case Put():
                    _, created, _, version, _ = state.get(op.key) or (b"", revision, 0, 0, 0)
                    state[op.key] = Item((op.value, created, revision, version + 1, op.lease))
                    written = True
                case Delete():
                    gone = [k for k in state if (k.startswith(op.key) if op.prefix else k == op.key)]
                    written = written or bool(gone)
                    for key in gone:
                        del state[key]
                case Get():
                    found.append(state.get(op.key))
        if written:
            self.states.append(state)
        return found

    def drop_lease(self, lease: int) -> None:
        if self.leases.pop(lease, None):
            self.do([Delete(key) for key, item in self.now.items() if item[4] == lease])

    def changes(self, prefix: str, start: int) -> list[tuple[int, str, Item | None]]:
        """What a watch from `start` must bring, without the order inside a revision."""
        found = []
        for revision in range(max(start, 1), len(self.states)):
            old, new = self.states[revision - 1], self.states[revision]
            for key in sorted(old.keys() | new.keys()):
                if key.startswith(prefix) and old.get(key) != new.get(key):
                    found.append((revision, key, new.get(key)))
        return found


def plain(item: Any) -> Item | None:
    return None if item is None else Item((item.value, item.create_revision, item.mod_revision, item.version, item.lease))


class StoreMachine(RuleBasedStateMachine):
    """Rules that do the same to the store and to the model."""

    leases = Bundle("leases")
    watches = Bundle("watches")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.model = Model()
        self.store = self.run(self.open())

    async def open(self) -> Store:
        return MemoryStore(self.clock)

    async def expire(self) -> None:
        assert isinstance(self.store, (MemoryStore, SqliteStore))
        await self.store.expire_leases()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(call, 10))

    def teardown(self) -> None:
        self.run(self.store.close())
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()

    @initialize(target=leases)
    def no_lease(self) -> Any:
        return multiple(LeaseId(0), LeaseId(0))

    def live(self, lease: int) -> bool:
        return lease == 0 or lease in self.model.leases

    @rule(key=KEYS, value=VALUES, lease=leases)
    def put(self, key: str, value: bytes, lease: LeaseId) -> None:
        if self.live(lease):
            self.model.do([Put(key, value, lease)])
            assert self.run(self.store.put(key, value, lease=lease)) == len(self.model.states) - 1
        else:
            with pytest.raises(NotFound):
                self.run(self.store.put(key, value, lease=lease))

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.model.do([Delete(key)])
        assert self.run(self.store.delete(key)) == len(self.model.states) - 1

    @rule(
        guard=st.lists(st.tuples(KEYS, TARGETS, st.integers(-3, 3), VALUES), max_size=2),
        then=st.lists(st.tuples(KEYS, st.one_of(st.none(), VALUES)), max_size=4, unique_by=lambda pair: pair[0]),
        reads=st.lists(KEYS, max_size=2),
        sweep=st.sampled_from([None, "none/", "d/"]),
    )
    def txn(
        self, guard: list[tuple[str, Target, int, bytes]], then: list[tuple[str, bytes | None]], reads: list[str], sweep: str | None
    ) -> None:
        compare = [Compare(k, t, v if t is Target.VALUE else max(0, len(self.model.states) - 1 + n)) for k, t, n, v in guard]
        ops: list[Op] = [Delete(key) if value is None else Put(key, value) for key, value in then]
        if sweep:
            ops.append(Delete(sweep, prefix=True))
        ops += [Get(key) for key in reads]
        succeeds = all(self.model.holds(c) for c in compare)
        otherwise: list[Op] = [Get("a/1"), Delete("a/", prefix=True)]
        found = self.model.do(ops if succeeds else otherwise)
        done = self.run(self.store.txn(compare, ops, otherwise))
        assert (done.succeeded, done.revision) == (succeeds, len(self.model.states) - 1)
        assert [plain(item) for item in done.found] == found

    def grant_in_store(self, ttl_s: float) -> LeaseId:
        return self.run(self.store.lease_grant(ttl_s)).id

    @rule(target=leases, ttl_s=st.sampled_from([5.0, 10.0]))
    def grant(self, ttl_s: float) -> LeaseId:
        lease = self.grant_in_store(ttl_s)
        assert lease not in self.model.leases
        self.model.leases[lease] = (ttl_s, self.clock.at + ttl_s)
        return lease

    @rule(lease=leases)
    def keep_alive(self, lease: LeaseId) -> None:
        if lease in self.model.leases:
            self.run(self.store.lease_keep_alive(lease))
            ttl_s, _ = self.model.leases[lease]
            self.model.leases[lease] = (ttl_s, self.clock.at + ttl_s)
        else:
            with pytest.raises(NotFound):
                self.run(self.store.lease_keep_alive(lease))

    @rule(lease=consumes(leases))
    def revoke(self, lease: LeaseId) -> None:
        self.run(self.store.lease_revoke(lease))
        self.model.drop_lease(lease)

    @rule(span_s=st.sampled_from([1.0, 4.0, 6.0]))
    def time_passes(self, span_s: float) -> None:
        self.clock.at += span_s
        over = [lease for lease, (_, end) in self.model.leases.items() if end <= self.clock.at]
        for lease in over:
            self.model.drop_lease(lease)
        self.run(self.expire())

    @rule(back=st.integers(0, 6))
    def compact(self, back: int) -> None:
        revision = len(self.model.states) - 1 - back
        if revision <= self.model.floor:
            with pytest.raises(Compacted):
                self.run(self.store.compact(Revision(revision)))
        else:
            self.run(self.store.compact(Revision(revision)))
            self.model.floor = revision

    @rule(prefix=PREFIXES, after=KEYS, limit=st.integers(1, 4), back=st.integers(0, 5))
    def range(self, prefix: str, after: str, limit: int, back: int) -> None:
        at = max(0, len(self.model.states) - 1 - back)
        if at < self.model.floor:
            with pytest.raises(Compacted):
                self.run(self.store.range(prefix, at=Revision(at)))
            return
        expected = sorted(key for key in self.model.states[at] if key.startswith(prefix) and key > after)
        page = self.run(self.store.range(prefix, after=after, limit=limit, at=Revision(at)))
        assert [(item.key, plain(item)) for item in page.items] == [(k, self.model.states[at][k]) for k in expected[:limit]]
        assert (page.more, page.revision) == (len(expected) > limit, at)

    @rule(prefix=PREFIXES, back=st.integers(0, 20))
    def watch(self, prefix: str, back: int) -> None:
        start = max(1, len(self.model.states) - back)
        if start < self.model.floor:
            with pytest.raises(Compacted):
                self.run(anext(self.store.watch(prefix, start=Revision(start))))
            return
        self.run(self.check_watch(prefix, start))

    async def check_watch(self, prefix: str, start: int) -> None:
        expected = self.model.changes(prefix, start)
        found: list[tuple[int, str, Item | None]] = []
        watch = self.store.watch(prefix, start=Revision(start))
        while len(found) < len(expected):
            batch = await anext(watch)
            for change in batch.changes:
                assert plain(change.previous) == self.model.states[batch.revision - 1].get(change.key)
            found += sorted((batch.revision, change.key, plain(change.item)) for change in batch.changes)
        assert found == expected

    @invariant()
    def everything_is_the_same(self) -> None:
        page = self.run(self.store.range(""))
        assert {item.key: plain(item) for item in page.items} == self.model.now
        assert page.revision == len(self.model.states) - 1 == self.run(self.store.revision())


class SqliteMachine(StoreMachine):
    """The same on a file, which is closed and opened again in between."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="atoll-store-")
        super().__init__()

    async def open(self) -> Store:
        return await SqliteStore.open(Path(self.directory.name) / "state.db", self.clock)

    @rule()
    def open_again(self) -> None:
        self.run(self.store.close())
        self.store = self.run(self.open())
        # A lease gets its whole time again.
        self.model.leases = {lease: (ttl_s, self.clock.at + ttl_s) for lease, (ttl_s, _) in self.model.leases.items()}

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


class EtcdMachine(StoreMachine):
    """The same on a real etcd, whose leases run by its own clock: they are made so long that none ends by itself."""

    etcd: PrivateEtcd

    async def open(self) -> Store:
        store = await EtcdStore.open(self.etcd.address)
        # All that other examples did lies before this one's history.
        last = await store.put("a", b"")
        newest = await store.delete("a")
        await store.compact(newest)
        self.model.states = [*[{}] * last, {"a": Item((b"", last, last, 1, 0))}, {}]
        self.model.floor = newest
        return store

    async def expire(self) -> None:
        for lease in [lease for lease in self.granted if lease not in self.model.leases]:
            await self.store.lease_revoke(LeaseId(lease))
            self.granted.remove(lease)

    def __init__(self) -> None:
        self.granted: list[int] = []
        super().__init__()

    def grant_in_store(self, ttl_s: float) -> LeaseId:
        lease = super().grant_in_store(100 * ttl_s)
        self.granted.append(lease)
        return lease

    def teardown(self) -> None:
        self.run(self.store.txn([], [Delete("", prefix=True)]))
        super().teardown()


EXAMPLES = {"deadline": None, "suppress_health_check": list(HealthCheck), "stateful_step_count": 40}
TestMemory = StoreMachine.TestCase
TestMemory.settings = settings(max_examples=100, **EXAMPLES)  # type: ignore[arg-type]
TestSqlite = SqliteMachine.TestCase
TestSqlite.settings = settings(max_examples=30, **EXAMPLES)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("etcd") is None, reason="there is no etcd on this machine")
class TestEtcd(EtcdMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=12, **EXAMPLES)  # type: ignore[arg-type]

    @classmethod
    def setUpClass(cls) -> None:
        EtcdMachine.etcd = cls.enterClassContext(PrivateEtcd())
