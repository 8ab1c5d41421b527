"""What a large cell needs: dry runs that share a snapshot, events that go as fast as they come, connections for every agent."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys

from control_cell import START, Cell, run_virtual

from atoll.api.http.serve import CONNECTIONS_MAX, FILES_SPARED
from atoll.api.service import KINDS, SYSTEM, Service
from atoll.api.service.planning import KEPT_TIMES
from atoll.control.gc import EVENTS_PER_PROJECT_MAX, GC_BEHIND_S, GC_S, REMOVED_AT_ONCE_MAX
from atoll.control.placement import INSTANCES_AT_ONCE, Placement
from atoll.control.world import World
from atoll.model import codec, keys
from atoll.model.ports.store import TXN_OPS_MAX, Put
from atoll.model.records import App, Capacity, Event, Instance, Node, OwnerKind, Release
from atoll.model.spec import AppSpec, Resources, RuntimeName, Scale
from atoll.model.units import Bytes
from atoll.scheduling.demand import demand_of
from atoll.scheduling.snapshot import Snapshot
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

GIB = 1 << 30


class SlowClock:
    """At every look so many seconds have passed."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.at = 1_000_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        self.at += self.step_s
        return self.at


def node(name: str) -> Node:
    capacity = Capacity(cpu_milli=4000, memory_bytes=4 * GIB, disk_bytes=100 * GIB)
    return Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,))


def spec(replicas: int) -> AppSpec:
    return AppSpec(name="web", image="x/y:1", resources=Resources(memory=Bytes(GIB)), scale=Scale(replicas=replicas))


async def dry_runs(step_s: float) -> list[int]:
    """Return how many nodes four plans saw, one after another, with a node more before each."""
    clock = SlowClock(step_s)
    store = MemoryStore(clock)
    seen = []
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32), "localhost") as service:
        for number in range(4):
            await state.reach(await store.put(keys.node(f"n{number}"), codec.encode(node(f"n{number}"))))
            seen.append(len((await service.planning.plan(spec(16))).placed))
            if number == 2:
                clock.at += KEPT_TIMES * step_s + 1
    await store.close()
    return seen


async def test_where_a_snapshot_takes_long_it_serves_several_dry_runs_and_then_no_more() -> None:
    assert await dry_runs(1.0) == [1, 1, 1, 4]


async def test_where_a_snapshot_is_quick_every_dry_run_is_of_now() -> None:
    assert await dry_runs(0.01) == [1, 2, 3, 4]


async def test_dry_runs_on_a_kept_snapshot_leave_it_as_it_was() -> None:
    clock = SlowClock(0.5)
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32), "localhost") as service:
        await store.put(keys.node("n0"), codec.encode(node("n0")))
        await service.apps.put(SYSTEM, spec(1))
        record = Instance(
            id="web-a", project="default", owner_kind=OwnerKind.APP, owner="web", release=1, generation=1, node="n0", created_at=1.0
        )
        await state.reach(await store.put(keys.instance("default", "web-a"), codec.encode(record)))
        first = await service.planning.explain("default", "web-a")
        for _ in range(2):
            # A gigabyte of four is held by the one that was explained.
            assert (await service.planning.plan(spec(9))).placed == {"n0": 3}
            assert await service.planning.explain("default", "web-a") == first
    await store.close()


def test_an_instance_left_out_for_a_while_counts_again_afterwards_even_after_an_error() -> None:
    snapshot = Snapshot()
    snapshot.upsert_node(node("n0"))
    demand = demand_of(spec(1))
    snapshot.allocate("a", "n0", "app/default/web/1/1", demand)
    used = snapshot.used.copy()
    with contextlib.suppress(RuntimeError), snapshot.without("a"):
        assert snapshot.allocated("a") is None
        assert snapshot.used.sum() < used.sum()
        raise RuntimeError
    with snapshot.without("unknown"):
        assert snapshot.allocated("a") == "n0"
    assert snapshot.allocated("a") == "n0"
    assert (snapshot.used == used).all()


def test_a_new_leader_counts_what_runs_in_parts_and_what_changes_between_them_is_counted_too() -> None:
    count = 3 * INSTANCES_AT_ONCE

    def record(number: int, on: str) -> bytes:
        id = f"web-{number:05d}"
        made = Instance(
            id=id, project="default", owner_kind=OwnerKind.APP, owner="web", release=1, generation=1, node=on, created_at=1.0
        )
        return codec.encode(made)

    def key(number: int) -> str:
        return keys.instance("default", f"web-{number:05d}")

    async def main() -> None:
        async with Cell() as cell:
            app = App(project="default", name="web", spec=spec(count), release=1, replicas=count, created_at=0.0, updated_at=0.0)
            release = Release(project="default", app="web", number=1, spec=app.spec, created_at=0.0)
            puts = [
                Put(keys.app("default", "web"), codec.encode(app)),
                Put(keys.release("default", "web", 1), codec.encode(release)),
            ]
            puts += [Put(keys.node(name), codec.encode(node(name))) for name in ("n0", "n1")]
            puts += [Put(key(number), record(number, "n0")) for number in range(count)]
            for first in range(0, len(puts), TXN_OPS_MAX):
                await cell.state.reach((await cell.store.txn([], puts[first : first + TXN_OPS_MAX])).revision)
            changes = cell.state.changes()
            world = World(cell.state)
            world.rebuild()
            placement, pauses = Placement(world), 0
            for _ in placement.rebuilding():
                # Behind and ahead of what has been counted, one moves to the other node; and one goes.
                await cell.store.put(key(pauses), record(pauses, "n1"))
                await cell.store.put(key(count - 1 - pauses), record(count - 1 - pauses, "n1"))
                await cell.state.reach(await cell.store.delete(key(count - 100 - pauses)))
                pauses += 1
            assert pauses == 3
            async for deltas in changes:
                world.apply(deltas)
                placement.apply(deltas)
                if deltas.revision >= cell.state.revision:
                    break
            afresh = Placement(world)
            afresh.rebuild()
            for name in ("n0", "n1"):
                assert dict(placement.snapshot.allocations_on(name)) == dict(afresh.snapshot.allocations_on(name))
            assert (placement.snapshot.used == afresh.snapshot.used).all()
            assert len(dict(placement.snapshot.allocations_on("n1"))) == 2 * pauses

    run_virtual(main())


def test_a_flood_of_events_is_removed_faster_than_look_by_look() -> None:
    extra = 3 * REMOVED_AT_ONCE_MAX

    async def main() -> None:
        async with Cell() as cell:
            events = [
                Event(id=f"{number:06d}", at=START - number, project="default", subject="app/x", code="c", message="")
                for number in range(EVENTS_PER_PROJECT_MAX + extra)
            ]
            puts = [Put(keys.event("default", event.id), codec.encode(event)) for event in events]
            for first in range(0, len(puts), TXN_OPS_MAX):
                await cell.store.txn([], puts[first : first + TXN_OPS_MAX])
            cell.lead()
            await asyncio.sleep(GC_S + 5 * GC_BEHIND_S)
            assert len(cell.state.records(Event)) == EVENTS_PER_PROJECT_MAX

    run_virtual(main())


def test_a_server_raises_its_own_limit_of_open_files_and_counts_on_no_more_than_it_has() -> None:
    """In a process of its own, with a soft limit as systemd gives it."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096)); "
        "from atoll.api.http.serve import connections_max; "
        "print(connections_max(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], connections_max())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(4096 - FILES_SPARED), "4096", str(4096 - FILES_SPARED)]
    assert CONNECTIONS_MAX >= 3 * 5_000
