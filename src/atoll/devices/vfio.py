"""Hands whole PCI devices to virtual machines: binds them to `vfio-pci`, and back to the driver that they had.

The unit that hardware can fence off is an IOMMU group: all of its devices go, or none (kernel documentation: driver-api/vfio).
What a device was bound to is written down before anything is changed, so that an agent that was killed half way, or its
successor, brings it back. Blocking; calls about one device are made one at a time.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import structlog
from msgspec import Struct

from atoll.devices.vfio_guest import Bar, read_bars
from atoll.model.codec import decode, encode
from atoll.model.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported

VFIO_DRIVER = "vfio-pci"
LET_GO_S_MAX = 20.0
"""How long a driver may take to let go of a device."""
_STEP_S = 0.05
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_BRIDGE_CLASS = 0x06
_REFUSALS_MAX = 3

log = structlog.get_logger()


class Member(Struct, frozen=True):
    """A device of an IOMMU group."""

    address: str
    driver: str
    """Empty for none."""
    bridge: bool

    @property
    def slot(self) -> str:
        """The address without its function: functions of one slot are one piece of hardware."""
        return self.address.rpartition(".")[0]


class Group(Struct, frozen=True):
    number: int
    members: tuple[Member, ...]

    @property
    def endpoints(self) -> tuple[Member, ...]:
        """Those that are bound and handed over; bridges stay with the node."""
        return tuple(member for member in self.members if not member.bridge)


class _Former(Struct, frozen=True, kw_only=True):
    """What stands in a device's file in `state`."""

    address: str
    driver: str


def write_file(path: Path, text: str) -> None:
    """Write to a file of sysfs: one write, and its error is the kernel's answer."""
    with path.open("w") as file:
        file.write(text)


