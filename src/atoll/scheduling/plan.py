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
from atoll.scheduling.demand import Demand, Pending, Placed
from atoll.scheduling.explain import reject
from atoll.scheduling.fair import Turns
from atoll.scheduling.gangs import place_gang, reject_gang
from atoll.scheduling.interface import View
from atoll.scheduling.placing import place_class
from atoll.scheduling.snapshot import Snapshot

PENDING_MAX = 100_000
"""Instances planned at once; later ones wait for the next plan."""


class Plan(Struct, frozen=True):
    """Every instance is in one of the two at most; in neither are those beyond `PENDING_MAX`."""

    placed: tuple[Placed, ...]
    rejected: dict[str, Rejection]


def plan(snapshot: Snapshot, pending: Iterable[Pending], now: float = 0.0) -> Plan:
    """Place `pending` on the snapshot's nodes; the snapshot is left as it is, and the order of `pending` does not matter.

    `now` (seconds since the epoch) is for rules that depend on time, of which there is none yet.
    """
    view = View(snapshot)
    placed: list[Placed] = []
    rejected: dict[str, Rejection] = {}
    turns = Turns(view, _queue(pending))
    for members in turns:
        first = members[0]
        gang = first.demand.placement.gang
        most = quotas.room(view, first.group, first.demand, len(members))
        if gang:
            rows = place_gang(view, first.group, first.demand, most) if most == len(members) else []
        else:
            rows = place_class(view, first.group, first.demand, most) if most else []
        turns.placed(first, len(rows))
        runtimes = {row: snapshot.runtime_for(row, first.demand.runtimes) for row in {row for row, _ in rows}}
        for member, (row, gpus) in zip(members, rows, strict=False):
            placed.append(Placed(id=member.id, node=snapshot.names[row], runtime=runtimes[row], gpus=gpus))
        if len(rows) < len(members):
            if gang:
                why_not = quotas.over if most < len(members) else reject_gang
                reason = why_not(view, first.group, first.demand, len(members))
            else:
                why = quotas.over if len(rows) == most else reject
                reason = why(view, first.group, first.demand)
            rejected.update((member.id, reason) for member in members[len(rows) :])
    return Plan(tuple(placed), rejected)


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
        if members and (item.group != members[0].group or item.demand != members[0].demand):
            yield members
            members = []
        members.append(item)
    if members:
        yield members
