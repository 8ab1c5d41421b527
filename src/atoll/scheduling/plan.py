"""`plan`: which node each pending instance gets, and why the others get none.

Instances are taken in the order of `Pending.order`, each to the best node as the ones before it have left things. Equal
instances are one class: nodes are filtered and scored once for it, and only a node that has just received one is scored again,
so that the answer is the one that placing one by one would give, at a small part of the cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from atoll.model.records import Rejection
from atoll.scheduling import quotas
from atoll.scheduling.demand import Pending, Placed
from atoll.scheduling.explain import reject
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
    queue = sorted(pending, key=lambda item: item.order)[:PENDING_MAX]
    for members in _classes(queue):
        first = members[0]
        most = quotas.room(view, first.group, first.demand, len(members))
        rows = place_class(view, first.group, first.demand, most) if most else []
        runtimes = {row: snapshot.runtime_for(row, first.demand.runtimes) for row in {row for row, _ in rows}}
        for member, (row, gpus) in zip(members, rows, strict=False):
            placed.append(Placed(id=member.id, node=snapshot.names[row], runtime=runtimes[row], gpus=gpus))
        if len(rows) < len(members):
            why = quotas.over if len(rows) == most else reject
            reason = why(view, first.group, first.demand)
            rejected.update((member.id, reason) for member in members[len(rows) :])
    return Plan(tuple(placed), rejected)


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
