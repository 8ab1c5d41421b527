"""GPUs as the kernel shows them: what AMD's and Intel's have in common. No library, no process, files below /sys only.

What is read where: the kernel's documentation of DRM (render nodes, the `WEDGED` message), of PCI devices in sysfs and of hwmon.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from msgspec import Struct
from msgspec.structs import replace

from atoll.devices.bounded import Bounded
from atoll.devices.uevents import Uevent, Uevents, kernel_uevents
from atoll.model.devices import GpuDevice, GpuGrant, GpuHealth, GpuLink, GpuPartition, GpuSample, GpuSharing, GpuVendor, LinkKind
from atoll.model.errors import NotFound, Unsupported
from atoll.model.ports.clock import Clock, SystemClock
from atoll.model.ports.devices import DeviceEvent, DeviceNode, Edits, Trouble
from atoll.model.spec import GpuCapability

DISCOVER_S = 5.0
_RECOVERED = ("", "none")
"""Values of WEDGED that mean that the driver recovered by itself."""


class Card(Struct, frozen=True):
    """A GPU's render node and its place on the bus."""

    render: Path
    """`/sys/class/drm/renderD128`."""
    device: Path
    pci: str

    @property
    def minor(self) -> int:
        return int(self.render.name.removeprefix("renderD"))

    def text(self, name: str) -> str:
        return text(self.device / name)

    def number(self, name: str) -> int:
        return number(self.device / name)


def text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def number(path: Path) -> int:
    """Return a file's number; 0 where there is none."""
    with contextlib.suppress(ValueError):
        return int(text(path), 0)
    return 0


def cards(root: Path, pci_vendor: str) -> Iterator[Card]:
    """Yield the GPUs of a vendor that have a driver with a render node, in order of PCI address."""
    found = []
    for render in (root / "sys/class/drm").glob("renderD*"):
        device = (render / "device").resolve()
        if text(device / "vendor") == pci_vendor:
            found.append(Card(render, device, device.name))
    return iter(sorted(found, key=lambda card: card.pci))


