"""A node is drained under load: real API, leader, ingress and Envoy; instances are small servers on loopback addresses."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from test_rollouts import Cell, Instance, _has_envoy, eventually

from atoll.api.service import Service
from atoll.api.service.access import SYSTEM
from atoll.api.service.context import KINDS
from atoll.control import world
from atoll.control.controllers import run_control
from atoll.ingress.service import Ingress
from atoll.model import codec, keys
from atoll.model.fabric import FabricNode
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Capacity, Heartbeat, Node, Status
from atoll.model.records import Instance as Record
from atoll.model.spec import Rollout, RuntimeName
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds
from atoll.model.views import DrainRequest, DrainState
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

pytestmark = [pytest.mark.system, pytest.mark.skipif(not _has_envoy(), reason="Envoy is not installed")]
NODES = ("n1", "n2", "n3")
ADDRESSES = itertools.count(2)


class Agent:
    """One node: runs what it is given as a server on an address of its own."""

    def __init__(self, service: Service, name: str) -> None:
        self._control, self._clock, self._name = service.control_plane, service.clock, name
        self._running: dict[str, Instance] = {}

    async def run(self) -> None:
        capacity = Capacity(cpu_milli=64_000, memory_bytes=64 << 30, disk_bytes=1 << 40)
        await self._control.register_node(Node(name=self._name, capacity=capacity, runtimes=(RuntimeName.RUNC,)))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            async for batch in self._control.assignments(self._name):
                for assignment in batch.put:
                    await self._obey(assignment.instance)

    async def _obey(self, instance: Record) -> None:
        if instance.desired is Desired.STOP:
            if (server := self._running.pop(instance.id, None)) is not None:
                server.stop()
            await self._say(instance.id, Phase.STOPPED)
        elif instance.id not in self._running:
            server = Instance(f"127.0.2.{next(ADDRESSES)}", instance.release, bad=False)
            await server.start()
            self._running[instance.id] = server
            await self._say(instance.id, Phase.RUNNING, server.address)

    async def _beat(self) -> None:
        while True:
            await self._control.heartbeat(Heartbeat(node=self._name, at=self._clock.now()))
            await asyncio.sleep(1)

    async def _say(self, id: str, phase: Phase, address: str | None = None) -> None:
        now, ready = self._clock.now(), phase is Phase.RUNNING
        status = Status(instance=id, project="default", node=self._name, phase=phase, ready=ready, address=address, phase_at=now)
        await self._control.report(self._name, [status])

    def stop(self) -> None:
        for server in self._running.values():
            server.stop()


@pytest.fixture
async def cell(tmp_path: Path) -> AsyncIterator[Cell]:
    clock, chance = SystemClock(), random.Random(1)
    async with AsyncExitStack() as stack:
        store = MemoryStore(clock)
        stack.push_async_callback(store.close)
        for name in NODES:  # none of which could ask for that
            await store.put(keys.fabric_node(name), codec.encode(FabricNode(name=name, prefix="127.0.2.0/24")))
        state = await stack.enter_async_context(State(store, {**KINDS, **world.KINDS}))
        service = await stack.enter_async_context(Service(store, state, clock, chance, bytes(32)))
        agents = [Agent(service, name) for name in NODES]
        ingress = Ingress(service.control_plane, tmp_path / "ingress", port=0, workers=2, stop_grace_s=0.2)
        control = run_control(store, state, clock, chance, service.heartbeats.last_seen(), heartbeats=service.heartbeats.all())
        tasks = [asyncio.create_task(work) for work in (control, ingress.run(), *(agent.run() for agent in agents))]

        async def end() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for agent in agents:
                agent.stop()

        stack.push_async_callback(end)
        async with asyncio.timeout(30):
            await ingress.ready.wait()
        yield Cell(service, ingress)


async def test_a_node_is_drained_under_load_without_a_failed_request_and_undrained(cell: Cell) -> None:
    await cell.deploy(Rollout(max_surge=1, drain=Seconds(5)))
    await cell.served(1)
    await cell.answered("web.localhost", ("200", "1"))
    drains, nodes = cell.service.drains, cell.service.nodes
    (busy, *_) = sorted(NODES, key=lambda name: -nodes.get(name).instances)
    there = nodes.get(busy).instances
    assert there >= 1
    load = [asyncio.create_task(cell.load()) for _ in range(4)]
    seen: set[DrainState] = set()
    try:
        await eventually(lambda: sum(cell.answers.values()) > 20, lambda: cell.answers)
        await drains.start(busy, DrainRequest(deadline=Seconds(600)))

        def empty() -> bool:
            view = drains.get(busy)
            assert view.total == there
            seen.update(item.state for item in view.items)
            return view.done and nodes.get(busy).instances == 0

        await eventually(empty, lambda: drains.get(busy))
        await cell.served(1)
        await asyncio.sleep(0.3)
        assert set(cell.answers) == {("200", "1")}
        assert sum(cell.answers.values()) > 40
        assert seen <= {DrainState.WAITS, DrainState.REPLACING, DrainState.DRAINING, DrainState.STOPPING}
        assert DrainState.DRAINING in seen

        def told() -> set[str]:
            return {event.code for event in cell.service.events.all("default", subject=f"node/{busy}", limit=10).items}

        await eventually(lambda: {"node-evacuated", "node-drained"} <= told(), told)
        await drains.undo(busy)
        await cell.service.apps.scale("default", "web", 6, caller=SYSTEM)
        await eventually(lambda: nodes.get(busy).instances > 0, lambda: nodes.get(busy))
        await cell.served(1)
        assert {status for status, _ in cell.answers} == {"200"}
    finally:
        for task in load:
            task.cancel()
        done: list[Any] = await asyncio.gather(*load, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in done), done
