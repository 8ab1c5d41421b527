"""The rules by which a device is cut into partitions (MIG), for the fake: no two overlap on the eight memory slices, their compute
slices are seven at most, of each kind there are only so many, and one alone has the media engines (`+me`)."""

from __future__ import annotations

import csv
import functools
import uuid
from collections.abc import Iterable
from pathlib import Path

from atoll.model.devices import COMPUTE_SLICES, MEMORY_SLICES, GpuPartition, MigProfile, has_media
from atoll.model.errors import Conflict, Invalid

TABLE = Path(__file__).parent / "data" / "mig_profiles.csv"
_DRIVER_SIXTEENTHS = 1
"""Sixteenths of a slice's memory that the driver keeps."""
_NAMESPACE = uuid.UUID("6c1b2f0e-3f52-4f3e-9a52-0d3f5f1f7a11")


@functools.cache
def _rows() -> tuple[dict[str, str], ...]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def mig_models() -> tuple[str, ...]:
    """Return the names of the devices in the table, in its order."""
    return tuple(dict.fromkeys(row["gpu"] for row in _rows()))


@functools.cache
def profiles_of(gpu: str, memory_bytes: int) -> tuple[MigProfile, ...]:
    """Return the kinds of partition that `gpu` (a name of `mig_models`) offers; none for one that is not in the table."""
    slice_bytes = memory_bytes // MEMORY_SLICES * (16 - _DRIVER_SIXTEENTHS) // 16
    return tuple(
        MigProfile(
            name=row["profile"],
            compute_slices=int(row["compute_slices"]),
            memory_slices=int(row["memory_slices"]),
            memory_bytes=int(row["memory_slices"]) * slice_bytes,
            starts=tuple(int(start) for start in row["memory_slice_starts"].split()),
            most=int(row["max_instances"]),
        )
        for row in _rows()
        if row["gpu"] == gpu
    )


def obstacle(profiles: Iterable[MigProfile], existing: Iterable[GpuPartition], profile: MigProfile, start: int) -> str:
    """Return what stands in the way of one more partition; nothing where it fits."""
    by_name = {kind.name: kind for kind in profiles}
    there = list(existing)
    taken = [other for other in there if start < other.start + other.size and other.start < start + profile.memory_slices]
    if taken:
        names = ", ".join(f"{other.profile} at {other.start}" for other in taken)
        return f"slices {start} to {start + profile.memory_slices - 1} are taken by {names}"
    used = sum(by_name[other.profile].compute_slices for other in there)
    if used + profile.compute_slices > COMPUTE_SLICES:
        return f"{used} of {COMPUTE_SLICES} compute slices are taken, and {profile.name} needs {profile.compute_slices}"
    if sum(other.profile == profile.name for other in there) >= profile.most:
        return f"there are {profile.most} of {profile.name} already, which is the most"
    if has_media(profile.name) and any(has_media(other.profile) for other in there):
        return "another partition has the media engines"
    return ""


class MigBoard:
    """The partitions of one device."""

    def __init__(self, device: str, profiles: tuple[MigProfile, ...]) -> None:
        self._device = device
        self.profiles = profiles
        self._by_start: dict[int, GpuPartition] = {}

    def partitions(self) -> tuple[GpuPartition, ...]:
        return tuple(self._by_start[start] for start in sorted(self._by_start))

    def make(self, name: str, start: int, *, half: bool = False) -> GpuPartition:
        """Make it, or return it if it is there; `half` leaves it without what makes it usable. Raises Invalid, Conflict."""
        profile = next((kind for kind in self.profiles if kind.name == name), None)
        if profile is None:
            names = ", ".join(kind.name for kind in self.profiles)
            raise Invalid(f"{self._device} has no profile {name}", mend=f"it has {names}", field="profile")
        if start not in profile.starts:
            starts = ", ".join(map(str, profile.starts))
            raise Invalid(f"{name} cannot begin at {start}", mend=f"it can at {starts}", field="start")
        old = self._by_start.get(start)
        if old is not None and old.profile == name and old.id:
            return old
        reason = obstacle(self.profiles, self._by_start.values(), profile, start)
        if reason:
            raise Conflict(f"{name} at {start} of {self._device}: {reason}")
        # a device gives the same name to the same partition each time it is made
        id = "" if half else f"MIG-{uuid.uuid5(_NAMESPACE, f'{self._device}/{name}/{start}')}"
        made = GpuPartition(id=id, profile=name, start=start, size=profile.memory_slices)
        self._by_start[start] = made
        return made

    def remove(self, start: int) -> None:
        self._by_start.pop(start, None)

    def clear(self) -> None:
        self._by_start.clear()
