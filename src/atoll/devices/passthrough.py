"""Whole devices of the node for virtual machines, as a node asks for them: nothing here blocks the caller, and all has a deadline.

What is done to the bus is `vfio.Vfio`'s, in a thread and one thing at a time: a step that hangs is waited for by the next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import structlog

from atoll.devices.bounded import Bounded
from atoll.devices.vfio import VFIO_DRIVER, Group, Vfio
from atoll.devices.vfio_guest import window_bytes
from atoll.model.errors import AtollError, Conflict, NotFound, Unavailable, Unsupported
from atoll.model.ports.devices import DeviceNode, Edits
from atoll.model.spec import RuntimeName

MACHINES = frozenset({RuntimeName.QEMU, RuntimeName.CLOUD_HYPERVISOR})
"""Runtimes that hand on devices as a whole and no other way."""
CHANGE_S = 90.0
"""For a set of devices to change hands; each step of it has a deadline of its own below this."""
LOOK_S = 5.0
CONTAINER = "/dev/vfio/vfio"
_MISC_VFIO = "10:196"
"""Its numbers, which the kernel has fixed (include/linux/miscdevice.h)."""

log = structlog.get_logger()


class Passthrough:
    """The node's PCI devices below `sysfs`. One agent at a time may use it."""

    def __init__(self, vfio: Vfio, *, sysfs: Path = Path("/sys"), change_s: float = CHANGE_S) -> None:
        self._vfio, self._sysfs, self._change_s = vfio, sysfs, change_s
        self._bounded = Bounded("the kernel, asked to move a PCI device,")

    def refusal(self) -> str:
        """Return why no machine of this node can be handed a device; nothing where one can. Reads two directories."""
        groups = self._sysfs / "kernel/iommu_groups"
        if not groups.is_dir() or not any(groups.iterdir()):
            return (
                "this machine has no IOMMU at work, which keeps a virtual machine's device out of others' memory; turn on VT-d or "
                "AMD-Vi in the firmware, and boot with intel_iommu=on iommu=pt"
            )
        if not (self._sysfs / "bus/pci/drivers" / VFIO_DRIVER).is_dir():
            return f"the kernel's driver {VFIO_DRIVER} is not loaded; modprobe {VFIO_DRIVER}"
        return ""

    async def check(self, addresses: Sequence[str]) -> None:
        """Raises Unsupported, in words, where the devices can be handed over at no time, and Unavailable where one is gone."""
        await self._bounded(lambda: self._check(addresses), LOOK_S)

    def _check(self, addresses: Sequence[str]) -> None:
        try:
            self._vfio.check(addresses)
        except Conflict as error:  # what is in use beside the device is the machine's own: that does not pass
            raise Unsupported(error.message, mend=error.mend) from None
        except NotFound as error:
            raise Unavailable(error.message, mend=error.mend) from None

    async def bound(self, addresses: Sequence[str]) -> bool:
        """Return whether all that goes with these devices is bound to vfio-pci."""

        def look() -> bool:
            groups = [self._vfio.group(address) for address in addresses]
            return all(member.driver == VFIO_DRIVER for group in groups for member in group.endpoints)

        return await self._bounded(look, LOOK_S)

    async def bind(self, addresses: Sequence[str]) -> Edits:
        """Take the devices from their drivers, with all that must go along, and return how a machine gets them. Safe to repeat.

        The machine gets these devices alone: what else is in their groups is bound, so that it is quiet, and goes to nobody.
        Raises Unavailable, Unsupported; what was taken is then given back, or `release` does it.
        """
        return await self._bounded(lambda: self._bind(addresses), self._change_s)

    def _bind(self, addresses: Sequence[str]) -> Edits:
        groups = self._vfio.bind(addresses)
        return Edits(
            pci=tuple(addresses),
            nodes=(_node(CONTAINER, self._numbers("misc/vfio") or _MISC_VFIO), *(self._node_of(group) for group in groups)),
            pci_window_bytes=window_bytes([bar for address in addresses for bar in self._vfio.bars(address)]),
        )

    def _node_of(self, group: Group) -> DeviceNode:
        numbers = self._numbers(f"vfio/{group.number}")
        if not numbers:
            raise Unavailable(f"vfio has no file for IOMMU group {group.number}", mend="the kernel's log may say why: dmesg")
        return _node(f"/dev/vfio/{group.number}", numbers)

    def _numbers(self, name: str) -> str:
        try:
            return (self._sysfs / "class" / name / "dev").read_text().strip()
        except OSError:
            return ""

    async def release(self, addresses: Sequence[str]) -> dict[str, str]:
        """Reset the devices and give them, and what went along, back to their drivers; return those that stay, and why.

        A device that knows no reset of its own was reset by vfio-pci when its machine ended, where its slot could be. One that
        fails to reset stays bound: what its tenant left in it reaches nobody. Safe to repeat.
        """
        try:
            return await self._bounded(lambda: self._release(addresses), self._change_s)
        except Unavailable as error:
            return dict.fromkeys(addresses, error.message)

    def _release(self, addresses: Sequence[str]) -> dict[str, str]:
        failed: dict[str, str] = {}
        for address in addresses:
            try:
                self._reset(address)
            except AtollError as error:
                failed[address] = error.message
        for address in addresses:
            if address in failed:
                continue
            try:
                self._vfio.release([address])
            except AtollError as error:
                failed[address] = error.message
        return failed

    def _reset(self, address: str) -> None:
        try:
            mine = next(member for member in self._vfio.group(address).members if member.address == address)
            if mine.driver == VFIO_DRIVER:
                self._vfio.reset(address)
        except NotFound:
            log.warning("vfio.device.gone", device=address)
        except Unsupported as error:
            log.info("vfio.device.not-reset", device=address, why=error.message)

    async def recover(self, keep: Collection[str]) -> tuple[str, ...]:
        """Give back what a former agent took and no record speaks of; return what stays. Raises Unavailable."""
        return await self._bounded(lambda: self._vfio.recover(keep), self._change_s)


def _node(path: str, numbers: str) -> DeviceNode:
    major, _, minor = numbers.partition(":")
    return DeviceNode(path=path, host_path=path, major=int(major), minor=int(minor))
