"""The scheduler's loop side: keeps the snapshot current, plans what has no node, and says what to write."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct, structs

from atoll.control.disruptions import Disruptions
from atoll.control.readings import Heartbeats
from atoll.control.world import World, owner_of
from atoll.model.evacuation import Evacuation
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
    Rejection,
    Release,
    Status,
)
from atoll.model.reservation import Reservation
from atoll.model.states import Desired
from atoll.scheduling.assembly import app_owner, ends_at, group_of, holds_room, standing_of
from atoll.scheduling.bookings import Booking
from atoll.scheduling.demand import Demand, Pending, demand_of, standing_by
from atoll.scheduling.geography import Geography
from atoll.scheduling.interface import View
from atoll.scheduling.plan import PENDING_MAX, Plan, plan
from atoll.scheduling.preemption import preempt
from atoll.scheduling.quotas import CODE as OVER_QUOTA
from atoll.scheduling.snapshot import Snapshot, Standing
from atoll.store.cache import Delta, Deltas

REJECTION_REFRESH_S = 10.0
"""The words of a rejection change with every instance that comes or goes; only a new code is written sooner than this."""
REPLAN_S = 0.2
"""What was rejected is planned again when something has changed, but not more often than this."""
PREEMPTIONS_MAX = 20
"""Instances for which victims are looked for in one plan; the others wait for the next."""
CLAIM_S = 900.0
"""The longest wait for what has to leave; after it the instance that waits is planned afresh."""
INSTANCES_AT_ONCE = 2_000
"""Instances that are counted before others get their turn, when all are."""
DEMANDS_MAX = 65_536
"""Demands kept, by owner and release."""


class Claim(Struct, frozen=True):
    """Room on a node that is set aside for a pending instance while what is in its way leaves."""

    node: str
    waits_for: frozenset[str]
    until: float


class Placement:
    """Which instances wait for a node, and a snapshot to plan them on. Nothing is counted before the cache shows it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.snapshot = Snapshot()
        self._new: dict[str, float] = {}
        """Pending instances that have not been planned since they came or changed → not to be planned before."""
        self._rejected: dict[str, float] = {}
        """Pending instances that did not fit → when their rejection was written."""
        self._room = False
        """Whether something has changed that may let a rejected one fit."""
        self._planned_at = 0.0
        self._looked_at = 0.0
        """The latest date that this was asked at."""
        self._claims: dict[str, Claim] = {}
        self._edge: float | None = None
        """When a reservation begins or ends next."""
        self._bookings: tuple[Booking, ...] = ()
        """What the last plan booked for the heads of the queue."""
        self.victims: dict[str, str] = {}
        """Instances that the last `place` found must leave → for which one."""
        self.gangs: dict[str, str] = {}
        """Instances that the last `place` placed and that must be written together with all others of their group → that group."""
        self._beats: dict[str, Heartbeat] = {}
        """Whose images the snapshot knows."""
        self._unplaced_gangs: set[str] = set()
        """Rejected instances that are part of a gang."""
        self._demands: dict[tuple[Any, ...], Demand] = {}
        self._suspects: frozenset[str] = frozenset()
        self.before_plan: Callable[[list[Pending]], None] = lambda pending: None
        """Called with what is planned next, so that all that the plan depends on is there."""

    def rebuild(self) -> None:
        for _ in self.rebuilding():
            pass

    def rebuilding(self) -> Iterator[None]:
        """Start from the cache as it is now; pause now and then, for others' sake: it takes seconds in a large cell.

        What changes in a pause may be taken over or not: tell it all by `apply` afterwards. Until the end nothing can be planned.
        """
        whereabouts = self.snapshot.whereabouts
        self.snapshot = Snapshot()
        self.snapshot.whereabouts = whereabouts
        self.snapshot.evacuations = dict(self._world.evacuations)
        self._new.clear()
        self._rejected.clear()
        self._claims.clear()
        self._bookings = ()
        self._demands.clear()
        self._unplaced_gangs.clear()
        self._beats.clear()
        for name in self._world.state.records(Node):
            self._node(name)
        for count, key in enumerate(list(self._world.state.records(Instance)), 1):
            self._instance(key)
            if count % INSTANCES_AT_ONCE == 0:
                yield
        for key in self._world.state.records(AppStatus):
            self._homes(key)
        for key in self._world.state.records(Project):
            self._quota(key)
        self._reservations()

    def apply(self, deltas: Deltas) -> None:
        """Take over one revision's changes."""
        for delta in deltas.deltas:
            self._apply(delta)

    def _apply(self, delta: Delta) -> None:
        if delta.kind in (Node, NodePolicy, NodeLiveness):
            self._node(delta.key)
        elif delta.kind is Instance:
            if delta.new is None:
                self._forget(delta.key)
            else:
                self._instance(delta.key)
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
        elif delta.kind is Status and delta.new is not None and delta.new.record.phase.final:
            self._instance(delta.key)

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
            self.snapshot.upsert_node(node.record, standing)
        self._room |= self.snapshot.facts != facts

    def suspect(self, names: Iterable[str]) -> None:
        """Take over which nodes are being asked whether they live: they take nothing new. Costs little where nothing changed."""
        now = frozenset(names)
        if now != self._suspects:
            changed, self._suspects = now ^ self._suspects, now
            for name in changed:
                self._node(name)

    def _homes(self, key: str) -> None:
        status = self._world.state.get(AppStatus, key)
        owner = app_owner(key)
        homes = status.record.homes if status is not None else ()
        if homes != self.snapshot.homes.get(owner, ()):
            self._room = True
            if homes:
                self.snapshot.homes[owner] = homes
            else:
                del self.snapshot.homes[owner]

    def _quota(self, name: str) -> None:
        project = self._world.state.get(Project, name)
        quota = project.record.quota if project is not None else None
        if quota != self.snapshot.quotas.get(name):
            self._room = True
            if quota is not None:
                self.snapshot.quotas[name] = quota
            else:
                del self.snapshot.quotas[name]

    def _reservations(self) -> None:
        self.snapshot.reservations = {name: held.record for name, held in self._world.state.records(Reservation).items()}
        self._room = True

    def _edges(self) -> Iterable[float]:
        """Return when what is reserved changes."""
        return (at for held in self.snapshot.reservations.values() for at in (held.start, held.spec.end))

    def _instance(self, key: str) -> None:
        state = self._world.state
        held, status = state.get(Instance, key), state.get(Status, key)
        if held is None or not holds_room(status.record if status else None):
            self._forget(key)
            return
        instance = held.record
        if instance.node is not None:
            self._new.pop(key, None)
            self._rejected.pop(key, None)
            self._unplaced_gangs.discard(key)
            self._claims.pop(key, None)
            demand = self.demand(instance)
            if demand is not None:
                until, since = self._ends_at(instance), instance.placed_at or 0.0
                self.snapshot.allocate(key, instance.node, group_of(instance), demand, instance.gpus, until, since)
        elif instance.desired is not Desired.RUN:
            self._forget(key)
        elif key not in self._rejected:
            self._new[key] = 0.0

    def _forget(self, key: str) -> None:
        self._new.pop(key, None)
        if self._rejected.pop(key, None) is not None and key in self._unplaced_gangs:
            self._room = True  # those that are left of it are fewer, and may fit
        self._unplaced_gangs.discard(key)
        self._claims.pop(key, None)
        self._room |= self.snapshot.release(key)

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

    def set_geography(self, geography: Geography) -> None:
        """Take over where sites are."""
        self.snapshot.set_geography(geography)
        self._room = True

    def look(self, heartbeats: Heartbeats) -> None:
        """Take over which images nodes say they have. Called with each tick; costs little where nothing has changed."""
        for name in self._beats.keys() - heartbeats.keys():
            del self._beats[name]
            self.snapshot.set_images(name, ())
        for name, beat in heartbeats.items():
            if self._beats.get(name) is not beat:
                self._beats[name] = beat
                self.snapshot.set_images(name, beat.images)

    def evacuate(self, evacuations: Mapping[str, Evacuation]) -> None:
        """Take over which nodes instances are to leave: they take nothing new."""
        self.snapshot.evacuations = dict(evacuations)
        self._room = True

    def due(self, now: float) -> float | None:
        """Return when to plan: now, later, or None while nothing can be placed."""
        self._follow_date(now)
        if self._edge is not None and now >= self._edge:
            self._edge, self._room = None, True
        if any(at <= now for at in self._new.values()) or any(self._settled(claim, now) for claim in self._claims.values()):
            return now
        later = min(self._new.values(), default=None)
        if self._rejected and self._room:
            again = max(now, self._planned_at + REPLAN_S)
            return again if later is None else min(again, later)
        return later

    def _follow_date(self, now: float) -> None:
        """Where the date was set back, move all that is to come with it: else nothing that waits is planned before the old date."""
        back_s, self._looked_at = self._looked_at - now, now
        if back_s <= 0:
            return
        self._planned_at -= back_s
        self._new = {key: at - back_s for key, at in self._new.items()}
        self._rejected = {key: at - back_s for key, at in self._rejected.items()}
        self._claims = {key: structs.replace(claim, until=claim.until - back_s) for key, claim in self._claims.items()}
        # What is reserved at the new date is something else.
        self._edge, self._room = None, True

    def place(self, created: Iterable[Instance], skip: set[str], now: float) -> tuple[list[Instance], list[tuple[Instance, int]]]:
        """Plan `created` (not in the store yet) and all that waits but for the keys in `skip`.

        Returns the created ones, each with its node or its rejection, and those that waited and must be written, with the
        revision that they were read at.
        """
        self.victims = {}
        self.gangs = {}
        waiting = self._waiting(skip, now)
        fresh = {f"{instance.project}/{instance.id}": instance for instance in created}
        pending = [*self._pending(fresh.items()), *self._pending((key, instance) for key, (instance, _) in waiting.items())]
        if any(item.demand.placement.gang for item in pending):
            pending = self._whole_gangs(pending, fresh, waiting, skip)
        if not pending:
            return list(fresh.values()), []
        self.snapshot.now = now
        self._edge = min((at for at in self._edges() if at > now), default=None)
        self.before_plan(pending)
        answer = plan(self.snapshot, pending, now, [one for one in self._bookings if self._waits(one, waiting)])
        self._bookings = answer.bookings
        result: dict[str, Instance] = {}
        self._preempt(pending, answer, fresh, skip, now)
        for placed in answer.placed:
            instance = fresh[placed.id] if placed.id in fresh else waiting[placed.id][0]
            result[placed.id] = structs.replace(
                instance, node=placed.node, runtime=placed.runtime, gpus=placed.gpus, placed_at=now, rejection=None
            )
        for item in pending:
            if item.demand.placement.gang:
                if item.id in result:
                    self.gangs[item.id] = item.group
                else:
                    self._unplaced_gangs.add(item.id)
        for key, rejection in answer.rejected.items():
            if key in fresh:
                result[key] = structs.replace(fresh[key], rejection=rejection)
                self._rejected[key] = now
            else:
                self._reject(key, waiting[key][0], rejection, now, result)
        for item in pending:
            if item.id in waiting and item.id not in result and item.id not in answer.rejected:
                # More waited than are planned at once.
                self._new[item.id] = 0.0
        return [result.get(key, instance) for key, instance in fresh.items()], [
            (result[key], revision) for key, (_, revision) in waiting.items() if key in result
        ]

    def _whole_gangs(
        self, pending: list[Pending], fresh: Container[str], waiting: dict[str, tuple[Instance, int]], skip: set[str]
    ) -> list[Pending]:
        """Return `pending` with all that waits of each gang among them, or nothing of it: what of a gang is not in the store yet,
        or changes in this wake, puts it off to the next. `waiting` is kept in step.
        """
        later = {item.group for item in pending if item.demand.placement.gang and item.id in fresh}
        gangs = {item.group: item for item in pending if item.demand.placement.gang and item.id not in fresh}
        chosen = [item for item in pending if not item.demand.placement.gang]
        for group, first in gangs.items():
            owner = owner_of(waiting[first.id][0])
            members: dict[str, tuple[Instance, int]] = {}
            for key in self._world.owned.get(owner, ()):
                held = self._world.state.get(Instance, key)
                waits = key in self._new or key in self._rejected or key in waiting
                if held is not None and waits and not held.record.standby and group_of(held.record) == group:
                    members[key] = (held.record, held.revision)
            if group in later or not skip.isdisjoint(members):
                for key in members:
                    if waiting.pop(key, None) is not None:
                        self._new[key] = 0.0
                continue
            for key in members:
                self._new.pop(key, None)
            waiting.update(members)
            chosen += self._pending((key, instance) for key, (instance, _) in members.items())
        return chosen

    def _waiting(self, skip: set[str], now: float) -> dict[str, tuple[Instance, int]]:
        """Return what to plan again: the new, and the rejected too where room may have come."""
        self._follow_date(now)
        again = bool(self._rejected) and self._room and now >= self._planned_at + REPLAN_S
        if again:
            self._room = False
            self._planned_at = now
        self._settle_claims(now)
        names = [*(key for key, at in self._new.items() if at <= now), *(self._rejected if again else ())]
        names = [key for key in names if key not in self._claims][:PENDING_MAX]
        found: dict[str, tuple[Instance, int]] = {}
        for key in names:
            held = self._world.state.get(Instance, key)
            if held is None:
                self._forget(key)
            elif key not in skip:
                found[key] = (held.record, held.revision)
                self._new.pop(key, None)
        return found

    def _preempt(self, pending: list[Pending], answer: Plan, fresh: Container[str], skip: set[str], now: float) -> None:
        """Find what must leave for those that fit nowhere, and set its room aside until then."""
        lowest = self.snapshot.lowest_priority()
        urgent = [
            item
            for item in pending
            if _lacks_room(answer.rejected.get(item.id))
            and lowest is not None
            and item.demand.placement.priority > lowest
            # A gang makes nobody leave: room for a part of it would be held for nothing.
            and not item.demand.placement.gang
        ]
        if not urgent:
            return
        # What is not in the store yet can wait for room only once it is.
        self._room |= any(item.id in fresh for item in urgent)
        view = View(self.snapshot)
        by_id = {item.id: item for item in pending}
        for placed in answer.placed:
            row = self.snapshot.row_of(placed.node)
            if row is not None:
                view.place(by_id[placed.id].group, by_id[placed.id].demand, (row,), (1,))
                view.devices.hold(row, placed.gpus)
        victims = Disruptions(self._world, skip, self.victims)
        for item in sorted((item for item in urgent if item.id not in fresh), key=lambda item: item.order)[:PREEMPTIONS_MAX]:
            found = preempt(view, item, victims.evictable, victims.leaving, victims.budget)
            row = self.snapshot.row_of(found.node) if found else None
            if found is None or row is None:
                continue
            self.victims.update((victim, item.id.rsplit("/", 1)[-1]) for victim in found.victims)
            leaving = frozenset(id for id, _ in self.snapshot.allocations_on(found.node) if victims.leaving(id))
            if not leaving:
                # Room was not what it lacked; waiting for nothing would be a loop without an end.
                continue
            self._claims[item.id] = Claim(found.node, leaving, now + CLAIM_S)
            self.snapshot.allocate(item.id, found.node, item.group, item.demand, found.gpus)
            view.place(item.group, item.demand, (row,), (1,))
            view.devices.hold(row, found.gpus)

    def _settled(self, claim: Claim, now: float) -> bool:
        """Whether there is nothing to wait for: all is gone, or something stays after all, or it takes too long."""
        held = [self._world.state.get(Instance, key) for key in claim.waits_for if self.snapshot.allocated(key) == claim.node]
        return now >= claim.until or not held or any(one is not None and one.record.desired is Desired.RUN for one in held)

    def _settle_claims(self, now: float) -> None:
        for key, claim in list(self._claims.items()):
            if self._settled(claim, now):
                del self._claims[key]
                self.snapshot.release(key)
                self._new[key] = 0.0

    def again(self, keys: Iterable[str], at: float = 0.0) -> None:
        """Plan these again, once it is `at` or they change: what was decided about them could not be written."""
        for key in keys:
            held = self._world.state.get(Instance, key)
            if held is not None and held.record.node is None and held.record.desired is Desired.RUN:
                self._rejected.pop(key, None)
                self._new[key] = at

    def _pending(self, instances: Iterable[tuple[str, Instance]]) -> Iterable[Pending]:
        for key, instance in instances:
            demand = self.demand(instance)
            if demand is not None:
                yield Pending(
                    id=key,
                    group=group_of(instance),
                    demand=demand,
                    created_at=instance.created_at,
                    ends_at=self._ends_at(instance),
                )

    def _waits(self, booking: Booking, planned: Container[str]) -> bool:
        """Whether any of those that room is booked for has no place yet."""
        return any(id in self._rejected or id in self._new or id in planned for id in booking.ids)

    def _ends_at(self, instance: Instance) -> float | None:
        job = None
        if instance.owner_kind is OwnerKind.JOB:
            held = self._world.state.get(Job, f"{instance.project}/{instance.owner}")
            job = held.record if held is not None else None
        return ends_at(instance, job)

    def _reject(self, key: str, instance: Instance, rejection: Rejection, now: float, result: dict[str, Instance]) -> None:
        last = instance.rejection
        written_at = self._rejected.get(key, 0.0)
        self._rejected[key] = written_at
        if last is None or last.code != rejection.code or (last != rejection and now >= written_at + REJECTION_REFRESH_S):
            result[key] = structs.replace(instance, rejection=rejection)
            self._rejected[key] = now


def _lacks_room(rejection: Rejection | None) -> bool:
    """Whether others' leaving might help: what is over its project's quota is not theirs to mend."""
    return rejection is not None and rejection.code != OVER_QUOTA
