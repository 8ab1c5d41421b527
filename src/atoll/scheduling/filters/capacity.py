"""Cpu and memory that are free, and a disk that is large enough (its space is limited for each instance, not set aside)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from atoll.model.units import format_bytes
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import CPU, DISK, MEMORY, Bools, Ints, amounts_of


def _cores(milli: int) -> str:
    return f"{milli / 1000:g} cores"


class _Room:
    """What is free of one resource, which instances set aside."""

    def __init__(self, name: str, resource: int, words: Callable[[int], str]) -> None:
        self.name = name
        self._resource = resource
        self._words = words

    def wants(self, demand: Demand) -> bool:
        return amounts_of(demand)[self._resource] > 0

    def room(self, view: View, demand: Demand) -> Ints:
        room: Ints = view.free[self._resource] // amounts_of(demand)[self._resource]
        return room

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        asked = amounts_of(demand)[self._resource]
        free, total = view.free[self._resource][failed], view.nodes.total[self._resource][failed]
        largest = int(total.max())
        if asked > largest:
            return Reason(
                f"too small ({self._words(asked)} of {self.name} asked for, the largest has {self._words(largest)})",
                f"ask for at most {self._words(largest)} of {self.name}, or add a larger node",
            )
        best = _first_by_name(view, failed[free == free.max()])
        short = asked - int(view.free[self._resource][best])
        return Reason(
            f"with too little {self.name} free for {self._words(asked)}",
            f"needs {self._words(short)} more {self.name} on the best node, {view.nodes.names[best]}",
        )


class _DiskSize:
    """The whole disk must hold what one instance may write."""

    name = "disk"

    def wants(self, demand: Demand) -> bool:
        return demand.disk_bytes > 0

    def passes(self, view: View, demand: Demand) -> Bools:
        mask: Bools = view.nodes.total[DISK, : view.size] >= demand.disk_bytes
        return mask

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        largest = format_bytes(int(view.nodes.total[DISK][failed].max()))
        return Reason(
            f"with a disk smaller than {format_bytes(demand.disk_bytes)}",
            f"ask for at most {largest} of disk, the largest there is",
        )


def _first_by_name(view: View, rows: Ints) -> int:
    return int(rows[np.argmin(view.nodes.ranks()[rows])])


CPU_ROOM = _Room("cpu", CPU, _cores)
MEMORY_ROOM = _Room("memory", MEMORY, format_bytes)
DISK_SIZE = _DiskSize()
