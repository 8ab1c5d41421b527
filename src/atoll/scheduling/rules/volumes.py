"""Host-local volumes bind an app to the nodes that hold them.

As long as such a node has no instance of the release, the next one goes there and nowhere else, even where that means to wait
for it: a database that came up elsewhere with an empty volume would be worse. A node that nobody knows any more binds nothing, nor
does one that is evacuated with the operator's consent to leave the volumes behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.rules.interface import Bound
from atoll.scheduling.snapshot import Bools, Ints, Standing


class Volumes:
    name = "volume"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return demand.pinned

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        waiting = self._waiting(view, group)
        return waiting if waiting.any() else np.ones(view.size, dtype=np.bool_)

    def bounds(self, view: View, group: str, demand: Demand, fit: Bools) -> Sequence[Bound]:
        waiting = self._waiting(view, group)
        return [_Homes(waiting)] if waiting.any() else []

    def room(self, view: View, group: str, demand: Demand) -> Ints | None:
        return None

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        names = sorted(view.nodes.names[row] for row in np.flatnonzero(self._waiting(view, group)).tolist())
        there = ", ".join(names[:5])
        return Reason(
            f"without the app's volumes, which are on {there}",
            f"bring {there} back, or set placement.follow_volumes = false to begin with empty volumes elsewhere",
        )

    def _waiting(self, view: View, group: str) -> Bools:
        """Return the nodes that hold the volumes and have no instance of the group that can be relied on."""
        owner = owner_of_group(group)
        homes: Bools = view.owner_counts(owner) > 0
        for name in view.nodes.homes.get(owner, ()):
            row = view.nodes.row_of(name)
            if row is not None:
                homes[row] = True
        for name, evacuation in view.nodes.evacuations.items():
            row = view.nodes.row_of(name)
            if row is not None and evacuation.leave_volumes:
                homes[row] = False
        standing = view.nodes.standing[: view.size]
        served = (view.counts(group) > 0) & ((standing == Standing.OPEN) | (standing == Standing.CORDONED))
        waiting: Bools = homes & ~served
        return waiting


class _Homes:
    """One instance for each node that waits, and then wherever there is room."""

    def __init__(self, waiting: Bools) -> None:
        self.of = np.where(waiting, np.arange(len(waiting)), len(waiting))
        self._elsewhere = len(waiting)
        self._waiting = set(np.flatnonzero(waiting).tolist())

    def open(self, place: int) -> bool:
        return place in self._waiting or not self._waiting

    def shut(self, place: int) -> bool:
        return False

    def still(self, count: int) -> Bools | None:
        return None

    def take(self, place: int) -> bool:
        self._waiting.discard(place)
        return not self._waiting
