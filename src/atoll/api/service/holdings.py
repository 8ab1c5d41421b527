"""What of a node's devices is given away, and to whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from atoll.model.devices import MEMORY_SLICES, MILLI, GpuDevice, GpuGrant, GpuSharing
from atoll.model.records import Instance
from atoll.model.views import GpuHolder, GpuHolding


def holdings_of(
    instances: Iterable[Instance], devices: Iterable[GpuDevice], sees: Callable[[str], bool] = lambda project: True
) -> tuple[GpuHolding, ...]:
    """Return who holds which of a node's `devices`, by device. Those of projects that the caller does not see have no names."""
    slices = {device.id: device.memory_slices for device in devices}
    holders: dict[str, list[GpuHolder]] = defaultdict(list)
    for instance in instances:
        named = sees(instance.project)
        for grant in instance.gpus:
            holder = GpuHolder(instance=instance.id if named else "", project=instance.project if named else "", grant=grant)
            holders[grant.device].append(holder)
    return tuple(_holding(device, holders[device], slices.get(device, MEMORY_SLICES)) for device in sorted(holders))


def _holding(device: str, holders: list[GpuHolder], slices: int) -> GpuHolding:
    return GpuHolding(
        device=device,
        milli=sum(_milli(holder.grant, slices) for holder in holders),
        memory_bytes=sum(holder.grant.memory_bytes for holder in holders),
        holders=tuple(sorted(holders, key=lambda holder: (holder.grant.start, holder.instance))),
    )


def _milli(grant: GpuGrant, slices: int) -> int:
    return grant.size * MILLI // slices if grant.sharing is GpuSharing.MIG else grant.milli
