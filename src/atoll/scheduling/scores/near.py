"""`placement.near`: the shorter the round trip to what it names, the better. Users spread the instances over sites by a layout."""

from __future__ import annotations

import numpy as np

from atoll.model.spec import SpreadBy
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Floats, View
from atoll.scheduling.near import FAR_MS, by_row, latency_by_site

BESIDE_SPREAD = 0.05
"""What a millisecond counts where instances are spread over sites or regions: among places with equally many, the nearest."""


class Close:
    """Minus the round trip in ms, up to `FAR_MS`. A millisecond outweighs all that is said of single nodes."""

    name = "near"
    weight = 1_000

    def wants(self, demand: Demand) -> bool:
        return demand.placement.near is not None

    def score(self, view: View, group: str, demand: Demand) -> Floats:
        latency = latency_by_site(view, group, demand)
        if latency is None:
            return np.zeros(view.size)
        factor = 1.0 if demand.placement.spread is SpreadBy.NODE else BESIDE_SPREAD
        return by_row(view, -factor * np.minimum(latency, FAR_MS))
