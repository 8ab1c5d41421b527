"""Taints that are wishes: such a node is taken when the others are full, or to be nearer by 50 ms."""

from __future__ import annotations

import numpy as np

from atoll.model.labels import ALL, tolerated
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Floats, View
from atoll.scheduling.snapshot import Ints


class ShunsTainted:
    """Minus one for each such taint of the node that is not tolerated."""

    name = "taint-shunned"
    weight = 50_000

    def wants(self, view: View, demand: Demand) -> bool:
        return bool(view.nodes.shunned) and ALL not in demand.placement.tolerations

    def score(self, view: View, demand: Demand, counts: Ints, rows: Ints, extra: Ints) -> Floats:
        score = np.zeros(len(rows), dtype=np.float64)
        for taint, column in view.nodes.shunned.items():
            if not tolerated(taint, demand.placement.tolerations):
                score -= column[rows]
        return score
