"""What an instance asks for of GPUs."""

from __future__ import annotations

import enum
import re
from typing import Annotated

from msgspec import Meta

from atoll.model.devices import GpuSharing, GpuVendor
from atoll.model.errors import Invalid
from atoll.model.names import SpecRecord
from atoll.model.spec.isolation import RuntimeName
from atoll.model.units import Bytes

PROFILE_PATTERN = r"[1-7]g\.[1-9][0-9]{0,3}gb([+-][a-z.]{1,12})?"
DRIVER_PATTERN = r"[0-9]{1,4}(\.[0-9]{1,4}){0,2}"
SHARE_BYTES_MIN = 1 << 20
"""A share of no memory would be one without a limit."""
GPU_RUNTIMES = (
    RuntimeName.RUNC,
    RuntimeName.CRUN,
    RuntimeName.GVISOR,
    RuntimeName.LXC,
    RuntimeName.CLOUD_HYPERVISOR,
    RuntimeName.QEMU,
)
"""Runtimes that can hand a GPU on at all; whether a node's own can is found out there (`Capacity.gpu_refusals`)."""


class GpuCapability(enum.StrEnum):
    """A class of the driver's libraries that the instance gets to see."""

    COMPUTE = "compute"
    UTILITY = "utility"
    """`nvidia-smi` and the management library."""
    GRAPHICS = "graphics"
    VIDEO = "video"


class GpuTopology(enum.StrEnum):
    """How near the devices of one instance must be to each other."""

    ANY = "any"
    NUMA = "numa"
    """All on one NUMA node."""
    NVLINK = "nvlink"
    """Every two of them joined by NVLink."""


class Gpu(SpecRecord, frozen=True, kw_only=True):
    """What each instance gets of GPUs: whole devices (`count`), a share of one (`count` below 1), or MIG partitions (`profile`)."""

    model: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    """Words of the device's name, whatever their case: `H100` is found in `NVIDIA H100 80GB HBM3`."""
    vendor: GpuVendor | None = None
    count: Annotated[float, Meta(gt=0, le=64)] = 1
    """Whole devices, or below 1 a share of one device's compute (and of its memory unless `memory` says otherwise)."""
    memory: Bytes | None = None
    """Of whole devices and partitions: what each must have at least. Of a share: what is set aside for it."""
    profile: Annotated[str, Meta(max_length=32)] | None = None
    """A MIG partition such as `1g.10gb`; `count` of them, each on a device in MIG mode."""
    sharing: GpuSharing | None = None
    """How a share is held to its size: `time-slice` (where absent) or `mps`."""
    topology: GpuTopology = GpuTopology.ANY
    driver: Annotated[str, Meta(max_length=32)] | None = None
    """The oldest version of the driver that will do."""
    capabilities: tuple[GpuCapability, ...] = (GpuCapability.COMPUTE, GpuCapability.UTILITY)


def gpu_runtimes(gpu: Gpu, runtimes: tuple[RuntimeName, ...]) -> tuple[RuntimeName, ...]:
    """Return those of `runtimes` that can hand on what is asked for on some node, in their order."""
    return tuple(name for name in runtimes if name in GPU_RUNTIMES and _refusal(name, gpu) is None)


def _refusal(runtime: RuntimeName, gpu: Gpu) -> tuple[str, str] | None:
    """Return the field that `runtime` cannot do on any node, and why; None where it can."""
    match runtime:
        case RuntimeName.CLOUD_HYPERVISOR | RuntimeName.QEMU:
            why = "a virtual machine gets whole devices only"
            if gpu.profile is not None:
                return "profile", why
            return ("count", why) if gpu.count < 1 else None
        case RuntimeName.GVISOR:
            if gpu.profile is not None:
                return "profile", "gVisor hands on no partitions (MIG)"
            if gpu.sharing is GpuSharing.MPS:
                return "sharing", "gVisor hands on no device that is shared by MPS"
            if gpu.vendor not in (None, GpuVendor.NVIDIA):
                return "vendor", "gVisor hands on devices of NVIDIA only"
            return None
        case _:
            return None


def check_gpu(gpu: Gpu, runtimes: tuple[RuntimeName, ...]) -> None:
    """Raise Invalid for a wish that contradicts itself, or that none of `runtimes` could grant."""
    where = "resources.gpu"
    if gpu.profile is not None and re.fullmatch(PROFILE_PATTERN, gpu.profile) is None:
        raise Invalid(
            f"{where}.profile: {gpu.profile!r} is no MIG partition",
            field=f"{where}.profile",
            mend="write slices and memory, as in 1g.10gb or 3g.40gb; `atoll nodes show NODE` lists those of a node",
        )
    if gpu.driver is not None and re.fullmatch(DRIVER_PATTERN, gpu.driver) is None:
        raise Invalid(
            f"{where}.driver: {gpu.driver!r} is no version of a driver",
            field=f"{where}.driver",
            mend="write the oldest that will do, as in 550 or 550.54.15",
        )
    if gpu.memory is not None and gpu.memory < SHARE_BYTES_MIN:
        raise Invalid(f"{where}.memory: below 1MiB nothing runs", field=f"{where}.memory", mend="ask for more, or leave it out")
    if gpu.count > 1 and gpu.count != int(gpu.count):
        raise Invalid(
            f"{where}.count: {gpu.count:g} is neither a whole number nor below 1",
            field=f"{where}.count",
            mend="a share is always of one device: ask for whole devices, or for less than 1",
        )
    if gpu.profile is not None and gpu.count < 1:
        raise Invalid(
            f"{where}.count: a share of a partition ({gpu.profile}) cannot be had",
            field=f"{where}.count",
            mend="ask for a smaller profile, or leave profile out",
        )
    if gpu.sharing in (GpuSharing.MIG, GpuSharing.EXCLUSIVE):
        mend = "set profile instead" if gpu.sharing is GpuSharing.MIG else "leave it out: whole devices are never shared"
        raise Invalid(f"{where}.sharing: '{gpu.sharing}' is no way to share by shares", field=f"{where}.sharing", mend=mend)
    if gpu.sharing is not None and gpu.count >= 1:
        raise Invalid(
            f"{where}.sharing: only a share of a device (count below 1) is shared", field=f"{where}.sharing", mend="leave it out"
        )
    if gpu.topology is not GpuTopology.ANY and (gpu.count < 2 or gpu.profile is not None):
        raise Invalid(
            f"{where}.topology: '{gpu.topology}' is about two whole devices or more", field=f"{where}.topology", mend="leave it out"
        )
    able = tuple(runtime for runtime in runtimes if runtime in GPU_RUNTIMES)
    if not able:
        raise Invalid(
            f"{where}: {' or '.join(runtimes)} cannot hand on a GPU",
            field=where,
            mend=f"use one of the runtimes {', '.join(GPU_RUNTIMES)}",
        )
    if not gpu_runtimes(gpu, able):
        name, why = next(refusal for runtime in able if (refusal := _refusal(runtime, gpu)) is not None)
        others = ", ".join(gpu_runtimes(gpu, GPU_RUNTIMES))
        raise Invalid(f"{where}.{name}: {why}", field=f"{where}.{name}", mend=f"use one of the runtimes {others}")
