"""Which moves would free what: nodes that few instances keep from being empty, devices that few shares keep from being whole.

A proposal only. Every move goes to room that is free now, on a node that stays in use, so that the moves may be made in any order;
and after each all hard rules hold, those of others that want to be near or away among them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import numpy as np
from msgspec import Struct

from atoll.model.devices import GpuGrant, GpuSharing
from atoll.model.spec import NVLINK, Operator
from atoll.model.units import format_bytes
from atoll.model.views import DefragMove, DefragStep, DefragView
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.groups import owner_of_group, owners_named
from atoll.scheduling.interface import View
from atoll.scheduling.placing import choose_rows, put
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import ABSENT, Bools, Snapshot, Standing

MOVES_MAX = 50
"""Moves in one proposal."""
TOGETHER_MAX = 8
"""Moves that free one thing; what takes more is left alone."""
TRIES_MAX = 500
"""Instances for which another place is looked for."""
WAITING_MAX = 1_000
"""Instances without a place for which is said whether the moves would give them one."""

Budget = Callable[[str], int]
"""Owner → how many of its instances may be moved at a time."""


class _Held(Struct, frozen=True):
    id: str
    node: str
    group: str
    gpus: tuple[GpuGrant, ...]
    size: tuple[int, ...]


def propose(
    snapshot: Snapshot, demands: Mapping[str, Demand], movable: Container[str], budget: Budget, waiting: Sequence[Pending] = ()
) -> DefragView:
    """Return moves, and what they free; `snapshot` is used up. `demands` has those of all groups that are placed."""
    waiting = sorted(waiting, key=lambda item: item.order)[:WAITING_MAX]
    before = len(plan(snapshot, waiting).placed)
    search = _Search(snapshot, demands, movable, budget)
    steps = [*search.nodes(), *search.devices()]
    after = len(plan(snapshot, waiting).placed) if steps else before
    return DefragView(steps=tuple(steps), nodes=len(snapshot), waiting=len(waiting), fit_now=before, fit_then=after)


class _Search:
    def __init__(self, snapshot: Snapshot, demands: Mapping[str, Demand], movable: Container[str], budget: Budget) -> None:
        self._snapshot = snapshot
        self._demands = demands
        self._movable = movable
        self._budget = budget
        self._moved: dict[str, int] = {}
        """Owner → moves so far."""
        self._moves = 0
        self._tries = 0
        self._sources: set[str] = set()
        self._targets: set[str] = set()
        self._leaned_on = _leaned_on(demands)

    def nodes(self) -> Iterator[DefragStep]:
        """Yield nodes that can be emptied, those with the fewest instances first."""
        for name, there in sorted(self._by_node(), key=lambda one: (len(one[1]), sum(h.size[0] for h in one[1]), one[0])):
            if len(there) <= TOGETHER_MAX and name not in self._targets:
                moves = self._move(there, whole_devices=False)
                if moves:
                    capacity = self._snapshot.nodes[name].capacity
                    gpus = f", {len(capacity.gpus)} GPUs" if capacity.gpus else ""
                    frees = f"node {name}: {capacity.cpu_milli / 1000:g} cores, {format_bytes(capacity.memory_bytes)}{gpus}"
                    yield DefragStep(frees=frees, moves=moves)

    def devices(self) -> Iterator[DefragStep]:
        """Yield devices that can be made whole again: shares and partitions go to devices that are in use anyway."""
        if not self._snapshot.has_gpus:
            return
        for name, there in sorted(self._by_node(), key=lambda one: one[0]):
            if name in self._sources or name in self._targets:
                continue
            holders: dict[str, list[_Held]] = {}
            for held in there:
                for device in {grant.device for grant in held.gpus}:
                    holders.setdefault(device, []).append(held)
            for device, those in sorted(holders.items(), key=lambda one: (len(one[1]), one[0])):
                shared = all(len(h.gpus) == 1 and h.gpus[0].sharing is not GpuSharing.EXCLUSIVE for h in those)
                moves = self._move(those, whole_devices=True) if shared and len(those) <= TOGETHER_MAX else ()
                if moves:
                    yield DefragStep(frees=f"GPU {device} of node {name}", moves=moves)

    def _by_node(self) -> list[tuple[str, list[_Held]]]:
        snapshot, found = self._snapshot, []
        for name, node in snapshot.nodes.items():
            row = snapshot.row_of(name)
            if row is None or snapshot.standing[row] >= Standing.UNREACHABLE:
                continue
            there = [_Held(id, node.name, a.group, a.gpus, a.amounts) for id, a in snapshot.allocations_on(name)]
            if there:
                found.append((name, there))
        return found

    def _move(self, there: Iterable[_Held], *, whole_devices: bool) -> tuple[DefragMove, ...]:
        """Find other places for all of `there`; nothing is moved where one has none."""
        done: list[tuple[_Held, DefragMove]] = []
        for held in sorted(there, key=lambda h: ([-amount for amount in h.size], h.id)):
            move = self._target(held, whole_devices)
            if move is None:
                for back, _ in done:
                    self._count(back, -1)
                    self._snapshot.allocate(back.id, back.node, back.group, self._demands[back.group], back.gpus)
                return ()
            self._count(held, 1)
            done.append((held, move))
        self._sources.update(held.node for held, _ in done)
        self._targets.update(move.to for _, move in done)
        return tuple(move for _, move in done)

    def _count(self, held: _Held, by: int) -> None:
        owner = owner_of_group(held.group)
        self._moves += by
        self._moved[owner] = self._moved.get(owner, 0) + by

    def _target(self, held: _Held, whole_devices: bool) -> DefragMove | None:
        owner, demand = owner_of_group(held.group), self._demands.get(held.group)
        if demand is None or demand.pinned or demand.placement.together == NVLINK or held.id not in self._movable:
            return None
        if self._moves >= MOVES_MAX or self._tries >= TRIES_MAX or self._moved.get(owner, 0) >= self._budget(owner):
            return None
        self._tries += 1
        snapshot = self._snapshot
        within = self._within(held, demand)
        snapshot.release(held.id)
        view = View(snapshot)
        rows = choose_rows(view, held.group, demand, 1, within)
        grants = put(view, held.group, demand, rows)[0][1] if rows else ()
        to = snapshot.names[rows[0]] if rows else ""
        if not rows or (whole_devices and not self._in_use(to, grants)):
            snapshot.allocate(held.id, held.node, held.group, demand, held.gpus)
            return None
        snapshot.allocate(held.id, to, held.group, demand, grants)
        project, _, name = held.id.partition("/")
        return DefragMove(instance=name, project=project, node=held.node, to=to, gpus=grants)

    def _in_use(self, name: str, grants: tuple[GpuGrant, ...]) -> bool:
        used = {grant.device for _, other in self._snapshot.allocations_on(name) for grant in other.gpus}
        return all(grant.device in used for grant in grants)

    def _within(self, held: _Held, demand: Demand) -> Bools:
        """Return the rows that it may move to: in use, never a node that is to be emptied, and as near as others count on."""
        snapshot = self._snapshot
        size = snapshot.size
        mask: Bools = np.any(snapshot.used[:, :size] > 0, axis=0)
        for name in (*self._sources, held.node):
            row = snapshot.row_of(name)
            if row is not None:
                mask[row] = False
        at = snapshot.row_of(held.node)
        for label in {*_even_over(demand), *self._leaned_on.get(owner_of_group(held.group), ())}:
            column = snapshot.label(label)
            same: Bools = column == (int(column[at]) if at is not None else ABSENT)
            mask &= same
        return mask


def _even_over(demand: Demand) -> Iterator[str]:
    """Yield labels over whose values the class must stay even: it only moves within one."""
    if demand.placement.max_skew is not None:
        yield str(demand.placement.spread)
    if demand.placement.near is not None:
        yield "site"
    yield from (rule.label for rule in demand.placement.constraints if rule.operator is Operator.GROUP_BY)


def _leaned_on(demands: Mapping[str, Demand]) -> dict[str, set[str]]:
    """Return owner → labels by which others must be near to it."""
    found: dict[str, set[str]] = {}
    for group, demand in demands.items():
        for wish in demand.placement.affinity:
            if wish.weight is None:
                for owner in owners_named(group, wish.app):
                    if owner != owner_of_group(group):
                        found.setdefault(owner, set()).add(wish.by)
    return found
