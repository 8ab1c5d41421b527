"""Instances of one group away from each other: over sites or regions where asked for, and always over nodes."""

from __future__ import annotations

from atoll.model.spec import SpreadBy
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Floats, View
from atoll.scheduling.near import wants_users
from atoll.scheduling.snapshot import Ints


class SpreadOverNodes:
    """Minus the group's instances on the node."""

    name = "spread"
    weight = 10

    def wants(self, view: View, demand: Demand) -> bool:
        return True

    def score(self, view: View, demand: Demand, counts: Ints, rows: Ints, extra: Ints) -> Floats:
        return -(counts[rows] + extra).astype("float64")


class SpreadOverPlaces:
    """Minus the group's instances in the site or region; before any difference between nodes. With `near = "users"`: whether the
    site has fewer than its layout says, before all but the order of regions."""

    name = "spread-places"
    weight = 100_000
    layout_name = "layout"
    layout_weight = 500_000_000

    def label(self, demand: Demand) -> str | None:
        if wants_users(demand):
            return "site"
        spread = demand.placement.spread
        return None if spread is SpreadBy.NODE else str(spread)

    def score(self, count: int) -> int:
        return -count * self.weight

    def layout_score(self, count: int, wanted: int) -> int:
        return self.layout_weight if count < wanted else 0
