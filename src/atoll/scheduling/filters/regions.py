"""`regions = ["weur", "any"]`: the listed ones, or all where `any` is among them. The order is a score's matter."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints

ANY = "any"


class Regions:
    name = "region"

    def wants(self, demand: Demand) -> bool:
        return bool(demand.placement.regions) and ANY not in demand.placement.regions

    def passes(self, view: View, demand: Demand) -> Bools:
        ids = view.nodes.values("region")
        wanted = [ids[region] for region in demand.placement.regions if region in ids]
        return np.isin(view.nodes.label("region"), wanted)

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        there = sorted({view.nodes.nodes[view.nodes.names[row]].region for row in failed[:1000].tolist()})
        asked = ", ".join(demand.placement.regions)
        return Reason(f"not in region {asked}", f"there are nodes in {', '.join(there[:10])}; add one of these or 'any'")