class Vfio:
    """The node's PCI devices below `sysfs`. `state` is a directory of the agent's; one agent at a time may use it."""

    def __init__(
        self,
        state: Path,
        *,
        sysfs: Path = Path("/sys"),
        write: Callable[[Path, str], None] = write_file,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        let_go_s: float = LET_GO_S_MAX,
    ) -> None:
        self._state = state
        self._sysfs = sysfs
        self._write = write
        self._clock = clock
        self._sleep = sleep
        self._let_go_s = let_go_s
        self._stuck: dict[str, threading.Thread] = {}  # writes that the kernel has not answered

    def group(self, address: str) -> Group:
        """Return the IOMMU group of a device. Raises NotFound, Unsupported (no IOMMU)."""
        link = self._device(address) / "iommu_group"
        if not link.exists():
            raise Unsupported(
                f"the device {address} is in no IOMMU group, so a virtual machine that had it could write to all memory",
                mend="turn on VT-d or AMD-Vi in the firmware, and boot with intel_iommu=on iommu=pt",
            )
        directory = link.resolve()
        if _text(directory / "name") == "vfio-noiommu":
            raise Unsupported(f"the device {address} has no IOMMU, only vfio's mode without one", mend="turn on VT-d or AMD-Vi")
        members = sorted(path.name for path in (directory / "devices").iterdir())
        return Group(int(directory.name), tuple(self._member(each) for each in members))

    def check(self, addresses: Sequence[str]) -> tuple[Group, ...]:
        """Return the groups of devices that can be handed over together.

        Raises Conflict where a group has another device that is in use; functions of the same slots are not others.
        Raises Unsupported, NotFound.
        """
        groups: dict[int, Group] = {}
        for address in addresses:
            group = self.group(address)
            groups[group.number] = group
        slots = {address.rpartition(".")[0] for address in addresses}
        for group in groups.values():
            others = [each for each in group.endpoints if each.slot not in slots and each.driver not in ("", VFIO_DRIVER)]
            if others:
                named = ", ".join(f"{each.address} ({each.driver})" for each in others[:_REFUSALS_MAX])
                raise Conflict(
                    f"the device {addresses[0]} shares IOMMU group {group.number} with devices in use: {named}",
                    mend="put it into another slot, turn on ACS in the firmware, or stop using the others",
                )
        if not (self._sysfs / "bus/pci/drivers" / VFIO_DRIVER).is_dir():
            raise Unsupported(f"the driver {VFIO_DRIVER} is not loaded", mend=f"modprobe {VFIO_DRIVER}")
        return tuple(groups.values())

    def bind(self, addresses: Sequence[str]) -> tuple[Group, ...]:
        """Bind the devices, and all that must go with them, to vfio-pci; return their groups. Safe to repeat.

        Raises what `check` raises, and Unavailable where a driver does not let go in time. What was bound before is then
        given back to its driver.
        """
        groups = self.check(addresses)
        taken: list[str] = []
        try:
            for member in (member for group in groups for member in group.endpoints):
                if member.driver == VFIO_DRIVER:
                    continue
                self._remember(member)
                taken.append(member.address)
                self._move(member.address, VFIO_DRIVER)
        except BaseException:
            for address in reversed(taken):
                try:
                    self._give_back(address)
                except Unavailable:
                    continue  # its file stays: `recover` tries again
            raise
        return groups

    def release(self, addresses: Sequence[str]) -> None:
        """Give back every device of the groups of `addresses` that `bind` took. Safe to repeat.

        Raises Unavailable where the machine still holds one; it stays remembered, and a repeat goes on.
        """
        for address in addresses:
            try:
                members = [member.address for member in self.group(address).endpoints]
            except (NotFound, Unsupported):
                members = [address]
            for member in members:
                if self._file(member).exists():
                    self._give_back(member)

    def recover(self, keep: Collection[str]) -> tuple[str, ...]:
        """Give back all that an earlier agent took and nobody holds (`keep` are the addresses that someone does).

        Returns those that could not be given back; call it again later for them.
        """
        kept = {member.address for address in keep for member in self._endpoints(address)} | set(keep)
        failed = []
        for path in sorted(self._state.glob("*.json")) if self._state.is_dir() else ():
            address = path.stem
            if address in kept:
                continue
            try:
                self._give_back(address)
            except Unavailable:
                failed.append(address)
        return tuple(failed)

    def bars(self, address: str) -> tuple[Bar, ...]:
        """Return the device's windows in order. Raises NotFound."""
        return read_bars(_text(self._device(address) / "resource"))

    def reset_methods(self, address: str) -> tuple[str, ...]:
        """Return how the device can be reset, best first; nothing where it cannot: one tenant's state may reach the next then."""
        return tuple(_text(self._device(address) / "reset_method").split())

    def reset(self, address: str) -> None:
        """Reset the device while nobody uses it. Raises Unsupported where it knows no reset, Unavailable where it fails."""
        if not (self._device(address) / "reset").exists():
            raise Unsupported(f"the device {address} has no reset of its own", mend="restart the machine between two tenants")
        refusal = f"the device {address} does not reset"
        self._tell(address, self._device(address) / "reset", "1", refusal, self._clock() + self._let_go_s)

    def _device(self, address: str) -> Path:
        if not _ADDRESS.fullmatch(address):
            raise Invalid(f"{address!r} is no PCI address", mend="as in 0000:3b:00.0, in lower case")
        path = self._sysfs / "bus/pci/devices" / address
        if not path.exists():
            raise NotFound(f"there is no PCI device {address}", mend="has it fallen off the bus?")
        return path

    def _member(self, address: str) -> Member:
        kind = _text(self._device(address) / "class")
        return Member(address, self._driver(address), bridge=bool(kind) and int(kind, 16) >> 16 == _BRIDGE_CLASS)

    def _endpoints(self, address: str) -> tuple[Member, ...]:
        try:
            return self.group(address).endpoints
        except (NotFound, Unsupported):
            return ()

    def _driver(self, address: str) -> str:
        try:
            return (self._device(address) / "driver").readlink().name
        except OSError:
            return ""

    def _file(self, address: str) -> Path:
        return self._state / f"{address}.json"

    def _remember(self, member: Member) -> None:
        """The first word counts: in a repeat after a crash the device may be without a driver already."""
        if self._file(member.address).exists():
            return
        self._state.mkdir(parents=True, exist_ok=True)
        partial = self._file(member.address).with_suffix(".next")
        partial.write_bytes(encode(_Former(address=member.address, driver=member.driver)))
        partial.rename(self._file(member.address))

    def _give_back(self, address: str) -> None:
        if (stuck := self._stuck.get(address)) is not None and stuck.is_alive():
            raise _held(f"the kernel still takes {address} from its driver", self._let_go_s)
        self._stuck.pop(address, None)
        try:
            former = decode(self._file(address).read_bytes(), _Former).driver
        except Invalid:  # of a crash of the machine, after which its driver has the device again
            former = self._driver(address).replace(VFIO_DRIVER, "")
        try:
            self._move(address, former)
        except NotFound:
            log.warning("vfio.device.gone", device=address)  # should it come back, its driver takes it
        self._file(address).unlink(missing_ok=True)

    def _move(self, address: str, driver: str) -> None:
        """Take the device from the driver that it has and give it to `driver` (empty: to none)."""
        device, deadline = self._device(address), self._clock() + self._let_go_s
        held = self._driver(address)
        if held != driver:
            # Without the override any driver that knows the device may take it, and not the one that had it.
            self._tell(address, device / "driver_override", driver or "\n", f"{address} takes no driver_override", deadline)
            if held:
                refusal = f"{held} does not let go of {address}"
                self._tell(address, device / "driver/unbind", address, refusal, deadline)
                self._wait(lambda: self._driver(address) != held, refusal, deadline)
            if driver:
                refusal = f"{driver} does not take {address}"
                self._tell(address, self._sysfs / "bus/pci/drivers_probe", address, refusal, deadline)
                self._wait(lambda: self._driver(address) == driver, refusal, deadline)
        if driver != VFIO_DRIVER:
            self._tell(address, device / "driver_override", "\n", f"{address} keeps its driver_override", deadline)

    def _tell(self, address: str, path: Path, text: str, refusal: str, deadline: float) -> None:
        """Write, but not for ever: a write to `unbind` returns only when the driver has let go."""
        errors: list[OSError] = []

        def run() -> None:
            try:
                self._write(path, text)
            except OSError as error:
                errors.append(error)

        left_s = max(0.0, deadline - self._clock())
        thread = threading.Thread(target=run, name=f"write {path.name}", daemon=True)
        thread.start()
        thread.join(left_s)
        if thread.is_alive():
            self._stuck[address] = thread
            raise _held(refusal, self._let_go_s)
        if errors:
            raise Unavailable(f"{refusal}: {errors[0].strerror or errors[0]}", mend="the kernel's log may say why: dmesg")

    def _wait(self, done: Callable[[], bool], refusal: str, deadline: float) -> None:
        while not done():
            if self._clock() >= deadline:
                raise _held(refusal, self._let_go_s)
            self._sleep(_STEP_S)


def _held(what: str, seconds: float) -> Unavailable:
    return Unavailable(
        f"{what} within {seconds:g} s",
        mend="end what uses the device (nvidia-persistenced, a display, a process: lsof /dev/nvidia*)",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
