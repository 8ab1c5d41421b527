"""Which instances may be taken away for the sake of others, and how many of one app at a time."""

from __future__ import annotations

from collections.abc import Container, Mapping

from atoll.control.actions import Decision
from atoll.control.leaving import retire
from atoll.control.world import World
from atoll.model.records import App, AppStatus, Ingress, Instance, OwnerKind
from atoll.model.spec import AppSpec
from atoll.model.states import Desired
from atoll.scheduling.budget import may_go


class Disruptions:
    """One look at the world. `skip` are instances that this wake has decided about already; `chosen` grows with what is taken.

    Only apps' instances are ever taken: a job's would count as a failed try.
    """

    def __init__(self, world: World, skip: Container[str], chosen: Mapping[str, str]) -> None:
        self._world = world
        self._skip = skip
        self._chosen = chosen
        self._spare: dict[str, int] = {}

    def evictable(self, id: str) -> bool:
        held = self._world.state.get(Instance, id)
        if held is None or id in self._skip or id in self._chosen:
            return False
        instance = held.record
        return instance.node is not None and instance.desired is Desired.RUN and instance.owner_kind is OwnerKind.APP

    def leaving(self, id: str) -> bool:
        held = self._world.state.get(Instance, id)
        return id in self._chosen or (held is not None and held.record.desired is not Desired.RUN)

    def budget(self, owner: str) -> int:
        """Return how many more of an app may go, by its budget (`scheduling.budget`). What stands by is not among them.

        What this wake has decided about already counts as gone: it may have been told to leave for another reason.
        """
        kind, _, key = owner.partition("/")
        if kind != OwnerKind.APP:
            return 0
        if owner not in self._spare:
            self._spare[owner] = self._spare_of(key)
        return self._spare[owner] - sum(self._owner_of(id) == key for id in self._chosen)

    def _spare_of(self, key: str) -> int:
        app = self._world.state.get(App, key)
        if app is None:
            return 0
        there = self._world.instances((OwnerKind.APP, key))
        ready = sum(seen.ready and f"{seen.instance.project}/{seen.instance.id}" not in self._skip for seen in there)
        status = self._world.state.get(AppStatus, key)
        wanted = app.record.wanted(status.record if status is not None else None)
        return may_go(app.record.spec, wanted, min(ready, wanted))

    def _owner_of(self, id: str) -> str | None:
        held = self._world.state.get(Instance, id)
        return f"{held.record.project}/{held.record.owner}" if held is not None and not held.record.standby else None


def take_away(world: World, key: str, reason: str, decision: Decision) -> None:
    """Begin to take an app's instance away, as a rollout would: its requests may end, and its grace is kept."""
    seen = world.seen(key, {})
    if seen is None or seen.instance.desired is not Desired.RUN:
        return
    spec = world.spec_of(seen.instance)
    drain_s = float(spec.rollout.drain) if isinstance(spec, AppSpec) and spec.port_named(None) is not None else None
    retire(decision, seen, reason, drain_s=drain_s, ingresses=frozenset(world.state.records(Ingress)))
