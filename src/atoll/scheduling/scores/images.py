"""Nodes that have the images already are a little better: the instance starts without fetching them."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Floats, View


class ImagesThere:
    """The part of the demand's images that a node has said it has. Worth less than to be even over nodes, more than packing."""

    name = "images"
    weight = 5

    def wants(self, demand: Demand) -> bool:
        return bool(demand.images)

    def score(self, view: View, group: str, demand: Demand) -> Floats:
        there = np.zeros(view.size, dtype=np.float64)
        for digest in demand.images:
            there[view.nodes.rows_with_image(digest)] += 1.0
        return there / len(demand.images)
