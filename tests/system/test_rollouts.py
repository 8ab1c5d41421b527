"""Rollouts by shares of the requests: real API, leader, ingress and Envoy; instances are small servers on loopback addresses."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from atoll.api.service import Service
from atoll.api.service.access import SYSTEM
from atoll.api.service.context import KINDS
from atoll.control import world
from atoll.control.controllers import run_control
from atoll.ingress import envoy
from atoll.ingress.service import Ingress
from atoll.model import codec, keys
from atoll.model.errors import AtollError, Conflict
from atoll.model.fabric import FabricNode
from atoll.model.ports.clock import SystemClock
from atoll.model.records import App, AppPhase, Capacity, Heartbeat, Node, Status
from atoll.model.rollouts import RolloutPhase, RolloutStatus
from atoll.model.spec import Analysis, AppSpec, CanaryStep, Health, Port, Rollout, RuntimeName, Scale, Strategy
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds
from atoll.model.views import RolloutView
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


def _has_envoy() -> bool:
    try:
        envoy.find_binary()
    except AtollError:
        return False
    return True


pytestmark = [pytest.mark.system, pytest.mark.skipif(not _has_envoy(), reason="Envoy is not installed")]
PORT = 18_471
TIMEOUT_S = 40.0
T = TypeVar("T")
ANALYSIS = Analysis(error_rate_max=0.05, requests_min=50, interval=Seconds(1), failures_max=0)
CANARY = Rollout(
    strategy=Strategy.CANARY,
    steps=(CanaryStep(weight=10, pause=Seconds(1)), CanaryStep(weight=50, pause=Seconds(1))),
    analysis=ANALYSIS,
    max_surge=1,
    drain=Seconds(5),
)
BLUE_GREEN = Rollout(strategy=Strategy.BLUE_GREEN, keep_old=Seconds(60), drain=Seconds(5))


class Instance:
    """Answers with its release; a bad one fails every other request."""

    def __init__(self, address: str, release: int, *, bad: bool) -> None:
        self.address, self.release, self.bad = address, release, bad
        self._count = itertools.count()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.address, PORT)

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                status = "500 Oh" if self.bad and next(self._count) % 2 else "200 OK"
                body = str(self.release).encode()
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


class Agent:
    """Runs what it is given as a server on an address of its own."""

    def __init__(self, service: Service) -> None:
        self._control = service.control_plane
        self._clock = service.clock
        self._numbers = itertools.count(2)
        self._running: dict[str, Instance] = {}

    async def run(self) -> None:
        capacity = Capacity(cpu_milli=64_000, memory_bytes=64 << 30, disk_bytes=1 << 40)
        await self._control.register_node(Node(name="n1", capacity=capacity, runtimes=(RuntimeName.RUNC,)))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            async for batch in self._control.assignments("n1"):
                for assignment in batch.put:
                    spec, instance = assignment.workload, assignment.instance
                    if instance.desired is Desired.STOP:
                        if (server := self._running.pop(instance.id, None)) is not None:
                            server.stop()
                        await self._say(instance.id, Phase.STOPPED)
                    elif instance.id not in self._running:
                        server = Instance(f"127.0.1.{next(self._numbers)}", instance.release, bad="BAD" in spec.env)
                        await server.start()
                        self._running[instance.id] = server
                        await self._say(instance.id, Phase.RUNNING, server.address)

    async def _beat(self) -> None:
        while True:
            await self._control.heartbeat(Heartbeat(node="n1", at=self._clock.now()))
            await asyncio.sleep(1)

    async def _say(self, id: str, phase: Phase, address: str | None = None) -> None:
        now, ready = self._clock.now(), phase is Phase.RUNNING
        status = Status(
            instance=id,
            project="default",
            node="n1",
            phase=phase,
            ready=ready,
            address=address,
            phase_at=now,
            started_at=now,
            ready_at=now if ready else None,
        )
        await self._control.report("n1", [status])

    def stop(self) -> None:
        for server in self._running.values():
            server.stop()


async def eventually(now: Callable[[], T], seen: Callable[[], Any]) -> T:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := now()):
        assert time.monotonic() < deadline, seen()
        await asyncio.sleep(0.02)
    return found


class Cell:
    def __init__(self, service: Service, ingress: Ingress) -> None:
        self.service, self.ingress = service, ingress
        self.answers: Counter[tuple[str, str]] = Counter()
        """(status, release) of every request of the load."""

    async def deploy(self, rollout: Rollout, **env: str) -> App:
        spec = AppSpec(
            name="web",
            image="registry.test/web:1",
            ports=(Port(port=PORT),),
            health=Health(),
            scale=Scale(replicas=3),
            rollout=rollout,
            env=env,
        )
        return (await self.service.apps.put(SYSTEM, spec)).app

    def view(self) -> RolloutView:
        return self.service.rollouts.get("default", "web")

    async def until(self, what: Callable[[RolloutStatus], bool]) -> RolloutStatus:
        def now() -> RolloutStatus | None:
            status = self.view().status
            return status if status is not None and what(status) else None

        return await eventually(now, self.view)

    async def answered(self, host: str, answer: tuple[str, str]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while (said := await self.ask(host)) != answer:
            assert time.monotonic() < deadline, said
            await asyncio.sleep(0.02)

    async def served(self, release: int) -> None:
        def now() -> bool:
            status = self.view().app_status
            return status is not None and (status.phase, status.served_release) == (AppPhase.RUNNING, release)

        await eventually(now, self.view)

    async def load(self, host: str = "web.localhost") -> None:
        """Ask for ever over one connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ingress.http_port)
        try:
            while True:
                self.answers[await self._ask(reader, writer, host)] += 1
                await asyncio.sleep(0.004)
        finally:
            writer.close()

    async def ask(self, host: str) -> tuple[str, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ingress.http_port)
        try:
            return await self._ask(reader, writer, host)
        finally:
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> tuple[str, str]:
        writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return head.split()[1], (await reader.readexactly(length)).decode()


