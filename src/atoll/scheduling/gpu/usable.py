"""How much of a node's free devices the next instance could use: FGD's measure, cheap enough for every plan.

FGD (Weng et al., USENIX ATC'23; `docs/packing.md`) asks what of the free GPUs is lost to an instance drawn from the expected
workload. Here that workload is fixed, so that the answer depends on the state of the devices alone and is kept. Partitions have
`mig.Table.worth` instead: what could still be made, the larger ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from atoll.model.devices import MILLI, GpuSharing
from atoll.scheduling.gpu.devices import Shape, State

EXPECTED_SHARES = ((250, 0.15), (500, 0.15))
"""Thousandths of a device asked for, and how often that is what comes."""
EXPECTED_WHOLE = ((1, 0.3), (2, 0.15), (4, 0.15), (8, 0.1))
"""Whole devices asked for at once, and how often."""

_BY_SHARES = tuple(sum(often for share, often in EXPECTED_SHARES if free >= share) * free / MILLI for free in range(MILLI + 1))
"""Thousandths of a device that are free → what of them expected shares can use, in devices."""


def usable(state: State) -> float:
    """Return the devices' worth of what is free that the expected instance could use, in devices."""
    total = 0.0
    idle: list[int] = []
    for index, (device, load) in enumerate(zip(state.shape.devices, state.loads, strict=True)):
        if not device.offered or load.sharing is GpuSharing.EXCLUSIVE:
            continue
        if device.mig:
            total += device.table.worth(load.parts)
            continue
        if load.idle:
            idle.append(index)
            continue
        memory = MILLI * (device.memory_bytes - load.memory_bytes) // max(device.memory_bytes, 1)
        free = min(MILLI - load.milli, memory)
        if free > 0:
            total += _BY_SHARES[free]
    if idle:
        together = _together(state.shape, idle) if state.shape.has_nvlink else len(idle)
        total += len(idle) * _BY_SHARES[MILLI] + _by_whole(len(idle), together)
    return total


@lru_cache(maxsize=4096)
def _by_whole(idle: int, together: int) -> float:
    return sum(often * (idle if count == 1 else together) for count, often in EXPECTED_WHOLE if together >= count)


def nearness(state: State, chosen: Sequence[int]) -> float:
    """Return how near `chosen` devices are to each other, from 0 (nothing is known) to 1 (all joined by NVLink)."""
    near, joined = state.shape.nearness, state.shape.joined
    pairs = [(one, other) for place, one in enumerate(chosen) for other in chosen[place + 1 :]]
    if not pairs:
        return 0.0
    return sum(1.0 if joined(*pair) else min(near[pair[0]][pair[1]], 16) / 32 for pair in pairs) / len(pairs)


def _together(shape: Shape, idle: Sequence[int]) -> int:
    """Return how many idle devices one instance could have: the largest set that NVLink joins, or all where there is none."""
    left, most = set(idle), 1
    while left:
        reach = [left.pop()]
        for index in reach:
            more = [other for other in left if shape.joined(index, other)]
            left.difference_update(more)
            reach.extend(more)
        most = max(most, len(reach))
    return most if most > 1 else len(idle)
