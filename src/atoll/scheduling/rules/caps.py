"""At most so many instances of the app in one place: `UNIQUE`, `MAX_PER`, and anti-affinity of an app to itself."""

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

_NODE = "node"


class Caps:
    name = "max-per"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return next(_caps(group, demand), None) is not None

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = np.ones(view.size, dtype=np.bool_)
        counts = view.owner_counts(owner_of_group(group))
        for label, most in _caps(group, demand):
            # A node without the label is a matter of the label's own rule: there is no place to be full.
            mask &= at_places(view, label, domain_counts(view, label, counts) < most, absent=True)
        return mask

    def bounds(self, view: View, group: str, demand: Demand, fit: Bools) -> Sequence[Bound]:
        counts = view.owner_counts(owner_of_group(group))
        return [
            _Cap(view.nodes.label(label), (most - domain_counts(view, label, counts)).tolist())
            for label, most in _caps(group, demand)
            if label != _NODE
        ]

    def room(self, view: View, group: str, demand: Demand) -> Ints | None:
        caps = [most for label, most in _caps(group, demand) if label == _NODE]
        return min(caps) - view.owner_counts(owner_of_group(group)) if caps else None

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        counts = view.owner_counts(owner_of_group(group))

        def full(cap: tuple[str, int]) -> int:
            good = domain_counts(view, cap[0], counts) < cap[1]
            return int((~at_places(view, cap[0], good, absent=True)[failed]).sum())

        label, most = max(_caps(group, demand), key=full)
        there = "one instance" if most == 1 else f"{most} instances"
        return Reason(
            f"whose {label} has {there} of it already, the most allowed",
            f"add a node with another {label}, raise the limit, or lower scale.replicas (a rollout needs room for max_surge too)",
        )


def _caps(group: str, demand: Demand) -> Iterator[tuple[str, int]]:
    for rule in demand.placement.constraints:
        if rule.operator is Operator.UNIQUE:
            yield rule.label, 1
        elif rule.operator is Operator.MAX_PER:
            number = values_of(rule)[0]
            # The API lets no other through; one that came by another way lets nothing on.
            yield rule.label, int(number) if number.isascii() and number.isdecimal() else 0
    for wish in demand.placement.anti_affinity:
        if wish.weight is None and owner_of_group(group) in owners_named(group, wish.app):
            yield wish.by, 1


class _Cap:
    def __init__(self, of: Ints, left: list[int]) -> None:
        self.of = of
        self._left = left

    def open(self, place: int) -> bool:
        return place == ABSENT or self._left[place] > 0

    def shut(self, place: int) -> bool:
        return True

    def still(self, count: int) -> Bools | None:
        mask: Bools = (self.of == ABSENT) | (np.asarray(self._left)[self.of] > 0)
        return mask

    def take(self, place: int) -> bool:
        if place != ABSENT:
            self._left[place] -= 1
        return False
