"""What apps say of themselves in the heartbeats of their nodes, for the decision about how many instances they have."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import UNSET
from msgspec.structs import replace

from atoll.control.apps import AppFacts
from atoll.control.autoscale import Memory, ScaleFacts, decide_scale
from atoll.control.world import World, owner_of
from atoll.model.ports.clock import Clock
from atoll.model.records import Heartbeat, Instance

FRESH_S = 15.0
"""A reading older than this is none: three heartbeats, after which a node counts as unreachable, too."""

Heartbeats = Mapping[str, Heartbeat]
"""Node → its latest heartbeat. Owned by whoever takes them, and read live."""


class Readings:
    """Takes in heartbeats at each tick, and marks the apps that they say something of. Keeps what decisions leave behind."""

    def __init__(self, world: World, clock: Clock, heartbeats: Heartbeats) -> None:
        self._world = world
        self._clock = clock
        self._heartbeats = heartbeats
        self._last: dict[str, Heartbeat] = {}
        self._heard: dict[str, float] = {}
        self._metrics: dict[str, dict[str, Mapping[str, float]]] = {}
        """Node → instance → its metrics."""
        self._memories: dict[str, Memory] = {}

    def look(self) -> None:
        """Have the apps decided about of which something new was heard."""
        scaling = self._world.scaling
        for gone in self._memories.keys() - scaling:
            del self._memories[gone]
        for gone in self._last.keys() - self._heartbeats.keys():
            for index in (self._last, self._heard, self._metrics):
                index.pop(gone, None)
        for node, beat in self._heartbeats.items():
            if self._last.get(node) is beat:
                continue
            self._last[node], self._heard[node] = beat, self._clock.monotonic()
            self._metrics[node] = {usage.instance: usage.metrics for usage in beat.usage if usage.metrics}
            if not scaling or not self._metrics[node]:
                continue
            for key in self._world.on_node.get(node, ()):
                held = self._world.state.get(Instance, key)
                if held is not None and f"{held.record.project}/{held.record.owner}" in scaling:
                    self._world.dirty[owner_of(held.record)] = None

    def join(self, facts: AppFacts) -> AppFacts:
        """Return `facts` with how many instances the app's metric asks for, where it scales by one."""
        app, status = facts.app, facts.status
        scale = app.spec.scale
        if app.deleting or app.most is None or scale is UNSET or scale.metric is None or scale.target is None:
            return facts
        if facts.awake is False:
            self._memories.pop(f"{app.project}/{app.name}", None)
            return facts
        least = max(app.replicas, 1)
        key = f"{app.project}/{app.name}"
        now = self._clock.monotonic()
        if status is None or status.scaled is None:
            # It begins with what there is, so that nothing is taken away before its metric has been seen.
            current = min(app.most, max(least, status.total if status is not None else 0))
        else:
            current = max(least, app.wanted(status))
        choice = decide_scale(
            ScaleFacts(
                least=least,
                most=app.most,
                current=current,
                target=scale.target,
                down_s=float(scale.down),
                ready=sum(seen.ready for seen in facts.instances),
                readings=tuple(self._of(facts, scale.metric, now)),
            ),
            self._memories.get(key, Memory()),
            now,
        )
        self._memories[key] = choice.memory
        return replace(facts, choice=choice)

    def _of(self, facts: AppFacts, metric: str, now: float) -> list[float]:
        found = []
        for seen in facts.instances:
            node = seen.instance.node
            if node is None or not seen.ready or now - self._heard.get(node, float("-inf")) > FRESH_S:
                continue
            value = self._metrics[node].get(seen.instance.id, {}).get(metric)
            if value is not None:
                found.append(value)
        return found
