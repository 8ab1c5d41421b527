"""May this instance have what it was granted? Pure questions, asked when it is to start: the scheduler chose from an older view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from atoll.model.devices import MILLI, GpuDevice, GpuGrant, GpuHealth, GpuPartition, GpuSample, GpuSharing, GpuVendor
from atoll.model.errors import AtollError, Conflict, Unavailable
from atoll.model.spec import Gpu, RuntimeName
from atoll.model.units import format_bytes

SLACK = 20
"""A device counts as free while at most one part in so many of its memory is in use: the driver itself keeps some."""
MPS_CAPABILITY = "7.0"
"""From Volta on, a client of MPS has its own address space and can be held to a limit."""
_ELSEWHERE = "place it elsewhere"


def ways_to_share(device: GpuDevice, *, mps: bool) -> tuple[GpuSharing, ...]:
    """Return how this node can share a device; `mps`: it has the daemon."""
    if device.mig:
        return (GpuSharing.MIG,)
    ways = tuple(way for way in device.sharing if way not in (GpuSharing.MIG, GpuSharing.MPS))
    able = device.vendor is GpuVendor.NVIDIA and version(device.compute_capability) >= version(MPS_CAPABILITY)
    return (*ways, GpuSharing.MPS) if able and mps else ways


def refuse_grant(
    grant: GpuGrant,
    device: GpuDevice | None,
    *,
    gpu: Gpu,
    others: Sequence[GpuGrant],
    foreign: Sequence[GpuPartition] = (),
    sample: GpuSample | None = None,
) -> AtollError | None:
    """Return why `grant` cannot be had of `device`: Unavailable (another node will do), Conflict (something else has it), or None.

    `others` is what other instances hold of it, `foreign` the partitions that are no instance's, `sample` what runs on it now
    (None: not known, or the instance itself may run there).
    """
    if device is None:
        return Unavailable(f"{grant.device}: this node has no such device", mend=_ELSEWHERE)
    name = f"{device.model} {device.id}"
    if device.health is GpuHealth.QUARANTINED:
        return Unavailable(f"{name} is taken out: {device.reason}", mend=_ELSEWHERE)
    if gpu.driver is not None and version(device.driver) < version(gpu.driver):
        return Unavailable(f"{name} has driver {device.driver or 'unknown'}, and {gpu.driver} is wanted", mend=_ELSEWHERE)
    if (grant.sharing is GpuSharing.MIG) != device.mig:
        state = "is in MIG mode: it is had in partitions only" if device.mig else "is not in MIG mode any more"
        return Unavailable(f"{name} {state}", mend=_ELSEWHERE)
    if grant.sharing not in device.sharing:
        ways = ", ".join(device.sharing)
        return Unavailable(f"{name} cannot be shared by {grant.sharing} on this node", mend=f"it can by {ways}")
    match grant.sharing:
        case GpuSharing.EXCLUSIVE:
            return _refuse_whole(name, device, others, sample)
        case GpuSharing.MIG:
            return _refuse_partition(name, grant, device, others, foreign)
        case GpuSharing.MPS | GpuSharing.TIME_SLICE:
            return _refuse_share(name, grant, device, others, sample)


def _refuse_whole(name: str, device: GpuDevice, others: Sequence[GpuGrant], sample: GpuSample | None) -> AtollError | None:
    if others:
        return Conflict(f"{name}: another instance holds {'it' if others[0].milli >= MILLI else 'a share of it'}")
    if sample is None:
        return None
    # What only draws may be a desktop that has every device open; what it holds of the memory counts below.
    if users := sorted(sample.processes):
        pids = ", ".join(map(str, users[:4]))
        return Unavailable(f"{name} is used by a process that is no instance's ({pids})", mend="end it, or " + _ELSEWHERE)
    if sample.memory_bytes > device.memory_bytes // SLACK:
        used = format_bytes(sample.memory_bytes)
        return Unavailable(f"{name}: {used} of its memory are in use by what is no instance's", mend=_ELSEWHERE)
    return None


def _refuse_partition(
    name: str, grant: GpuGrant, device: GpuDevice, others: Sequence[GpuGrant], foreign: Sequence[GpuPartition]
) -> AtollError | None:
    kind = next((kind for kind in device.profiles if kind.name == grant.profile), None)
    if kind is None or grant.start not in kind.starts:
        return Unavailable(f"{name} offers no {grant.profile} at {grant.start}", mend=_ELSEWHERE)
    taken: Iterable[tuple[int, int, str]] = [
        *((other.start, other.size, "another instance holds") for other in others),
        *((other.start, other.size, "someone else made") for other in foreign),
    ]
    for start, size, who in taken:
        if grant.start < start + size and start < grant.start + kind.memory_slices:
            return Conflict(f"{name}: {grant.profile} at {grant.start} overlaps what {who} at {start}")
    return None


def _refuse_share(
    name: str, grant: GpuGrant, device: GpuDevice, others: Sequence[GpuGrant], sample: GpuSample | None
) -> AtollError | None:
    strange = next((other for other in others if other.sharing is not grant.sharing), None)
    if strange is not None:
        return Conflict(f"{name} is held by {strange.sharing}, and cannot be by {grant.sharing} at the same time")
    held = sum(other.milli for other in others)
    if held + grant.milli > MILLI:
        return Conflict(f"{name}: {held} of {MILLI} thousandths are held, and {grant.milli} more are wanted")
    memory = sum(other.memory_bytes for other in others)
    if memory + grant.memory_bytes > device.memory_bytes:
        return Conflict(f"{name}: {format_bytes(memory)} of its memory are held, and {format_bytes(grant.memory_bytes)} are wanted")
    if sample is not None and sample.memory_bytes + grant.memory_bytes > device.memory_bytes:
        used = format_bytes(sample.memory_bytes)
        return Unavailable(
            f"{name}: {used} of its memory are in use, and {format_bytes(grant.memory_bytes)} are wanted", mend=_ELSEWHERE
        )
    return None


def refuse_runtime(
    runtime: RuntimeName,
    devices: Sequence[GpuDevice],
    *,
    gvisor_drivers: frozenset[str] | None,
    refusals: Mapping[RuntimeName, str],
) -> str:
    """Return why `runtime` cannot hand on `devices`; nothing where it can.

    `gvisor_drivers` are the versions that gVisor's proxy knows (None or none: it could not be asked); `refusals` are reasons found
    elsewhere, an empty one being a yes for a virtual machine.
    """
    if not devices:
        return "this node has no GPU"
    match runtime:
        case RuntimeName.FIRECRACKER:
            return "Firecracker cannot hand on a device; use runc, crun, gvisor, cloud-hypervisor or qemu"
        case RuntimeName.WORKERD:
            return "an isolate of workerd has no devices; use runc, crun or gvisor"
        case RuntimeName.CLOUD_HYPERVISOR | RuntimeName.QEMU:
            return refusals.get(runtime, "no device of this node is set aside for virtual machines (VFIO)")
        case RuntimeName.GVISOR:
            return refusals.get(runtime) or _refuse_gvisor(devices, gvisor_drivers)
        case RuntimeName.RUNC | RuntimeName.CRUN | RuntimeName.LXC:
            return refusals.get(runtime, "")


def _refuse_gvisor(devices: Sequence[GpuDevice], known: frozenset[str] | None) -> str:
    drivers = sorted({device.driver for device in devices if device.vendor is GpuVendor.NVIDIA})
    if not drivers:
        return "gVisor's proxy knows NVIDIA's driver only"
    if not known:
        return "it could not be found out which drivers gVisor's proxy knows (`runsc nvproxy list-supported-drivers`)"
    strange = next((driver for driver in drivers if driver not in known), None)
    if strange is None:
        return ""
    series = sorted((driver for driver in known if driver.split(".")[0] == strange.split(".")[0]), key=version)
    newest = max(known, key=version, default="none")
    nearest = f"of that series it knows {', '.join(series[-3:])}" if series else f"the newest that it knows is {newest}"
    return f"gVisor's proxy does not know driver {strange}; {nearest}"


def version(text: str) -> tuple[int, ...]:
    """Return a driver's version in comparable form: `580.65` is older than `580.159.04`."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())
