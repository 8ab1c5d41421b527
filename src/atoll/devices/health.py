"""How a device fares: a pure state machine per device. What the driver says goes in; health, and what to tell, come out.

A device's health is the worst of its ills. Each ill has a cause, and ends by that cause's own sign only: a device that was taken
away for an error comes back when the driver says that it recovered or when a reset shows, and never because time went by.
"""

from __future__ import annotations

import enum

from msgspec import Struct
from msgspec.structs import replace

from atoll.devices.xid import XidMeaning, classify_xid
from atoll.model.devices import GpuDevice, GpuHealth
from atoll.model.ports.devices import DeviceEvent, Trouble

__all__ = ["Cause", "DeviceState", "Gone", "Held", "Ill", "Seen", "Silent", "Tick", "Told", "XidMeaning", "classify_xid", "decide"]

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


_ENDED_BY_RESET = frozenset({Cause.ERROR, Cause.SUSPECT})


class Ill(Struct, frozen=True, kw_only=True):
    cause: Cause
    reason: str
    since: float
    degrading: bool = False
    """It leaves the device on offer."""


class _Repeats(Struct, frozen=True, kw_only=True):
    """What came of one kind of trouble since `first`, which was told."""

    trouble: Trouble
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
    ills: tuple[Ill, ...] = ()
    """At most one of each cause."""
    repeats: tuple[_Repeats, ...] = ()

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
        """Return the device as it is to be offered, with its health."""
        present, answers = self.ill(Cause.GONE) is None, self.ill(Cause.SILENT) is None
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


class Tick(Struct, frozen=True):
    """Time went by."""


Happening = Seen | Gone | Silent | Told | Held | Tick


def decide(state: DeviceState, event: Happening, now: float) -> tuple[DeviceState | None, tuple[DeviceEvent, ...]]:
    """Return the device's next state (None: forget it) and what to tell about it. `now` in seconds since the epoch.

    However many troubles come, what is told stays below KINDS_MAX + 1 for each REPEATS_S, and the state below a fixed size.
    """
    before = state.health
    match event:
        case Seen(device):
            state, told = _seen(state, device, now)
        case Gone():
            return _gone(state, now)
        case Silent(reason):
            # one word for all devices of the driver is told by whoever asked it
            state, told = _with(state, Cause.SILENT, reason, now), ()
        case Told(what):
            state, told = _told(state, what, now)
        case Held(held):
            return _held(state, held, now)
        case Tick():
            state, told = _tick(state, now)
    if before is not GpuHealth.OK and state.health is GpuHealth.OK and not any(e.trouble is Trouble.RECOVERED for e in told):
        told = (*told, _event(state, Trouble.RECOVERED, "is well again", now))
    return state, told


def _event(state: DeviceState, trouble: Trouble, words: str, now: float, *, code: int = 0, mend: str = "") -> DeviceEvent:
    name = state.seen.model or "GPU"
    return DeviceEvent(trouble=trouble, device=state.id, code=code, message=f"{name} {state.id} {words}", mend=mend, at=now)


def _with(state: DeviceState, cause: Cause, reason: str, now: float, *, degrading: bool = False) -> DeviceState:
    """Add an ill; one of the same cause keeps its beginning, and takes the newer reason (a suspicion begins anew)."""
    old = state.ill(cause)
    since = old.since if old is not None and cause is not Cause.SUSPECT else now
    ill = Ill(cause=cause, reason=reason, since=since, degrading=degrading)
    return replace(state, ills=(*(other for other in state.ills if other.cause is not cause), ill))


def _without(state: DeviceState, causes: frozenset[Cause]) -> DeviceState:
    return replace(state, ills=tuple(ill for ill in state.ills if ill.cause not in causes))


def _seen(state: DeviceState, device: GpuDevice, now: float) -> tuple[DeviceState, tuple[DeviceEvent, ...]]:
    old, told = state.seen, []
    state = replace(state, seen=replace(device, health=GpuHealth.OK, reason=""))
    back = state.ill(Cause.GONE) is not None
    if back or _was_reset(old, device):
        state = _without(state, _ENDED_BY_RESET)
    state = _without(state, frozenset({Cause.GONE, Cause.SILENT}))
    if old.driver and device.driver and old.driver != device.driver:
        words = f"has another driver: {device.driver} instead of {old.driver}"
        if state.held:
            state = _with(state, Cause.DRIVER, f"the driver was changed from {old.driver} to {device.driver} under what runs", now)
            told.append(_event(state, Trouble.DRIVER_CHANGED, words, now, mend="what runs on it is started anew elsewhere"))
        else:
            told.append(_event(state, Trouble.DRIVER_CHANGED, words, now))
    state, rows = _fold(state, Cause.ROWS, _rows_of(device), now)
    says = "" if device.health is GpuHealth.OK or state.ill(Cause.ROWS) else device.reason or "the driver calls it unwell"
    state, said = _fold(state, Cause.DRIVER_SAYS, says, now, degrading=device.health is GpuHealth.DEGRADED)
    return state, (*told, *rows, *said)


def _was_reset(old: GpuDevice, new: GpuDevice) -> bool:
    """Counters that only a reset (or a new start of the driver) makes smaller, and remapping that only it does."""
    return new.ecc_errors < old.ecc_errors or (old.remap_pending and not new.remap_pending)


