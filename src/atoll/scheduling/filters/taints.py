"""A taint keeps instances off a node, but for those that tolerate it (`model.labels.tolerated`)."""

from __future__ import annotations

import numpy as np

from atoll.model.labels import ALL, tolerated
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints


class Taints:
    name = "taint"

    def wants(self, demand: Demand) -> bool:
        return ALL not in demand.placement.tolerations

    def passes(self, view: View, demand: Demand) -> Bools:
        mask: Bools = np.ones(view.size, dtype=np.bool_)
        for taint, column in view.nodes.taints.items():
            if not tolerated(taint, demand.placement.tolerations):
                mask &= ~column[: view.size]
        return mask

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        found = sorted(
            taint
            for taint, column in view.nodes.taints.items()
            if column[failed].any() and not tolerated(taint, demand.placement.tolerations)
        )
        first = ", ".join(found[:5])
        return Reason(f"tainted {first}", f"add {found[0]!r} to placement.tolerations" if found else "")
