"""All instances of an app in one place: `CLUSTER`, and affinity of an app to itself. The first chooses freely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from atoll.model.spec import Operator
from atoll.scheduling.constraints import values_of
from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import owner_of_group, owners_named
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.places import at_places, domain_counts
from atoll.scheduling.rules.interface import Bound
from atoll.scheduling.snapshot import ABSENT, Bools, Ints


class Together:
    name = "cluster"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return next(_labels(group, demand), None) is not None

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = np.ones(view.size, dtype=np.bool_)
        counts = view.owner_counts(owner_of_group(group))
        for label in _labels(group, demand):
            there = domain_counts(view, label, counts)
            mask &= at_places(view, label, (there > 0) | (there.sum() == 0), absent=False)
        return mask

    def bounds(self, view: View, group: str, demand: Demand, fit: Bools) -> Sequence[Bound]:
        counts = view.owner_counts(owner_of_group(group))
        there = {label: np.flatnonzero(domain_counts(view, label, counts)) for label in _labels(group, demand)}
        if all(len(places) for places in there.values()):
            return []
        return [_Chosen(view.nodes.label(label), set(places.tolist())) for label, places in there.items()]

    def room(self, view: View, group: str, demand: Demand) -> Ints | None:
        return None

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        labels = ", ".join(_labels(group, demand))
        return Reason(f"not on the {labels} where its first instance is", f"add a node to that {labels}, or remove the rule")


def _labels(group: str, demand: Demand) -> Iterator[str]:
    for rule in demand.placement.constraints:
        if rule.operator is Operator.CLUSTER and not any(values_of(rule)):
            yield rule.label
    for wish in demand.placement.affinity:
        if wish.weight is None and owner_of_group(group) in owners_named(group, wish.app):
            yield wish.by


class _Chosen:
    """`places` are those where instances are; where there are none, the first that is taken."""

    def __init__(self, of: Ints, places: set[int]) -> None:
        self.of = of
        self._places = places

    def open(self, place: int) -> bool:
        return place != ABSENT and (not self._places or place in self._places)

    def shut(self, place: int) -> bool:
        return True

    def still(self, count: int) -> Bools | None:
        return None

    def take(self, place: int) -> bool:
        if not self._places:
            self._places.add(place)
        return False
