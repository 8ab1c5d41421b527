"""`affinity` to other apps: only where at least one instance of each is."""

from __future__ import annotations

import numpy as np

from atoll.model.spec import Affinity
from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import owner_of_group, owners_named
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.places import at_places, domain_counts
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import Bools, Ints


class Beside(Still):
    name = "affinity"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return any(wish.weight is None for wish in demand.placement.affinity)

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = np.ones(view.size, dtype=np.bool_)
        for wish in demand.placement.affinity:
            if wish.weight is None:
                mask &= _near(view, group, wish)
        return mask

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        hard = [wish for wish in demand.placement.affinity if wish.weight is None]
        wish = max(hard, key=lambda wish: int((~_near(view, group, wish)[failed]).sum()))
        return Reason(f"without {wish.app} on the same {wish.by}", f"start {wish.app} first, or give the affinity a weight")


def _near(view: View, group: str, wish: Affinity) -> Bools:
    owners = owners_named(group, wish.app)
    if owner_of_group(group) in owners:
        return np.ones(view.size, dtype=np.bool_)
    counts = sum((view.owner_counts(owner) for owner in owners), np.zeros(view.size, dtype=np.int64))
    return at_places(view, wish.by, domain_counts(view, wish.by, counts) > 0, absent=False)
