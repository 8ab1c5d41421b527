"""Two ports about GPUs: `Hardware`, what one vendor's driver can do, and `Devices`, what the agent asks of a whole node."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from msgspec import Struct

from atoll.model.devices import GpuDevice, GpuGrant, GpuPartition, GpuSample, GpuVendor, OfferedDevice
from atoll.model.spec import Gpu, GpuCapability, RuntimeName


class DeviceNode(Struct, frozen=True):
    """A character device of the node that the instance sees at `path`, and may open for `permissions` (`r`, `w`, `m`)."""

    path: str
    host_path: str
    major: int
    minor: int
    permissions: str = "rw"
    mode: int = 0o666


class FileMount(Struct, frozen=True):
    """A file or directory of the node (a library of the driver) that the instance sees, read-only unless options say else."""

    source: str
    target: str
    options: tuple[str, ...] = ("ro", "nosuid", "nodev", "rbind")


class Edits(Struct, frozen=True, kw_only=True):
    """What a runtime adds to an instance so that its devices appear inside: CDI's containerEdits, decided to the last detail."""

    nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[FileMount, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    library_directories: tuple[str, ...] = ()
    """Directories inside that the dynamic linker must search, most wanted first: a runtime makes its cache or path so."""
    links: tuple[tuple[str, str], ...] = ()
    """(path inside, what it points to)."""
    masked: tuple[str, ...] = ()
    """Paths below /proc inside that speak of others' devices: the instance finds them empty."""
    devices: tuple[str, ...] = ()
    """The granted devices' names as CDI knows them (`nvidia.com/gpu=GPU-…`), for what wants names instead of edits."""
    pci: tuple[str, ...] = ()
    """PCI addresses, for a virtual machine that gets the device itself. `nodes` are then the files of VFIO that lead to them."""
    pci_window_bytes: int = 0
    """How much of its 64-bit addresses the machine must keep for these devices' windows: a power of two, or 0 for none."""
    gvisor_driver: str = ""
    """The driver version that gVisor's proxy must know; empty where it cannot be used."""

    def __bool__(self) -> bool:
        return self != Edits()


class Trouble(enum.StrEnum):
    """What can befall a device."""

    FAULT = "fault"
    """An application's own mistake: the device is well."""
    BROKEN = "broken"
    """The device's: it gets nothing new and is drained."""
    SUSPECT = "suspect"
    """Works on, and wants an operator's eye."""
    VANISHED = "vanished"
    """The driver does not know it any more."""
    RECOVERED = "recovered"
    """Of a device: it is well again. Of all (no `device`): the driver answers again, which mends no device."""
    DRIVER_CHANGED = "driver-changed"
    """The kernel driver was replaced under what runs."""
    SILENT = "silent"
    """The driver does not answer; nothing is known until it does."""


class DeviceEvent(Struct, frozen=True, kw_only=True):
    """Something that happened to a device (`device` empty: to all of the vendor's). `code` is the XID where it was one."""

    trouble: Trouble
    device: str = ""
    start: int | None = None
    """The first memory slice of the partition in which it happened; None: in none, or it cannot be told in which."""
    code: int = 0
    message: str
    mend: str = ""
    at: float = 0.0


class Hardware(Protocol):
    """One vendor's devices on this machine, over its driver. Every call has a deadline of its own and never hangs its caller:
    a driver that does not answer is Unavailable (safe to retry)."""

    vendor: GpuVendor

    async def discover(self) -> tuple[GpuDevice, ...]:
        """Return the devices that are there now, in order of PCI address, health as the driver's counters alone tell.

        Raises Unavailable (no answer in time, or the driver and its library differ; the message says which).
        """
        ...

    def events(self) -> AsyncIterator[DeviceEvent]:
        """Yield what befalls the devices, as it happens, for ever; waits in the driver, does not poll it."""
        ...

    async def partitions(self, device: str) -> tuple[GpuPartition, ...]:
        """Return all partitions of a device in MIG mode, whoever made them, in order of `start`. Half-made ones (a GPU
        instance without a compute instance) are among them with an empty `id`."""
        ...

    async def make_partition(self, device: str, profile: str, start: int) -> GpuPartition:
        """Make the partition; one that is there with this profile and start is returned as it is, so that a retry is safe.

        Raises Invalid (no such profile or start; names those that exist), Conflict (slices are taken), NotFound (no such device),
        Unavailable. After an error nothing half-made is left, or `partitions` shows it.
        """
        ...

    async def remove_partition(self, device: str, start: int) -> None:
        """Remove the partition that begins at `start`, half-made or whole; none there is no error.

        Raises Conflict while a process uses it.
        """
        ...

    async def samples(self) -> tuple[GpuSample, ...]:
        """Return what every device does now."""
        ...

    async def suspend(self, pid: int) -> None:
        """Take a running process off its devices: its memory waits in the node's, theirs is free meanwhile. Safe to repeat.

        Raises Unsupported (this driver cannot), Unavailable (it would not; the process runs on).
        """
        ...

    async def resume(self, pid: int) -> None:
        """Put a process back on the devices that it had. One that was never taken off is left as it is; safe to repeat.

        Raises Unavailable, for devices without enough free memory too: it stays off, and may be tried again. Raises Unsupported as
        `suspend` does.
        """
        ...

    async def reset(self, device: str) -> None:
        """Reset the hardware: what was in its memory, and all partitions, are lost. Safe to repeat.

        Raises Conflict (something has it open), Unsupported (not this vendor or device), Unavailable (it would not; in the
        driver's words, where it has any). Calls beside it may raise Unavailable meanwhile.
        """
        ...

    def edits(self, grants: Sequence[GpuGrant], capabilities: Collection[GpuCapability], partitions: Sequence[str]) -> Edits:
        """Return what makes exactly these grants appear in an instance; `partitions` are the ids of those that are partitions,
        in their order. Blocking, but bounded: it looks up files only.

        Raises Unsupported where the driver's libraries or device files are not found, naming them.
        """
        ...

    async def close(self) -> None: ...


@runtime_checkable
class LetsGo(Protocol):
    """Hardware whose driver is kept from letting go of a device by whoever asks it things, this process too."""

    def let_go(self) -> AbstractAsyncContextManager[None]:
        """Hold no device open while inside. Calls raise Unavailable meanwhile."""
        ...


class Claim(Struct, frozen=True, kw_only=True):
    """What an instance's grants came to on this node."""

    edits: Edits
    partitions: tuple[GpuPartition, ...] = ()


class Devices(Protocol):
    """All devices of a node, as the agent sees them."""

    async def inventory(self) -> tuple[GpuDevice, ...]:
        """Return every device with its health, those that vanished while something held them among them (quarantined)."""
        ...

    async def claim(self, instance: str, grants: Sequence[GpuGrant], gpu: Gpu, runtime: RuntimeName) -> Claim:
        """Make ready what the instance was granted: admission check, partitions, sharing daemon. Safe to repeat.

        Raises Unavailable (the device is sick or gone: place it elsewhere), Unsupported (this runtime cannot hand it on, with the
        reason), Conflict. Nothing is left behind then.
        """
        ...

    async def release(self, instance: str) -> None:
        """Give back all that `claim` made. Safe to repeat; an unknown instance is no error."""
        ...

    async def suspend(self, instance: str, pids: Sequence[int]) -> None:
        """Take processes of an instance off its devices, which it goes on holding. They must not be frozen. Safe to repeat.

        Raises Unsupported (this vendor, or this driver, cannot), Unavailable; then all of them run on, as far as the driver allows.
        """
        ...

    async def resume(self, instance: str, pids: Sequence[int]) -> None:
        """Put back what `suspend` took off. Safe to repeat. Raises Unavailable: some of them are still off; Unsupported as it."""
        ...

    async def recover(self, held: Callable[[], Mapping[str, Sequence[GpuGrant]]]) -> None:
        """Adopt what a former agent made for the instances that hold something, and remove what it made for others, half-made
        partitions too. `held` is asked when the drivers were looked at, which takes its time: instances end meanwhile."""
        ...

    async def reinstate(self, device: str, *, reset: bool = False) -> None:
        """Offer a device again that was taken out for an error, on an operator's word; with `reset`, reset it before. What its
        driver still says of it stands. Safe to repeat.

        Raises NotFound; with `reset` Conflict (something holds it; names what), Unsupported, Unavailable.
        """
        ...

    def events(self) -> AsyncIterator[DeviceEvent]:
        """Yield what befalls the devices for ever. Afterwards `inventory` shows it."""
        ...

    async def samples(self) -> tuple[GpuSample, ...]:
        """Return what every device does now, without those of a driver that does not tell in time."""
        ...

    def offers(self, runtime: RuntimeName) -> str:
        """Return why `runtime` cannot hand on this node's devices; nothing where it can."""
        ...

    async def close(self) -> None: ...


class ForeignDevices(Protocol):
    """Devices of CDI specs that others wrote, as far as the node's operator allowed them."""

    def offered(self) -> tuple[OfferedDevice, ...]:
        """Return those that can be asked for now, by name. Blocking, but bounded: it reads small files."""
        ...

    def add(self, edits: Edits, names: Sequence[str]) -> Edits:
        """Return `edits` with what makes the devices of these full names appear. Blocking, as above.

        Raises Forbidden (a kind that is not allowed), NotFound (names what exists), Invalid or Unsupported (cannot be done).
        """
        ...


CDI_DIRECTORY = Path("cdi")
"""Below the agent's data: the specs that are made here, for people and other tools to read."""
