"""Fuller nodes first, so that large instances still find room (best fit, as Nomad's bin packing)."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Floats, View
from atoll.scheduling.snapshot import CPU, MEMORY, Ints, amounts_of


class Packing:
    """The mean share of cpu and memory in use once the instance is there, 0 to 1."""

    name = "packing"
    weight = 1

    def wants(self, view: View, demand: Demand) -> bool:
        return True

    def score(self, view: View, demand: Demand, counts: Ints, rows: Ints, extra: Ints) -> Floats:
        amounts = amounts_of(demand)
        share = np.zeros(len(rows), dtype=np.float64)
        for resource in (CPU, MEMORY):
            total = np.maximum(view.nodes.total[resource][rows], 1)
            left = view.free[resource][rows] - (extra + 1) * amounts[resource]
            share += 1.0 - left / total
        return share / 2.0
