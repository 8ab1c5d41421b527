"""`placement.regions` in order of preference; `any` stands for all that are not listed."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.filters.regions import ANY
from atoll.scheduling.interface import Floats, View
from atoll.scheduling.snapshot import Ints

_PLACES_MAX = 500
"""Regions told apart, so that the weighted score stays within 64 bits."""


class RegionOrder:
    """0 for the first region, -1 for the second and so on. Its weight is above what spreading can ever add up to."""

    name = "region"
    weight = 10**10

    def wants(self, view: View, demand: Demand) -> bool:
        return len(demand.placement.regions) > 1

    def score(self, view: View, demand: Demand, counts: Ints, rows: Ints, extra: Ints) -> Floats:
        listed = demand.placement.regions
        ids = view.nodes.values("region")
        fallback = listed.index(ANY) if ANY in listed else len(listed)
        places = np.full(len(ids), fallback, dtype=np.int64)
        for place, region in reversed(list(enumerate(listed))):
            if region in ids:
                places[ids[region]] = place
        return -np.minimum(places, _PLACES_MAX)[view.nodes.label("region")[rows]].astype(np.float64)