class DrmHardware:
    """What AMD and Intel have in common. `root` is below which /sys and /dev are read."""

    vendor: GpuVendor
    pci_vendor: ClassVar[str]
    drivers: ClassVar[frozenset[str]]
    models: ClassVar[dict[int, str]]

    def __init__(self, *, root: Path = Path("/"), clock: Clock | None = None, uevents: Uevents = kernel_uevents) -> None:
        self.root, self._clock, self._uevents = root, clock or SystemClock(), uevents
        self._bounded = Bounded(f"the kernel's driver of {self.vendor}'s GPUs")
        self._devices: dict[str, GpuDevice] = {}

    async def discover(self) -> tuple[GpuDevice, ...]:
        devices = await self._bounded(self._look, DISCOVER_S)
        self._devices = {device.id: device for device in devices}
        return devices

    def _look(self) -> tuple[GpuDevice, ...]:
        return _linked([self._device(card) for card in self._offered()])

    def withheld(self) -> tuple[tuple[str, str], ...]:
        """Return (PCI address, why) of the GPUs here that are not offered. Reads small files only."""
        every = ((card.pci, self.integrated(card)) for card in cards(self.root, self.pci_vendor))
        return tuple((pci, why) for pci, why in every if why)

    def _offered(self) -> Iterator[Card]:
        return (card for card in cards(self.root, self.pci_vendor) if not self.integrated(card))

    def integrated(self, card: Card) -> str:
        """Return why the GPU counts as part of the processor, which drives a display and is no place for work; else nothing."""
        return ""

    def _device(self, card: Card) -> GpuDevice:
        health, reason = self.health(card)
        driver = (card.device / "driver").resolve().name
        ecc, errors = self.errors(card)
        return GpuDevice(
            id=self.id(card),
            model=self.model(card),
            memory_bytes=self.memory_bytes(card),
            vendor=self.vendor,
            compute_capability=self.compute_capability(card),
            driver=text(self.root / "sys/module" / driver / "version") or text(self.root / "proc/sys/kernel/osrelease"),
            pci=card.pci,
            minor=card.minor,
            numa=int(card.text("numa_node") or -1),
            cpus=card.text("local_cpulist"),
            sharing=(GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE),
            ecc=ecc,
            ecc_errors=errors,
            health=health,
            reason=reason,
        )

    def id(self, card: Card) -> str:
        return card.pci

    def model(self, card: Card) -> str:
        device = card.number("device")
        return self.models.get(device) or f"pci {int(self.pci_vendor, 0):04x}:{device:04x}"

    def memory_bytes(self, card: Card) -> int:
        """Return the device's own memory, or what of it (or of the machine's) its largest window shows."""
        sizes = []
        for line in card.text("resource").splitlines()[:6]:
            start, end, flags = (int(word, 0) for word in line.split())
            if end > start and flags & 0x200:  # IORESOURCE_MEM
                sizes.append(end - start + 1)
        return max(sizes, default=0)

    def compute_capability(self, card: Card) -> str:
        return ""

    def errors(self, card: Card) -> tuple[bool | None, int]:
        """Return whether memory errors are corrected, and how many could not be."""
        return None, 0

    def health(self, card: Card) -> tuple[GpuHealth, str]:
        return GpuHealth.OK, ""

    async def samples(self) -> tuple[GpuSample, ...]:
        return await self._bounded(lambda: tuple(self._sample(card) for card in self._offered()), DISCOVER_S)

    async def suspend(self, pid: int) -> None:
        raise Unsupported(f"{self.vendor}'s driver cannot take a program off its device")

    async def resume(self, pid: int) -> None:
        return  # nothing is ever taken off

    async def reset(self, device: str) -> None:
        raise Unsupported(
            f"{device} cannot be reset from here: only NVIDIA's devices can",
            mend="reset it by its vendor's tool, then reinstate it",
        )

    def _sample(self, card: Card) -> GpuSample:
        sensors = next(iter((card.device / "hwmon").glob("hwmon*")), card.device)
        return GpuSample(
            device=self.id(card),
            busy_milli=min(card.number("gpu_busy_percent"), 100) * 10,
            memory_bytes=card.number("mem_info_vram_used"),
            power_milliwatts=(number(sensors / "power1_average") or number(sensors / "power1_input")) // 1000,
            temperature_c=number(sensors / "temp1_input") // 1000,
            processes=self.processes(card),
        )

    def processes(self, card: Card) -> dict[int, int]:
        return {}

    async def events(self) -> AsyncIterator[DeviceEvent]:
        known: dict[str, str] = {}
        gone: set[str] = set()
        try:
            async for event in self._uevents():
                # Anew each time: whoever waits for events does not wait for the first look.
                known |= {device.pci: device.id for device in self._devices.values()}
                told = self._told(event, known, gone)
                if told is not None:
                    yield told
        except OSError:
            await asyncio.Event().wait()  # no such socket in this sandbox: nothing will be said

    def _told(self, event: Uevent, known: Mapping[str, str], gone: set[str]) -> DeviceEvent | None:
        device = known.get(event.pci)
        if device is None:
            return None
        if event.subsystem == "pci" and event.action == "remove" and device not in gone:
            gone.add(device)
            mend = "see the kernel's log; restart the node if it does not come back"
            return self._event(Trouble.VANISHED, device, "has vanished: it was removed from the bus", mend)
        bound = event.subsystem == "pci" and event.action == "bind" and event.properties.get("DRIVER") in self.drivers
        if bound and device in gone:
            gone.discard(device)
            return self._event(Trouble.RECOVERED, device, "is there again")
        if event.subsystem == "drm" and "WEDGED" in event.properties:
            return self._wedged(event, device)
        return None

    def _wedged(self, event: Uevent, device: str) -> DeviceEvent:
        how = event.properties["WEDGED"]
        if how in _RECOVERED:
            return self._event(Trouble.SUSPECT, device, "hung, and its driver reset it", "start anew what used it")
        mends = {"rebind": "bind its driver anew", "bus-reset": "reset it on its bus", "vendor-specific": "see the vendor's guide"}
        mend = ", or ".join(mends.get(word, "restart the node") for word in how.split(","))
        return self._event(Trouble.BROKEN, device, "hangs, and its driver could not reset it", mend)

    def _event(self, trouble: Trouble, device: str, words: str, mend: str = "") -> DeviceEvent:
        return DeviceEvent(trouble=trouble, device=device, message=f"the GPU {device} {words}", mend=mend, at=self._clock.now())

    async def partitions(self, device: str) -> tuple[GpuPartition, ...]:
        return ()

    async def make_partition(self, device: str, profile: str, start: int) -> GpuPartition:
        raise self._refusal(device)

    async def remove_partition(self, device: str, start: int) -> None:
        return None

    def _refusal(self, device: str) -> Unsupported:
        return Unsupported(f"{device} cannot be partitioned: only NVIDIA's devices in MIG mode are", mend="ask for a whole device")

    def edits(self, grants: Sequence[GpuGrant], capabilities: Collection[GpuCapability], partitions: Sequence[str]) -> Edits:
        """Return the render nodes (and what else the vendor's programs open). Libraries come with the image: they need no match."""
        if partitions or any(grant.sharing in (GpuSharing.MIG, GpuSharing.MPS) for grant in grants):
            raise self._refusal(grants[0].device)
        granted = list(dict.fromkeys(grant.device for grant in grants))
        nodes = self.common_nodes()
        for id in granted:
            if id not in self._devices:
                raise NotFound(f"there is no device {id}")
            name = f"renderD{self._devices[id].minor}"
            nodes.append(self.node(f"dri/{name}", self.root / "sys/class/drm" / name / "dev"))
        return Edits(
            nodes=tuple(nodes),
            devices=tuple(f"{self.vendor}.com/gpu={id}" for id in granted),
            pci=tuple(self._devices[grant.device].pci for grant in grants if grant.sharing is GpuSharing.EXCLUSIVE),
        )

    def common_nodes(self) -> list[DeviceNode]:
        return []

    def node(self, name: str, numbers: Path) -> DeviceNode:
        major, mark, minor = text(numbers).partition(":")
        if not mark or not (self.root / "dev" / name).exists():
            raise Unsupported(f"there is no device file /dev/{name}", mend=f"see whether the driver of {self.vendor} is loaded")
        return DeviceNode(path=f"/dev/{name}", host_path=f"/dev/{name}", major=int(major), minor=int(minor))

    async def close(self) -> None:
        return None


def _linked(devices: list[GpuDevice]) -> tuple[GpuDevice, ...]:
    """Add how near the devices are to each other, as far as their NUMA nodes tell."""

    def kind(one: GpuDevice, other: GpuDevice) -> LinkKind:
        return LinkKind.NODE if one.numa == other.numa else LinkKind.SYS

    return tuple(
        replace(one, links=tuple(GpuLink(peer=other.id, kind=kind(one, other)) for other in devices if other is not one))
        for one in devices
    )
