"""A leader on SQLite, or on an etcd of its own, with thousands of simulated agents in one process: for the scheduling benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.control.controllers import run_control
from atoll.control.world import KINDS
from atoll.model import codec, keys
from atoll.model.devices import GpuDevice
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.store import TXN_OPS_MAX, Op, Put
from atoll.model.records import App, Capacity, Instance, Node, Release
from atoll.model.spec import AppSpec, RuntimeName
from atoll.store.cache import State
from atoll.store.etcd.private import PrivateEtcd
from atoll.store.etcd.store import EtcdStore
from atoll.store.sqlite import SqliteStore

SQLITE, ETCD = "SQLite, fsync", "etcd, one member"
"""What a cell may be built on."""
WITHIN_S = 300.0
"""For one wave of instances to be seen by their agents."""
_GIB = 1 << 30


def node(index: int, sites: int, *, gpus: int = 0) -> Node:
    """Return one of a fleet of equal machines (32 cores, 128 GiB) dealt out over `sites` in 10 regions."""
    site = index % sites
    devices = tuple(GpuDevice(id=f"g{place}", model="A100", memory_bytes=80 * _GIB) for place in range(gpus))
    return Node(
        name=f"n{index:06d}",
        site=f"s{site:03d}",
        region=f"r{site % 10}",
        capacity=Capacity(cpu_milli=32_000, memory_bytes=128 * _GIB, disk_bytes=4096 * _GIB, gpus=devices),
        labels={"disk": "ssd" if index % 2 else "hdd"},
        runtimes=(RuntimeName.RUNC,),
    )


@dataclass
class Wave:
    """How long it took from the request until the last step of each kind."""

    instances: int
    observed_s: float
    committed_s: float
    processor_s: float
    """Of the whole process: leader, store, cache and agents."""


class Agents:
    """One task for each node, each woken with the instances that are new on it, as the API's feed of assignments does."""

    def __init__(self, state: State, nodes: Iterable[str]) -> None:
        self._state = state
        self._queues: dict[str, asyncio.Queue[list[str]]] = {name: asyncio.Queue() for name in nodes}
        self._tasks: list[asyncio.Task[None]] = []
        self.observed: set[str] = set()
        self.committed = 0
        self.committed_at = 0.0
        self._target = 0
        self._reached = asyncio.Event()

    def start(self) -> None:
        changes = self._state.changes()
        self._tasks.append(asyncio.create_task(self._follow(changes)))
        self._tasks.extend(asyncio.create_task(self._agent(name)) for name in self._queues)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, total: int) -> None:
        """Return when the agents together have seen `total` different instances."""
        self._target = total
        self._reached.clear()
        if len(self.observed) < total:
            async with asyncio.timeout(WITHIN_S):
                await self._reached.wait()

    async def _follow(self, changes: object) -> None:
        async for deltas in changes:  # type: ignore[attr-defined]
            found: dict[str, list[str]] = defaultdict(list)
            for delta in deltas.deltas:
                if delta.kind is not Instance or delta.new is None or delta.new.record.node is None:
                    continue
                if delta.old is None or delta.old.record.node is None:
                    found[delta.new.record.node].append(delta.key)
                    self.committed += 1
            if found:
                self.committed_at = time.perf_counter()
            for name, new in found.items():
                self._queues[name].put_nowait(new)

    async def _agent(self, name: str) -> None:
        queue = self._queues[name]
        while True:
            for key in await queue.get():
                held = self._state.get(Instance, key)
                if held is None or held.record.node != name:
                    raise RuntimeError(f"{name} was told of {key}, which is not there")
                self.observed.add(key)
            if len(self.observed) >= self._target > 0:
                self._reached.set()


class Cell:
    """Store, cache, leader and agents; `deploy` measures one wave of apps."""

    def __init__(self, nodes: Sequence[Node], store: str = SQLITE) -> None:
        self._nodes = nodes
        self._kind = store
        self._work = Path(tempfile.mkdtemp(prefix="atoll-bench-"))
        self._stack = contextlib.AsyncExitStack()
        self._total = 0

    async def __aenter__(self) -> Cell:
        self._stack.callback(shutil.rmtree, self._work, ignore_errors=True)
        clock = SystemClock()
        self.store = await self._open(clock)
        self._stack.push_async_callback(self.store.close)
        await self.put_all((keys.node(one.name), one) for one in self._nodes)
        self.state = await self._stack.enter_async_context(State(self.store, KINDS))
        self.agents = Agents(self.state, [one.name for one in self._nodes])
        self.agents.start()
        self._stack.push_async_callback(self.agents.close)
        seen = {one.name: 0.0 for one in self._nodes}
        beat = asyncio.create_task(self._beat(seen))
        lead = asyncio.create_task(run_control(self.store, self.state, clock, random.Random(1), seen))
        self._stack.push_async_callback(_end, [beat, lead])
        await asyncio.sleep(1.0)
        return self

    async def _open(self, clock: SystemClock) -> SqliteStore | EtcdStore:
        if self._kind == SQLITE:
            return await SqliteStore.open(self._work / "state.db", clock)
        (self._work / "etcd").mkdir()
        # One member, with its data on this machine's disk and synced as it is by itself.
        etcd = await asyncio.to_thread(self._stack.enter_context, PrivateEtcd(1, data=self._work / "etcd"))
        return await EtcdStore.open(etcd.address)

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def put_all(self, records: Iterable[tuple[str, object]]) -> None:
        ops: list[Op] = [Put(key, codec.encode(record)) for key, record in records]
        for start in range(0, len(ops), TXN_OPS_MAX // 2):
            await self.store.txn((), ops[start : start + TXN_OPS_MAX // 2])

    async def deploy(self, specs: Sequence[AppSpec]) -> Wave:
        """Write the apps, and wait until every instance of them was committed with a node and seen by that node's agent."""
        now = time.time()
        records: list[tuple[str, object]] = []
        for spec in specs:
            release = Release(project="default", app=spec.name, number=1, spec=spec, created_at=now)
            app = App(
                project="default",
                name=spec.name,
                spec=spec,
                release=1,
                replicas=spec.scale.replicas,
                created_at=now,
                updated_at=now,
            )
            records += [(keys.release("default", spec.name, 1), release), (keys.app("default", spec.name), app)]
        count = sum(spec.scale.replicas for spec in specs)
        self._total += count
        began, used = time.perf_counter(), time.process_time()
        await self.put_all(records)
        await self.agents.until(self._total)
        return Wave(count, time.perf_counter() - began, self.agents.committed_at - began, time.process_time() - used)

    async def _beat(self, seen: dict[str, float]) -> None:
        while True:
            for name in seen:
                seen[name] += 1.0
            await asyncio.sleep(2.0)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
