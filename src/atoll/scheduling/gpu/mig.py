"""Where on a device its MIG partitions go, so that the largest ones stay possible.

A device has as many memory slices as its profiles' places say (eight, or twelve), and at most seven compute slices. A partition
takes a run of memory slices that begins at one of its profile's starts, and some compute slices; it is never moved, so where it
goes decides what still fits beside it.

`Table.best_start` takes the start after which most partitions of the largest profile would still fit, then most of the next,
and so on (`worth` is that order as a number). `mig_measure` says how near this comes to the exact optimum.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from atoll.model.devices import COMPUTE_SLICES, GpuPartition, MigProfile, has_media

LAYOUTS_MAX = 65_536
"""Layouts of one table whose worth is remembered; the seven profiles of one device make 2,319."""


class Part(NamedTuple):
    """A partition on a device, ours or another's."""

    start: int
    size: int
    compute: int
    profile: str


Layout = tuple[Part, ...]
"""The partitions of a device, by start."""


class Table:
    """What a model of device can be partitioned into."""

    def __init__(self, profiles: tuple[MigProfile, ...]) -> None:
        self.profiles = profiles
        self.by_name = {profile.name: profile for profile in profiles}
        self._room: dict[tuple[Layout, str], int] = {}
        self._worth: dict[Layout, float] = {}
        self._full = self._raw_worth(()) or 1.0

    def starts(self, layout: Layout, name: str) -> tuple[int, ...]:
        """Return where a partition of this profile may begin beside those of `layout`; nowhere if it may not be at all."""
        profile = self.by_name.get(name)
        if profile is None:
            return ()
        media = has_media(name)
        taken = compute = same = 0
        for part in layout:
            taken |= _slices(part.start, part.size)
            compute += part.compute
            same += part.profile == name
            if media and has_media(part.profile):
                return ()
        if compute + profile.compute_slices > COMPUTE_SLICES or same >= profile.most:
            return ()
        size = profile.memory_slices
        return tuple(s for s in profile.starts if not taken & _slices(s, size))

    def part(self, name: str, start: int) -> Part:
        profile = self.by_name[name]
        return Part(start, profile.memory_slices, profile.compute_slices, name)

    def room(self, layout: Layout, name: str) -> int:
        """Return how many partitions of this profile would fit beside `layout`, placed as well as can be."""
        known = self._room.get((layout, name))
        if known is None:
            tries = (with_part(layout, self.part(name, start)) for start in self.starts(layout, name))
            known = max((1 + self.room(more, name) for more in tries), default=0)
            if len(self._room) >= LAYOUTS_MAX * len(self.profiles):
                self._room.clear()
            self._room[layout, name] = known
        return known

    def worth(self, layout: Layout) -> float:
        """Return what could still be made, from 0 to 1 (an empty device): how many of each profile, the larger ones first."""
        known = self._worth.get(layout)
        if known is None:
            if len(self._worth) >= LAYOUTS_MAX:
                self._worth.clear()
            known = self._worth[layout] = self._raw_worth(layout) / self._full
        return known

    def best_start(self, layout: Layout, name: str) -> int | None:
        """Return where to put one more; None only where no start is free."""
        starts = self.starts(layout, name)
        return max(starts, key=lambda s: (self.worth(with_part(layout, self.part(name, s))), s), default=None)

    def _raw_worth(self, layout: Layout) -> float:
        return float(sum(self.room(layout, p.name) * p.memory_slices**2 for p in self.profiles))


@lru_cache(maxsize=1024)
def table_of(profiles: tuple[MigProfile, ...]) -> Table:
    """Return the table of these profiles; equal profiles share one, with all that it remembers."""
    return Table(profiles)


def with_part(layout: Layout, part: Part) -> Layout:
    return tuple(sorted((*layout, part)))


def foreign_part(table: Table, partition: GpuPartition) -> Part:
    """Return a partition that someone else made as it counts here. One of an unknown profile counts the compute of its name."""
    return held_part(table, partition.profile, partition.start, partition.size)


def held_part(table: Table, profile: str, start: int, size: int) -> Part:
    known = table.by_name.get(profile)
    if known is not None:
        return Part(start, max(size, known.memory_slices), known.compute_slices, profile)
    return Part(start, size, compute_of(profile), profile)


def compute_of(profile: str) -> int:
    """Return the compute slices that a profile's name says (`3g.40gb`: 3); all where it says none."""
    return int(profile[0]) if profile[:1].isdigit() and profile[1:2] == "g" else COMPUTE_SLICES


def _slices(start: int, size: int) -> int:
    return ((1 << size) - 1) << start
