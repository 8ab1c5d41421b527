"""Cheaper nodes first, where `placement.cost` asks for it. A node's price is its label `price`, in whatever unit all use."""

from __future__ import annotations

import math

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Floats, View

LABEL = "price"
PRICE_MAX = 1e12


class Cheap:
    """Minus the price as a share of the dearest, times `placement.cost`. A node without a price counts as the dearest."""

    name = "cost"
    weight = 20

    def wants(self, demand: Demand) -> bool:
        return demand.placement.cost > 0

    def score(self, view: View, group: str, demand: Demand) -> Floats:
        ids = view.nodes.values(LABEL)
        prices = np.full(len(ids) + 1, np.nan)
        for value, id in ids.items():
            prices[id] = price_of(value)
        # ABSENT is -1: the last one, which is no number.
        by_row = prices[view.nodes.label(LABEL)]
        known = view.nodes.present[: view.size] & np.isfinite(by_row)
        dearest = float(by_row[known].max()) if known.any() else 0.0
        shares = np.where(known, by_row / dearest if dearest else 0.0, 1.0)
        return -demand.placement.cost * shares


def price_of(text: str) -> float:
    """Return the price that a label says; NaN for what is no number from 0 to `PRICE_MAX`."""
    try:
        price = float(text)
    except ValueError:
        return math.nan
    return price if 0 <= price <= PRICE_MAX else math.nan
