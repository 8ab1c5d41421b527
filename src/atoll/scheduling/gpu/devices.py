"""A node's devices as the scheduler sees them: what they are, whatever their ids, and what is taken of each.

Nodes with equal hardware that is equally taken are in the same state, so that what follows from a state is worked out once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from atoll.model.devices import (
    COMPUTE_SLICES,
    MILLI,
    GpuDevice,
    GpuGrant,
    GpuHealth,
    GpuSharing,
    GpuVendor,
    LinkKind,
)
from atoll.scheduling.gpu.mig import Layout, Table, foreign_part, held_part, table_of, with_part

NEARNESS = {LinkKind.NVLINK: 1000, LinkKind.PIX: 16, LinkKind.PXB: 8, LinkKind.PHB: 4, LinkKind.NODE: 2, LinkKind.SYS: 1}
"""How near two devices are; of NVLink for each link. An order, not a bandwidth."""
_NVLINK = NEARNESS[LinkKind.NVLINK]


class Device(NamedTuple):
    """The facts about a device that matter for who may get it."""

    vendor: GpuVendor
    model: str
    memory_bytes: int
    driver: str
    numa: int
    offered: bool
    mig: bool
    table: Table
    foreign: Layout
    sharing: tuple[GpuSharing, ...]


class Load(NamedTuple):
    """What is taken of a device. More than there is where its holders' grants contradict each other: then nothing is free."""

    milli: int = 0
    memory_bytes: int = 0
    sharing: GpuSharing | None = None
    """How its holders have it; EXCLUSIVE too where they disagree."""
    parts: Layout = ()

    @property
    def idle(self) -> bool:
        return self.sharing is None and not self.parts


class Taken(NamedTuple):
    """A part of a device (by its place on the node) that is given to an instance."""

    place: int
    sharing: GpuSharing
    milli: int
    memory_bytes: int
    profile: str = ""
    start: int = 0
    size: int = 0

    def grant(self, ids: Sequence[str]) -> GpuGrant:
        return GpuGrant(
            device=ids[self.place],
            sharing=self.sharing,
            milli=self.milli,
            memory_bytes=self.memory_bytes,
            profile=self.profile,
            start=self.start,
            size=self.size,
        )


class Shape:
    """The devices of a node, in the order of its record, and how near they are to each other. Compared by identity."""

    def __init__(self, devices: tuple[Device, ...], nearness: tuple[tuple[int, ...], ...]) -> None:
        self.devices = devices
        self.nearness = nearness

    @cached_property
    def bare(self) -> State:
        """Nothing is given away; what others partitioned is taken."""
        return State(self, tuple(Load(parts=device.foreign) for device in self.devices))

    @cached_property
    def has_nvlink(self) -> bool:
        return any(near >= _NVLINK for row in self.nearness for near in row)

    def joined(self, one: int, other: int) -> bool:
        """Whether two devices are joined by NVLink."""
        return self.nearness[one][other] >= _NVLINK


class State(NamedTuple):
    shape: Shape
    loads: tuple[Load, ...]

    def take(self, parts: Iterable[Taken]) -> State:
        """Return the state with `parts` given away too."""
        loads = list(self.loads)
        for part in parts:
            loads[part.place] = _taken(self.shape.devices[part.place], loads[part.place], part)
        return State(self.shape, tuple(loads))


EMPTY = Shape((), ())
"""That of a node without devices."""
ShapeKey = tuple[tuple[Device, ...], tuple[tuple[int, ...], ...]]


def shape_key(devices: Sequence[GpuDevice]) -> ShapeKey:
    """Return what two nodes have in common whose devices are equal but for their ids."""
    facts = _all_facts(devices)
    if not any(device.links for device in devices):
        return facts, ((0,) * len(devices),) * len(devices)
    place = {device.id: index for index, device in enumerate(devices)}
    near = [[0] * len(devices) for _ in devices]
    for index, device in enumerate(devices):
        for link in device.links:
            peer = place.get(link.peer)
            if peer is not None and peer != index:
                value = NEARNESS[link.kind] * (max(link.width, 1) if link.kind is LinkKind.NVLINK else 1)
                near[index][peer] = near[peer][index] = max(near[index][peer], value)
    return facts, tuple(map(tuple, near))


def taken_by(ids: dict[str, int], grants: Iterable[GpuGrant]) -> list[Taken]:
    """Return grants as parts of a node's devices (`ids`: id → place on it). What names a device that is not there is left out."""
    parts = []
    for grant in grants:
        index = ids.get(grant.device)
        if index is not None:
            part = Taken(index, grant.sharing, grant.milli, grant.memory_bytes, grant.profile, grant.start, grant.size)
            parts.append(part)
    return parts


def partition(device: Device, index: int, profile: str, start: int) -> Taken:
    """Return one partition as it is given away."""
    kind = device.table.by_name[profile]
    milli = MILLI * kind.compute_slices // COMPUTE_SLICES
    return Taken(index, GpuSharing.MIG, milli, kind.memory_bytes, profile, start, kind.memory_slices)


def _all_facts(devices: Sequence[GpuDevice]) -> tuple[Device, ...]:
    """Most devices of a node are equal: such share one record, which is made once."""
    facts: list[Device] = []
    last: tuple[object, ...] = ()
    for device in devices:
        what = (
            device.vendor,
            device.model,
            device.memory_bytes,
            device.driver,
            device.numa,
            device.health,
            device.mig,
            device.profiles,
            device.foreign,
            device.sharing,
        )
        facts.append(facts[-1] if what == last else _facts(device))
        last = what
    return tuple(facts)


def _facts(device: GpuDevice) -> Device:
    table = table_of(device.profiles if device.mig else ())
    return Device(
        vendor=device.vendor,
        model=device.model,
        memory_bytes=device.memory_bytes,
        driver=device.driver,
        numa=device.numa,
        offered=device.health is not GpuHealth.QUARANTINED,
        mig=device.mig,
        table=table,
        foreign=tuple(sorted(foreign_part(table, there) for there in device.foreign)),
        sharing=device.sharing,
    )


def _taken(device: Device, load: Load, part: Taken) -> Load:
    agreed = load.sharing in (None, part.sharing) and (part.sharing is GpuSharing.MIG) == device.mig
    parts = load.parts
    if part.sharing is GpuSharing.MIG:
        parts = with_part(parts, held_part(device.table, part.profile, part.start, part.size))
    return Load(
        load.milli + part.milli,
        load.memory_bytes + part.memory_bytes,
        part.sharing if agreed else GpuSharing.EXCLUSIVE,
        parts,
    )
