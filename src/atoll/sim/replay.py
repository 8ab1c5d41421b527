"""Replays a trace through the real scheduler, `plan`, at simulated speed: arrivals, departures, failures, several policies.

What fails to fit waits, and is planned again when room has come, at most every `REPLANS` part of the trace's span. What ran on
a node that fails waits again and starts anew. Nothing here is random: the same trace gives the same report.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from typing import Any

from atoll.model.devices import GpuGrant
from atoll.model.errors import Invalid
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot, Standing
from atoll.sim.replay_places import Places, near_group
from atoll.sim.replay_report import SAMPLES, Gauge, Report
from atoll.sim.replay_trace import Task, Trace

REPLANS = 4_000
"""Into how many parts the span is divided: what was rejected is planned again once in each at most."""

POLICIES = {
    "pack": "fullest node that fits; whatever fits may pass what waits",
    "spread": "node with fewest instances; whatever fits may pass what waits",
    "pack-fifo": "fullest node that fits; nothing passes what waits",
    "near": "where requests come from (sites need coordinates), then the node with fewest; whatever fits may pass what waits",
}


def replay(trace: Trace, policy: str) -> Report:
    """Replay the whole trace under one of `POLICIES`."""
    return _Replay(trace, policy).run()


class _Replay:
    def __init__(self, trace: Trace, policy: str) -> None:
        self._trace = trace
        self._policy = policy
        self._snapshot = Snapshot()
        self._tasks = {task.name: task for task in trace.tasks}
        self._waiting: dict[str, float] = {}
        """Task → since when it waits."""
        self._fresh: set[str] = set()
        self._on: dict[str, dict[str, None]] = {node.name: {} for node in trace.nodes}
        self._node_of: dict[str, str] = {}
        self._runs: dict[str, int] = {}
        self._down: Counter[str] = Counter()
        self._waits: list[float] = []
        self._ended = self._lost = self._plans = 0
        self._room = False
        self._planned_at = -math.inf
        self._events: list[tuple[float, int, str, Any]] = []
        self._count = 0
        for node in trace.nodes:
            self._snapshot.upsert_node(node)
        self._places = Places(trace, self._snapshot)
        self._gauge = Gauge(trace, self._snapshot, self._places)
        if policy == "near" and not self._places.users:
            raise Invalid("the policy 'near' needs sites with coordinates", mend="--sites FILE with latitude, longitude and demand")
        for task in trace.tasks:
            self._push(task.arrive_s, "arrive", task)
        for failure in trace.failures:
            self._push(failure.at_s, "fail", failure)
            if math.isfinite(failure.for_s):
                self._push(failure.at_s + failure.for_s, "mend", failure)
        self._end_s = max((at for at, *_ in self._events), default=0.0)
        self._replan_s = self._end_s / REPLANS

    def run(self) -> Report:
        step_s = self._end_s / SAMPLES or 1.0
        next_sample = 0.0
        while self._events and self._events[0][0] <= self._end_s:
            now = self._events[0][0]
            while next_sample < now:
                self._sample(next_sample)
                next_sample += step_s
            while self._events and self._events[0][0] == now:
                _, _, kind, what = heapq.heappop(self._events)
                getattr(self, f"_{kind}")(now, what)
            self._place(now)
        self._sample(self._end_s)
        return self._report()

    def _push(self, at: float, kind: str, what: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, kind, what))

    def _arrive(self, now: float, task: Task) -> None:
        self._waiting[task.name] = now
        self._fresh.add(task.name)

    def _depart(self, now: float, what: tuple[str, int]) -> None:
        name, run = what
        if self._runs.get(name) != run or name not in self._node_of:
            return
        self._free(name)
        self._ended += 1

    def _retry(self, now: float, what: None) -> None:
        """An event only so that what waits is planned again."""

    def _fail(self, now: float, failure: Any) -> None:
        for node in self._nodes(failure):
            self._down[node.name] += 1
            self._snapshot.upsert_node(node, Standing.LOST)
            for name in list(self._on[node.name]):
                self._free(name)
                self._lost += 1
                self._arrive(now, self._tasks[name])

    def _mend(self, now: float, failure: Any) -> None:
        for node in self._nodes(failure):
            self._down[node.name] -= 1
            if not self._down[node.name]:
                self._snapshot.upsert_node(node)
                self._room = True

    def _nodes(self, failure: Any) -> list[Any]:
        return [node for node in self._trace.nodes if failure.name == (node.name if failure.kind == "node" else node.site)]

    def _free(self, name: str) -> None:
        self._places.count(self._tasks[name].owner, self._node_of[name], -1)
        del self._on[self._node_of.pop(name)][name]
        self._snapshot.release(name)
        self._room = True

    def _place(self, now: float) -> None:
        """Plan what is new, and what waits too if room has come since."""
        if not self._waiting:
            self._fresh.clear()
            return
        again = self._room and now >= self._planned_at + self._replan_s
        if self._room and not again:
            self._push(self._planned_at + self._replan_s, "retry", None)
        fifo = self._policy == "pack-fifo"
        if fifo and not again and len(self._waiting) > len(self._fresh):
            self._fresh.clear()
            return
        names = list(self._waiting) if again or fifo else sorted(self._fresh)
        self._fresh.clear()
        if again:
            self._room = False
            self._planned_at = now
        if not names:
            return
        self._plans += 1
        for name, node, gpus in self._planned(names, now):
            self._waits.append(now - self._waiting.pop(name))
            task = self._tasks[name]
            self._snapshot.allocate(name, node, self._group(name), self._demand(name), gpus)
            self._node_of[name] = node
            self._places.count(task.owner, node, 1)
            self._on[node][name] = None
            self._runs[name] = self._runs.get(name, 0) + 1
            if math.isfinite(task.run_s):
                self._push(now + task.run_s, "depart", (name, self._runs[name]))

    def _planned(self, names: list[str], now: float) -> list[tuple[str, str, tuple[GpuGrant, ...]]]:
        pending = [
            Pending(id=name, group=self._group(name), demand=self._demand(name), created_at=self._waiting[name]) for name in names
        ]
        if self._policy == "near":
            self._places.lay_out(pending)
        answer = plan(self._snapshot, pending, now)
        if self._policy == "pack-fifo" and answer.rejected:
            # Up to the first that does not fit: the plan goes by the same order, so that what came before it stands.
            since = {item.id: item.order for item in pending}
            first = min(since[name] for name in answer.rejected)
            return [(placed.id, placed.node, placed.gpus) for placed in answer.placed if since[placed.id] < first]
        return [(placed.id, placed.node, placed.gpus) for placed in answer.placed]

    def _group(self, name: str) -> str:
        """Instances of one group are kept apart: all of them to spread, each alone to pack, those of an owner to be near."""
        if self._policy == "near":
            return near_group(self._tasks[name].owner)
        return "all" if self._policy == "spread" else name

    def _demand(self, name: str) -> Demand:
        demand = self._tasks[name].demand
        return self._places.near(demand) if self._policy == "near" else demand

    def _sample(self, now: float) -> None:
        since = min(self._waiting.values(), default=now)
        self._gauge.sample(now, waiting=len(self._waiting), running=len(self._node_of), since=since)

    def _report(self) -> Report:
        return self._gauge.report(
            self._policy,
            arrived=len(self._trace.tasks),
            waits=self._waits,
            ended=self._ended,
            lost=self._lost,
            never=len(self._waiting),
            plans=self._plans,
        )
