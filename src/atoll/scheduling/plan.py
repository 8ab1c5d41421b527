"""`plan`: which node each pending instance gets, and why the others get none.

Instances are taken in the order of `Pending.order`, and between projects of equal priority by fair shares (`fair`), each to the
best node as the ones before it have left things. Equal instances are one class: nodes are filtered and scored once for it, and
only a node that has just received one is scored again, so that the answer is the one that placing one by one would give, at a
small part of the cost. A gang is placed as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from atoll.model.records import Rejection
from atoll.scheduling import quotas
from atoll.scheduling.bookings import BOOKINGS_MAX, Booking
from atoll.scheduling.demand import Demand, Pending, Placed
from atoll.scheduling.explain import booked, reject
from atoll.scheduling.fair import Turns
from atoll.scheduling.future import Future
from atoll.scheduling.gangs import place_gang, reject_gang
from atoll.scheduling.interface import View
from atoll.scheduling.placing import Grants, place_class
from atoll.scheduling.snapshot import Snapshot

PENDING_MAX = 100_000
"""Instances planned at once; later ones wait for the next plan."""


class Plan(Struct, frozen=True):
    """Every instance is in one of the two at most; in neither are those beyond `PENDING_MAX`."""

    placed: tuple[Placed, ...]
    rejected: dict[str, Rejection]
    bookings: tuple[Booking, ...] = ()
    """What is booked for the first of those that were rejected; give it to the next plan that they are no part of."""


def plan(snapshot: Snapshot, pending: Iterable[Pending], now: float | None = None, bookings: Iterable[Booking] = ()) -> Plan:
    """Place `pending` on the snapshot's nodes; the snapshot is left as it is, and the order of `pending` does not matter.

    `now` (seconds since the epoch; the snapshot's where it is None) is what reservations go by. `bookings` are those of an
    earlier plan: they hold back what comes after their heads as if these were planned, too; one whose head is in `pending` is made
    anew.
    """
    view = View(snapshot)
    if now is not None:
        view.now = now
    queue = _queue(pending)
    _keep(view, queue, bookings)
    placed: list[Placed] = []
    rejected: dict[str, Rejection] = {}
    turns = Turns(view, queue)
    future: Future | None = None
    for members in turns:
        first = members[0]
        view.ends_at = first.ends_at
        rows, within_quota = _place(view, members)
        turns.placed(first, len(rows))
        wanted, gpu = first.demand.runtimes, first.demand.gpu is not None
        runtimes = {row: snapshot.runtime_for(row, wanted, gpu=gpu) for row in {row for row, _ in rows}}
        for member, (row, gpus) in zip(members, rows, strict=False):
            placed.append(Placed(id=member.id, node=snapshot.names[row], runtime=runtimes[row], gpus=gpus))
        if len(rows) == len(members):
            continue
        left = members[len(rows) :]
        reason = _why(view, members, within_quota)
        if within_quota and len(view.bookings) < BOOKINGS_MAX and snapshot.ledger.ends_any:
            future = future or Future(view)
            booking = future.book(left, len(left) if first.demand.placement.gang else 1)
            if booking is not None:
                view.book(booking)
                rejected.update((id, booked(reason, booking, first=id == booking.ids[0])) for id in booking.ids)
                left = left[len(booking.ids) :]
        rejected.update((member.id, reason) for member in left)
    return Plan(tuple(placed), rejected, view.bookings.all())


def _place(view: View, members: list[Pending]) -> tuple[list[tuple[int, Grants]], bool]:
    """Put what fits of a class on the view; return where, and whether its quota has room for those that are left."""
    first = members[0]
    most = quotas.room(view, first.group, first.demand, len(members))
    if first.demand.placement.gang:
        enough = most == len(members)
        return place_gang(view, first.group, first.demand, most) if enough else [], enough
    rows = place_class(view, first.group, first.demand, most) if most else []
    return rows, len(rows) < most


def _why(view: View, members: list[Pending], within_quota: bool) -> Rejection:
    first = members[0]
    if first.demand.placement.gang:
        return (reject_gang if within_quota else quotas.over)(view, first.group, first.demand, len(members))
    return (reject if within_quota else quotas.over)(view, first.group, first.demand)


def _keep(view: View, queue: list[list[Pending]], bookings: Iterable[Booking]) -> None:
    """Keep those of `bookings` whose heads are not in the queue themselves."""
    kept = list(bookings)[:BOOKINGS_MAX]
    if kept:
        there = {member.id for members in queue for member in members}
        for booking in kept:
            if there.isdisjoint(booking.ids):
                view.book(booking)


def _queue(pending: Iterable[Pending]) -> list[list[Pending]]:
    """Return the classes in order, whichever project they are of: a gang as a whole, where its first member is, or not at all."""
    ordered = sorted(pending, key=lambda item: item.order)
    classes = list(_classes(ordered[:PENDING_MAX]))
    if not any(members[0].demand.placement.gang for members in classes):
        return classes
    beyond = {item.group for item in ordered[PENDING_MAX:]}
    gangs: dict[tuple[str, Demand], list[Pending]] = {}
    queue: list[list[Pending]] = []
    for members in classes:
        first = members[0]
        if not first.demand.placement.gang:
            queue.append(members)
        elif first.group not in beyond:
            gang = gangs.setdefault((first.group, first.demand), [])
            if not gang:
                queue.append(gang)
            gang.extend(members)
    return queue


def _classes(queue: list[Pending]) -> Iterator[list[Pending]]:
    """Yield runs of equal instances: neighbours only, since another class between them may change what they find."""
    members: list[Pending] = []
    for item in queue:
        if members and _differ(item, members[0]):
            yield members
            members = []
        members.append(item)
    if members:
        yield members


def _differ(item: Pending, other: Pending) -> bool:
    return item.group != other.group or item.ends_at != other.ends_at or item.demand != other.demand
