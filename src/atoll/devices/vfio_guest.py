"""The windows of PCI devices, and how much room of its addresses a virtual machine needs for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

BARS = 6
_IO, _PREFETCH, _MEMORY_64 = 0x100, 0x2000, 0x100000
"""Flags of a resource: kernel source, include/linux/ioport.h."""


class Bar(Struct, frozen=True):
    """A window of the device into the machine's addresses."""

    index: int
    size_bytes: int
    kind: Literal["io", "memory", "memory64"]
    prefetchable: bool


def read_bars(resource: str) -> tuple[Bar, ...]:
    """Return the windows that a device's file `resource` in sysfs tells of: lines of start, end and flags."""
    found = []
    for index, line in enumerate(resource.splitlines()[:BARS]):
        start, end, flags = (int(word, 16) for word in line.split())
        if end <= start:
            continue  # none, or the upper half of the one before
        kind: Literal["io", "memory", "memory64"] = "io" if flags & _IO else "memory64" if flags & _MEMORY_64 else "memory"
        found.append(Bar(index, end - start + 1, kind, bool(flags & _PREFETCH)))
    return tuple(found)


def window_bytes(bars: Sequence[Bar]) -> int:
    """Return how much of its 64-bit addresses a machine must keep for all windows of its devices: a power of two, 0 for none.

    There is room for all of them even where those of each device begin at a multiple of its largest.
    """
    total = sum(bar.size_bytes for bar in bars if bar.kind == "memory64")
    return 1 << (2 * total - 1).bit_length() if total else 0
