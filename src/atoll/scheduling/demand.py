"""What an instance asks of a node."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from atoll.model.devices import GpuGrant
from atoll.model.spec import (
    DEVICE_RUNTIMES,
    NVLINK,
    AppSpec,
    Gpu,
    Placement,
    RuntimeName,
    Workload,
    gpu_runtimes,
    host_ports,
)
from atoll.scheduling.gpu.asks import milli_of

STANDBY_PRIORITY = -1
"""Below all that a spec may say: whatever is wanted and finds no place gets that of an instance that stands by."""


class Demand(Struct, frozen=True, kw_only=True, cache_hash=True):
    """What one instance asks for. Instances with equal demand and group are one class, scored once."""

    cpu_milli: int
    memory_bytes: int
    disk_bytes: int = 0
    gpu: Gpu | None = None
    runtimes: tuple[RuntimeName, ...] = (RuntimeName.RUNC,)
    """Any of them will do, preferred first."""
    placement: Placement = Placement()
    pinned: bool = False
    """It writes to host-local volumes, and so belongs where they are."""

    images: tuple[str, ...] = ()
    """Digests of the images that it shows, of those that the spec names by digest."""
    host_ports: tuple[str, ...] = ()
    """Ports of its node that it is published on, as `tcp/8053`."""

    devices: tuple[str, ...] = ()
    """Of CDI specs, by their full names."""

    @property
    def gpu_milli(self) -> int:
        """Thousandths of devices that are set aside."""
        return milli_of(self.gpu) if self.gpu else 0

    @property
    def together(self) -> str | None:
        """The label by which all of a gang are in one place."""
        label = self.placement.together
        return "node" if label == NVLINK else label


def demand_of(spec: Workload) -> Demand:
    """Return what each instance of an app or a job asks for."""
    resources = spec.resources
    runtimes = spec.runtimes
    if resources.gpu is not None:
        runtimes = gpu_runtimes(resources.gpu, runtimes) or runtimes
    if resources.devices:
        runtimes = tuple(name for name in runtimes if name in DEVICE_RUNTIMES) or runtimes
    return Demand(
        cpu_milli=resources.cpu.milli,
        memory_bytes=int(resources.memory),
        disk_bytes=int(resources.disk),
        gpu=resources.gpu,
        runtimes=runtimes,
        placement=spec.placement,
        pinned=holds_volumes(spec),
        images=_digests(spec),
        devices=resources.devices,
        host_ports=host_ports(spec.ports) if isinstance(spec, AppSpec) else (),
    )


def _digests(spec: Workload) -> tuple[str, ...]:
    references = (spec.image, *(volume.image for volume in spec.volumes))
    return tuple(dict.fromkeys(name.rpartition("@")[2] for name in references if name is not None and "@" in name))


def standing_by(demand: Demand) -> Demand:
    """Return what an instance asks for while it only stands by: the same, after everyone else."""
    return replace(demand, placement=replace(demand.placement, priority=STANDBY_PRIORITY, gang=False))


def holds_volumes(spec: Workload) -> bool:
    """Return whether instances are bound to the nodes that hold the app's volumes. A job starts anew wherever there is room.

    Volumes that show an image are read-only: every node can have them.
    """
    return isinstance(spec, AppSpec) and spec.placement.follow_volumes and any(not volume.read_only for volume in spec.volumes)


class Pending(Struct, frozen=True, kw_only=True):
    """An instance without a node."""

    id: str
    group: str
    """Owner and release: instances of one group are spread away from each other."""
    demand: Demand
    created_at: float = 0.0
    ends_at: float | None = None
    """When it will have ended at the latest, as `Allocation.ends_at`."""

    @property
    def order(self) -> tuple[int, float, str]:
        """Higher priority first, then older, then by id."""
        return (-self.demand.placement.priority, self.created_at, self.id)


class Placed(Struct, frozen=True, kw_only=True):
    """An instance of the plan, the node that it goes to and the runtime that it uses there."""

    id: str
    node: str
    runtime: RuntimeName
    gpus: tuple[GpuGrant, ...] = ()
    """Which devices it gets, and how much of each."""
