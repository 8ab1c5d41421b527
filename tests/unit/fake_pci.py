"""A made /sys with PCI devices, and what the kernel does when one writes to it."""

from __future__ import annotations

import threading
from pathlib import Path

from atoll.devices.vfio import VFIO_DRIVER

GPU, AUDIO, NIC, BRIDGE = "0000:3b:00.0", "0000:3b:00.1", "0000:3c:00.0", "0000:3a:00.0"
H200 = (
    "0x00000000f0000000 0x00000000f0ffffff 0x0000000000040200\n"
    "0x0000020000000000 0x0000023fffffffff 0x000000000014220c\n"
    "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
    "0x0000024000000000 0x0000024001ffffff 0x000000000014220c\n"
    "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
    "0x0000000000002000 0x000000000000207f 0x0000000000040101\n"
    "0x00000000f2000000 0x00000000f207ffff 0x0000000000046200\n"
)
"""The shape of a large GPU's windows: 16 MiB, 256 GiB, 32 MiB, 128 ports; the seventh line is its ROM."""


class FakeKernel:
    """A made /sys and what the kernel does when one writes to it. Drivers in `stubborn` let go of nothing."""

    def __init__(self, sysfs: Path) -> None:
        self.sysfs = sysfs
        self.natural: dict[str, str] = {}
        self.stubborn: set[str] = set()
        self.refusing: set[str] = set()
        self.hang: threading.Event | None = None
        self.written: list[tuple[str, str]] = []

    def add(self, address: str, driver: str, *, kind: str = "0x030200", group: int | None = 7, natural: str = "") -> None:
        device = self.sysfs / "bus/pci/devices" / address
        device.mkdir(parents=True, exist_ok=True)
        (device / "class").write_text(f"{kind}\n")
        (device / "driver_override").write_text("(null)\n")
        self.natural[address] = natural or driver
        if group is not None:
            members = self.sysfs / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(device)
            (device / "iommu_group").symlink_to(members.parent)
        self.load(VFIO_DRIVER)
        if driver:
            self.load(driver)
            self._bind(address, driver)

    def load(self, driver: str) -> None:
        (self.sysfs / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)

    def driver(self, address: str) -> str:
        link = self.sysfs / "bus/pci/devices" / address / "driver"
        return link.readlink().name if link.is_symlink() else ""

    def override(self, address: str) -> str:
        return (self.sysfs / "bus/pci/devices" / address / "driver_override").read_text().strip()

    def write(self, path: Path, text: str) -> None:
        self.written.append((path.name, text.strip()))
        match path.name:
            case "driver_override":
                path.write_text(text)
            case "unbind":
                self._unbind(text)
            case "drivers_probe":
                self._probe(text)
            case "reset":
                path.write_text(text)

    def _unbind(self, address: str) -> None:
        if self.hang is not None:
            self.hang.wait(30)
        if self.driver(address) not in self.stubborn:
            (self.sysfs / "bus/pci/devices" / address / "driver").unlink()

    def _probe(self, address: str) -> None:
        wanted = self.override(address).replace("(null)", "") or self.natural[address]
        if wanted and wanted not in self.refusing and not self.driver(address):
            self._bind(address, wanted)

    def _bind(self, address: str, driver: str) -> None:
        device = self.sysfs / "bus/pci/devices" / address
        (device / "driver").symlink_to(self.sysfs / "bus/pci/drivers" / driver)
        if driver == VFIO_DRIVER and (device / "iommu_group").exists():  # the group's file appears: class/vfio/NUMBER
            number = (device / "iommu_group").resolve().name
            group = self.sysfs / "class/vfio" / number
            group.mkdir(parents=True, exist_ok=True)
            (group / "dev").write_text(f"239:{number}\n")


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
