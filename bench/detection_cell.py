"""A cell on a virtual clock: the real leader's loop and scheduler over a store in memory, and the fleet of `detection_field`."""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections.abc import Coroutine
from typing import Any

from atoll.control.detection.rules import TICK_S
from atoll.control.leader import lead
from atoll.control.loop import Loop
from atoll.control.world import KINDS
from atoll.model import codec, keys
from atoll.model.ports.store import TXN_OPS_MAX, Compare, Op, Put, Target, TxnResult
from atoll.model.records import (
    App,
    AppPhase,
    AppStatus,
    Capacity,
    Event,
    Instance,
    Node,
    NodeHealth,
    NodeLiveness,
    OwnerKind,
    Release,
    Status,
)
from atoll.model.spec import AppSpec, RuntimeName
from atoll.model.states import Phase
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from bench.detection_field import Field, ManualClock, Weather

COMMIT_S = 0.01
"""What one transaction takes: an etcd cluster's in one region, with its synced write."""
READY_S = 0.2
REVIVE_S = 20.0
"""A node that died is back so long after its work was replaced."""
WAIT_S = 120.0
CPU_MILLI = 350
"""Room for three instances, so that work does not gather on a few nodes while others die."""


class _Selector(selectors.SelectSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and timeout:
            self.loop.passed_s += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """Instead of waiting it lets its time pass."""

    def __init__(self) -> None:
        self.passed_s = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.passed_s


def run_virtual(main: Coroutine[Any, Any, Any]) -> Any:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()


class SlowStore(MemoryStore):
    async def txn(self, compare: Any, then: Any, otherwise: Any = ()) -> TxnResult:
        await asyncio.sleep(COMMIT_S)
        return await super().txn(compare, then, otherwise)


class Cell:
    """One app of one instance on every node, all ready."""

    def __init__(self, nodes: int, weather: Weather, seed: int) -> None:
        self.clock = ManualClock()
        self.field = Field(nodes, weather, self.clock, seed)
        self.chance = random.Random(seed)
        self.store = SlowStore(self.clock)
        self.state = State(self.store, KINDS)
        self.placed_at: dict[str, list[tuple[float, str]]] = {}
        """App → when an instance of it got a node, and which."""
        self.loop_s = 0.0
        """Processor time of everything but the fleet and the network."""
        self._field_s = 0.0
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Cell:
        await self._fill()
        await self.state.start()
        self._tasks = [asyncio.create_task(self._live()), asyncio.create_task(self._follow()), asyncio.create_task(self._lead())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.state.close()

    async def _fill(self) -> None:
        ops: list[Op] = []
        now = self.clock.now()
        for number, name in enumerate(self.field.names):
            capacity = Capacity(cpu_milli=CPU_MILLI, memory_bytes=32 << 30, disk_bytes=1 << 40)
            site = self.field.site_of(name) or ""
            node = Node(name=name, site=site, region=f"r{number % 4}", capacity=capacity, runtimes=(RuntimeName.RUNC,))
            app = f"a{number}"
            spec = AppSpec(name=app, image="host.example/a:1")
            id = f"{app}-0"
            records = (
                (keys.node(name), node),
                (
                    keys.app("default", app),
                    App(project="default", name=app, spec=spec, release=1, replicas=1, created_at=now, updated_at=now),
                ),
                (keys.release("default", app, 1), Release(project="default", app=app, number=1, spec=spec, created_at=now)),
                (
                    keys.app_status("default", app),
                    AppStatus(
                        project="default", name=app, phase=AppPhase.RUNNING, release=1, ready=1, updated=1, total=1,
                        progressed_at=now, served_release=1,
                    ),
                ),
                (
                    keys.instance("default", id),
                    Instance(
                        id=id, project="default", owner_kind=OwnerKind.APP, owner=app, release=1, generation=1,
                        node=name, runtime=RuntimeName.RUNC, created_at=now, placed_at=now,
                    ),
                ),
                (keys.status("default", id), self._status(id, name)),
            )  # fmt: skip
            ops += [Put(key, codec.encode(record)) for key, record in records]
        for start in range(0, len(ops), TXN_OPS_MAX):
            await MemoryStore.txn(self.store, (), ops[start : start + TXN_OPS_MAX])

    def _status(self, id: str, node: str) -> Status:
        now = self.clock.now()
        return Status(
            instance=id, project="default", node=node, phase=Phase.RUNNING, ready=True, phase_at=now, started_at=now, ready_at=now
        )

    async def _lead(self) -> None:
        async def work(term: Any) -> None:
            await Loop(self.store, self.state, self.clock, random.Random(7), {}, term, None, self.field.exchange).run()

        await lead(self.store, self.clock, "bench", work, self.field.exchange.affirm)

    async def _live(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(TICK_S)
            self.clock.at = loop.time()
            began = time.process_time()
            self.field.step()
            self._field_s += time.process_time() - began

    async def _follow(self) -> None:
        async for deltas in self.state.changes():
            self.clock.at = asyncio.get_running_loop().time()
            for delta in deltas.deltas:
                if delta.kind is Instance and delta.new is not None and delta.new.record.node is not None:
                    record = delta.new.record
                    if delta.old is None or delta.old.record.node is None:
                        self.placed_at.setdefault(record.owner, []).append((self.clock.at, record.node))
                        self._tasks.append(asyncio.create_task(self._ready(record.id, record.node)))

    async def _ready(self, id: str, node: str) -> None:
        await asyncio.sleep(READY_S)
        number = int(node.removeprefix("n"))
        if self.field.dead_at[number] > self.clock.at:
            key = keys.instance("default", id)
            held = await self.store.get(key)
            if held is not None:
                exists = Compare(key, Target.CREATE, int(held.create_revision))
                put = Put(keys.status("default", id), codec.encode(self._status(id, node)))
                await MemoryStore.txn(self.store, [exists], [put])

    def apps_on(self, node: str) -> list[str]:
        return [h.record.owner for h in self.state.records(Instance).values() if h.record.node == node]

    def events(self, code: str) -> list[Event]:
        return [held.record for held in self.state.records(Event).values() if held.record.code == code]

    def lost(self) -> int:
        return sum(held.record.health is NodeHealth.LOST for held in self.state.records(NodeLiveness).values())

    async def die(self, number: int) -> list[float]:
        """Let a node die at a moment between two ticks; return how long each of its instances was without a place elsewhere."""
        name = self.field.names[number]
        at = self.clock.at + self.chance.random() * TICK_S
        apps = self.apps_on(name)
        self.field.kill(number, at)
        deadline = at + WAIT_S
        found: dict[str, float] = {}
        while len(found) < len(apps) and self.clock.at < deadline:
            await asyncio.sleep(TICK_S / 2)
            for app in apps:
                later = [when for when, node in self.placed_at.get(app, ()) if when >= at and node != name]
                if later:
                    found.setdefault(app, min(later) - at)
        self._tasks.append(asyncio.create_task(self._revive(number)))
        return [found.get(app, WAIT_S) for app in apps]

    async def _revive(self, number: int) -> None:
        await asyncio.sleep(REVIVE_S)
        self.field.revive(number)


async def deaths(nodes: int, weather: Weather, count: int, every_s: float, seed: int) -> tuple[list[float], float, float]:
    """Kill `count` nodes, one after another at random times; return for each the time to the commit of its last replacement, the
    processor time of leader, scheduler, store and cache per virtual second, and that of the fleet and the network."""
    async with Cell(nodes, weather, seed) as cell:
        await asyncio.sleep(10.0)
        began_at, began_s, began_field_s = cell.clock.at, time.process_time(), cell._field_s
        dying: list[asyncio.Task[list[float]]] = []
        for _ in range(count):
            await asyncio.sleep(cell.chance.expovariate(1 / every_s))
            number = _with_work(cell, nodes)
            if number is not None:
                dying.append(asyncio.create_task(cell.die(number)))
        times = [max(await task) for task in dying]
        span = cell.clock.at - began_at
        field_s = cell._field_s - began_field_s
        return times, (time.process_time() - began_s - field_s) / span, field_s / span


def _with_work(cell: Cell, nodes: int) -> int | None:
    """Return a node that lives and runs something; None where none does now."""
    busy = {held.record.node for held in cell.state.records(Instance).values()}
    alive = [n for n in range(nodes) if cell.field.dead_at[n] == float("inf") and cell.field.names[n] in busy]
    return cell.chance.choice(alive) if alive else None


async def many_at_once(nodes: int, share: float, weather: Weather, seed: int, for_s: float) -> dict[str, Any]:
    """Let a share of all nodes die at one moment; return how many were given up within `for_s`, and what was told."""
    async with Cell(nodes, weather, seed) as cell:
        await asyncio.sleep(10.0)
        for number in range(int(nodes * share)):
            cell.field.kill(number, cell.clock.at)
        await asyncio.sleep(for_s)
        return {"lost": cell.lost(), "brake": len(cell.events("brake-on"))}


async def site_dies(nodes: int, weather: Weather, seed: int) -> dict[str, Any]:
    """Let all nodes of one site die at one moment; return what was told, and when the last of their work was placed elsewhere."""
    async with Cell(nodes, weather, seed) as cell:
        await asyncio.sleep(10.0)
        there = [n for n, name in enumerate(cell.field.names) if cell.field.site_of(name) == "s3"]
        dying = [asyncio.create_task(cell.die(number)) for number in there]
        times = [one for task in dying for one in await task]
        await asyncio.sleep(5.0)
        return {
            "nodes": len(there),
            "times": times,
            "sites": [event.subject for event in cell.events("site-unreachable")],
            "brake": len(cell.events("brake-on")),
        }
