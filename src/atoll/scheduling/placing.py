"""Puts one class of equal instances on a view: as placing one by one would, with everything scored once."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from atoll.model.devices import GpuGrant
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import View
from atoll.scheduling.ranking import Domains, Entry, Ranking, feasible, static_mask
from atoll.scheduling.rules import RULES, Bound
from atoll.scheduling.scores import DOMAIN_SCORE
from atoll.scheduling.snapshot import Bools, Ints

Grants = tuple[GpuGrant, ...]


def place_class(view: View, group: str, demand: Demand, count: int) -> list[tuple[int, Grants]]:
    """Put up to `count` equal instances on `view` and return the row and the devices of each, in order; fewer where no more fit."""
    chosen = choose_rows(view, group, demand, count)
    return put(view, group, demand, chosen) if chosen else []


def choose_rows(view: View, group: str, demand: Demand, count: int, within: Bools | None = None) -> list[int]:
    """Return the rows that up to `count` equal instances would go to, in order, of those in `within`; the view is left as it is."""
    mask, room, bounds = allowed(view, group, demand, count)
    if within is not None:
        mask = mask & within
    rows = np.flatnonzero(mask)
    if not len(rows):
        return []
    ranking = Ranking(view, group, demand, room)
    label = DOMAIN_SCORE.label(demand)
    if label is None and not bounds:
        return _place_flat(ranking, rows, count)
    return _Cells(ranking, rows, count, label, bounds).place(count)


def put(view: View, group: str, demand: Demand, chosen: Sequence[int]) -> list[tuple[int, Grants]]:
    """Count one instance on each of the rows `chosen`, and return it with the devices that the instance gets."""
    times: dict[int, int] = {}
    for row in chosen:
        times[row] = times.get(row, 0) + 1
    view.place(group, demand, times.keys(), times.values())
    gpu = demand.gpu
    if gpu is None:
        return [(row, ()) for row in chosen]
    return [(row, view.devices.take(row, gpu)) for row in chosen]


def allowed(view: View, group: str, demand: Demand, count: int = 1) -> tuple[Bools, Ints, Sequence[Bound]]:
    """Return which rows take the class, how many of it each has room for, and what changes as up to `count` are placed.

    Rows that a bound holds back now are among the first; without bounds none are.
    """
    mask, room = feasible(view, demand)
    bounds: list[Bound] = []
    for rule in RULES:
        if not rule.wants(view, group, demand):
            continue
        limit = rule.room(view, group, demand)
        if limit is not None:
            room = np.minimum(room, limit)
            mask = mask & (room > 0)
        more = rule.bounds(view, group, demand, static_mask(view, demand)) if count > 1 else ()
        if more:
            bounds.extend(more)
        else:
            mask = mask & rule.passes(view, group, demand)
    return mask, room, bounds


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


class _Cells:
    """One heap for each cell, and one over these by their best node.

    Nodes of one cell are in the same place for every bound and for the score of places, so that within it the best node is
    the best whatever these say.
    """

    def __init__(self, ranking: Ranking, rows: Ints, count: int, label: str | None, bounds: Sequence[Bound]) -> None:
        self._ranking = ranking
        self._bounds = bounds
        self._domains: Domains | None = ranking.domains(label) if label is not None else None
        columns = [bound.of for bound in bounds] + ([self._domains.of] if self._domains else [])
        still = [] if self._domains else [mask for bound in bounds if (mask := bound.still(count)) is not None]
        for mask in still:
            rows = rows[mask[rows]]
        self._waiting: list[int] = []
        """Cells that a bound holds back for now."""
        self._outer: list[tuple[int, int, int]] = []
        if not len(rows):
            return
        of, places = _cells(columns, rows)
        self._places: list[list[int]] = places
        """By column: cell → place."""
        # With one bound a place is a cell. What is shut stays so, and only what gets one is shut: no cell beyond the best `count`
        # can have its turn.
        self._heaps = ranking.best_by(of, rows, count, count if len(still) == len(bounds) == 1 else None)
        self._outer = [self._entry(cell) for cell in self._heaps]
        heapq.heapify(self._outer)

    def _entry(self, cell: int) -> tuple[int, int, int]:
        score, rank, _ = self._heaps[cell][0]
        place = self._domains.score(self._places[-1][cell]) if self._domains else 0
        return (score - place, rank, cell)

    def place(self, count: int) -> list[int]:
        chosen: list[int] = []
        while self._outer and len(chosen) < count:
            cell = self._outer[0][2]
            entry = self._entry(cell)
            if entry != self._outer[0]:
                # Another cell of its site or region has received one since: it is worth less by now, never more.
                heapq.heapreplace(self._outer, entry)
                continue
            if not self._open(cell):
                heapq.heappop(self._outer)
                continue
            chosen.append(self._take(cell))
        return chosen

    def _open(self, cell: int) -> bool:
        for bound, places in zip(self._bounds, self._places, strict=False):
            if not bound.open(places[cell]):
                if not bound.shut(places[cell]):
                    self._waiting.append(cell)
                return False
        return True

    def _take(self, cell: int) -> int:
        heap = self._heaps[cell]
        row = heap[0][2]
        if self._domains:
            self._domains.counts[self._places[-1][cell]] += 1
        again = [bound.take(places[cell]) for bound, places in zip(self._bounds, self._places, strict=False)]
        _renew(heap, self._ranking.again(row))
        if heap:
            heapq.heapreplace(self._outer, self._entry(cell))
        else:
            heapq.heappop(self._outer)
        if any(again):
            for waiting in self._waiting:
                heapq.heappush(self._outer, self._entry(waiting))
            self._waiting.clear()
        return row


def _cells(columns: Sequence[Ints], rows: Ints) -> tuple[Ints, list[list[int]]]:
    """Return row → cell (a cell is a combination of places; valid for `rows`), and for each column cell → place."""
    joined = columns[0][rows].astype(np.int64)
    for column in columns[1:]:
        values = column[rows]
        _, joined = np.unique(joined * (int(values.max()) + 2) + values + 1, return_inverse=True)
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    of = np.full(len(columns[0]), -1, dtype=np.int64)
    of[rows] = inverse
    return of, [column[rows][first].tolist() for column in columns]
