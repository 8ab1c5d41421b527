"""The scheduler's picture of the cell: its snapshot, kept as the cache shows things.

Nothing counts there before the cache shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from atoll.control.readings import Heartbeats
from atoll.control.world import World, owner_of
from atoll.model.evacuation import Evacuation
from atoll.model.labels import described
from atoll.model.records import (
    AppStatus,
    Heartbeat,
    Instance,
    Job,
    Node,
    NodeLiveness,
    NodePolicy,
    OwnerKind,
    Project,
    Release,
)
from atoll.model.reservation import Reservation
from atoll.scheduling.assembly import app_owner, ends_at, group_of, standing_of
from atoll.scheduling.demand import Demand, demand_of, standing_by
from atoll.scheduling.geography import Geography
from atoll.scheduling.snapshot import Snapshot, Standing
from atoll.store.cache import Delta

DEMANDS_MAX = 65_536
"""Demands kept, by owner and release."""


class Picture:
    """What may let one fit that did not sets `room`; whoever plans again takes it back."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.snapshot = Snapshot()
        self.room = False
        """Whether something has changed that may let a rejected one fit."""
        self._beats: dict[str, Heartbeat] = {}
        """Whose images the snapshot knows."""
        self._demands: dict[tuple[Any, ...], Demand] = {}
        self._suspects: frozenset[str] = frozenset()
        self._unread: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        """Projects and reservations that cannot be read: of a newer version, or damaged."""

    def begin(self) -> None:
        """Start anew from the cache as it is now, with the nodes alone: instances come after them, then `finish`."""
        before, self.snapshot = self.snapshot, Snapshot()
        self.snapshot.whereabouts = before.whereabouts
        unread = self._world.state.broken(Project)
        self.snapshot.quotas = {name: quota for name, quota in before.quotas.items() if name in unread}
        self.snapshot.reservations = before.reservations
        self._unread = (frozenset(), frozenset())
        self.snapshot.evacuations = dict(self._world.evacuations)
        self._demands.clear()
        self._beats.clear()
        for name in self._world.state.records(Node):
            self._node(name)

    def finish(self) -> None:
        """Take over what the cache says beside nodes and instances."""
        for key in self._world.state.records(AppStatus):
            self._homes(key)
        for key in self._world.state.records(Project):
            self._quota(key)
        self._reservations()
        self.doubt()

    def apply(self, delta: Delta) -> None:
        """Take over a change of anything but an instance or its status."""
        if delta.kind in (Node, NodePolicy, NodeLiveness):
            self._node(delta.key)
        elif delta.kind is AppStatus:
            self._homes(delta.key)
        elif delta.kind is Project:
            self._quota(delta.key)
        elif delta.kind is Reservation:
            self._reservations()
        elif delta.kind is Release:
            # An app may be deleted and made again under the same name.
            gone = (delta.new or delta.old).record  # type: ignore[union-attr]  # one of the two is there
            for standby in (False, True):
                self._demands.pop((OwnerKind.APP, f"{gone.project}/{gone.app}", gone.number, standby), None)

    def place(self, key: str, instance: Instance) -> None:
        """Count an instance on its node, as long as it is known what it asks for."""
        demand = self.demand(instance)
        if demand is not None and instance.node is not None:
            until, since = self.ends_at(instance), instance.placed_at or 0.0
            self.snapshot.allocate(key, instance.node, group_of(instance), demand, instance.gpus, until, since)

    def release(self, key: str) -> None:
        """Count an instance no more."""
        self.room |= self.snapshot.release(key)

    def suspect(self, names: Iterable[str]) -> None:
        """Take over which nodes are being asked whether they live: they take nothing new. Costs little where nothing changed."""
        now = frozenset(names)
        if now != self._suspects:
            changed, self._suspects = now ^ self._suspects, now
            for name in changed:
                self._node(name)

    def set_geography(self, geography: Geography) -> None:
        """Take over where sites are."""
        self.snapshot.set_geography(geography)
        self.room = True

    def look(self, heartbeats: Heartbeats) -> None:
        """Take over which images nodes say they have, and what cannot be read. Called with each tick; costs little where nothing
        has changed."""
        self.doubt()
        for name in self._beats.keys() - heartbeats.keys():
            del self._beats[name]
            self.snapshot.set_images(name, ())
        for name, beat in heartbeats.items():
            if self._beats.get(name) is not beat:
                self._beats[name] = beat
                self.snapshot.set_images(name, beat.images)

    def doubt(self) -> None:
        """Take over what cannot be read, of which the cache tells no change: the last that is known of it holds, and a project of
        whose quota nothing is known gets nothing new. Costs little where nothing has changed."""
        state, before = self._world.state, self._unread
        self._unread = (frozenset(state.broken(Project)), frozenset(state.broken(Reservation)))
        for name in before[0] ^ self._unread[0]:
            self._quota(name)
        if before[1] != self._unread[1]:
            self._reservations()

    def evacuate(self, evacuations: Mapping[str, Evacuation]) -> None:
        """Take over which nodes instances are to leave: they take nothing new."""
        self.snapshot.evacuations = dict(evacuations)
        self.room = True

    def demand(self, instance: Instance) -> Demand | None:
        """Return what the instance asks for; None when its spec is not held any more."""
        which = (*owner_of(instance), instance.release, instance.standby)
        demand = self._demands.get(which)
        if demand is None:
            spec = self._world.spec_of(instance)
            if spec is None:
                return None
            demand = standing_by(demand_of(spec)) if instance.standby else demand_of(spec)
            if self._world.release(instance.project, instance.owner, instance.release) is not None:
                # A release never changes, unlike a job of the same name.
                if len(self._demands) >= DEMANDS_MAX:
                    del self._demands[next(iter(self._demands))]
                self._demands[which] = demand
        return demand

    def ends_at(self, instance: Instance) -> float | None:
        """Return when an instance will be gone at the latest, as `Allocation.ends_at`."""
        job = None
        if instance.owner_kind is OwnerKind.JOB:
            held = self._world.state.get(Job, f"{instance.project}/{instance.owner}")
            job = held.record if held is not None else None
        return ends_at(instance, job)

    def next_edge(self, now: float) -> float | None:
        """Return when a reservation begins or ends next."""
        edges = (at for held in self.snapshot.reservations.values() for at in (held.start, held.spec.end))
        return min((at for at in edges if at > now), default=None)

    def _node(self, name: str) -> None:
        state = self._world.state
        node, policy, liveness = state.get(Node, name), state.get(NodePolicy, name), state.get(NodeLiveness, name)
        facts = self.snapshot.facts
        if node is None:
            self.snapshot.remove_node(name)
        else:
            standing = standing_of(policy.record if policy else None, liveness.record if liveness else None)
            if name in self._suspects and standing is Standing.OPEN:
                standing = Standing.UNREACHABLE
            self.snapshot.upsert_node(described(node.record, policy.record if policy else None), standing)
        self.room |= self.snapshot.facts != facts

    def _homes(self, key: str) -> None:
        status = self._world.state.get(AppStatus, key)
        owner = app_owner(key)
        homes = status.record.homes if status is not None else ()
        if homes != self.snapshot.homes.get(owner, ()):
            self.room = True
            if homes:
                self.snapshot.homes[owner] = homes
            else:
                del self.snapshot.homes[owner]

    def _quota(self, name: str) -> None:
        if name in self._world.state.broken(Project):
            if name not in self.snapshot.quotas:
                self.snapshot.unread |= {name}
            return
        if name in self.snapshot.unread:
            self.snapshot.unread -= {name}
            self.room = True
        project = self._world.state.get(Project, name)
        quota = project.record.quota if project is not None else None
        if quota != self.snapshot.quotas.get(name):
            self.room = True
            if quota is not None:
                self.snapshot.quotas[name] = quota
            else:
                del self.snapshot.quotas[name]

    def _reservations(self) -> None:
        unread = self._world.state.broken(Reservation)
        known = {name: held for name, held in self.snapshot.reservations.items() if name in unread}
        read = {name: held.record for name, held in self._world.state.records(Reservation).items()}
        self.snapshot.reservations = {**known, **read}
        self.room = True
