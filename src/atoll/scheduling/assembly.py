"""From records to a snapshot: what counts on a node, which group an instance is of, whether a node takes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set

from msgspec import Struct

from atoll.model.evacuation import Evacuation
from atoll.model.labels import described
from atoll.model.records import (
    AppStatus,
    Ingress,
    IngressHeartbeat,
    Instance,
    Job,
    Node,
    NodeHealth,
    NodeLiveness,
    NodePolicy,
    OwnerKind,
    Project,
    RoundTrips,
    Site,
    Status,
)
from atoll.model.reservation import Reservation
from atoll.model.spec import Workload
from atoll.model.states import Desired
from atoll.scheduling.bookings import Booking, read
from atoll.scheduling.demand import Demand, demand_of, standing_by
from atoll.scheduling.geography import Geography
from atoll.scheduling.ledger import SOME_DAY
from atoll.scheduling.snapshot import Snapshot, Standing
from atoll.scheduling.whereabouts import Layout, traffic_of

_STANDING = {NodeHealth.READY: Standing.OPEN, NodeHealth.UNREACHABLE: Standing.UNREACHABLE, NodeHealth.LOST: Standing.LOST}


class Records(Struct, frozen=True, kw_only=True):
    """All that a snapshot is made of, by the key behind each kind's prefix."""

    nodes: Mapping[str, Node]
    policies: Mapping[str, NodePolicy]
    liveness: Mapping[str, NodeLiveness]
    instances: Mapping[str, Instance]
    statuses: Mapping[str, Status]
    app_statuses: Mapping[str, AppStatus]
    projects: Mapping[str, Project] = {}
    projects_unread: Set[str] = frozenset()
    """Those whose record cannot be read."""
    jobs: Mapping[str, Job] = {}
    reservations: Mapping[str, Reservation] = {}
    reservations_unread: Set[str] = frozenset()
    now: float = 0.0
    evacuations: Mapping[str, Evacuation] = {}
    images: Mapping[str, tuple[str, ...]] = {}
    """Node → digests of the images that it says it has."""
    sites: Mapping[str, Site] = {}
    round_trips: Mapping[str, RoundTrips] = {}
    ingresses: Mapping[str, Ingress] = {}
    ingress_heartbeats: Mapping[str, IngressHeartbeat] = {}
    """The latest word of each, beside the store."""


def standing_of(policy: NodePolicy | None, liveness: NodeLiveness | None) -> Standing:
    standing = _STANDING[liveness.health] if liveness else Standing.OPEN
    return Standing.CORDONED if standing is Standing.OPEN and policy is not None and policy.cordoned else standing


def group_of(instance: Instance) -> str:
    """Instances of one group are equal, and are spread away from each other."""
    return f"{instance.owner_kind}/{instance.project}/{instance.owner}/{instance.release}/{instance.generation}"


def app_owner(key: str) -> str:
    """Return the owner, as groups name it, of the app `PROJECT/NAME`."""
    return f"{OwnerKind.APP}/{key}"


def holds_room(status: Status | None) -> bool:
    """Return whether a placed instance counts on its node: it has not ended for good."""
    return status is None or not status.phase.final


def ends_at(instance: Instance, job: Job | None) -> float | None:
    """Return when an instance will be gone at the latest, as `Allocation.ends_at`; `job` is its owner, where that is a job.

    What was told to go is taken to be on its way: 0, whatever is left of its grace.
    """
    if instance.desired is not Desired.RUN:
        return 0.0
    if job is None:
        return None if instance.owner_kind is OwnerKind.APP else SOME_DAY
    if job.spec.deadline is None:
        return SOME_DAY
    return job.created_at + job.spec.deadline + job.spec.stop.grace


def snapshot_from(records: Records, spec_of: Callable[[Instance], Workload | None]) -> Snapshot:
    """Return the snapshot that the leader's scheduler would plan on. A demand is made once for each group."""
    snapshot = Snapshot()
    complete(snapshot, records)
    demands: dict[tuple[str, bool], Demand | None] = {}
    for name, node in records.nodes.items():
        policy = records.policies.get(name)
        snapshot.upsert_node(described(node, policy), standing_of(policy, records.liveness.get(name)))
    for key, instance in records.instances.items():
        if instance.node is None or not holds_room(records.statuses.get(key)):
            continue
        group = group_of(instance)
        which = (group, instance.standby)
        if which not in demands:
            spec = spec_of(instance)
            demand = demand_of(spec) if spec is not None else None
            demands[which] = standing_by(demand) if demand is not None and instance.standby else demand
        demand = demands[which]
        if demand is not None:
            until = ends_at(instance, records.jobs.get(f"{instance.project}/{instance.owner}"))
            snapshot.allocate(key, instance.node, group, demand, instance.gpus, until, instance.placed_at or 0.0)
    snapshot.bookings = bookings_of(records.instances, spec_of)
    return snapshot


def bookings_of(instances: Mapping[str, Instance], spec_of: Callable[[Instance], Workload | None]) -> tuple[Booking, ...]:
    """Return what the leader wrote down for those that wait; of a gang its first member says it for all."""
    waiting = {key: one for key, one in instances.items() if one.node is None and one.desired is Desired.RUN}
    heads = {key: one for key, one in waiting.items() if one.rejection is not None and one.rejection.booked is not None}
    found = []
    for key, head in heads.items():
        spec = spec_of(head)
        if spec is None or head.rejection is None or head.rejection.booked is None:
            continue
        demand = standing_by(demand_of(spec)) if head.standby else demand_of(spec)
        group = group_of(head)
        others = (other for other, one in waiting.items() if other != key and group_of(one) == group and not one.standby)
        ids = (key, *sorted(others)) if demand.placement.gang else (key,)
        found.append(read(head.rejection.booked, ids, demand, head.created_at))
    return tuple(sorted(found, key=lambda booking: booking.order))


def complete(snapshot: Snapshot, records: Records) -> None:
    """Take over all but nodes, instances and their statuses, and what is booked. Of what cannot be read holds what the snapshot
    knows of it."""
    snapshot.now = records.now
    known = {name: held for name, held in snapshot.reservations.items() if name in records.reservations_unread}
    snapshot.reservations = {**known, **records.reservations}
    snapshot.evacuations = dict(records.evacuations)
    snapshot.homes = {app_owner(key): status.homes for key, status in records.app_statuses.items() if status.homes}
    quotas = {name: quota for name, quota in snapshot.quotas.items() if name in records.projects_unread}
    snapshot.unread = frozenset(records.projects_unread - quotas.keys())
    snapshot.quotas = quotas | {name: project.quota for name, project in records.projects.items() if project.quota is not None}
    for name, digests in records.images.items():
        snapshot.set_images(name, digests)
    whereabouts = snapshot.whereabouts
    snapshot.set_geography(Geography(records.sites.values(), records.round_trips.values()))
    whereabouts.entrances = entrances_of(records.ingresses.values())
    whereabouts.traffic = traffic_of(records.ingress_heartbeats.values())
    whereabouts.layouts = {
        app_owner(key): Layout(wanted=dict(status.sites)) for key, status in records.app_statuses.items() if status.sites
    }


def entrances_of(ingresses: Iterable[Ingress]) -> tuple[str, ...]:
    """Return the sites with an ingress, by name."""
    return tuple(sorted({ingress.site for ingress in ingresses}))
