"""Which nodes are to be empty, looked at again as policies change and as time goes by, and what people are told of it."""

from __future__ import annotations

from msgspec import structs

from atoll.control import evacuation
from atoll.control.actions import Decision, Tell
from atoll.control.placement import Placement
from atoll.control.world import World
from atoll.model.records import Event, NodePolicy


class Emptying:
    """One leader's look. It keeps nothing that cannot be found out again."""

    def __init__(self, world: World, placement: Placement) -> None:
        self._world = world
        self._placement = placement
        self._to_tell: list[Tell] = []
        self._done: set[tuple[str, float]] = set()
        """Drains of which has been told that they are done."""

    def look(self, now: float) -> None:
        """Take over which nodes instances are to leave at `now`. Costs little where no policy has changed since the last tick."""
        if not self._world.stale:
            return
        changed = self._world.look(now)
        if changed:
            self._placement.evacuate(self._world.evacuations)
            self._to_tell.extend(evacuation.changes_in_words(changed, now))
        for name, held in self._world.state.records(NodePolicy).items():
            drain = held.record.drain
            if drain is None or name not in self._world.evacuations or (name, drain.since) in self._done:
                continue
            left, kept = self._world.left_on(name)
            if not left:
                self._done.add((name, drain.since))
                self._to_tell.append(evacuation.drained(name, drain, kept, now))

    def tell(self, decision: Decision) -> None:
        """Tell what has not been told, by this leader or one before it."""
        for told in self._to_tell:
            event = structs.replace(told.event, at=decision.now)
            if self._world.state.get(Event, f"{event.project}/{event.id}") is None:
                decision.do(Tell(event))
        self._to_tell.clear()
