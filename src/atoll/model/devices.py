"""GPUs in records: what a node has, what an instance was given of it, and what it uses."""

from __future__ import annotations

import enum

from msgspec import Struct

MILLI = 1000
"""Thousandths of a device's compute: a whole device."""
MEMORY_SLICES = 8
"""Memory slices of most devices that can be partitioned (MIG); how many one has its profiles' places say."""
COMPUTE_SLICES = 7
"""Compute slices of such a device, at most."""
MEDIA = "+me"
"""What the suffix of a profile's name begins with where it has media engines that one partition of a device alone can have."""


class _Record(Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class GpuVendor(enum.StrEnum):
    NVIDIA = "nvidia"
    AMD = "amd"
    INTEL = "intel"


class GpuSharing(enum.StrEnum):
    """How a device is shared, and so how hard the wall between its tenants is (docs/gpu.md has the table)."""

    EXCLUSIVE = "exclusive"
    """The whole device, for one instance."""
    MIG = "mig"
    """A partition in hardware: memory, compute and faults are apart."""
    MPS = "mps"
    """Side by side: the driver holds the memory and compute limits; a fault of one may end all that share."""
    TIME_SLICE = "time-slice"
    """In turns: shares and memory are only accounted for, nothing holds an instance to them."""


class GpuHealth(enum.StrEnum):
    OK = "ok"
    DEGRADED = "degraded"
    """Works, and is offered; something wants an operator's eye."""
    QUARANTINED = "quarantined"
    """Gets nothing new, and what holds it is moved away."""


class LinkKind(enum.StrEnum):
    """How two devices of a node reach each other, best first (the words of `nvidia-smi topo`)."""

    NVLINK = "nvlink"
    PIX = "pix"
    """Through one PCIe switch."""
    PXB = "pxb"
    """Through several PCIe switches."""
    PHB = "phb"
    """Through the host bridge."""
    NODE = "node"
    """Across host bridges of one NUMA node."""
    SYS = "sys"
    """Across NUMA nodes."""


class GpuLink(_Record, frozen=True, kw_only=True):
    peer: str
    """The other device's id."""
    kind: LinkKind
    width: int = 0
    """Of NVLink: active links between the two."""


class MigProfile(_Record, frozen=True, kw_only=True):
    """A kind of partition that the device offers, and where it may begin."""

    name: str
    """As in `1g.10gb`."""
    compute_slices: int
    memory_slices: int
    memory_bytes: int
    starts: tuple[int, ...]
    """First memory slices at which it may be placed."""
    most: int
    """Partitions of this kind at a time."""


def has_media(profile: str) -> bool:
    """Return whether no two partitions of such profiles can be on one device (`1g.24gb+me`, `1g.24gb+me.all`)."""
    return MEDIA in profile


class GpuPartition(_Record, frozen=True, kw_only=True):
    """A partition that exists."""

    id: str
    """`MIG-…`, what a program names it by."""
    profile: str
    start: int
    size: int
    """Memory slices."""


class GpuDevice(_Record, frozen=True, kw_only=True):
    """One device of a node; `id` (the vendor's UUID, or the PCI address where it has none) stays with the hardware."""

    id: str
    model: str
    memory_bytes: int
    vendor: GpuVendor = GpuVendor.NVIDIA
    compute_capability: str = ""
    """NVIDIA: `9.0`; AMD: the `gfx` name."""
    driver: str = ""
    """Version of the kernel driver."""
    cuda: str = ""
    """The newest CUDA that the driver speaks."""
    pci: str = ""
    """`0000:3b:00.0`."""
    minor: int = -1
    """Of `/dev/nvidiaN` or `/dev/dri/renderDN`; -1 unknown."""
    numa: int = -1
    """NUMA node; -1 where the machine has one only, or does not say."""
    cpus: str = ""
    """Near processors, as a list of ranges (`0-15,32-47`)."""
    links: tuple[GpuLink, ...] = ()
    fabric: str = ""
    """The NVLink domain of several machines that it has joined; empty where none."""
    mig: bool = False
    """MIG mode is on: the device is offered in partitions only."""
    profiles: tuple[MigProfile, ...] = ()
    """With `mig`: the partitions that can be made."""
    foreign: tuple[GpuPartition, ...] = ()
    """Partitions that someone else made: their slices are never given away."""
    sharing: tuple[GpuSharing, ...] = (GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE)
    """What this node can do with it."""
    ecc: bool | None = None
    """Error correction is on; None where the device has none."""
    ecc_errors: int = 0
    """Uncorrected errors since the driver was loaded."""
    remapped_rows: int = 0
    remap_pending: bool = False
    """Rows are to be remapped at the next reset."""
    remap_failed: bool = False
    present: bool = True
    """False: the driver does not know it any more, and it is listed only since something holds it; `health` is then quarantined."""
    answers: bool = True
    """False: its driver is silent, and until it answers nothing is known. It is quarantined, but what runs on it is left alone."""
    health: GpuHealth = GpuHealth.OK
    reason: str = ""
    """Why it is not `ok`."""

    @property
    def memory_slices(self) -> int:
        """How many it has in MIG mode, by its profiles' places."""
        return max((start + profile.memory_slices for profile in self.profiles for start in profile.starts), default=MEMORY_SLICES)


WALLS = {
    GpuSharing.EXCLUSIVE: "hard: nobody else can open the device",
    GpuSharing.MIG: "hard: a partition in hardware, with memory, compute and faults apart",
    GpuSharing.MPS: "the driver holds each program to the largest share of the device, and to its own as its environment says, "
    "which the tenant can change; a fault of one may end all that share it",
    GpuSharing.TIME_SLICE: "a convention: it is accounted for, but nothing holds an instance to its share or its memory",
}
"""How hard the wall is between those that hold a device this way."""


class GpuGrant(_Record, frozen=True, kw_only=True):
    """What an instance holds of one device. Chosen by the scheduler with the node; the agent carries it out or says why not."""

    device: str
    sharing: GpuSharing = GpuSharing.EXCLUSIVE
    milli: int = MILLI
    """Share of its compute."""
    memory_bytes: int = 0
    """Memory set aside."""
    profile: str = ""
    """With `mig`: the partition's kind, and `start` its first memory slice."""
    start: int = 0
    size: int = 0
    """With `mig`: memory slices."""


class OfferedDevice(_Record, frozen=True, kw_only=True):
    """A device of a CDI spec that the node's operator allowed: `vendor.com/class=name`."""

    name: str
    shared: bool = False
    """Any number of instances may have it at a time; else one."""


class GpuSample(_Record, frozen=True, kw_only=True):
    """What one device does now."""

    device: str
    busy_milli: int = 0
    """Thousandths of the time in which a kernel ran."""
    memory_bytes: int = 0
    power_milliwatts: int = 0
    temperature_c: int = 0
    processes: dict[int, int] = {}
    """Process (as the node sees it) that computes → bytes of device memory."""
    graphics: tuple[int, ...] = ()
    """Processes that only draw: they use the device, and cannot be taken off it."""
    mig: bool = False
    """MIG mode is on."""
    driver: str = ""
    """Version of the kernel driver that said this; empty where it is not said."""
