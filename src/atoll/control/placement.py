"""The scheduler's loop side: knows what has no node, plans it, and says what to write.

The snapshot is kept by `picture`, room for those that wait for others to leave by `claims`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator

from msgspec import structs

from atoll.control.claims import Claims
from atoll.control.picture import Picture
from atoll.control.world import World, owner_of
from atoll.model.records import Instance, Rejection, Status
from atoll.model.states import Desired
from atoll.scheduling.assembly import bookings_of, group_of, holds_room
from atoll.scheduling.bookings import Booking
from atoll.scheduling.demand import Pending
from atoll.scheduling.plan import PENDING_MAX, plan
from atoll.scheduling.snapshot import Snapshot
from atoll.store.cache import Delta, Deltas

REJECTION_REFRESH_S = 10.0
"""The words of a rejection change with every instance that comes or goes; only a new code is written sooner than this."""
REPLAN_S = 0.2
"""What was rejected is planned again when something has changed, but not more often than this."""
INSTANCES_AT_ONCE = 2_000
"""Instances that are counted before others get their turn, when all are."""


class Placement:
    """Which instances wait for a node, and a snapshot to plan them on. Nothing is counted before the cache shows it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._picture = Picture(world)
        self._new: dict[str, float] = {}
        """Pending instances that have not been planned since they came or changed → not to be planned before."""
        self._rejected: dict[str, float] = {}
        """Pending instances that did not fit → when their rejection was written."""
        self._planned_at = 0.0
        self._looked_at = 0.0
        """The latest date that this was asked at."""
        self._claims = Claims(world, self._picture)
        self._edge: float | None = None
        """When a reservation begins or ends next."""
        self._bookings: tuple[Booking, ...] = ()
        """What the last plan booked for the heads of the queue."""
        self.gangs: dict[str, str] = {}
        """Instances that the last `place` placed and that must be written together with all others of their group → that group."""
        self._unplaced_gangs: set[str] = set()
        """Rejected instances that are part of a gang."""
        self.before_plan: Callable[[list[Pending]], None] = lambda pending: None
        """Called with what is planned next, so that all that the plan depends on is there."""
        # What the loop sees beside the cache's changes goes straight on.
        self.suspect = self._picture.suspect
        self.set_geography = self._picture.set_geography
        self.look = self._picture.look
        self.evacuate = self._picture.evacuate

    @property
    def snapshot(self) -> Snapshot:
        return self._picture.snapshot

    def copy(self, like: Snapshot | None = None) -> Snapshot:
        """Return a copy of the snapshot with what was booked for those that wait, as it was written down."""
        state = self._world.state
        waiting = {key: held.record for key in (*self._new, *self._rejected) if (held := state.get(Instance, key)) is not None}
        copied = self._picture.snapshot.copy(like)
        copied.bookings = bookings_of(waiting, self._world.spec_of)
        return copied

    @property
    def victims(self) -> dict[str, str]:
        """Instances that the last `place` found must leave → for which one."""
        return self._claims.victims

    def rebuild(self) -> None:
        for _ in self.rebuilding():
            pass

    def rebuilding(self) -> Iterator[None]:
        """Start from the cache as it is now; pause now and then, for others' sake: it takes seconds in a large cell.

        What changes in a pause may be taken over or not: tell it all by `apply` afterwards. Until the end nothing can be planned.
        """
        self._new.clear()
        self._rejected.clear()
        self._claims.clear()
        self._bookings = ()
        self._unplaced_gangs.clear()
        self._picture.begin()
        for count, key in enumerate(list(self._world.state.records(Instance)), 1):
            self._instance(key)
            if count % INSTANCES_AT_ONCE == 0:
                yield
        self._picture.finish()

    def apply(self, deltas: Deltas) -> None:
        """Take over one revision's changes."""
        for delta in deltas.deltas:
            self._apply(delta)

    def _apply(self, delta: Delta) -> None:
        if delta.kind is Instance:
            if delta.new is None:
                self._forget(delta.key)
            else:
                self._instance(delta.key)
        elif delta.kind is Status:
            if delta.new is not None and delta.new.record.phase.final:
                self._instance(delta.key)
        else:
            self._picture.apply(delta)

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
            self._claims.forget(key)
            self._picture.place(key, instance)
        elif instance.desired is not Desired.RUN:
            self._forget(key)
        elif key not in self._rejected:
            self._new[key] = 0.0

    def _forget(self, key: str) -> None:
        self._new.pop(key, None)
        if self._rejected.pop(key, None) is not None and key in self._unplaced_gangs:
            self._picture.room = True  # those that are left of it are fewer, and may fit
        self._unplaced_gangs.discard(key)
        self._claims.forget(key)
        self._picture.release(key)

    def due(self, now: float) -> float | None:
        """Return when to plan: now, later, or None while nothing can be placed."""
        self._follow_date(now)
        if self._edge is not None and now >= self._edge:
            self._edge, self._picture.room = None, True
        if any(at <= now for at in self._new.values()) or self._claims.any_settled(now):
            return now
        later = min(self._new.values(), default=None)
        if self._rejected and self._picture.room:
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
        self._claims.set_back(back_s)
        # What is reserved at the new date is something else.
        self._edge, self._picture.room = None, True

    def place(self, created: Iterable[Instance], skip: set[str], now: float) -> tuple[list[Instance], list[tuple[Instance, int]]]:
        """Plan `created` (not in the store yet) and all that waits but for the keys in `skip`.

        Returns the created ones, each with its node or its rejection, and those that waited and must be written, with the
        revision that they were read at.
        """
        self._claims.victims = {}
        self.gangs = {}
        self._picture.doubt()
        waiting = self._waiting(skip, now)
        fresh = {f"{instance.project}/{instance.id}": instance for instance in created}
        pending = [*self._pending(fresh.items()), *self._pending((key, instance) for key, (instance, _) in waiting.items())]
        if any(item.demand.placement.gang for item in pending):
            pending = self._whole_gangs(pending, fresh, waiting, skip)
        if not pending:
            return list(fresh.values()), []
        self.snapshot.now = now
        self._edge = self._picture.next_edge(now)
        self.before_plan(pending)
        answer = plan(self.snapshot, pending, now, [one for one in self._bookings if self._waits(one, waiting)])
        self._bookings = answer.bookings
        result: dict[str, Instance] = {}
        self._claims.make(pending, answer, fresh, skip, now)
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
        again = bool(self._rejected) and self._picture.room and now >= self._planned_at + REPLAN_S
        if again:
            self._picture.room = False
            self._planned_at = now
        self._new.update(dict.fromkeys(self._claims.settle(now), 0.0))
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

    def again(self, keys: Iterable[str], at: float = 0.0) -> None:
        """Plan these again, once it is `at` or they change: what was decided about them could not be written."""
        for key in keys:
            held = self._world.state.get(Instance, key)
            if held is not None and held.record.node is None and held.record.desired is Desired.RUN:
                self._rejected.pop(key, None)
                self._new[key] = at

    def _pending(self, instances: Iterable[tuple[str, Instance]]) -> Iterable[Pending]:
        for key, instance in instances:
            demand = self._picture.demand(instance)
            if demand is not None:
                yield Pending(
                    id=key,
                    group=group_of(instance),
                    demand=demand,
                    created_at=instance.created_at,
                    ends_at=self._picture.ends_at(instance),
                )

    def _waits(self, booking: Booking, planned: Container[str]) -> bool:
        """Whether any of those that room is booked for has no place yet."""
        return any(id in self._rejected or id in self._new or id in planned for id in booking.ids)

    def _reject(self, key: str, instance: Instance, rejection: Rejection, now: float, result: dict[str, Instance]) -> None:
        last = instance.rejection
        written_at = self._rejected.get(key, 0.0)
        self._rejected[key] = written_at
        if last is None or last.code != rejection.code or (last != rejection and now >= written_at + REJECTION_REFRESH_S):
            result[key] = structs.replace(instance, rejection=rejection)
            self._rejected[key] = now
