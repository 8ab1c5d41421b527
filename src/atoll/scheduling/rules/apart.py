"""`anti_affinity` to other apps, in both directions: neither goes where the other is, whichever was there first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import owner_of_group, owners_named
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.places import at_places, domain_counts
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import Bools, Ints


class Apart(Still):
    name = "anti-affinity"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return bool(demand.placement.anti_affinity) or view.repelling(owner_of_group(group)) is not None

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = np.ones(view.size, dtype=np.bool_)
        for _, label, counts in self._others(view, group, demand):
            mask &= at_places(view, label, domain_counts(view, label, counts) == 0, absent=True)
        return mask

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        others = dict.fromkeys(name for name, _, counts in self._others(view, group, demand) if counts.any())
        names = ", ".join(list(others)[:5])
        return Reason(f"beside {names}, from which it must stay apart", "remove the anti_affinity, give it a weight, or add a node")

    def _others(self, view: View, group: str, demand: Demand) -> Iterator[tuple[str, str, Ints]]:
        """Yield the name of each app to keep away from, the label that says what near is, and its instances by row."""
        own = owner_of_group(group)
        for wish in demand.placement.anti_affinity:
            owners = owners_named(group, wish.app)
            if wish.weight is None and own not in owners:
                yield wish.app, wish.by, sum((view.owner_counts(owner) for owner in owners), np.zeros(view.size, dtype=np.int64))
        for other, labels in (view.repelling(own) or {}).items():
            if owner_of_group(other) != own:
                for label in labels:
                    yield owner_of_group(other).rsplit("/", 1)[-1], label, view.counts(other)
