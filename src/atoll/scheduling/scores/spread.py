"""Instances of one group away from each other: over sites or regions where asked for, and always over nodes."""

from __future__ import annotations

from atoll.model.spec import SpreadBy
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Floats, View
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
    """Minus the group's instances in the site or region; before any difference between nodes."""

    name = "spread-places"
    weight = 100_000

    def label(self, demand: Demand) -> str | None:
        spread = demand.placement.spread
        return None if spread is SpreadBy.NODE else str(spread)

    def score(self, count: int) -> int:
        return -count
