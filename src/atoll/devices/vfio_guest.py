"""What a virtual machine is told about the PCI devices that it gets, and how much room of its addresses they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

BARS = 6
_IO, _PREFETCH, _MEMORY_64 = 0x100, 0x2000, 0x100000
"""Flags of a resource: kernel source, include/linux/ioport.h."""
_QEMU_HOLE_BYTES = 32 << 30
"""What QEMU's q35 keeps for 64-bit windows when it is told nothing."""


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


def qemu_arguments(addresses: Sequence[str], bars: Sequence[Bar] = ()) -> list[str]:
    """Return what QEMU's q35 is given for the devices, each behind a root port of its own. `bars` are those of all of them.

    Where they are larger than what q35 keeps free, its window is widened, and a firmware of EDK II is told so.
    """
    arguments: list[str] = []
    window = _window_bytes(bars)
    if window > _QEMU_HOLE_BYTES:
        arguments += ["-global", f"q35-pcihost.pci-hole64-size={window}"]
        arguments += ["-fw_cfg", f"name=opt/ovmf/X-PciMmio64Mb,string={window >> 20}"]
    for at, address in enumerate(addresses):
        arguments += ["-device", f"pcie-root-port,id=gpu{at},bus=pcie.0,chassis={at + 1}"]
        arguments += ["-device", f"vfio-pci,host={address},bus=gpu{at}"]
    return arguments


def cloud_hypervisor_arguments(addresses: Sequence[str], sysfs: Path = Path("/sys")) -> list[str]:
    """Return what Cloud Hypervisor is given for the devices."""
    arguments: list[str] = []
    for address in addresses:
        arguments += ["--device", f"path={sysfs / 'bus/pci/devices' / address}/"]
    return arguments


def _window_bytes(bars: Sequence[Bar]) -> int:
    """Return a power of two with room for all windows, even where those of each device begin at a multiple of its largest."""
    total = sum(bar.size_bytes for bar in bars if bar.kind == "memory64")
    return 1 << (2 * total - 1).bit_length() if total else 0
