"""Wishes to be beside other apps, or away from them: `affinity` and `anti_affinity` with a weight."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import owner_of_group, owners_named
from atoll.scheduling.interface import Floats, View
from atoll.scheduling.places import at_places, domain_counts


class Near:
    """The weights of the apps that are there and wished for, minus those that are there and not wished for.

    An app's wish to keep away from itself is what spreading does already; here only what is there before the class counts.
    """

    name = "affinity"
    weight = 20

    def wants(self, demand: Demand) -> bool:
        placement = demand.placement
        return any(wish.weight is not None for wish in (*placement.affinity, *placement.anti_affinity))

    def score(self, view: View, group: str, demand: Demand) -> Floats:
        total = np.zeros(view.size, dtype=np.float64)
        for sign, wishes in ((1, demand.placement.affinity), (-1, demand.placement.anti_affinity)):
            for wish in wishes:
                owners = owners_named(group, wish.app)
                if wish.weight is None or owner_of_group(group) in owners:
                    continue
                counts = sum((view.owner_counts(owner) for owner in owners), np.zeros(view.size, dtype=np.int64))
                total += sign * wish.weight * at_places(view, wish.by, domain_counts(view, wish.by, counts) > 0, absent=False)
        return total
