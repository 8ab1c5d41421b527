"""All nodes at each tick, and at once when the detection says that one has fallen silent or is heard again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from atoll.control.actions import Decision
from atoll.control.detection import brake
from atoll.control.detection.decide import Standing
from atoll.control.detection.exchange import Exchange
from atoll.control.nodes import LastSeen, NodeFacts, decide_node, is_silent, is_to_be_lost
from atoll.control.outages import Outages
from atoll.control.world import World
from atoll.model.ports.clock import Clock
from atoll.model.records import Node, NodeHealth, NodeLiveness
from atoll.store.cache import Held


class NodeWatch:
    """Decides about all nodes at each tick.

    Only that a value of `last_seen` has changed is used, not the value, so that its clock does not matter, and a jump of the
    wall clock declares nobody lost.
    """

    def __init__(self, world: World, clock: Clock, last_seen: LastSeen, detection: Exchange | None = None) -> None:
        self._world = world
        self._clock = clock
        self._last_seen = last_seen
        self._detection = detection
        self._outages = Outages(world)
        self._known: dict[str, float] = {}
        """Node → since when it has been watched here."""
        self._values: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        self.tick_due = True

    @property
    def suspects(self) -> Iterable[str]:
        """Nodes that are being asked whether they live: they get nothing new meanwhile."""
        return self._detection.watches if self._detection is not None else ()

    def decide(self, decision: Decision) -> None:
        if not self.tick_due:
            return
        self.tick_due = False
        monotonic = self._clock.monotonic()
        nodes = self._world.state.records(Node)
        for gone in self._known.keys() - nodes.keys():
            for index in (self._known, self._values, self._heard):
                index.pop(gone, None)
        new = nodes.keys() - self._known.keys()
        self._known.update(dict.fromkeys(new, monotonic))
        doubtful: dict[str, NodeFacts] = {}
        for name in self._doubtful(nodes):
            value = self._last_seen.get(name)
            if value is not None and value != self._values.get(name):
                # The first value may be from long ago: only the next one is a sign of life.
                if name not in new:
                    self._heard[name] = monotonic
                self._values[name] = value
            liveness = self._world.state.get(NodeLiveness, name)
            doubtful[name] = NodeFacts(
                node=nodes[name].record,
                liveness=liveness.record if liveness else None,
                heard=self._heard.get(name),
                watched_since=self._known[name],
                standing=self._detection.standing(name) if self._detection is not None else None,
                silence_s=self._detection.silence_s(name) if self._detection is not None else None,
            )
        silent = {name for name, facts in doubtful.items() if is_silent(facts, monotonic)}
        doubted = sum(
            facts.standing is Standing.SUSPECT and facts.silent_s(monotonic) >= brake.DOUBTED_S for facts in doubtful.values()
        )
        self._outages.look(silent, doubted, decision, monotonic)
        for facts in doubtful.values():
            may_lose = not is_to_be_lost(facts, monotonic) or self._outages.may_lose()
            decide_node(facts, monotonic, decision, may_lose=may_lose)
        if self._detection is not None:
            self._outages.tell_overrun(self._detection.overrun, decision)
            self._outages.tell_roundabout(self._detection.roundabout() & nodes.keys(), decision)

    def _doubtful(self, nodes: Mapping[str, Held[Node]]) -> list[str]:
        """Return all but those that are ready, and simply heard: with 5,000 nodes, those alone would take as long as all else."""
        if self._detection is None:
            return list(nodes)
        health = self._world.state.records(NodeLiveness)
        unwell = {name for name, held in health.items() if held.record.health is not NodeHealth.READY}
        return sorted((nodes.keys() - self._detection.heard) | ((unwell | self._detection.watches.keys()) & nodes.keys()))
