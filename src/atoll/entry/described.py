"""The devices of this machine over its real drivers, with a CDI spec of each vendor's kept for people and other tools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from atoll.devices.cdi import make_spec, spec_path, write_spec
from atoll.devices.mps import NvidiaMps
from atoll.devices.node import NodeDevices
from atoll.devices.nvidia.hardware import NvidiaHardware
from atoll.model.devices import GpuDevice, GpuGrant
from atoll.model.errors import AtollError
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import CDI_DIRECTORY, Edits, Hardware
from atoll.model.spec import GpuCapability

MPS_DIRECTORY = "mps"

log = structlog.get_logger()


def drivers(clock: Clock, root: Path = Path("/")) -> tuple[Hardware, ...]:
    """Return the drivers of every vendor that is known; one whose devices are not here costs nothing."""
    return (NvidiaHardware(root=root, clock=clock),)


class DescribedDevices(NodeDevices):
    """The node's devices, of which a CDI spec for each vendor is kept below the agent's data, for people and other tools."""

    def __init__(self, hardware: Sequence[Hardware], *, directory: Path, clock: Clock, known_to_gvisor: frozenset[str]) -> None:
        mps = NvidiaMps(directory / MPS_DIRECTORY)
        super().__init__(hardware, directory=directory, clock=clock, mps=mps, gvisor_drivers=lambda: known_to_gvisor)
        self._hardware = tuple(hardware)
        self._directory = directory / CDI_DIRECTORY
        self._described: tuple[tuple[str, str], ...] = ()

    async def inventory(self) -> tuple[GpuDevice, ...]:
        found = await super().inventory()
        whole = tuple(device for device in found if device.present and device.answers and not device.mig)
        described = tuple((device.id, device.driver) for device in whole)
        if described != self._described:
            self._described = described
            await asyncio.to_thread(self._describe, whole)
        return found

    def _describe(self, devices: tuple[GpuDevice, ...]) -> None:
        for hardware in self._hardware:
            mine = [device.id for device in devices if device.vendor is hardware.vendor]
            try:
                if not mine:
                    spec_path(self._directory, f"{hardware.vendor}.com/gpu").unlink(missing_ok=True)
                else:
                    write_spec(self._directory, make_spec(f"{hardware.vendor}.com/gpu", {id: _edits(hardware, id) for id in mine}))
            except (AtollError, OSError) as error:
                log.warning("no CDI spec was written", vendor=hardware.vendor.value, error=str(error))


def _edits(hardware: Hardware, device: str) -> Edits:
    return hardware.edits([GpuGrant(device=device)], (GpuCapability.COMPUTE, GpuCapability.UTILITY), ())
