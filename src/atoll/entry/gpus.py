"""Whether this machine has GPUs, and if so its devices. A machine without any loads nothing of what they need."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.model.ports.clock import Clock

if TYPE_CHECKING:
    from atoll.entry.described import DescribedDevices

VENDOR_IDS = frozenset({"0x10de", "0x1002", "0x8086"})
"""NVIDIA, AMD, Intel on the PCI bus."""
DISPLAY_CLASS = "0x03"


def has_gpu(root: Path = Path("/")) -> bool:
    """Return whether a GPU may be here: a vendor's device is on the bus, or NVIDIA's driver is loaded. Reads small files only."""
    return (root / "proc/driver/nvidia/version").exists() or any(
        _text(device / "vendor") in VENDOR_IDS and _text(device / "class").startswith(DISPLAY_CLASS)
        for device in (root / "sys/bus/pci/devices").glob("*")
    )


async def node_devices(data: Path, clock: Clock, root: Path = Path("/")) -> DescribedDevices | None:
    """Return the machine's devices for an agent with this data directory; None, at no cost, where it has none."""
    if not has_gpu(root):
        return None
    from atoll.entry.described import DescribedDevices, drivers
    from atoll.runtimes.nvproxy import gvisor_drivers

    known = await asyncio.to_thread(gvisor_drivers, "runsc", data / "runtimes" / "gvisor")
    return DescribedDevices(drivers(clock, root), directory=data, clock=clock, known_to_gvisor=known)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
