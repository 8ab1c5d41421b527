"""The nodes of one class of equal instances in order: which fit, how often, and how good each next one there is."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.filters import FILTERS, LIMITS
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.interface import View
from atoll.scheduling.near import wants_users
from atoll.scheduling.scores import DOMAIN_SCORE, GROUP_SCORES, SCORES
from atoll.scheduling.snapshot import Bools, Ints, Standing

Entry = tuple[int, int, int]
"""Minus the score, the rank of the node's name, the row: the smallest is the best."""
STEPS = 1_000_000
"""Scores are rounded to whole millionths, so that sums are exact and the same on every machine."""
_LEVELS_AHEAD = 16
"""Further instances on one node that are scored at once."""
_TABLE_MAX = 1 << 20
"""Scores in the table that a class begins with."""
_NO_LIMIT = np.iinfo(np.int64).max


def static_mask(view: View, demand: Demand) -> Bools:
    """Return which rows pass every rule that depends on facts about nodes only."""

    def make() -> Bools:
        mask = view.nodes.present[: view.size].copy()
        for rule in FILTERS:
            if rule.wants(demand):
                mask &= rule.passes(view, demand)
        return mask

    return view.kept(("static", demand), make)


def feasible(view: View, demand: Demand) -> tuple[Bools, Ints]:
    """Return which rows take the demand, and how many of it each has room for (valid where it fits)."""
    mask = static_mask(view, demand)
    room = np.full(view.size, _NO_LIMIT, dtype=np.int64)
    for limit in LIMITS:
        if limit.wants(demand):
            np.minimum(room, limit.room(view, demand), out=room)
    return mask & (room > 0), room


class Domains:
    """The sites or regions, and how many of the group each has; with a layout, how many each should have."""

    def __init__(self, of: Ints, counts: list[int], wanted: list[int] | None = None) -> None:
        self.of = of
        """Row → domain."""
        self.counts = counts
        self._wanted = wanted
        self.name = DOMAIN_SCORE.name if wanted is None else DOMAIN_SCORE.layout_name

    def score(self, domain: int) -> int:
        if self._wanted is None:
            return DOMAIN_SCORE.score(self.counts[domain]) * STEPS
        return DOMAIN_SCORE.layout_score(self.counts[domain], self._wanted[domain]) * STEPS


def group_scores(view: View, group: str, demand: Demand) -> Ints | None:
    """Return by row the weighted sum of the scores that the class does not change, in millionths; None where it has none."""
    total: Ints | None = None
    for score in GROUP_SCORES:
        if score.wants(demand):
            values = np.rint(score.score(view, group, demand) * STEPS).astype(np.int64) * score.weight
            total = values if total is None else total + values
    return total


