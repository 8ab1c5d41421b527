"""The devices of this machine over its real drivers, with a CDI spec of each vendor's kept for people and other tools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from atoll.devices.cdi import write_inventory
from atoll.devices.mps import NvidiaMps
from atoll.devices.node import NodeDevices
from atoll.devices.nvidia.hardware import NvidiaHardware
from atoll.devices.passthrough import Passthrough
from atoll.devices.sysfs import AmdHardware, IntelHardware
from atoll.devices.vfio import Vfio
from atoll.entry.gpus import AMD, INTEL, NVIDIA, vendors
from atoll.model.devices import GpuDevice, GpuGrant
from atoll.model.errors import AtollError
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import CDI_DIRECTORY, Edits, Hardware
from atoll.model.spec import GpuCapability

MPS_DIRECTORY = "mps"
VFIO_DIRECTORY = "vfio"
"""Below the agent's data: the drivers that devices of virtual machines had."""

log = structlog.get_logger()


def drivers(clock: Clock, root: Path = Path("/")) -> tuple[Hardware, ...]:
    """Return the drivers of the vendors that have a device here."""
    here = vendors(root)
    found: list[Hardware] = []
    if NVIDIA in here:
        found.append(NvidiaHardware(root=root, clock=clock))
    if AMD in here:
        found.append(AmdHardware(root=root, clock=clock))
    if INTEL in here:
        found.append(IntelHardware(root=root, clock=clock))
    return tuple(found)


class DescribedDevices(NodeDevices):
    """The node's devices, of which a CDI spec for each vendor is kept below the agent's data, for people and other tools.

    `known_to_gvisor` gives the driver versions that count as known to gVisor's proxy, each time that it is asked.
    """

    def __init__(
        self,
        hardware: Sequence[Hardware],
        *,
        directory: Path,
        clock: Clock,
        known_to_gvisor: Callable[[], frozenset[str]],
        root: Path = Path("/"),
    ) -> None:
        super().__init__(
            hardware,
            directory=directory,
            clock=clock,
            mps=NvidiaMps(directory / MPS_DIRECTORY),
            gvisor_drivers=known_to_gvisor,
            passthrough=Passthrough(Vfio(directory / VFIO_DIRECTORY, sysfs=root / "sys"), sysfs=root / "sys"),
        )
        self.known_to_gvisor = known_to_gvisor
        self._hardware = tuple(hardware)
        self._directory = directory / CDI_DIRECTORY
        self._described: tuple[tuple[str, str, bool], ...] = ()

    async def inventory(self) -> tuple[GpuDevice, ...]:
        found = await super().inventory()
        whole = tuple(device for device in found if device.present and device.answers)
        described = tuple((device.id, device.driver, device.mig) for device in whole)
        if described != self._described:
            self._described = described
            await asyncio.to_thread(self._describe, whole)
        return found

    def _describe(self, devices: tuple[GpuDevice, ...]) -> None:
        for hardware in self._hardware:
            try:
                write_inventory(self._directory, hardware.vendor, devices, lambda device, by=hardware: _edits(by, device))  # type: ignore[misc]
            except (AtollError, OSError) as error:
                log.warning("no CDI spec was written", vendor=hardware.vendor.value, error=str(error))


def _edits(hardware: Hardware, device: GpuDevice) -> Edits:
    return hardware.edits([GpuGrant(device=device.id)], (GpuCapability.COMPUTE, GpuCapability.UTILITY), ())
