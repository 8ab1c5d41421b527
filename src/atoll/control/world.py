"""What the controllers know: the cache's records joined by owner and by node, and which of them must be looked at again."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

from atoll.control.actions import Ailment, Seen
from atoll.control.apps import AppFacts
from atoll.control.dependencies import Dependencies
from atoll.control.evacuation import kept
from atoll.control.gpus import ailment_of
from atoll.control.jobs import JobFacts
from atoll.control.patience import patience_s
from atoll.control.runs import Runs
from atoll.model import keys
from atoll.model.devices import GpuDevice
from atoll.model.evacuation import Evacuation, evacuations
from atoll.model.maintenance import Maintenance
from atoll.model.ports.store import Revision
from atoll.model.records import (
    App,
    AppStatus,
    Brake,
    BrakeRelease,
    Drained,
    Event,
    Ingress,
    Instance,
    Job,
    JobStatus,
    Node,
    NodeHealth,
    NodeLiveness,
    NodePolicy,
    OwnerKind,
    Prefetch,
    Project,
    Release,
    RoundTrips,
    RouteClaim,
    Site,
    Status,
)
from atoll.model.reservation import Reservation
from atoll.model.spec import AppSpec, NearKind, Workload
from atoll.model.states import Desired
from atoll.store.cache import Delta, Deltas, Held, State

KINDS: dict[str, type[Any]] = {
    keys.APPS: App,
    keys.APP_STATUSES: AppStatus,
    keys.RELEASES: Release,
    keys.JOBS: Job,
    keys.JOB_STATUSES: JobStatus,
    keys.INSTANCES: Instance,
    keys.STATUSES: Status,
    keys.NODES: Node,
    keys.NODE_POLICIES: NodePolicy,
    keys.NODE_LIVENESS: NodeLiveness,
    keys.MAINTENANCES: Maintenance,
    keys.RESERVATIONS: Reservation,
    keys.PREFETCHES: Prefetch,
    keys.BRAKES: Brake,
    keys.BRAKE_RELEASES: BrakeRelease,
    keys.EVENTS: Event,
    keys.DRAINED: Drained,
    keys.INGRESSES: Ingress,
    keys.ROUTES: RouteClaim,
    keys.PROJECTS: Project,
    keys.SITES: Site,
    keys.ROUND_TRIPS: RoundTrips,
}
"""What the `State` that control is given must hold."""

T = TypeVar("T")
Owner = tuple[OwnerKind, str]
"""Kind, and `project/name`."""


def _gpus(held: Held[Node] | None) -> tuple[GpuDevice, ...] | None:
    return held.record.capacity.gpus if held is not None else None


def _near_users(app: App) -> bool:
    return app.spec.placement.near == NearKind.USERS


def owner_of(instance: Instance) -> Owner:
    return (instance.owner_kind, f"{instance.project}/{instance.owner}")


class World:
    """Joins over a `State`, kept current delta by delta. Everything happens on one event loop."""

    def __init__(self, state: State, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.state = state
        self._monotonic = monotonic
        self.lost_since: dict[str, float] = {}
        """Node → since when it has been lost, as long as this process knows: spans are measured by that, not by a wall clock."""
        self.returning: set[str] = set()
        """Nodes that were lost and answer again, until they get anything new."""
        self.revision = Revision(0)
        """Up to which the joins are current."""
        self.dirty: dict[Owner, None] = {}
        """Owners to decide about, in the order in which they changed."""
        self.later: dict[Owner, None] = {}
        """Owners to decide about beside them, though nothing is known to have changed: after a start afresh all there are."""
        self.owned: dict[Owner, set[str]] = defaultdict(set)
        self.on_node: dict[str, set[str]] = defaultdict(set)
        self.draining: set[str] = set()
        self.ids: set[str] = set()
        """Of all instances, in every project."""
        self.scaling: set[str] = set()
        """Apps (`project/name`) that scale by a metric."""
        self.near: set[str] = set()
        """Apps that are near their users."""
        self.runs = Runs(state)
        self.dependencies = Dependencies(state, lambda owner: owner in self.owned)
        self.evacuations: dict[str, Evacuation] = {}
        """Nodes that instances are to leave → why, and until when; as of the last `look`."""
        self.stale = True
        """Whether `evacuations` must be looked at again, because a policy has changed."""
        self._drained: dict[str, set[str]] = defaultdict(set)
        self._unread: dict[str, Maintenance] = {}
        """Windows that cannot be read any more (of a newer version, or damaged), as they were."""

    def rebuild(self) -> None:
        """Start from the cache as it is now, with everything to be decided about."""
        for index in (self.dirty, self.later, self.owned, self.on_node, self._drained):
            index.clear()
        self.draining.clear()
        self.ids.clear()
        self.scaling = {key for key, held in self.state.records(App).items() if held.record.most is not None}
        self.near = {key for key, held in self.state.records(App).items() if _near_users(held.record)}
        for key, held in self.state.records(Instance).items():
            self._enter(key, held.record)
        for drained in self.state.records(Drained).values():
            self._drained[drained.record.instance].add(drained.record.ingress)
        self.later.update((owner, None) for owner in self.owners())
        self.revision = self.state.revision
        self.runs.rebuild()
        self.dependencies.rebuild()
        self.stale = True
        lost = {name for name, held in self.state.records(NodeLiveness).items() if held.record.health is NodeHealth.LOST}
        self.lost_since = {name: self.lost_since.get(name, self._monotonic()) for name in lost}

    def look(self, now: float) -> dict[str, Evacuation | None]:
        """Find out which nodes instances are to leave at `now`, have those decided about of which that has changed, and return
        these nodes with what holds for them now."""
        self.stale = False
        unread = self.state.broken(Maintenance)
        self._unread = {name: held for name, held in self._unread.items() if name in unread}
        if not self.evacuations and not self._unread and not self.state.records(Maintenance) and not self.state.records(NodePolicy):
            return {}

        def plain(kind: type[T]) -> dict[str, T]:
            return {key: held.record for key, held in self.state.records(kind).items()}

        windows = {**self._unread, **plain(Maintenance)}
        found = evacuations(plain(Node), plain(NodePolicy), windows.values(), now)
        changed = {name: found.get(name) for name in {**found, **self.evacuations} if found.get(name) != self.evacuations.get(name)}
        self.evacuations = found
        for name in changed:
            for key in self.on_node.get(name, ()):
                self._touch(key)
        return changed

    def left_on(self, name: str) -> tuple[int, int]:
        """Return how many instances are to leave a node still, and how many are kept there by their volumes."""
        left = kept = 0
        for key in self.on_node.get(name, ()):
            seen = self.seen(key, {})
            if seen is not None and not seen.ended:
                stays = seen.evacuation is None and seen.instance.desired is Desired.RUN
                kept, left = kept + stays, left + (not stays)
        return left, kept

    def take(self, owner: Owner) -> None:
        """It is decided about now."""
        self.dirty.pop(owner, None)
        self.later.pop(owner, None)

    def apply(self, deltas: Deltas) -> None:
        """Take over one revision's changes and mark the owners that they touch."""
        for delta in deltas.deltas:
            self._apply(delta)
        self.revision = deltas.revision

    def _apply(self, delta: Delta) -> None:
        record = (delta.new or delta.old).record  # type: ignore[union-attr]  # one of the two is there
        match record:
            case App():
                scales = delta.new is not None and record.most is not None
                (self.scaling.add if scales else self.scaling.discard)(delta.key)
                near = delta.new is not None and _near_users(record)
                (self.near.add if near else self.near.discard)(delta.key)
                self.dirty[(OwnerKind.APP, delta.key)] = None
                self._touch_beside(delta.key)
                self.dependencies.apply(delta)
                self._touch_beside(delta.key)
            case AppStatus():
                self.dirty[(OwnerKind.APP, delta.key)] = None
                self._touch_beside(delta.key)
            case Job():
                self.runs.apply(delta)
                self._touch_job(delta.key)
            case JobStatus():
                self._touch_job(delta.key)
            case Release():
                self.dirty[(OwnerKind.APP, f"{record.project}/{record.app}")] = None
            case Instance():
                self._instance(delta)
            case Status():
                self._touch(delta.key)
            case Drained():
                self._set_drained(delta, record)
            case Ingress():
                for key in self.draining:
                    self._touch(key)
            case NodePolicy() | Maintenance():
                self.stale = True
                if isinstance(record, Maintenance) and delta.new is None and delta.key in self.state.broken(Maintenance):
                    self._unread[delta.key] = record
            case Node() | NodeLiveness():
                if isinstance(record, NodeLiveness):
                    if delta.new is None or record.health is not NodeHealth.LOST:
                        if self.lost_since.pop(delta.key, None) is not None:
                            self.returning.add(delta.key)
                    else:
                        self.lost_since.setdefault(delta.key, self._monotonic())
                    if delta.new is None or record.health is not NodeHealth.UNREACHABLE:
                        self.returning.discard(delta.key)
                # A node's own words (its labels, say) change nothing for owners; that it is there, or is lost, or what becomes
                # of its GPUs, does.
                if not isinstance(record, Node) or _gpus(delta.old) != _gpus(delta.new):
                    for key in self.on_node.get(record.name, ()):
                        self._touch(key)
            case _:
                pass

    def _instance(self, delta: Delta) -> None:
        if delta.old is not None:
            old: Instance = delta.old.record
            self.owned[owner_of(old)].discard(delta.key)
            if not self.owned[owner_of(old)]:
                del self.owned[owner_of(old)]
            if old.node is not None:
                self.on_node[old.node].discard(delta.key)
            self.draining.discard(delta.key)
            self.ids.discard(old.id)
            self.dirty[owner_of(old)] = None
        if delta.new is not None:
            self._enter(delta.key, delta.new.record)
            self.dirty[owner_of(delta.new.record)] = None

    def _enter(self, key: str, instance: Instance) -> None:
        self.owned[owner_of(instance)].add(key)
        self.ids.add(instance.id)
        if instance.node is not None:
            self.on_node[instance.node].add(key)
        if instance.desired is Desired.DRAIN:
            self.draining.add(key)

    def _set_drained(self, delta: Delta, record: Drained) -> None:
        there = self._drained[record.instance]
        (there.add if delta.new is not None else there.discard)(record.ingress)
        if not there:
            del self._drained[record.instance]
        for key in self.draining:
            if key.endswith("/" + record.instance):
                self._touch(key)

    def _touch_beside(self, key: str) -> None:
        """Have those decided about that depend on an app, or that it depends on."""
        for name in self.dependencies.beside(key):
            self.dirty[(OwnerKind.APP, name)] = None

    def _touch_job(self, key: str) -> None:
        """Have a job decided about; and of a run its schedule, and the other runs, of which only some are kept."""
        for name in (key, *self.runs.family(key)):
            self.dirty[(OwnerKind.JOB, name)] = None

    def _touch(self, key: str) -> None:
        held = self.state.get(Instance, key)
        if held is not None:
            self.dirty[owner_of(held.record)] = None

    def lost_at(self, node: str | None) -> float | None:
        """Return since when a node is lost; one that nobody knows counts as lost for ever."""
        if node is None or node in self.state.broken(Node):
            return None
        if self.state.get(Node, node) is None:
            return 0.0
        liveness = self.state.get(NodeLiveness, node)
        if liveness is None or liveness.record.health is not NodeHealth.LOST:
            return None
        return liveness.record.since

    def seen(self, key: str, lost: dict[str | None, float | None]) -> Seen | None:
        """Return the join about one instance. `lost` keeps what `lost_at` says, for as long as nothing is awaited."""
        held = self.state.get(Instance, key)
        if held is None:
            return None
        status = self.state.get(Status, key)
        instance = held.record
        if instance.node not in lost:
            lost[instance.node] = self.lost_at(instance.node)
        lost_at, lost_in_s = lost[instance.node], None
        if lost_at is not None and instance.node in self.lost_since:
            left_s = self._patience_left_s(instance)
            if left_s > 0:
                lost_at, lost_in_s = None, left_s
        return Seen(
            instance=instance,
            revision=held.revision,
            created=held.created,
            status=status.record if status else None,
            lost_at=lost_at,
            lost_in_s=lost_in_s,
            returned=instance.node in self.returning,
            ailment=self._ailment(instance) if instance.gpus and lost[instance.node] is None else None,
            drained=frozenset(self._drained.get(instance.id, ())),
            evacuation=self._evacuation(instance) if instance.node in self.evacuations else None,
        )

    def _patience_left_s(self, instance: Instance) -> float:
        spec = self.spec_of(instance)
        if spec is None:
            return 0.0
        patience = patience_s(spec, leaving=instance.desired is not Desired.RUN)
        if math.isinf(patience):
            return patience
        return patience - (self._monotonic() - self.lost_since[instance.node or ""])

    def _evacuation(self, instance: Instance) -> Evacuation | None:
        found = self.evacuations[instance.node or ""]
        return None if kept(instance, self.spec_of(instance), leave_volumes=found.leave_volumes) else found

    def _ailment(self, instance: Instance) -> Ailment | None:
        node = self.state.get(Node, instance.node or "")
        return ailment_of(instance, node.record.capacity.gpus) if node is not None else None

    def owners(self) -> list[Owner]:
        """Return everything that there is to decide about."""
        found = dict.fromkeys((OwnerKind.APP, key) for key in self.state.records(App))
        found.update(dict.fromkeys((OwnerKind.JOB, key) for key in self.state.records(Job)))
        found.update(dict.fromkeys(self.owned))
        return list(found)

    def damaged(self, owner: Owner) -> bool:
        """Whether what is wanted cannot be read: then nothing is decided, above all not that it is not wanted."""
        kind, key = owner
        return key in self.state.broken(App if kind is OwnerKind.APP else Job)

    def instances(self, owner: Owner) -> tuple[Seen, ...]:
        lost: dict[str | None, float | None] = {}
        found = (self.seen(key, lost) for key in sorted(self.owned.get(owner, ())))
        return tuple(seen for seen in found if seen is not None)

    def app_facts(self, key: str) -> AppFacts | None:
        held = self.state.get(App, key)
        if held is None:
            return None
        status = self.state.get(AppStatus, key)
        instances = self.instances((OwnerKind.APP, key))
        wanted = {seen.instance.release for seen in instances} | {status.record.served_release if status else 0}
        specs = {number: spec for number in wanted if (spec := self.release_spec(held.record, number)) is not None}
        return AppFacts(
            app=held.record,
            revision=held.revision,
            status=status.record if status else None,
            instances=instances,
            specs=specs,
            ingresses=frozenset(self.state.records(Ingress)),
            waits_for=self.dependencies.waits_for(held.record),
            stops_after=self.dependencies.stops_after(key, held.record),
        )

    def job_facts(self, key: str, now: float = 0.0) -> JobFacts | None:
        held = self.state.get(Job, key)
        if held is None:
            return None
        status = self.state.get(JobStatus, key)
        return JobFacts(
            job=held.record,
            revision=held.revision,
            created=held.created,
            status=status.record if status else None,
            instances=self.instances((OwnerKind.JOB, key)),
            runs=self.runs.of(key) if held.record.spec.schedule is not None else (),
            due_taken=self.runs.taken(held.record, now),
            stays=self.runs.stays(held.record) if held.record.parent else None,
        )

    def release_spec(self, app: App, number: int) -> AppSpec | None:
        held = self.release(app.project, app.name, number)
        if held is not None:
            return held.record.spec
        return app.spec if number == app.release else None

    def release(self, project: str, app: str, number: int) -> Held[Release] | None:
        return self.state.get(Release, keys.release(project, app, number).removeprefix(keys.RELEASES))

    def spec_of(self, instance: Instance) -> Workload | None:
        """Return the spec that an instance runs; None when its owner, or its release, is not held any more."""
        key = f"{instance.project}/{instance.owner}"
        if instance.owner_kind is OwnerKind.JOB:
            job = self.state.get(Job, key)
            return job.record.spec if job else None
        app = self.state.get(App, key)
        release = self.release(instance.project, instance.owner, instance.release)
        if release is not None:
            return release.record.spec
        return app.record.spec if app else None
