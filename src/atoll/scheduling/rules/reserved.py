"""Nodes, or room on them, that are reserved for another project: nothing goes there that is not known to be gone in time."""

from __future__ import annotations

from math import ceil

import numpy as np

from atoll.model.devices import MILLI
from atoll.model.evacuation import in_words
from atoll.model.spec import Gpu
from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import project_of_group
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.reserved import Kept
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import CPU, GPU, MEMORY, Bools, Ints, amounts_of

_NO_LIMIT = np.iinfo(np.int64).max
NAMES_MAX = 3
"""Reservations that a reason names."""


class ReservedNodes(Still):
    name = "reserved"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return bool(view.nodes.reservations) and view.reserved.concerns(project_of_group(group), view.ends_at)

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = self.room(view, group, demand) > 0
        return mask

    def room(self, view: View, group: str, demand: Demand) -> Ints:
        room = np.full(view.size, _NO_LIMIT, dtype=np.int64)
        for kept in self._others(view, group):
            room[kept.rows] = np.minimum(room[kept.rows], _room(view, kept, demand))
        return room

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        there = [kept.reservation for kept in self.holders(view, group, failed)]
        words = [
            f"reserved for project '{held.spec.project}' until {in_words(held.spec.end)}"
            + (f" (from {in_words(held.start)})" if held.start > view.now else "")
            for held in there[:NAMES_MAX]
        ]
        mend = "wait until then, or have an admin remove it: atoll reserve remove " + (there[0].spec.name if there else "NAME")
        if any(held.start > view.now for held in there):
            mend = f"a job whose deadline ends before it begins may run there; or {mend}"
        return Reason("; ".join(words), mend)

    def holders(self, view: View, group: str, rows: Ints) -> list[Kept]:
        """Return the reservations that keep `group` out of any of `rows`."""
        return [kept for kept in self._others(view, group) if np.isin(kept.rows, rows).any()]

    def _others(self, view: View, group: str) -> list[Kept]:
        project = project_of_group(group)
        return [kept for kept in view.reserved.kept if kept.concerns(project, view.ends_at)]


def _room(view: View, kept: Kept, demand: Demand) -> Ints:
    """Return by place in `kept.rows` how many of `demand` leave what is kept."""
    room = np.zeros(len(kept.rows), dtype=np.int64)
    if kept.reservation.spec.whole:
        return room
    room[:] = _NO_LIMIT
    amounts = amounts_of(demand)
    left = np.maximum(kept.left, 0)
    for resource in (CPU, MEMORY):
        if amounts[resource] > 0:
            np.minimum(room, (view.free[resource][kept.rows] - left[resource]) // amounts[resource], out=room)
    if demand.gpu is not None and left[GPU].any():
        # Devices that are idle, whatever is free of shared ones: what is kept are whole devices.
        idle = view.devices.room(Gpu(count=1))[kept.rows]
        spare = idle - -(-left[GPU] // MILLI)
        some = np.where(left[GPU] > 0, np.maximum(spare, 0) // max(1, ceil(demand.gpu.count)), _NO_LIMIT)
        np.minimum(room, some, out=room)
    return np.maximum(room, 0)
