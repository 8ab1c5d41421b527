"""Even over places: `max_skew` with `spread`, and `GROUP_BY`. A release is counted by itself, so that its rollout can be even.

A place counts when it has a node that the facts allow (whether there is room on it or not), as in Kubernetes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from atoll.model.spec import Operator
from atoll.scheduling.constraints import values_of
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.places import at_places, domain_counts
from atoll.scheduling.ranking import static_mask
from atoll.scheduling.rules.interface import Bound
from atoll.scheduling.snapshot import ABSENT, Bools, Ints


class Even:
    name = "skew"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return next(_evens(demand), None) is not None

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = np.ones(view.size, dtype=np.bool_)
        fit = static_mask(view, demand)
        for label, skew, least in _evens(demand):
            counts = domain_counts(view, label, view.counts(group))
            low = _lowest(counts, _places(view, label, fit), least)
            mask &= at_places(view, label, counts + 1 - low <= skew, absent=False)
        return mask

    def bounds(self, view: View, group: str, demand: Demand, fit: Bools) -> Sequence[Bound]:
        counts = view.counts(group)
        return [
            _Even(view.nodes.label(label), domain_counts(view, label, counts), _places(view, label, fit), skew, least)
            for label, skew, least in _evens(demand)
        ]

    def room(self, view: View, group: str, demand: Demand) -> Ints | None:
        return None

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        fit = static_mask(view, demand)
        label, skew, least = next(_evens(demand))
        counts = domain_counts(view, label, view.counts(group))
        places = _places(view, label, fit)
        low = _lowest(counts, places, least)
        names = sorted(name for name, id in view.nodes.values(label).items() if id in set(places[counts[places] == low].tolist()))
        fewest = ", ".join(names[:5]) or f"a {label} that is not there yet"
        return Reason(f"whose {label} would have over {skew} more than another", f"make room on {fewest}, or raise the skew")


def _evens(demand: Demand) -> Iterator[tuple[str, int, int]]:
    """Yield label, the greatest skew, and how many places there must be for the fewest to count."""
    placement = demand.placement
    if placement.max_skew is not None:
        yield str(placement.spread), placement.max_skew, 0
    for rule in placement.constraints:
        if rule.operator is Operator.GROUP_BY:
            number = values_of(rule)[0] if values_of(rule) else ""
            yield rule.label, 1, int(number) if number.isascii() and number.isdecimal() else 0


def _places(view: View, label: str, fit: Bools) -> Ints:
    column = view.nodes.label(label)[fit]
    return np.flatnonzero(np.bincount(column[column >= 0]))


def _lowest(counts: Ints, places: Ints, least: int) -> int:
    return int(counts[places].min()) if len(places) >= max(least, 1) else 0


class _Even:
    def __init__(self, of: Ints, counts: Ints, places: Ints, skew: int, least: int) -> None:
        self.of = of
        self._skew = skew
        self._counts: list[int] = counts.tolist()
        self._places = set(places.tolist())
        self._low = _lowest(counts, places, least)
        self._rises = len(places) >= max(least, 1)
        self._with: Counter[int] = Counter(counts[places].tolist())

    def open(self, place: int) -> bool:
        return place != ABSENT and self._counts[place] + 1 - self._low <= self._skew

    def shut(self, place: int) -> bool:
        return place == ABSENT or not self._rises

    def still(self, count: int) -> Bools | None:
        if self._rises and self._with[self._low] <= count:
            return None
        mask: Bools = (self.of != ABSENT) & (np.asarray(self._counts)[self.of] + 1 - self._low <= self._skew)
        return mask

    def take(self, place: int) -> bool:
        before = self._counts[place]
        self._counts[place] = before + 1
        if place not in self._places:
            return False
        self._with[before] -= 1
        self._with[before + 1] += 1
        if not self._rises or before != self._low or self._with[before]:
            return False
        self._low += 1
        return True
