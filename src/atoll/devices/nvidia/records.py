"""What a worker answers, as records and errors of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from atoll.devices.nvidia import presence
from atoll.model.devices import GpuDevice, GpuHealth, GpuLink, GpuSharing, GpuVendor, LinkKind, MigProfile
from atoll.model.errors import AtollError, Conflict, Invalid, NotFound, Unavailable, Unsupported


class Code:
    """NVML's errors (nvmlReturn_t) that have an answer of their own here."""

    NO_PERMISSION = 4
    DRIVER_NOT_LOADED = 9
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    IN_USE = 19


_RECOVERY = {
    1: "it must be reset",
    2: "the node must be restarted",
    3: "its peers must be drained",
    4: "it must be drained and reset",
    5: "its IMEX domain must be recovered",
    6: "its bus must be reset",
    7: "the system must be restarted",
}
"""nvmlDeviceGpuRecoveryAction_t."""
_DRAIN_P2P = 3


class _Link(Struct):
    peer: str
    kind: LinkKind
    width: int


class _Profile(Struct):
    name: str
    compute_slices: int
    memory_slices: int
    memory_bytes: int
    starts: tuple[int, ...]
    most: int


class _Device(Struct):
    id: str
    model: str
    pci: str
    memory_bytes: int
    compute_capability: str
    minor: int
    mig: bool
    profiles: list[_Profile]
    links: list[_Link]
    ecc: bool | None
    ecc_errors: int
    remapped: tuple[int, int, int, int]
    """Correctable, uncorrectable, pending, failure."""
    recovery: int
    fabric: str
    failure: str


class _Discovery(Struct):
    driver: str
    cuda: str
    devices: list[_Device]
    lost: int
    unreadable: list[str]


def devices_of(answer: Any, root: Path) -> tuple[GpuDevice, ...]:
    """Return the devices of a `discover`, with what sysfs below `root` adds."""
    found = msgspec.convert(answer, _Discovery)
    return tuple(_device(device, found, root) for device in found.devices)


def _device(device: _Device, found: _Discovery, root: Path) -> GpuDevice:
    health, reason = health_of(device)
    numa, cpus = presence.near(root, device.pci)
    correctable, uncorrectable, pending, failed = device.remapped
    return GpuDevice(
        id=device.id,
        model=device.model,
        memory_bytes=device.memory_bytes,
        vendor=GpuVendor.NVIDIA,
        compute_capability=device.compute_capability,
        driver=found.driver,
        cuda=found.cuda,
        pci=device.pci,
        minor=device.minor,
        numa=numa,
        cpus=cpus,
        links=tuple(GpuLink(peer=link.peer, kind=link.kind, width=link.width) for link in device.links),
        fabric=device.fabric,
        mig=device.mig,
        profiles=tuple(
            MigProfile(
                name=profile.name,
                compute_slices=profile.compute_slices,
                memory_slices=profile.memory_slices,
                memory_bytes=profile.memory_bytes,
                starts=profile.starts,
                most=profile.most,
            )
            for profile in device.profiles
        ),
        sharing=(GpuSharing.MIG,) if device.mig else (GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE),
        ecc=device.ecc,
        ecc_errors=device.ecc_errors,
        remapped_rows=correctable + uncorrectable,
        remap_pending=bool(pending),
        remap_failed=bool(failed),
        health=health,
        reason=reason,
    )


def health_of(device: _Device) -> tuple[GpuHealth, str]:
    """Return health and reason as the counters alone tell: the worst first.

    A row that failed to be remapped, or waits to be after an uncorrectable error, takes the device away (NVIDIA's guide to GPU
    memory error management); one that waits after correctable errors only wants a reset at the next chance.
    """
    _, uncorrectable, pending, failed = device.remapped
    if failed:
        return GpuHealth.QUARANTINED, "bad rows of memory could not be remapped: have the GPU replaced"
    if device.failure:
        return GpuHealth.QUARANTINED, f"it does not answer its driver: {device.failure}"
    if device.recovery and device.recovery != _DRAIN_P2P:
        return GpuHealth.QUARANTINED, f"the driver says that {_RECOVERY.get(device.recovery, 'it must be recovered')}"
    if pending and uncorrectable:
        return GpuHealth.QUARANTINED, "rows of memory with uncorrectable errors wait for a reset to be remapped"
    if pending:
        return GpuHealth.DEGRADED, "rows of memory wait for a reset to be remapped"
    if device.recovery == _DRAIN_P2P:
        return GpuHealth.DEGRADED, f"the driver says that {_RECOVERY[_DRAIN_P2P]}"
    if device.ecc_errors:
        return GpuHealth.DEGRADED, f"{device.ecc_errors} uncorrected memory errors since the driver was loaded"
    return GpuHealth.OK, ""


def error_of(error: dict[str, Any], root: Path) -> AtollError:
    """Return the error that a worker's answer stands for."""
    if error["kind"] != "nvml":
        kinds = {cls.code: cls for cls in (Invalid, NotFound, Conflict, Unsupported)}
        return kinds.get(error["kind"], Unavailable)(error["message"], mend=error.get("mend"))
    kernel = presence.driver_version(root)
    match error["code"]:
        case Code.LIB_RM_VERSION_MISMATCH:
            return mismatch(kernel, error["library"])
        case Code.DRIVER_NOT_LOADED:
            return driver_not_loaded()
        case Code.LIBRARY_NOT_FOUND:
            return library_missing(kernel)
        case Code.NO_PERMISSION:
            return Unavailable(
                f"NVIDIA's driver does not let this user do that ({error['function']})", mend="run the agent as root"
            )
        case Code.FUNCTION_NOT_FOUND:
            return Unsupported(f"NVIDIA's driver {kernel} is too old: it has no {error['function']}", mend="update the driver")
        case Code.GPU_IS_LOST:
            return Unavailable("the GPU has fallen off the bus", mend="restart the node; if it comes again, have the GPU checked")
        case Code.RESET_REQUIRED:
            return Unavailable("the GPU must be reset before it can be used", mend="nvidia-smi --gpu-reset, when nothing uses it")
        case Code.IN_USE:
            return Conflict("the GPU is in use", mend="end what uses it")
    return Unavailable(f"NVIDIA's driver says to {error['function'] or 'the request'}: {error['words']}")


def mismatch(kernel: str, library: str) -> Unavailable:
    found = re.search(r"\.so\.(\d[\d.]*)$", str(Path(library).resolve()) if library else "")
    which = f" is {found[1]}" if found and "." in found[1] else " is of another version"
    return Unavailable(
        f"NVIDIA's kernel driver is {kernel or 'unknown'}, but its library (libnvidia-ml){which}: they must be the same",
        mend="restart the node, or unload and load the driver's kernel modules, so that what is installed is what runs",
    )


def driver_not_loaded() -> Unavailable:
    return Unavailable(
        "NVIDIA's kernel driver is not loaded, though its library is installed",
        mend="modprobe nvidia, and see the kernel's log for why it was not",
    )


def library_missing(kernel: str) -> Unavailable:
    which = f" {kernel}" if kernel else ""
    return Unavailable(
        f"NVIDIA's kernel driver{which} is loaded, but its library {presence.LIBRARY} is not found",
        mend="install the driver's user-space libraries of the same version, or run ldconfig for the directory that has them",
    )
