"""How a device fares: a pure state machine per device. What the driver says goes in; health, and what to tell, come out.

A device's health is the worst of its ills. Each ill has a cause, and ends by that cause's own sign only: a device that was taken
away for an error comes back when the driver says that it recovered or when a reset shows, and never because time went by.
"""

from __future__ import annotations

from msgspec.structs import replace

from atoll.devices.health_state import (
    DEGRADED_S,
    KINDS_MAX,
    REPEATS_S,
    Away,
    Cause,
    DeviceState,
    Gone,
    Happening,
    Held,
    Ill,
    Repeats,
    Seen,
    Silent,
    Tick,
    Told,
)
from atoll.devices.xid import XidMeaning, classify_xid
from atoll.model.devices import GpuDevice, GpuHealth
from atoll.model.ports.devices import DeviceEvent, Trouble

__all__ = [
    "DEGRADED_S",
    "KINDS_MAX",
    "REPEATS_S",
    "Away",
    "Cause",
    "DeviceState",
    "Gone",
    "Happening",
    "Held",
    "Ill",
    "Seen",
    "Silent",
    "Tick",
    "Told",
    "XidMeaning",
    "classify_xid",
    "count",
    "decide",
]

_ENDED_BY_RESET = frozenset({Cause.ERROR, Cause.SUSPECT})
_NOT_ITS_DRIVER_S = frozenset({Trouble.VANISHED, Trouble.SILENT, Trouble.DRIVER_CHANGED})
"""What a driver cannot say of a device that it does not have."""


def decide(state: DeviceState, event: Happening, now: float) -> tuple[DeviceState | None, tuple[DeviceEvent, ...]]:
    """Return the device's next state (None: forget it) and what to tell about it. `now` in seconds since the epoch.

    However many troubles come, what is told stays below KINDS_MAX + 1 for each REPEATS_S, and the state below a fixed size.
    """
    before = state.health
    told: tuple[DeviceEvent, ...] = ()
    if state.away and (isinstance(event, Gone | Silent) or (isinstance(event, Told) and event.event.trouble in _NOT_ITS_DRIVER_S)):
        return state, ()
    match event:
        case Away(away):
            state = _without(replace(state, away=away), frozenset({Cause.SILENT}))
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


def _named(state: DeviceState, event: DeviceEvent) -> DeviceEvent:
    """Return the event with a message that names its device."""
    if state.id in event.message:
        return event
    return replace(event, message=f"{_name(state)}: {event.message}")


def _name(state: DeviceState) -> str:
    return f"{state.seen.model or 'GPU'} {state.id}".strip()


def _event(state: DeviceState, trouble: Trouble, words: str, now: float, *, code: int = 0, mend: str = "") -> DeviceEvent:
    return DeviceEvent(trouble=trouble, device=state.id, code=code, message=f"{_name(state)} {words}", mend=mend, at=now)


def _with(state: DeviceState, cause: Cause, reason: str, now: float, *, degrading: bool = False) -> DeviceState:
    """Add an ill. One of the same cause keeps its beginning and takes the newer reason, but the first error is what began it all,
    and a suspicion begins anew."""
    old = state.ill(cause)
    if old is not None and cause is Cause.ERROR:
        return state
    since = old.since if old is not None and cause is not Cause.SUSPECT else now
    ill = Ill(cause=cause, reason=reason, since=since, degrading=degrading)
    return replace(state, ills=(*(other for other in state.ills if other.cause is not cause), ill))


def _without(state: DeviceState, causes: frozenset[Cause]) -> DeviceState:
    return replace(state, ills=tuple(ill for ill in state.ills if ill.cause not in causes))


def _seen(state: DeviceState, device: GpuDevice, now: float) -> tuple[DeviceState, tuple[DeviceEvent, ...]]:
    old, told = state.seen, []
    if device.health is GpuHealth.QUARANTINED:
        # A driver that could not read its counters says 0 of them, which looks like a reset that never was.
        pending = old.remap_pending or device.remap_pending
        device = replace(device, ecc_errors=max(old.ecc_errors, device.ecc_errors), remap_pending=pending)
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
    # A driver's adapter that knows why they wait may call that a doubt only (NVIDIA's, after correctable errors): its word holds.
    waits = device.remap_pending and device.health is not GpuHealth.DEGRADED
    return "bad rows of memory wait for a reset to be remapped" if waits else ""


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
        case Trouble.RECOVERED if not event.device:
            # its driver answers: that mends nothing of the device itself
            return _without(state, frozenset({Cause.SILENT})), (replace(event, device=state.id, at=at),)
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
    state, told = count(state, replace(event, device=state.id, at=at), now)
    return state, tuple(_named(state, one) for one in told)


def count(state: DeviceState, event: DeviceEvent, now: float) -> tuple[DeviceState, tuple[DeviceEvent, ...]]:
    """Tell the first of a kind as it is, count the others: Tick sums them up. Health stays as it is."""
    keys = {(repeats.trouble, repeats.code, repeats.start) for repeats in state.repeats}
    key = event.trouble, event.code, event.start
    if key not in keys and len(keys) >= KINDS_MAX:
        key = Trouble.SUSPECT, -1, None
    if key not in keys:
        first = Repeats(trouble=key[0], code=key[1], start=key[2], first=now, message=event.message)
        return replace(state, repeats=(*state.repeats, first)), (event,)
    counted = tuple(
        replace(repeats, more=repeats.more + 1) if (repeats.trouble, repeats.code, repeats.start) == key else repeats
        for repeats in state.repeats
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


def _sum_up(state: DeviceState, repeats: Repeats, now: float) -> DeviceEvent:
    what = "other troubles" if repeats.code < 0 else repeats.message
    words = f"had {repeats.more} more in {round(now - repeats.first)} s of: {what}"
    return replace(_event(state, repeats.trouble, words, now, code=max(0, repeats.code)), start=repeats.start)
