"""A small cell for tests of control: a store in memory, the leader's loop, a scripted agent, on a virtual clock."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from msgspec import structs

from atoll.control.controllers import run_control
from atoll.control.detection.exchange import Exchange
from atoll.control.optimiser import InlineOptimiser, Optimiser
from atoll.control.queries import Ask
from atoll.control.sleeping import NoDemand
from atoll.control.world import KINDS
from atoll.model import codec, keys
from atoll.model.records import (
    App,
    AppStatus,
    Capacity,
    Drained,
    Event,
    Exit,
    Heartbeat,
    Ingress,
    IngressHeartbeat,
    Instance,
    Job,
    JobStatus,
    Node,
    Release,
    Status,
    Usage,
)
from atoll.model.spec import AppSpec, JobSpec, RuntimeName
from atoll.model.states import Desired, Phase
from atoll.model.traffic import Counts
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

T = TypeVar("T")
START = 1_000_000.0


class _Selector(selectors.SelectSelector):
    """Instead of waiting it lets the loop's time pass."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and timeout is None:
            raise RuntimeError("everything waits for ever")
        if not found and timeout:
            self.loop.passed_s += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.passed_s = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.passed_s


class LoopClock:
    def now(self) -> float:
        return START + asyncio.get_running_loop().time()

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(asyncio.wait_for(main, 100_000))
    finally:
        loop.close()


def node(name: str, *, cpu: int = 4000, memory: int = 8 << 30, **more: Any) -> Node:
    capacity = Capacity(cpu_milli=cpu, memory_bytes=memory, disk_bytes=1 << 40)
    return Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,), **more)


