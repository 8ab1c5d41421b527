"""`plan`: which node each pending instance gets, and why the others get none.

Instances are taken in the order of `Pending.order`, each to the best node as the ones before it have left things. Equal
instances are one class: nodes are filtered and scored once for it, and only a node that has just received one is scored again,
so that the answer is the one that placing one by one would give, at a small part of the cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import numpy as np
from msgspec import Struct

from atoll.model.records import Rejection
from atoll.scheduling.demand import Demand, Pending, Placed
from atoll.scheduling.explain import reject
from atoll.scheduling.interface import View
from atoll.scheduling.ranking import Entry, Ranking, feasible
from atoll.scheduling.scores import DOMAIN_SCORE
from atoll.scheduling.snapshot import Ints, Snapshot

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
        rows = place_class(view, first.group, first.demand, len(members))
        runtimes = {row: snapshot.runtime_for(row, first.demand.runtimes) for row in set(rows)}
        for member, row in zip(members, rows, strict=False):
            placed.append(Placed(id=member.id, node=snapshot.names[row], runtime=runtimes[row]))
        if len(rows) < len(members):
            reason = reject(view, first.demand)
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


def place_class(view: View, group: str, demand: Demand, count: int) -> list[int]:
    """Put up to `count` equal instances on `view` and return the row of each, in order; fewer where no more fit."""
    mask, room = feasible(view, demand)
    rows = np.flatnonzero(mask)
    if not len(rows):
        return []
    ranking = Ranking(view, group, demand, room)
    label = DOMAIN_SCORE.label(demand)
    chosen = _place_flat(ranking, rows, count) if label is None else _place_over(ranking, rows, count, label)
    times: dict[int, int] = {}
    for row in chosen:
        times[row] = times.get(row, 0) + 1
    view.place(group, demand, times.keys(), times.values())
    return chosen


def _place_flat(ranking: Ranking, rows: Ints, count: int) -> list[int]:
    heap = ranking.best(rows, count)
    chosen: list[int] = []
    while heap and len(chosen) < count:
        row = heap[0][2]
        chosen.append(row)
        if len(chosen) < count:
            _renew(heap, ranking.again(row))
    return chosen


def _renew(heap: list[Entry], again: Entry | None) -> None:
    """Put the entry of the node that has just received one back in its place."""
    if again is None:
        heapq.heappop(heap)
    else:
        heapq.heapreplace(heap, again)


def _place_over(ranking: Ranking, rows: Ints, count: int, label: str) -> list[int]:
    """As `_place_flat`, with one heap for each site or region, and one over these by their best node.

    Within a place the place's own score is the same for all, so that its best node is the best whatever that score is.
    """
    domains = ranking.domains(label)
    heaps = ranking.best_by(domains.of, rows, count)

    def entry(domain: int) -> tuple[int, int, int]:
        score, rank, _ = heaps[domain][0]
        return (score - domains.score(domain), rank, domain)

    outer = [entry(domain) for domain in heaps]
    heapq.heapify(outer)
    chosen: list[int] = []
    while outer and len(chosen) < count:
        domain = outer[0][2]
        heap = heaps[domain]
        row = heap[0][2]
        chosen.append(row)
        domains.counts[domain] += 1
        _renew(heap, ranking.again(row))
        if heap:
            heapq.heapreplace(outer, entry(domain))
        else:
            heapq.heappop(outer)
    return chosen