def _rows_of(device: GpuDevice) -> str:
    if device.remap_failed:
        return "bad rows of memory could not be remapped: have the GPU replaced"
    return "bad rows of memory wait for a reset to be remapped" if device.remap_pending else ""


def _fold(
    state: DeviceState, cause: Cause, reason: str, now: float, *, degrading: bool = False
) -> tuple[DeviceState, tuple[DeviceEvent, ...]]:
    """Begin, go on with or end an ill that holds as long as the driver says so. What begins or gets worse is told."""
    old = state.ill(cause)
    if not reason:
        return _without(state, frozenset({cause})), ()
    state = _with(state, cause, reason, now, degrading=degrading)
    if old is not None and old.degrading <= degrading:
        return state, ()
    trouble, words = (Trouble.SUSPECT, "is doubtful") if degrading else (Trouble.BROKEN, "is taken out")
    return state, (_event(state, trouble, f"{words}: {reason}", now),)


def _gone(state: DeviceState, now: float) -> tuple[DeviceState | None, tuple[DeviceEvent, ...]]:
    state = _without(state, frozenset({Cause.SILENT}))
    told: tuple[DeviceEvent, ...] = ()
    if state.ill(Cause.GONE) is None:
        words = "has vanished: the driver does not know it any more"
        mend = "see the kernel's log; restart the node if it does not come back"
        told = (_event(state, Trouble.VANISHED, words, now, mend=mend),)
        state = _with(state, Cause.GONE, "it has vanished: the driver does not know it any more", now)
    return (state if state.held else None), told


def _held(state: DeviceState, held: bool, now: float) -> tuple[DeviceState | None, tuple[DeviceEvent, ...]]:
    before = state.health
    state = replace(state, held=held)
    if held:
        return state, ()
    if state.ill(Cause.GONE) is not None:
        return None, ()
    state = _without(state, frozenset({Cause.DRIVER}))
    if before is not GpuHealth.OK and state.health is GpuHealth.OK:
        return state, (_event(state, Trouble.RECOVERED, "is well again", now),)
    return state, ()


def _told(state: DeviceState, event: DeviceEvent, now: float) -> tuple[DeviceState, tuple[DeviceEvent, ...]]:
    at = event.at or now
    name = f"XID {event.code}: {event.message}" if event.code and "XID" not in event.message else event.message
    match event.trouble:
        case Trouble.RECOVERED:
            state = _without(state, _ENDED_BY_RESET | {Cause.DRIVER_SAYS, Cause.SILENT})
            return replace(state, repeats=()), (replace(event, device=state.id, at=at),)
        case Trouble.BROKEN:
            state = _with(state, Cause.ERROR, name, at)
        case Trouble.SUSPECT:
            state = _with(state, Cause.SUSPECT, name, at, degrading=True)
        case Trouble.VANISHED:
            state = _with(state, Cause.GONE, name, at)
        case Trouble.SILENT:
            state = _with(state, Cause.SILENT, name, at)
        case Trouble.DRIVER_CHANGED:
            state = _with(state, Cause.DRIVER, name, at) if state.held else state
        case Trouble.FAULT:
            pass
    return _count(state, replace(event, device=state.id, at=at), now)


def _count(state: DeviceState, event: DeviceEvent, now: float) -> tuple[DeviceState, tuple[DeviceEvent, ...]]:
    """Tell the first of a kind, count the others."""
    keys = {(repeats.trouble, repeats.code) for repeats in state.repeats}
    key = event.trouble, event.code
    if key not in keys and len(keys) >= KINDS_MAX:
        key = Trouble.SUSPECT, -1
    if key not in keys:
        first = _Repeats(trouble=key[0], code=key[1], first=now, message=event.message)
        return replace(state, repeats=(*state.repeats, first)), (event,)
    counted = tuple(
        replace(repeats, more=repeats.more + 1) if (repeats.trouble, repeats.code) == key else repeats for repeats in state.repeats
    )
    return replace(state, repeats=counted), ()


def _tick(state: DeviceState, now: float) -> tuple[DeviceState, tuple[DeviceEvent, ...]]:
    over = [repeats for repeats in state.repeats if now >= repeats.first + REPEATS_S]
    told = tuple(_sum_up(state, repeats, now) for repeats in over if repeats.more)
    # a storm goes on being counted from here, so that it is told once for each span
    going_on = tuple(replace(repeats, first=now, more=0) for repeats in over if repeats.more)
    state = replace(state, repeats=(*(repeats for repeats in state.repeats if repeats not in over), *going_on))
    suspicion = state.ill(Cause.SUSPECT)
    if suspicion is not None and now >= suspicion.since + DEGRADED_S:
        state = _without(state, frozenset({Cause.SUSPECT}))
    return state, told


def _sum_up(state: DeviceState, repeats: _Repeats, now: float) -> DeviceEvent:
    what = "other troubles" if repeats.code < 0 else repeats.message
    words = f"had {repeats.more} more in {round(now - repeats.first)} s of: {what}"
    return _event(state, repeats.trouble, words, now, code=max(0, repeats.code))
