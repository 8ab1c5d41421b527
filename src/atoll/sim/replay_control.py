"""Replays a trace through a whole cell: the API takes the work, the controllers make its instances, the scheduler places them,
light machines run them, the detection finds those that fail, and the controllers replace what ran there.

Times in which nothing happens are passed over (`Cell.pass_over`), so that months of a quiet trace cost what happens in them. One
process gives one answer for one trace and policy.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from msgspec.structs import replace

from atoll.api.service.access import SYSTEM
from atoll.model.errors import Invalid
from atoll.model.ports.control_plane import ControlPlane
from atoll.model.records import Ingress, IngressHeartbeat, Node, OwnerKind
from atoll.model.spec import AppSpec, JobSpec, NearKind, Port, Resources, Rollout, Scale
from atoll.model.units import Bytes, Cores, Seconds
from atoll.scheduling.demand import demand_of
from atoll.scheduling.snapshot import Snapshot
from atoll.sim.loop import run_virtual
from atoll.sim.replay_cell import Cell
from atoll.sim.replay_fleet import RUN, Fleet
from atoll.sim.replay_places import Places
from atoll.sim.replay_report import SAMPLES, Gauge, Living, Report, spread_of
from atoll.sim.replay_tally import Tally
from atoll.sim.replay_trace import Failure, Task, Trace

POLICIES = {
    "pack": "each piece of work is a job of its own, an app where it never ends: the fullest node that fits",
    "spread": "equal work is one app that is scaled: even over nodes",
    "near": "as spread, of each owner, where requests come from (sites need coordinates)",
}
PROJECT = "default"
IMAGE = "replayed"
PORTS = (Port(port=8080),)
RETRIES = 1000
STEP_S = 0.25
"""Simulated time between two looks whether anything is to be done."""
SETTLE_S = 60.0
"""At first, until all nodes are known; and at the end, for what the last event of the trace set going."""
EXACT_S = 1e-6
"""As closely as dates are told."""
INGRESS_S = 10.0
"""Between two words of an ingress."""
MEMORY_BYTES_MIN = 4 << 20
STEPS_MAX = 2_000_000_000
STILL_STEPS_MAX = 20_000_000

Progress = Callable[[float, float], None]
"""`(share, at_s)`: how much of what the trace brings has been done, and where in its time that is."""


def replay_controlled(trace: Trace, policy: str, progress: Progress = lambda share, at_s: None) -> Report:
    """Replay the whole trace under one of `POLICIES`. Takes the process's log and a loop of its own.

    Raises Invalid for a policy that needs more than the trace has.
    """
    if policy not in POLICIES:
        raise Invalid(
            f"there is no policy '{policy}' through the controllers", mend=f"use {', '.join(POLICIES)}, or --planning-only"
        )
    if policy == "near" and not any(demand > 0 for demand in trace.demand.values()):
        raise Invalid("the policy 'near' needs sites with coordinates", mend="--sites FILE with latitude, longitude and demand")
    chance = random.Random(0)

    async def main() -> Report:
        async with Cell(chance) as cell:
            return await _Course(_renamed(trace), policy, cell, progress).run()

    with _undisturbed():
        return run_virtual(main, chance, steps_max=STEPS_MAX, still_steps_max=STILL_STEPS_MAX)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the cell's log to itself, and the collector of garbage from what was there before."""

    def drop(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        raise structlog.DropEvent

    structlog.configure(processors=[drop], cache_logger_on_first_use=False)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        structlog.reset_defaults()


def _renamed(trace: Trace) -> Trace:
    """Return the trace with nodes named as the API takes it, in the same order: names break ties."""
    names = {node.name: f"n{place:06d}" for place, node in enumerate(sorted(trace.nodes, key=lambda node: node.name))}
    return replace(
        trace,
        nodes=tuple(replace(node, name=names[node.name]) for node in trace.nodes),
        failures=tuple(replace(each, name=names[each.name]) if each.kind == "node" else each for each in trace.failures),
    )


class _Course:
    def __init__(self, trace: Trace, policy: str, cell: Cell, progress: Progress) -> None:
        self._trace = trace
        self._policy = policy
        self._cell = cell
        self._progress = progress
        snapshot = Snapshot()
        for node in trace.nodes:
            snapshot.upsert_node(node)
        places = Places(trace, snapshot)
        self._gauge = Gauge(trace, snapshot, places)
        self._users = places.users
        self._tally = Tally(cell, snapshot, places, self._runs)
        self._control: ControlPlane = cell.service.control_plane
        self._fleet = Fleet(trace.nodes, self._control, cell.detection, cell.clock, self._ends_at)
        self._down: Counter[str] = Counter()
        self._runs_of: Counter[str] = Counter()
        self._kinds: dict[Any, str] = {}
        self._replicas: Counter[str] = Counter()
        self._events: list[tuple[float, int, str, Any]] = []
        self._count = self._done = 0
        self._failed = 0
        for place, task in enumerate(trace.tasks):
            self._push(task.arrive_s, "arrive", (place, task))
        for failure in trace.failures:
            self._push(failure.at_s, "fail", failure)
            if math.isfinite(failure.for_s):
                self._push(failure.at_s + failure.for_s, "mend", failure)
        self._total = max(1, self._count)
        self._end_s = max((at for at, *_ in self._events), default=0.0)
        self._step_s = self._end_s / SAMPLES or 1.0
        self._next_sample = 0.0

    async def run(self) -> Report:
        cell = self._cell
        following = asyncio.create_task(self._tally.follow(), name="tally")
        edges = asyncio.create_task(self._tell_traffic(), name="ingresses")
        lasting = (following, edges)
        try:
            await self._fleet.start()
            for site in self._trace.sites:
                await cell.service.sites.put(site)
            await self._settle(lasting)
            cell.begin()
            lived_from = cell.clock.monotonic()
            while self._events and self._events[0][0] <= self._end_s:
                await self._reach(self._events[0][0], lasting)
                await self._next_events()
            await self._settle(lasting)
            self._sample(max(self._end_s, cell.now_s()))
            return self._report(cell.clock.monotonic() - lived_from, int(cell.state.revision))
        finally:
            for task in lasting:
                task.cancel()
            await asyncio.gather(*lasting, return_exceptions=True)
            await self._fleet.close()

    async def _settle(self, lasting: tuple[asyncio.Task[None], ...]) -> None:
        """Wait until all is at rest, for a while."""
        until = self._cell.clock.monotonic() + SETTLE_S
        while self._cell.clock.monotonic() < until:
            await asyncio.sleep(STEP_S)
            await self._look(lasting)
            if self._tally.at_rest():
                return

    async def _reach(self, at_s: float, lasting: tuple[asyncio.Task[None], ...]) -> None:
        """Let time go on until `at_s`, or until a process ends before that; and pass over what of it is quiet."""
        while (gap := min(at_s, self._events[0][0]) - self._cell.now_s()) > EXACT_S:
            if self._tally.at_rest():
                self._sample_until(self._cell.now_s() + gap)
                self._cell.pass_over(gap)
                return
            await asyncio.sleep(min(gap, STEP_S))
            self._sample_until(self._cell.now_s())
            await self._look(lasting)

    async def _look(self, lasting: tuple[asyncio.Task[None], ...]) -> None:
        self._cell.check()
        self._fleet.check()
        for task in lasting:
            if task.done():
                raise RuntimeError(f"the replay's {task.get_name()} ended") from task.exception()
        while self._tally.finished:
            await self._cell.service.jobs.delete(PROJECT, self._tally.finished.pop())

    async def _next_events(self) -> None:
        while self._events and self._events[0][0] <= self._cell.now_s() + EXACT_S:
            at, _, kind, what = heapq.heappop(self._events)
            if at > self._end_s:
                return
            await getattr(self, f"_{kind}")(what)
            self._tally.touch()
            if kind in ("arrive", "fail", "mend"):
                self._done += 1
                self._progress(self._done / self._total, at)

    def _push(self, at_s: float, kind: str, what: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_s, self._count, kind, what))

    # What the trace brings.

    async def _arrive(self, what: tuple[int, Task]) -> None:
        place, task = what
        service = self._cell.service
        resources = Resources(
            cpu=Cores(max(0.01, task.demand.cpu_milli / 1000)),
            memory=Bytes(max(MEMORY_BYTES_MIN, task.demand.memory_bytes)),
            gpu=task.demand.gpu,
        )
        placement = task.demand.placement
        if self._policy == "pack" and math.isfinite(task.run_s):
            job = JobSpec(
                name=f"t{place}",
                image=IMAGE,
                command=(RUN, f"{task.run_s:.3f}"),
                resources=resources,
                placement=placement,
                retries=RETRIES,
            )
            self._tally.arrive(task, (OwnerKind.JOB, job.name), demand_of(job))
            await service.jobs.create(SYSTEM, job)
            return
        if self._policy == "pack":
            name = f"t{place}"
        else:
            kind = (task.demand, task.owner if self._policy == "near" else "")
            name = self._kinds.setdefault(kind, f"k{len(self._kinds)}")
        if self._policy == "near":
            placement = replace(placement, near=NearKind.USERS)
        app = AppSpec(
            name=name,
            image=IMAGE,
            resources=resources,
            placement=placement,
            scale=Scale(replicas=1),
            ports=PORTS if self._policy == "near" else (),  # without a port it has no users
            rollout=Rollout(drain=Seconds(0)),  # no request is under way here
        )
        self._tally.arrive(task, (OwnerKind.APP, name), demand_of(app))
        self._replicas[name] += 1
        if self._replicas[name] == 1 and (PROJECT, name) not in self._kinds:
            self._kinds[(PROJECT, name)] = name
            await service.apps.put(SYSTEM, app)
        else:
            await service.apps.scale(PROJECT, name, self._replicas[name])

    async def _depart(self, what: tuple[Task, int]) -> None:
        task, run = what
        if self._runs_of[task.name] != run or task.name not in self._tally.running:
            return
        _, name = self._tally.depart(task.name)
        self._replicas[name] -= 1
        await self._cell.service.apps.scale(PROJECT, name, self._replicas[name])

    async def _end(self, what: tuple[str, str]) -> None:
        self._fleet.end(*what)

    async def _fail(self, failure: Failure) -> None:
        for node in self._nodes(failure):
            self._down[node.name] += 1
            if self._down[node.name] == 1:
                self._failed += 1
                self._fleet.switch_off(node.name)
                self._tally.node_failed(node.name)

    async def _mend(self, failure: Failure) -> None:
        for node in self._nodes(failure):
            self._down[node.name] -= 1
            if not self._down[node.name]:
                await self._fleet.switch_on(node.name)
                self._tally.node_returned(node.name)

    def _nodes(self, failure: Failure) -> list[Node]:
        return [node for node in self._trace.nodes if failure.name == (node.name if failure.kind == "node" else node.site)]

    # What the cell does.

    def _ends_at(self, after_s: float, node: str, instance: str) -> None:
        self._push(self._cell.now_s() + after_s, "end", (node, instance))

    def _runs(self, task: Task) -> None:
        self._runs_of[task.name] += 1
        if math.isfinite(task.run_s) and self._policy != "pack":
            self._push(self._cell.now_s() + task.run_s, "depart", (task, self._runs_of[task.name]))

    async def _tell_traffic(self) -> None:
        """Be the ingresses: say again and again where the requests for each app come from."""
        total = sum(self._users.values())
        for site in self._users:
            await self._control.register_ingress(Ingress(name=f"edge-{site}", site=site, http_port=80))
        while True:
            if self._policy == "near":
                apps = {f"{PROJECT}/{name}": count for name, count in self._replicas.items() if count}
                for site, demand in self._users.items():
                    requests = {key: count * demand / total for key, count in apps.items()}
                    beat = IngressHeartbeat(ingress=f"edge-{site}", site=site, at=self._cell.clock.now(), requests=requests)
                    await self._control.ingress_heartbeat(beat)
            await asyncio.sleep(INGRESS_S)

    def _sample_until(self, at_s: float) -> None:
        while self._next_sample <= min(at_s, self._end_s) and self._next_sample < self._end_s:
            self._sample(self._next_sample)
            self._next_sample += self._step_s

    def _sample(self, at_s: float) -> None:
        tally = self._tally
        since = min((since for since in tally.waiting.values()), default=at_s)
        self._gauge.sample(at_s, waiting=len(tally.waiting), running=len(tally.running), since=min(since, at_s))

    def _report(self, passed_s: float, writes: int) -> Report:
        tally = self._tally
        return self._gauge.report(
            self._policy,
            arrived=len(self._trace.tasks),
            waits=tally.waits,
            ended=tally.ended,
            lost=tally.lost,
            never=len(tally.waiting),
            plans=None,
            living=Living(
                started=spread_of(tally.starts),
                replaced=spread_of(tally.replaced),
                found=spread_of(tally.found),
                nodes_failed=self._failed,
                braked=tally.braked,
                writes=writes,
                passed_s=passed_s,
            ),
        )
