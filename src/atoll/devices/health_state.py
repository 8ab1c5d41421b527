"""The records of a device's health: what is known of it, and what can happen to it."""

from __future__ import annotations

import enum

from msgspec import Struct
from msgspec.structs import replace

from atoll.model.devices import GpuDevice, GpuHealth
from atoll.model.ports.devices import DeviceEvent, Trouble

REPEATS_S = 60.0
"""Within this span the same trouble of a device is told once; what came after the first is told as a count at its end."""
KINDS_MAX = 32
"""Different troubles of a device that are counted at a time; more of them are counted together."""
DEGRADED_S = 3_600.0
"""How long a trouble that left the device working is shown."""


class Cause(enum.StrEnum):
    """Why a device is not well, and so what ends it."""

    ERROR = "error"
    """The driver reported one that only a reset mends. Ends: the driver says recovered, or a reset shows."""
    ROWS = "rows"
    """Rows are to be remapped, or could not be. Ends when the driver's counters say so."""
    DRIVER_SAYS = "driver-says"
    """The driver calls it unwell, or has a doubt. Ends when it does not any more."""
    GONE = "gone"
    """Ends when it is there again."""
    SILENT = "silent"
    """Ends when the driver answers."""
    DRIVER = "driver"
    """The driver was changed under what runs. Ends when nothing of that time holds the device."""
    SUSPECT = "suspect"
    """Ends by itself after DEGRADED_S, or by a reset."""


class Ill(Struct, frozen=True, kw_only=True):
    cause: Cause
    reason: str
    since: float
    degrading: bool = False
    """It leaves the device on offer."""


class Repeats(Struct, frozen=True, kw_only=True):
    """What came of one kind of trouble since `first`, which was told."""

    trouble: Trouble
    start: int | None = None
    """The partition's, where it was one."""
    code: int
    """-1: all those that are one too many to be counted apart."""
    first: float
    more: int = 0
    message: str = ""


class DeviceState(Struct, frozen=True, kw_only=True):
    """All that is known of one device. `seen` is what its driver said last, before its ills are counted in."""

    seen: GpuDevice
    held: bool = False
    """An instance has something of it."""
    away: bool = False
    """A virtual machine has it as a whole: its driver does not know it, and that is as it should be."""
    ills: tuple[Ill, ...] = ()
    """At most one of each cause."""
    repeats: tuple[Repeats, ...] = ()

    @property
    def id(self) -> str:
        return self.seen.id

    @property
    def health(self) -> GpuHealth:
        if any(not ill.degrading for ill in self.ills):
            return GpuHealth.QUARANTINED
        return GpuHealth.DEGRADED if self.ills else GpuHealth.OK

    @property
    def reason(self) -> str:
        """Return the reasons of the ills, the worst first."""
        return "; ".join(ill.reason for ill in sorted(self.ills, key=lambda ill: (ill.degrading, ill.since)))

    def ill(self, cause: Cause) -> Ill | None:
        return next((ill for ill in self.ills if ill.cause is cause), None)

    def device(self) -> GpuDevice:
        """Return the device as it is to be offered, with its health. What is known to be broken counts as such, silent or not."""
        grave = {ill.cause for ill in self.ills if not ill.degrading}
        present, answers = Cause.GONE not in grave, grave != {Cause.SILENT}
        return replace(self.seen, health=self.health, reason=self.reason, present=present, answers=answers)

    @property
    def due(self) -> float | None:
        """Return when a Tick would change something."""
        times = [repeats.first + REPEATS_S for repeats in self.repeats]
        times += [ill.since + DEGRADED_S for ill in self.ills if ill.cause is Cause.SUSPECT]
        return min(times, default=None)


class Seen(Struct, frozen=True):
    """The driver answered, and the device is there."""

    device: GpuDevice


class Gone(Struct, frozen=True):
    """The driver answered, and the device is not there."""


class Silent(Struct, frozen=True):
    """The driver did not answer."""

    reason: str


class Told(Struct, frozen=True):
    """The driver reported something about this device."""

    event: DeviceEvent


class Held(Struct, frozen=True):
    """An instance holds it now, or none does any more."""

    held: bool


class Away(Struct, frozen=True):
    """It is taken from its driver for a virtual machine, or was given back."""

    away: bool


class Tick(Struct, frozen=True):
    """Time went by."""


Happening = Seen | Gone | Silent | Told | Held | Away | Tick
