"""All nodes at each tick, and at once when the detection says that one has fallen silent or is heard again."""

from __future__ import annotations

from collections.abc import Iterable

from atoll.control.actions import Decision
from atoll.control.detection import brake
from atoll.control.detection.decide import Standing
from atoll.control.detection.exchange import Exchange
from atoll.control.nodes import LastSeen, NodeFacts, decide_node, is_silent, is_to_be_lost
from atoll.control.outages import Outages
from atoll.control.world import World
from atoll.model.ports.clock import Clock
from atoll.model.records import Node, NodeHealth, NodeLiveness


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
        doubtful: dict[str, NodeFacts] = {}
        """All but those that are ready, and simply heard."""
        for name, held in nodes.items():
            first = name not in self._known
            since = self._known.setdefault(name, monotonic)
            value = self._last_seen.get(name)
            if value is not None and value != self._values.get(name):
                # The first value may be from long ago: only the next one is a sign of life.
                if not first:
                    self._heard[name] = monotonic
                self._values[name] = value
            standing = self._detection.standing(name) if self._detection is not None else None
            liveness = self._world.state.get(NodeLiveness, name)
            quiet = self._detection is not None and standing is not None and name not in self._detection.watches
            if quiet and (liveness is None or liveness.record.health is NodeHealth.READY):
                continue
            doubtful[name] = NodeFacts(
                node=held.record,
                liveness=liveness.record if liveness else None,
                heard=self._heard.get(name),
                watched_since=since,
                standing=standing,
                silence_s=(self._detection.silence_s(name) or 0.0) if self._detection is not None else 0.0,
            )
        silent = {name for name, facts in doubtful.items() if is_silent(facts, monotonic)}
        doubted = sum(facts.standing is Standing.SUSPECT and facts.silence_s >= brake.DOUBTED_S for facts in doubtful.values())
        self._outages.look(silent, doubted, decision, monotonic)
        for facts in doubtful.values():
            may_lose = not is_to_be_lost(facts, monotonic) or self._outages.may_lose()
            decide_node(facts, monotonic, decision, may_lose=may_lose)
        if self._detection is not None:
            self._outages.tell_roundabout({name for name in nodes if self._detection.indirect(name)}, decision)
