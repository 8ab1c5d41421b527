"""The node must offer a runtime that gives the isolation asked for."""

from __future__ import annotations

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints


class Runtimes:
    name = "runtime"

    def wants(self, demand: Demand) -> bool:
        return True

    def passes(self, view: View, demand: Demand) -> Bools:
        return view.nodes.offers_any(demand.runtimes)

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        offered = sorted({name for row in failed[:1000].tolist() for name in view.nodes.nodes[view.nodes.names[row]].runtimes})
        wanted = " or ".join(demand.runtimes)
        there = ", ".join(offered) or "no runtime"
        return Reason(f"without runtime {wanted}", f"these nodes offer {there}: install {demand.runtimes[0]} or change isolation")