class Ranking:
    """Scores of one class over the rows; `again` is asked after each placement."""

    def __init__(self, view: View, group: str, demand: Demand, room: Ints) -> None:
        self._view = view
        self._group = group
        self._demand = demand
        self._room = room
        self._scores = [score for score in SCORES if score.wants(view, demand)]
        self._base = group_scores(view, group, demand)
        self._counts = view.counts(group)
        self._ranks = view.nodes.ranks()
        self._placed: dict[int, int] = {}
        self._levels: dict[int, list[int]] = {}

    def totals(self, rows: Ints, extra: Ints) -> Ints:
        """Return the weighted sum of all scores of one more instance on each row, in millionths."""
        total = np.zeros(len(rows), dtype=np.int64) if self._base is None else self._base[rows]
        for score in self._scores:
            values = score.score(self._view, self._demand, self._counts, rows, extra)
            total += np.rint(values * STEPS).astype(np.int64) * score.weight
        return total

    def best(self, rows: Ints, count: int) -> list[Entry]:
        """Return a heap of the `count` best of `rows`: no other can be chosen before one of these has been."""
        scores = self.totals(rows, np.zeros(len(rows), dtype=np.int64))
        ranks = self._ranks[rows]
        if count == 1:
            equal = np.flatnonzero(scores == scores.max())
            first = equal[ranks[equal].argmin()]
            return [(-int(scores[first]), int(ranks[first]), int(rows[first]))]
        if count < len(rows):
            edge = np.partition(scores, len(rows) - count)[len(rows) - count]
            better = np.flatnonzero(scores > edge)
            equal = np.flatnonzero(scores == edge)
            fill = count - len(better)
            if fill < len(equal):
                equal = equal[np.argpartition(ranks[equal], fill - 1)[:fill]]
            keep = np.concatenate((better, equal))
            rows, scores, ranks = rows[keep], scores[keep], ranks[keep]
        order = np.lexsort((ranks, -scores))
        self._look_ahead(rows, count)
        # Sorted, it is a heap.
        return list(zip((-scores[order]).tolist(), ranks[order].tolist(), rows[order].tolist(), strict=True))

    def best_by(self, of: Ints, rows: Ints, count: int, cells_max: int | None = None) -> dict[int, list[Entry]]:
        """Return for each domain (`of` gives it by row) what `best` returns of its rows, all scored at once; of at most
        `cells_max` domains, those with the best rows."""
        scores = self.totals(rows, np.zeros(len(rows), dtype=np.int64))
        order = np.lexsort((self._ranks[rows], -scores, of[rows]))
        rows, scores = rows[order], scores[order]
        starts = np.flatnonzero(np.diff(of[rows], prepend=-1))
        sizes = np.diff(starts, append=len(rows))
        if cells_max is not None and len(starts) > cells_max:
            first = np.lexsort((self._ranks[rows[starts]], -scores[starts]))[:cells_max]
            chosen = np.zeros(len(starts), dtype=np.bool_)
            chosen[first] = True
            keep = np.repeat(chosen, sizes)
            rows, scores, sizes = rows[keep], scores[keep], sizes[chosen]
            starts = np.cumsum(sizes) - sizes
        place = np.arange(len(rows)) - np.repeat(starts, sizes)
        self._look_ahead(rows[place <= count // len(starts)], count)
        keep = place < count
        rows, scores = rows[keep], scores[keep]
        entries = list(zip((-scores).tolist(), self._ranks[rows].tolist(), rows.tolist(), strict=True))
        ends = np.cumsum(np.minimum(sizes, count)).tolist()
        names = of[rows][[end - 1 for end in ends]].tolist()
        return {name: entries[start:end] for name, start, end in zip(names, [0, *ends], ends, strict=False)}

    def _look_ahead(self, rows: Ints, count: int) -> None:
        """Score all of `rows` at once for as many instances as each would get if all got the same; with GPUs, which are packed
        and not spread, for as many as they have room for."""
        levels = count // len(rows) + 1
        if self._demand.gpu is not None:
            levels = max(levels, min(count, _LEVELS_AHEAD, int(self._room[rows].max())))
        levels = min(levels, max(1, _TABLE_MAX // len(rows)))
        extra = np.arange(1, levels + 1, dtype=np.int64)
        table = self.totals(np.repeat(rows, levels), np.tile(extra, len(rows))).reshape(len(rows), levels)
        self._levels.update(zip(rows.tolist(), table.tolist(), strict=True))

    def again(self, row: int) -> Entry | None:
        """Count one instance on `row` and return its entry for the next one; None when it is full."""
        placed = self._placed[row] = self._placed.get(row, 0) + 1
        if placed >= self._room[row]:
            return None
        levels = self._levels.setdefault(row, [])
        if placed > len(levels):
            start = len(levels) + 1
            extra = np.arange(start, start + _LEVELS_AHEAD, dtype=np.int64)
            levels.extend(self.totals(np.full(_LEVELS_AHEAD, row, dtype=np.int64), extra).tolist())
        return (-levels[placed - 1], int(self._ranks[row]), row)

    def domains(self, label: str) -> Domains:
        """Return the places that `label` (`site` or `region`) names."""
        nodes = self._view.nodes
        column, values = nodes.label(label), nodes.values(label)
        there = column >= 0
        wanted = None
        if wants_users(self._demand):
            # What is lost serves nobody, and is made again where it was.
            there &= nodes.standing[: nodes.size] != Standing.LOST
            layout = nodes.whereabouts.layouts.get(owner_of_group(self._group))
            wanted = [layout.wanted.get(name, 0) if layout is not None else 0 for name in values]
        counts = np.bincount(column[there], weights=self._counts[there], minlength=len(values))
        return Domains(column, [int(count) for count in counts], wanted)
