"""What apps have to do, by the heartbeats of their nodes and the word of ingresses, for how many instances they are to have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import UNSET
from msgspec.structs import replace

from atoll.control.actions import Decision, Seen
from atoll.control.autoscale import BOUNDS, Cause, Memory, Need, ScaleFacts, Signal, decide_scale
from atoll.control.facts import AppFacts
from atoll.control.loads import Loads
from atoll.control.pressure import PressureFacts, PressureMemory, decide_pressure
from atoll.control.queries import Queries
from atoll.control.signals import prometheus_signal, signals_of
from atoll.control.sleeping import Demand
from atoll.control.windows import floor_of
from atoll.control.world import World, owner_of
from atoll.model.ports.clock import Clock
from atoll.model.records import Heartbeat, Instance, Severity, Usage
from atoll.model.spec import Scale

FRESH_S = 15.0
"""A reading older than this is none: three heartbeats, after which a node counts as unreachable, too."""

WINDOW = Cause(text="a window of its schedule is open")

Heartbeats = Mapping[str, Heartbeat]
"""Node → its latest heartbeat. Owned by whoever takes them, and read live."""


class Readings:
    """Takes in heartbeats at each tick, and marks the apps that they say something of. Keeps what decisions leave behind."""

    def __init__(self, world: World, clock: Clock, heartbeats: Heartbeats, demand: Demand, queries: Queries) -> None:
        self._world = world
        self._clock = clock
        self._heartbeats = heartbeats
        self._loads = Loads(world, clock, demand)
        self._queries = queries
        self._failing: set[str] = set()
        """Apps of which it was told that their query has no answer."""
        self._last: dict[str, Heartbeat] = {}
        self._heard: dict[str, float] = {}
        self._usages: dict[str, dict[str, Usage]] = {}
        """Node → instance → what it uses and says; made when somebody asks."""
        self._memories: dict[str, Memory] = {}
        self._pressures: dict[str, PressureMemory] = {}

    def look(self) -> None:
        """Have the apps decided about of which something new was heard."""
        self._loads.look()
        scaling = self._world.scaling
        for memories in (self._memories, self._pressures):
            for gone in memories.keys() - scaling:
                del memories[gone]
        self._failing &= scaling
        for gone in self._last.keys() - self._heartbeats.keys():
            for index in (self._last, self._heard, self._usages):
                index.pop(gone, None)
        for node, beat in self._heartbeats.items():
            if self._last.get(node) is beat:
                continue
            self._last[node], self._heard[node] = beat, self._clock.monotonic()
            self._usages.pop(node, None)
            if not scaling:
                continue
            for key in self._world.on_node.get(node, ()):
                held = self._world.state.get(Instance, key)
                if held is not None and f"{held.record.project}/{held.record.owner}" in scaling:
                    self._world.dirty[owner_of(held.record)] = None

    def join(self, facts: AppFacts, decision: Decision) -> AppFacts:
        """Return `facts` with how many instances the app is to have, where it scales; decide again when its windows change."""
        app, status = facts.app, facts.status
        scale = app.spec.scale
        if app.deleting or app.most is None or scale is UNSET or (app.most == 1 and app.sleeps):
            return facts
        key = f"{app.project}/{app.name}"
        if facts.awake is False:
            self._memories.pop(key, None)
            self._pressures.pop(key, None)
            return facts
        floor = floor_of(scale, decision.now)
        if floor.until is not None:
            decision.wake(floor.until)
        self._tell_query(key, facts, scale, decision)
        least = max(app.replicas, 1)
        now = self._clock.monotonic()
        if status is None or status.scaled is None:
            # It begins with what there is, so that nothing is taken away before anything has been seen.
            current = min(app.most, max(least, status.total if status is not None else 0))
        else:
            current = max(least, app.wanted(status))
        choice = decide_scale(
            ScaleFacts(
                least=min(app.most, max(least, floor.least)),
                least_cause=WINDOW if floor.least > least else BOUNDS,
                most=app.most,
                current=current,
                down_s=float(scale.down),
                signals=tuple(self._signals(facts, scale, now)),
                pressed=self._pressed(facts, scale, current, app.most, now),
            ),
            self._memories.get(key, Memory()),
            now,
        )
        self._memories[key] = choice.memory
        return replace(facts, choice=choice)

    def _tell_query(self, key: str, facts: AppFacts, scale: Scale, decision: Decision) -> None:
        """Say once that the app's query has no answer, and again after it has had one."""
        problem = self._queries.problems.get(scale.prometheus) if scale.prometheus is not None else None
        if problem is None:
            self._failing.discard(key)
        elif key not in self._failing:
            self._failing.add(key)
            text = f"scale.prometheus: {problem}"
            decision.tell(facts.app.project, f"app/{facts.app.name}", "query-failed", text, Severity.WARNING)

    def _signals(self, facts: AppFacts, scale: Scale, now: float) -> Iterable[Signal]:
        ready = [seen for seen in facts.instances if seen.ready]
        found = [usage for seen in ready if (usage := self._usage(seen, now)) is not None]
        yield from signals_of(facts.app.spec, scale, len(ready), found)
        if scale.prometheus is not None:
            yield prometheus_signal(scale.prometheus, self._queries.answers.get(scale.prometheus), now)

    def _usage(self, seen: Seen, now: float) -> Usage | None:
        node = seen.instance.node
        if node is None or now - self._heard.get(node, float("-inf")) > FRESH_S:
            return None
        if node not in self._usages:
            self._usages[node] = {usage.instance: usage for usage in self._last[node].usage}
        return self._usages[node].get(seen.instance.id)

    def _pressed(self, facts: AppFacts, scale: Scale, current: int, most: int, now: float) -> Need | None:
        if not scale.counts_requests:
            return None
        key = f"{facts.app.project}/{facts.app.name}"
        pressures, known = self._loads.pressures(key, scale, facts.ingresses)
        need, self._pressures[key] = decide_pressure(
            PressureFacts(
                current=current,
                most=most,
                ready=sum(seen.ready for seen in facts.instances),
                stable_s=float(scale.stable),
                pressures=pressures,
                known=known,
            ),
            self._pressures.get(key, PressureMemory()),
            now,
        )
        return need
