"""What `atoll doctor` says of GPUs: driver, libraries, devices, and which runtime can hand them on. Changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

from atoll.entry.findings import Finding, Level, Part
from atoll.entry.gpus import vendors
from atoll.model.devices import GpuDevice, GpuHealth, GpuVendor
from atoll.model.errors import AtollError
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.devices import DeviceEvent, Hardware, Trouble
from atoll.model.ports.runtime import Feature
from atoll.model.spec import GpuCapability, RuntimeName
from atoll.model.units import format_bytes

AREA = "gpus"
LOOK_S = 30.0
"""How long the drivers may take in all: one that is not used keeps its devices asleep, and wakes each to be asked."""
NEWS_S = 0.1
"""How long is waited for a driver's own word on why it does not answer."""

Seen = tuple[tuple[GpuDevice, ...], dict[RuntimeName, str], str]
"""Devices, runtime → why it cannot hand them on, and why the driver does not answer."""


def gpus(root: Path = Path("/"), hardware: Callable[[], Sequence[Hardware]] | None = None) -> Iterator[Finding]:
    """Yield what there is to say. Blocking; `hardware` gives the drivers, those of this machine where it is absent."""
    from atoll.devices.drm import DrmHardware

    any_part = Part(AREA, "GPUs", "work that asks for one is placed here")
    if hardware is None:
        if not vendors(root):
            yield any_part(Level.OK, "none on this machine")
            return
        from atoll.entry.described import drivers

        found = drivers(SystemClock(), root)
    else:
        found = tuple(hardware())
    withheld = [each for one in found if isinstance(one, DrmHardware) for each in one.withheld()]
    for place, why in withheld:
        yield Part(AREA, place, "drives a display")(Level.OK, f"not offered: {why}")
    devices, refusals, silent = asyncio.run(_look(found, root))
    if silent:
        yield Part(AREA, "driver", "devices are asked through it")(
            Level.MISSING, silent, "see the kernel's log, and whether driver and library are of one version"
        )
    elif not devices and not withheld:
        mend = "install or load the vendor's driver; optional"
        yield any_part(Level.DEGRADED, "one is on the bus, and no driver offers it", mend)
    if not devices:
        return
    yield from _drivers(devices)
    if any(device.vendor is GpuVendor.NVIDIA for device in devices):
        yield _libraries(root)
    yield from (_device(device) for device in devices)
    for runtime, why in refusals.items():
        part = Part(AREA, f"with {runtime}", "instances of this runtime get GPUs")
        yield part(Level.OK, "can hand them on") if not why else part(Level.DEGRADED, why, "use another runtime for work with GPUs")


async def _look(hardware: Sequence[Hardware], root: Path) -> Seen:
    from atoll.devices.node import NodeDevices
    from atoll.devices.passthrough import Passthrough
    from atoll.devices.vfio import Vfio
    from atoll.runtimes.nvproxy import gvisor_drivers
    from atoll.runtimes.offer import having

    known = await asyncio.to_thread(gvisor_drivers)
    with tempfile.TemporaryDirectory(prefix="atoll-doctor-") as scratch:
        passthrough = Passthrough(Vfio(Path(scratch) / "vfio", sysfs=root / "sys"), sysfs=root / "sys")
        node = NodeDevices(
            hardware, directory=Path(scratch), clock=SystemClock(), gvisor_drivers=lambda: known, passthrough=passthrough
        )
        silent = ""
        try:
            async with asyncio.timeout(LOOK_S):
                devices = await node.inventory()
            if not devices:
                silent = await _silence(node.events())
        except TimeoutError:
            devices, silent = (), f"no answer within {LOOK_S:g} s"
        except AtollError as error:
            devices, silent = (), str(error)
        refusals = {runtime: node.offers(runtime) for runtime in having(Feature.GPU)} if devices else {}
        await node.close()
    return devices, refusals, silent


async def _silence(events: AsyncIterator[DeviceEvent]) -> str:
    """Return why a driver that was asked gave no answer, where it said so."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(NEWS_S):
            async for event in events:
                if event.trouble is Trouble.SILENT:
                    return event.message
    return ""


def _drivers(devices: Sequence[GpuDevice]) -> Iterator[Finding]:
    part = Part(AREA, "driver", "devices are asked through it")
    for vendor, driver, cuda in sorted({(device.vendor, device.driver, device.cuda) for device in devices}):
        yield part(Level.OK, f"{vendor} {driver or 'of unknown version'}" + (f", CUDA {cuda}" if cuda else ""))


def _libraries(root: Path) -> Finding:
    from atoll.devices.libraries import driver_files

    part = Part(AREA, "libraries", "instances see the driver's own, in its version")
    try:
        files = driver_files((GpuCapability.COMPUTE, GpuCapability.UTILITY), root)
    except AtollError as error:
        return part(Level.MISSING, str(error), error.mend or "install the driver's user-space libraries")
    return part(Level.OK, f"{len(files.mounts)} files of {files.version}")


def _device(device: GpuDevice) -> Finding:
    part = Part(AREA, device.pci or device.id, "offered to instances")
    words = [device.model, format_bytes(device.memory_bytes), device.id]
    if device.mig:
        words.append(f"in MIG mode: {', '.join(profile.name for profile in device.profiles)}")
    if device.ecc_errors or device.remapped_rows:
        words.append(f"{device.ecc_errors} uncorrected memory errors, {device.remapped_rows} rows remapped")
    if device.reason:
        words.append(f"{device.health}: {device.reason}")
    level = {GpuHealth.OK: Level.OK, GpuHealth.DEGRADED: Level.DEGRADED, GpuHealth.QUARANTINED: Level.MISSING}[device.health]
    return part(level, ", ".join(words), "reset it or have it replaced; the kernel's log has more")
