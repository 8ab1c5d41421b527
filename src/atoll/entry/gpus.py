"""Whether this machine has GPUs, and if so its devices. A machine without any loads nothing of what they need."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.model.ports.clock import Clock

if TYPE_CHECKING:
    from atoll.devices.foreign import ForeignDevices
    from atoll.entry.described import DescribedDevices

NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"
"""As they are called on the PCI bus."""
CLASSES = ("0x03", "0x12")
"""Displays, and accelerators without one."""


def vendors(root: Path = Path("/")) -> frozenset[str]:
    """Return the vendors that may have a GPU here: one is on the bus, or NVIDIA's driver is loaded. Reads small files only."""
    on_bus = (device for device in (root / "sys/bus/pci/devices").glob("*") if _text(device / "class").startswith(CLASSES))
    found = {_text(device / "vendor") for device in on_bus} & {NVIDIA, AMD, INTEL}
    return frozenset(found | {NVIDIA} if (root / "proc/driver/nvidia/version").exists() else found)


async def node_devices(
    data: Path, clock: Clock, root: Path = Path("/"), *, nvproxy_driver: str = "", runsc: str = "runsc"
) -> DescribedDevices | None:
    """Return the machine's devices for an agent with this data directory; None, at no cost, where it has none.

    With `nvproxy_driver`, a version that gVisor's proxy knows, the node's own driver counts as known to it.
    """
    if not vendors(root):
        return None
    from atoll.devices.nvidia.presence import driver_version
    from atoll.entry.described import DescribedDevices, drivers
    from atoll.runtimes.nvproxy import gvisor_drivers

    known = await asyncio.to_thread(gvisor_drivers, runsc, data / "runtimes" / "gvisor")

    def known_now() -> frozenset[str]:
        # Read each time: the driver may be replaced, or loaded at all, while the agent runs.
        return known | {driver_version(root)} if nvproxy_driver in known else known

    return DescribedDevices(drivers(clock, root), directory=data, clock=clock, known_to_gvisor=known_now, root=root)


def foreign_devices(allowed: str) -> ForeignDevices | None:
    """Return the devices of CDI specs of the allowed kinds (as `--cdi-devices`); None where none is. Raises Invalid."""
    if not allowed:
        return None
    from atoll.devices.foreign import ForeignDevices, parse_allowed

    return ForeignDevices(parse_allowed(allowed))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
