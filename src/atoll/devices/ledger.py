"""What the node has made of its devices, kept in one small file so that `kill -9` of the agent loses none of it.

A partition is written down before it is made. After a crash the file therefore names every partition that may be ours, and what it
does not name is someone else's and is never touched. (One that was written down and never made, and that someone else then makes at
the very same place before this is set right, is taken for ours: there is no telling them apart.)

The file is replaced as a whole, and not forced to the disk: the kernel keeps what a killed process wrote, and with the kernel all
partitions and all errors end too, which `boot` shows; devices are then with their own drivers again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from atoll.devices.health import Ill
from atoll.model.devices import GpuDevice, GpuGrant, GpuPartition, GpuSharing

FILE = "devices.json"
FILE_BYTES_MAX = 4 << 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = structlog.get_logger()


class Made(Struct, frozen=True, kw_only=True):
    """A partition that was to be made for an instance, and perhaps was. Without `instance` it is to be removed."""

    device: str
    profile: str
    start: int
    instance: str
    id: str = ""
    """Empty until it was made."""

    def is_of(self, partition: GpuPartition) -> bool:
        """Return whether `partition`, found on the same device, is this one; a half-made one has no id."""
        if (partition.start, partition.profile) != (self.start, self.profile):
            return False
        return not self.id or not partition.id or self.id == partition.id


class Handed(Struct, frozen=True, kw_only=True):
    """A device that was to be taken from its driver for a virtual machine, and perhaps was. Without `instance` it is to go back."""

    device: str
    pci: str
    instance: str
    stuck: bool = False
    """It was tried to give it back, in vain."""


class Known(Struct, frozen=True, kw_only=True):
    """A device that must not be forgotten: something holds it, or it was taken out."""

    device: GpuDevice
    ills: tuple[Ill, ...] = ()


class Ledger(Struct, frozen=True, kw_only=True):
    """`boot` tells one start of the machine from the next: no error and no partition outlives it."""

    boot: str = ""
    holdings: dict[str, tuple[GpuGrant, ...]] = {}
    made: tuple[Made, ...] = ()
    known: tuple[Known, ...] = ()
    handed: tuple[Handed, ...] = ()

    def is_handed(self, device: str) -> bool:
        return any(handed.device == device for handed in self.handed)

    def others_on(self, device: str, instance: str) -> tuple[GpuGrant, ...]:
        """Return what instances beside `instance` hold of a device."""
        return tuple(
            grant for other, grants in self.holdings.items() if other != instance for grant in grants if grant.device == device
        )

    def sharers_of(self, device: str) -> tuple[GpuGrant, ...]:
        """Return what is held of a device by MPS."""
        return tuple(
            grant
            for grants in self.holdings.values()
            for grant in grants
            if grant.device == device and grant.sharing is GpuSharing.MPS
        )

    def holds(self, device: str) -> bool:
        return any(grant.device == device for grants in self.holdings.values() for grant in grants)

    def made_at(self, device: str, start: int) -> Made | None:
        return next((made for made in self.made if (made.device, made.start) == (device, start)), None)

    def with_made(self, new: Made) -> Ledger:
        kept = tuple(made for made in self.made if (made.device, made.start) != (new.device, new.start))
        return replace(self, made=(*kept, new))

    def without_made(self, device: str, start: int) -> Ledger:
        return replace(self, made=tuple(made for made in self.made if (made.device, made.start) != (device, start)))


class LedgerFile:
    """The file, and what is in it. Every change is a new `Ledger` given to `write`."""

    def __init__(self, directory: Path, boot: str) -> None:
        self._directory = directory
        self._path = directory / FILE
        self._waits = False
        self.now = self._read(boot)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Have all that is written inside in the file at the end, or nothing of it. Nothing may be awaited inside.

        Raises OSError: then all is as before.
        """
        before, self._waits = self.now, True
        try:
            yield
        finally:
            self._waits = False
            changed, self.now = self.now, before
        self.write(changed)

    def write(self, ledger: Ledger) -> None:
        """Replace what is kept; the same again costs nothing. Raises OSError: then all is as before."""
        if ledger == self.now:
            return
        if self._waits:
            self.now = ledger
            return
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(ledger))
        temporary.replace(self._path)
        self.now = ledger

    def _read(self, boot: str) -> Ledger:
        try:
            with self._path.open("rb") as file:
                ledger = msgspec.json.decode(file.read(FILE_BYTES_MAX), type=Ledger)
        except FileNotFoundError:
            return Ledger(boot=boot)
        except (OSError, msgspec.DecodeError) as error:
            # partitions that it named are then left standing as someone else's: that costs room, and never another's work
            log.error("what was made of the devices is not known any more", file=str(self._path), error=str(error))
            return Ledger(boot=boot)
        if ledger.boot == boot:
            return ledger
        known = tuple(replace(known, ills=()) for known in ledger.known)
        return replace(ledger, boot=boot, made=(), known=known, handed=())


def boot_id() -> str:
    """Return what tells this start of the machine from others; empty where it does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
