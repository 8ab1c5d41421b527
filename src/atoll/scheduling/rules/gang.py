"""A gang that is `together` goes where those of it that run already are. That it finds one place in the first place is `gangs`."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.places import at_places, domain_counts
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import Bools, Ints, Standing


class Gang(Still):
    name = "together"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return demand.together is not None

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        label = str(demand.together)
        there = domain_counts(view, label, self._counts(view, group))
        return at_places(view, label, (there > 0) | (there.sum() == 0), absent=False)

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        label = str(demand.together)
        if not self._counts(view, group).any():
            return Reason(f"without the label {label}", f"give nodes the label {label}, or change placement.together")
        return Reason(f"not on the {label} where the others are", f"make room on that {label}, or leave placement.together out")

    def _counts(self, view: View, group: str) -> Ints:
        """Return how many each row has; those on lost nodes will be made again, and hold nobody to a place."""
        lost = view.nodes.standing[: view.size] == Standing.LOST
        return np.where(lost, 0, view.owner_counts(owner_of_group(group)))