class Cell:
    """`agents` say what becomes of an instance that is started: by default it is ready after 50 ms."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.store = MemoryStore(self.clock)
        self.state = State(self.store, KINDS)
        self.last_seen: dict[str, float] = {}
        self.heartbeats: dict[str, Heartbeat] = {}
        self.detection: Exchange | None = None
        self.ingresses: dict[str, IngressHeartbeat] = {}
        self.optimiser: Optimiser = InlineOptimiser()
        self.traffic: dict[str, dict[int, Counts]] = {}
        """What ingresses have counted: app → release → all of it."""
        self.demand = NoDemand()
        """What ingresses have requests for: tests set it."""
        self.prometheus: Ask | None = None
        """How Prometheus servers are asked."""
        self.metrics: Callable[[Instance], dict[str, float]] = lambda instance: {}
        """What instances that are ready say of themselves with each heartbeat."""
        self.uses: Callable[[Instance], dict[str, int]] = lambda instance: {}
        """Beside it, what their nodes say that they use."""
        self.silent: set[str] = set()
        self.script: Callable[[Instance], list[tuple[float, dict[str, Any]]]] = healthy
        self.watchers: list[Callable[[], None]] = []
        self._acts: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[Any]] = []
        self._leading: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Cell:
        await self.state.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (*self._tasks, *self._acts.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._acts.values(), return_exceptions=True)
        await self.state.close()
        await self.store.close()

    kinds = KINDS

    def chance(self, seed: int) -> random.Random:
        return random.Random(seed)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Have `task` end with the cell."""
        self._tasks.append(task)

    def stop_leading(self) -> None:
        for task in self._leading:
            task.cancel()

    def lead(self, identity: str = "server", chance: random.Random | None = None) -> asyncio.Task[Any]:
        control = run_control(
            self.store,
            self.state,
            self.clock,
            chance or random.Random(1),
            self.last_seen,
            heartbeats=self.heartbeats,
            identity=identity,
            detection=self.detection,
            ingresses=self.ingresses,
            optimiser=self.optimiser,
            traffic=self.traffic,
            demand=self.demand,
            ask=self.prometheus,
        )
        task = asyncio.ensure_future(control)
        self._tasks.append(task)
        self._leading.append(task)
        return task

    def agents(self) -> None:
        self._tasks.append(asyncio.ensure_future(self._agents()))
        self._tasks.append(asyncio.ensure_future(self._heartbeats()))

    async def put(self, key: str, record: object) -> None:
        await self.state.reach(await self.store.put(key, codec.encode(record)))

    async def add_node(self, name: str, **more: Any) -> None:
        await self.put(keys.node(name), node(name, **more))

    async def add_ingress(self, name: str = "g") -> None:
        await self.put(keys.ingress(name), Ingress(name=name, http_port=1))

    async def deploy(self, spec: AppSpec, *, release: int = 1, replicas: int = 1, generation: int = 1, **more: Any) -> App:
        now = self.clock.now()
        app = App(
            project="default",
            name=spec.name,
            spec=spec,
            release=release,
            replicas=replicas,
            generation=generation,
            created_at=now,
            updated_at=now,
            **more,
        )
        made = Release(project="default", app=spec.name, number=release, spec=spec, created_at=now)
        await self.put(keys.release("default", spec.name, release), made)
        await self.put(keys.app("default", spec.name), app)
        return app

    async def change(self, app: App, **changes: Any) -> App:
        app = structs.replace(app, updated_at=self.clock.now(), **changes)
        await self.put(keys.app("default", app.name), app)
        return app

    async def submit(self, spec: JobSpec) -> Job:
        job = Job(project="default", name=spec.name, spec=spec, created_at=self.clock.now())
        await self.put(keys.job("default", spec.name), job)
        return job

    def instances(self) -> list[Instance]:
        return sorted((held.record for held in self.state.records(Instance).values()), key=lambda i: (i.created_at, i.id))

    def status(self, instance: Instance) -> Status | None:
        held = self.state.get(Status, f"{instance.project}/{instance.id}")
        return held.record if held else None

    def app_status(self, name: str = "web") -> AppStatus | None:
        held = self.state.get(AppStatus, f"default/{name}")
        return held.record if held else None

    def job_status(self, name: str = "work") -> JobStatus | None:
        held = self.state.get(JobStatus, f"default/{name}")
        return held.record if held else None

    def codes(self) -> list[str]:
        events = sorted((held.record for held in self.state.records(Event).values()), key=lambda e: e.id)
        return [event.code for event in events]

    def ready(self) -> int:
        statuses = ((i, self.status(i)) for i in self.instances())
        return sum(i.desired is Desired.RUN and s is not None and s.ready for i, s in statuses)

    async def until(self, holds: Callable[[], Any], within_s: float = 100.0) -> None:
        async with asyncio.timeout(within_s):
            while not holds():
                await self.state.wait_past(self.state.revision)

    async def quiet(self, for_s: float = 5.0) -> int:
        """Let time pass; return how many revisions came meanwhile."""
        before = await self.store.revision()
        await asyncio.sleep(for_s)
        return int(await self.store.revision()) - int(before)

    async def report(self, instance: Instance, **changes: Any) -> None:
        """What the agent does through the API: the newest word counts, and only while the instance is there."""
        key = f"{instance.project}/{instance.id}"
        if self.state.get(Instance, key) is None or instance.node is None:
            return
        old = self.status(instance) or Status(
            instance=instance.id, project=instance.project, node=instance.node, phase=Phase.PENDING
        )
        new = structs.replace(old, **changes)
        if new.phase is not old.phase:
            new = structs.replace(new, phase_at=self.clock.now())
        if new.ready and not old.ready:
            new = structs.replace(new, ready_at=self.clock.now())
        await self.put(keys.status(instance.project, instance.id), new)

    async def _agents(self) -> None:
        async for _ in self._each_change():
            for instance in self.instances():
                if instance.node is None or instance.node in self.silent:
                    continue
                act = f"{instance.id}/{'stop' if instance.desired is Desired.STOP else 'run'}"
                if act not in self._acts:
                    self._acts[act] = asyncio.ensure_future(self._act(instance, act))
                if instance.desired is Desired.DRAIN:
                    await self._drain(instance)

    async def _act(self, instance: Instance, act: str) -> None:
        if act.endswith("stop"):
            run = self._acts.get(f"{instance.id}/run")
            if run is not None:
                run.cancel()
            await asyncio.sleep(0.02)
            status = self.status(instance)
            if status is None or not status.phase.final:
                await self.report(instance, phase=Phase.STOPPED, ready=False)
            return
        for after_s, changes in self.script(instance):
            await asyncio.sleep(after_s)
            if "started_at" in changes:
                changes = {**changes, "started_at": self.clock.now()}
            await self.report(instance, **changes)

    async def _drain(self, instance: Instance) -> None:
        for name in self.state.records(Ingress):
            key = keys.drained(instance.id, name)
            if name not in self.silent and await self.store.get(key) is None:
                await self.store.put(key, codec.encode(Drained(instance=instance.id, ingress=name, at=self.clock.now())))

    async def _each_change(self) -> Any:
        revision = self.state.revision
        yield revision
        while True:
            revision = await self.state.wait_past(revision)
            for watcher in self.watchers:
                watcher()
            yield revision

    async def _heartbeats(self) -> None:
        while True:
            for name in self.state.records(Node):
                if name not in self.silent:
                    self.last_seen[name] = self.clock.monotonic()
                    self.heartbeats[name] = Heartbeat(node=name, at=self.clock.now(), usage=self._usage(name))
            await asyncio.sleep(2.0)

    def _usage(self, node: str) -> tuple[Usage, ...]:
        ready = [i for i in self.instances() if i.node == node and (status := self.status(i)) is not None and status.ready]
        return tuple(Usage(instance=one.id, metrics=self.metrics(one), **self.uses(one)) for one in ready)


def healthy(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
    return [
        (0.03, {"phase": Phase.RUNNING, "started_at": 0.0, "address": "10.64.0.2"}),
        (0.02, {"ready": True}),
    ]


def fails(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
    """Starts, ends with status 3, and is not started again."""
    return [
        (0.03, {"phase": Phase.RUNNING, "started_at": 0.0}),
        (0.05, {"phase": Phase.FAILED, "exit": Exit(code=3, at=0.0)}),
    ]


def succeeds(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
    return [
        (0.03, {"phase": Phase.RUNNING, "started_at": 0.0}),
        (1.0, {"phase": Phase.SUCCEEDED, "exit": Exit(code=0, at=0.0)}),
    ]


def crash_loops(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
    """Is up for a moment, again and again, as without a health check."""
    script: list[tuple[float, dict[str, Any]]] = []
    for restarts in range(12):
        script.append(
            (min(60.0, 0.2 * 2**restarts), {"phase": Phase.RUNNING, "started_at": 0.0, "ready": True, "restarts": restarts})
        )
        exit = Exit(code=1, at=0.0)
        script.append((0.1, {"phase": Phase.BACKOFF, "ready": False, "exit": exit, "message": "exited with status 1"}))
    return script
