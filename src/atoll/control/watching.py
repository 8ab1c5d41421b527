"""Samples of when nodes were last heard of, on this process's own monotonic clock."""

from __future__ import annotations

from atoll.control.actions import Decision
from atoll.control.nodes import LastSeen, NodeFacts, decide_node
from atoll.control.world import World
from atoll.model.ports.clock import Clock
from atoll.model.records import Node, NodeLiveness


class NodeWatch:
    """Decides about all nodes at each tick.

    Only that a value of `last_seen` has changed is used, not the value, so that its clock does not matter, and a jump of the
    wall clock declares nobody lost.
    """

    def __init__(self, world: World, clock: Clock, last_seen: LastSeen) -> None:
        self._world = world
        self._clock = clock
        self._last_seen = last_seen
        self._known: dict[str, float] = {}
        """Node → since when it has been watched here."""
        self._values: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        self.tick_due = True

    def decide(self, decision: Decision) -> None:
        if not self.tick_due:
            return
        self.tick_due = False
        monotonic = self._clock.monotonic()
        nodes = self._world.state.records(Node)
        for gone in self._known.keys() - nodes.keys():
            for index in (self._known, self._values, self._heard):
                index.pop(gone, None)
        for name, held in nodes.items():
            first = name not in self._known
            since = self._known.setdefault(name, monotonic)
            value = self._last_seen.get(name)
            if value is not None and value != self._values.get(name):
                # The first value may be from long ago: only the next one is a sign of life.
                if not first:
                    self._heard[name] = monotonic
                self._values[name] = value
            liveness = self._world.state.get(NodeLiveness, name)
            facts = NodeFacts(
                node=held.record,
                liveness=liveness.record if liveness else None,
                heard=self._heard.get(name),
                watched_since=since,
            )
            decide_node(facts, monotonic, decision)