@pytest.fixture
async def cell(tmp_path: Path) -> AsyncIterator[Cell]:
    clock, chance = SystemClock(), random.Random(1)
    async with AsyncExitStack() as stack:
        store = MemoryStore(clock)
        stack.push_async_callback(store.close)
        loopback = FabricNode(name="n1", prefix="127.0.1.0/24")  # which no agent could ask for
        await store.put(keys.fabric_node("n1"), codec.encode(loopback))
        state = await stack.enter_async_context(State(store, {**KINDS, **world.KINDS}))
        service = await stack.enter_async_context(Service(store, state, clock, chance, bytes(32)))
        beats = service.heartbeats
        agent = Agent(service)
        ingress = Ingress(service.control_plane, tmp_path / "ingress", port=0, workers=2, stop_grace_s=0.2)
        control = run_control(
            store, state, clock, chance, beats.last_seen(), heartbeats=beats.all(), traffic=service.traffic.totals()
        )
        tasks = [asyncio.create_task(work) for work in (control, agent.run(), ingress.run())]

        async def end() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            agent.stop()

        stack.push_async_callback(end)
        async with asyncio.timeout(30):
            await ingress.ready.wait()
        yield Cell(service, ingress)


async def test_a_bad_canary_reverts_by_itself_under_load_and_a_good_one_is_promoted_without_a_failed_request(cell: Cell) -> None:
    await cell.deploy(CANARY)
    await cell.served(1)
    await cell.answered("web.localhost", ("200", "1"))
    load = [asyncio.create_task(cell.load()) for _ in range(4)]
    try:
        await cell.deploy(CANARY, BAD="1")
        status = await cell.until(lambda s: s.phase is RolloutPhase.REVERTED)
        assert "requests failed" in status.message
        assert "of the old release 0 %" in status.message
        app = cell.view().app_status
        assert app is not None
        assert (app.phase, app.served_release) == (AppPhase.FAILED, 1)
        events = {event.code: event for event in cell.service.events.all("default", subject="app/web", limit=100).items}
        assert status.message in events["rollout-reverted"].message
        canary = {each.release: each for each in cell.view().releases}[2]
        assert 0.3 < canary.errors / canary.requests < 0.7
        bad, good = canary.requests, sum(n for (_, release), n in cell.answers.items() if release == "1")
        assert bad < 0.2 * (bad + good), "a tenth of the requests, though it is one instance of four"
        await eventually(lambda: not any(each.instances for each in cell.view().releases if each.release == 2), cell.view)
        await asyncio.sleep(0.2)
        cell.answers.clear()
        await asyncio.sleep(0.5)
        assert set(cell.answers) == {("200", "1")}, "all requests are back at the last good release"
        await cell.deploy(CANARY, GOOD="1")
        await cell.until(lambda s: s.release == 3 and s.phase is RolloutPhase.COMPLETE)
        await cell.served(3)
        await asyncio.sleep(0.3)
        assert {code for code, _ in cell.answers} == {"200"}, "no request failed while weights changed and instances left"
        assert {release for _, release in cell.answers} == {"1", "3"}
        for task in load:
            assert not task.done()
    finally:
        for task in load:
            task.cancel()
        done: list[Any] = await asyncio.gather(*load, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in done), done
    await _blue_green(cell)


async def _blue_green(cell: Cell) -> None:
    """In the same cell: another Envoy would only take its time to start."""
    cell.answers.clear()
    load = [asyncio.create_task(cell.load()) for _ in range(4)]
    try:
        await cell.deploy(BLUE_GREEN)
        await cell.until(lambda s: s.release == 4 and s.phase is RolloutPhase.WAITING)
        with pytest.raises(Conflict, match="blue-green rollout"):
            await cell.service.apps.restart("default", "web")
        await cell.answered("preview--web.localhost", ("200", "4"))
        assert set(cell.answers) == {("200", "3")}, "the new set is beside the old one and is not served"
        await cell.service.rollouts.promote(SYSTEM, "default", "web")
        await cell.until(lambda s: s.phase is RolloutPhase.KEEPING)
        await asyncio.sleep(0.3)
        before = cell.answers["200", "3"]
        await asyncio.sleep(0.3)
        assert cell.answers["200", "3"] == before, "all requests at once"
        assert cell.answers["200", "4"]
        await cell.service.rollouts.undo(SYSTEM, "default", "web")
        await cell.until(lambda s: s.phase is RolloutPhase.REVERTED)
        await asyncio.sleep(0.3)
        before = cell.answers["200", "4"]
        await asyncio.sleep(0.3)
        assert cell.answers["200", "4"] == before, "and back"
        assert {code for code, _ in cell.answers} == {"200"}
    finally:
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
