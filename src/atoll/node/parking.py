"""When an instance that stands by is parked and woken, as part of its state machine: pure, as `decide` is.

    ready ─▶ PARKING ─▶ PARKED ─▶ WAKING ─▶ awake, and ready once its check succeeds
                │                    │
                ▼ cannot be parked   ▼ cannot be woken
       waits awake, ready         ended, and started again

The order matters: a frozen process cannot answer its driver. So it leaves its devices before it is frozen, and comes back to them
after it was let go on.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from atoll.model.records import Severity
from atoll.model.states import Desired, Phase
from atoll.node.moves import KILL_REPEAT_S, Outcome, enter
from atoll.node.transitions import (
    Kill,
    Note,
    Now,
    Park,
    Parked,
    ParkFailed,
    Rest,
    Rules,
    State,
    Suspending,
    Wake,
    WakeFailed,
    Woken,
)


def rests(rules: Rules, state: State) -> bool:
    """Whether an instance that has become ready is parked instead of serving. A template's sandbox is not (it has no restart rule):
    whoever takes it has a command in it at once."""
    return state.standby and state.desired is Desired.RUN and not state.kept_awake and rules.restart is not None


def park(state: State, now: Now) -> Outcome:
    """Begin to park what has become ready."""
    after = enter(state, Phase.RUNNING, now, ready=False, rest=Rest.PARKING, message="", probes=0, misses=0)
    return after, (Park(state.run),)


def promoted(state: State, now: Now) -> Outcome:
    """It is to serve now: wake it if it is parked. What is still being parked is woken afterwards."""
    state = replace(state, standby=False)
    if state.rest is not Rest.PARKED:
        return state, ()
    if state.phase is not Phase.RUNNING:
        return replace(state, rest=Rest.WAKING), ()  # it is being ended, and is killed before it could wake
    return enter(state, Phase.RUNNING, now, rest=Rest.WAKING), (Wake(state.run),)


def rested(rules: Rules, state: State, event: Suspending | Parked | ParkFailed | Woken | WakeFailed, now: Now) -> Outcome:
    """Take in how parking or waking went."""
    if state.phase is not Phase.RUNNING or event.run != state.run or state.ending:
        return state, ()
    match event:
        case Suspending() if state.rest is Rest.PARKING:
            return replace(state, suspended=tuple(sorted({*state.suspended, *event.pids}))), ()
        case Parked() if state.rest is Rest.PARKING:
            note = Note("parked", event.message)
            if state.standby:
                return enter(state, Phase.RUNNING, now, rest=Rest.PARKED), (note,)
            return enter(state, Phase.RUNNING, now, rest=Rest.WAKING), (note, Wake(state.run))
        case ParkFailed() if state.rest is Rest.PARKING:
            due = now.monotonic + rules.health.interval if rules.health else None
            changes: dict[str, Any] = {"rest": Rest.AWAKE, "kept_awake": True, "suspended": (), "ready": True, "ready_at": now.wall}
            note = Note("park-failed", f"waits awake: {event.message}", Severity.WARNING)
            return enter(state, Phase.RUNNING, now, probe_due=due, **changes), (note,)
        case Woken() if state.rest is Rest.WAKING:
            note = Note("woken", event.message)
            checked = rules.health is not None or rules.gate_port is not None
            # Its check begins anew, as after a start: failures are forgiven for as long.
            changes = {"rest": Rest.AWAKE, "suspended": (), "running_since": now.monotonic, "probes": 0, "misses": 0}
            changes |= {"probe_due": now.monotonic} if checked else {"ready": True, "ready_at": now.wall}
            return enter(state, Phase.RUNNING, now, **changes), (note,)
        case WakeFailed() if state.rest is not Rest.AWAKE:
            message = f"could not be woken: {event.message}"
            after = enter(state, Phase.RUNNING, now, ending=True, message=message, kill_due=now.monotonic + KILL_REPEAT_S)
            return after, (Kill(), Note("wake-failed", message, Severity.ERROR))
        case _:
            return state, ()


def end(state: State, now: Now, **changes: Any) -> Outcome:
    """End at once what is parked, or between two states: it holds no request, and would not hear a signal."""
    return enter(state, Phase.STOPPING, now, ready=False, kill_due=now.monotonic + KILL_REPEAT_S, **changes), (Kill(),)


def adopted(state: State, now: Now) -> Outcome:
    """Go on where an earlier agent has left off; `state` is that of a process that runs and is not awake."""
    match state.rest:
        case Rest.PARKING:
            return enter(state, Phase.RUNNING, now), (Park(state.run, again=True),)
        case Rest.PARKED if state.standby:
            return enter(state, Phase.RUNNING, now), ()
        case _:
            again = state.rest is Rest.WAKING
            return enter(state, Phase.RUNNING, now, rest=Rest.WAKING), (Wake(state.run, again=again),)
