"""What an instance uses of its devices, from what the devices say of processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from atoll.model.devices import GpuGrant, GpuSample, GpuSharing

Owners = Mapping[int, str]
"""Process → instance."""


def owners_of(samples: Iterable[GpuSample], ids: Collection[str], groups: Callable[[int], Sequence[str]]) -> Owners:
    """Return whose the processes in `samples` are; `groups` gives the names of the control groups that a process is in, an
    instance's being its id."""
    found: dict[int, str] = {}
    for pid in {pid for sample in samples for pid in sample.processes}:
        owner = next((name for name in groups(pid) if name in ids), None)
        if owner is not None:
            found[pid] = owner
    return found


def usage_of(id: str, grants: Sequence[GpuGrant], samples: Sequence[GpuSample], owners: Owners) -> tuple[int, int] | None:
    """Return (thousandths of a device that are busy, bytes of device memory) of an instance; None where a device that it
    holds has no sample: its driver is silent, or a virtual machine has it.

    How busy a device is, it says of itself and not of its tenants: only one that is the instance's alone counts.
    """
    alone = {grant.device for grant in grants if grant.sharing is GpuSharing.EXCLUSIVE}
    held = {grant.device for grant in grants}
    if not held <= {sample.device for sample in samples}:
        return None
    milli = memory_bytes = 0
    for sample in samples:
        if sample.device in alone:
            milli += sample.busy_milli
        if sample.device in held:
            memory_bytes += sum(used for pid, used in sample.processes.items() if owners.get(pid) == id)
    return milli, memory_bytes
