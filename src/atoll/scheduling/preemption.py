"""Which instances of lower priority must leave so that one that fits nowhere gets a node: the lowest, and the fewest.

Only room is made that way: a node that a rule about facts or about other instances turns away stays turned away. Priorities are
compared with those of the victims; equal ones never displace each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from msgspec import Struct

from atoll.model.devices import GpuGrant
from atoll.scheduling.demand import STANDBY_PRIORITY, Pending
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.interface import View
from atoll.scheduling.ranking import static_mask
from atoll.scheduling.rules import RULES
from atoll.scheduling.snapshot import CPU, MEMORY, Allocation, Ints, Snapshot, amounts_of

NODES_MAX = 200
"""Nodes on which victims are looked for, those with the most room first."""
TOGETHER_MAX = 3
"""Up to so many victims are chosen out of all combinations; of more, those that are not needed are let go, highest first."""
COMBINED_MAX = 12
"""Instances of one node among which combinations are tried."""

Ask = Callable[[str], bool]
Budget = Callable[[str], int]
"""Owner → how many of its instances may be taken away now."""
Victim = tuple[str, Allocation]
Worth = tuple[int, int, int, int]
"""Highest priority among the victims, their number, the sum of priorities, the rank of the node: the smallest is the best."""


class Preemption(Struct, frozen=True, kw_only=True):
    """The node on which `victims` (by id, lowest priority first) must leave for the instance `id`; none where it is enough to
    wait for those that are on their way out."""

    id: str
    node: str
    victims: tuple[str, ...]
    gpus: tuple[GpuGrant, ...] = ()
    """The devices that the instance will get."""


def preempt(view: View, item: Pending, evictable: Ask, leaving: Ask, budget: Budget) -> Preemption | None:
    """Return what has to leave for `item`, None where nothing would help.

    `evictable` says which instances may be asked at all, `leaving` which are on their way out and so count as gone.
    """
    snapshot, demand = view.nodes, item.demand
    lowest = snapshot.lowest_priority()
    if lowest is None or lowest >= demand.placement.priority:
        return None
    mask = static_mask(view, demand)
    for rule in RULES:
        if rule.wants(view, item.group, demand):
            mask = mask & rule.passes(view, item.group, demand)
    rows = np.flatnonzero(mask)
    ranks = snapshot.ranks()
    order = rows[np.lexsort((ranks[rows], -view.free[CPU, rows], -view.free[MEMORY, rows]))].tolist()
    some = [row for row in order if _may_help(snapshot, snapshot.names[row], demand.placement.priority, leaving)]
    best: tuple[Worth, Preemption] | None = None
    for row in some[:NODES_MAX]:
        there = _Node(view, item, row, evictable, leaving, budget)
        found = there.victims()
        if found is not None:
            priorities = [allocation.priority for _, allocation in found]
            worth = (max(priorities, default=-1), len(found), sum(priorities), int(ranks[row]))
            if best is None or worth < best[0]:
                ids = tuple(id for id, _ in sorted(found, key=lambda victim: (victim[1].priority, victim[0])))
                best = (worth, Preemption(id=item.id, node=snapshot.names[row], victims=ids, gpus=there.grants(found) or ()))
    return best[1] if best else None


def _may_help(snapshot: Snapshot, name: str, priority: int, leaving: Ask) -> bool:
    """Whether the node has something lower, or something on its way out, for which to wait is better than to evict elsewhere."""
    return snapshot.holds_below(name, priority) or any(leaving(id) for id, _ in snapshot.allocations_on(name))


class _Node:
    """The search on one node."""

    def __init__(self, view: View, item: Pending, row: int, evictable: Ask, leaving: Ask, budget: Budget) -> None:
        self._view = view
        self._demand = item.demand
        self._row = row
        there = list(view.nodes.allocations_on(view.nodes.names[row]))
        self._leaving = frozenset(id for id, _ in there if leaving(id))
        self._base = _sum([(id, allocation) for id, allocation in there if id in self._leaving])
        self._grants: dict[frozenset[str], tuple[GpuGrant, ...] | None] = {}
        self._pool: list[Victim] = []
        taken: Counter[str] = Counter()
        for victim in sorted(there, key=lambda v: (v[1].priority, [-amount for amount in v[1].amounts], v[0])):
            id, allocation = victim
            owner = owner_of_group(allocation.group)
            lower = allocation.priority < item.demand.placement.priority
            if not lower or id in self._leaving or not evictable(id):
                continue
            if allocation.priority != STANDBY_PRIORITY:  # what only stands by is not missed
                if taken[owner] >= budget(owner):
                    continue
                taken[owner] += 1
            self._pool.append(victim)

    def victims(self) -> tuple[Victim, ...] | None:
        """Return the lowest and fewest; None where all that may leave would not be enough."""
        if self._fits(()):
            return ()
        for top in sorted({allocation.priority for _, allocation in self._pool}):
            pool = [victim for victim in self._pool if victim[1].priority <= top]
            if self._fits(pool):
                return self._fewest(pool)
        return None

    def _fewest(self, pool: list[Victim]) -> tuple[Victim, ...]:
        if len(pool) <= COMBINED_MAX:
            for count in range(1, min(TOGETHER_MAX, len(pool)) + 1):
                enough = [some for some in combinations(pool, count) if self._fits(some)]
                if enough:
                    return min(enough, key=lambda some: (sum(a.priority for _, a in some), [id for id, _ in some]))
        kept = pool
        for victim in sorted(pool, key=lambda v: (-v[1].priority, v[1].amounts, v[0])):
            fewer = [other for other in kept if other is not victim]
            if self._fits(fewer):
                kept = fewer
        return tuple(kept)

    def _fits(self, gone: Sequence[Victim]) -> bool:
        """Return whether the item has room once `gone` are."""
        freed = self._base + _sum(gone)
        amounts = amounts_of(self._demand)
        free = self._view.free[:, self._row]
        if any(free[resource] + freed[resource] < amounts[resource] for resource in (CPU, MEMORY)):
            return False
        return self._demand.gpu is None or self.grants(gone) is not None

    def grants(self, gone: Sequence[Victim]) -> tuple[GpuGrant, ...] | None:
        """Return the devices that the item gets once `gone` are; None where they have no room, or it asks for none."""
        gpu = self._demand.gpu
        if gpu is None:
            return None
        holders = frozenset(id for id, allocation in gone if allocation.gpu is not None or allocation.gpus)
        if holders not in self._grants:
            stays = self._view.nodes.holdings_on(self._view.nodes.names[self._row], self._leaving | holders)
            self._grants[holders] = self._view.devices.grant_with(self._row, stays, gpu)
        return self._grants[holders]


def _sum(victims: Sequence[Victim]) -> Ints:
    total = np.zeros(4, dtype=np.int64)
    for _, allocation in victims:
        total += allocation.amounts
    return total
