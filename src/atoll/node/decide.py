"""The life of one instance on its node, as a pure function: no I/O, no clock, no randomness.

    PENDING → PREPARING → STARTING → RUNNING → STOPPING → STOPPED
                  ↑ ↓         ↓         ↓
                  BACKOFF ←───┴─────────┘          jobs: SUCCEEDED | FAILED

An instance that fails its health check is ended while its phase stays RUNNING (not ready), since STOPPING means
that the control plane wants it gone.
"""

from __future__ import annotations

from typing import Any, assert_never

from msgspec.structs import replace

from atoll.model.records import Exit, Severity
from atoll.model.spec import RestartPolicy
from atoll.model.states import Desired, Phase, advance
from atoll.node.idling import idle_again, idled, used
from atoll.node.moves import (
    AWAKE,
    KILL_REPEAT_S,
    UNUSED,
    Outcome,
    back_off,
    delay_of,
    describe_exit,
    enter,
    restarts,
    terminate,
)
from atoll.node.parking import adopted, end, park, promoted, rested, rests
from atoll.node.probing import first_probe_due, probed
from atoll.node.transitions import (
    Action,
    CancelPrepare,
    Clean,
    Due,
    Ended,
    Erase,
    Happening,
    Kill,
    Launch,
    Launched,
    LaunchFailed,
    Note,
    Now,
    Parked,
    ParkFailed,
    Paused,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Probed,
    Progressed,
    Reached,
    Recovered,
    Removed,
    Rest,
    Rules,
    State,
    Suspending,
    Used,
    WakeFailed,
    Wanted,
    Watch,
    Woken,
)

PASSING_TRIES_MAX = 5
"""Tries at a passing failure before the start of an instance that is never restarted."""
HOLD_S = 15.0
"""How long a new agent waits for the control plane before it starts what it finds gone and does not know the end of: that may have
ended for good, where the machine lost power, or its disk was full. Longer than a server takes to be replaced."""
DUE_SLACK_S = 0.001
"""A timer that comes so much too early still counts."""


def decide(rules: Rules, state: State, event: Happening, now: Now) -> Outcome:
    """Return the state after `event`, and what must be done now. An event that no longer matters changes nothing."""
    match event:
        case Wanted():
            after, actions = _wanted(rules, state, event.desired, now)
            if after.standby and not event.standby:
                after, more = promoted(after, now)
                actions = (*actions, *more)
        case Removed():
            after, actions = _wanted(rules, replace(state, removed=True), Desired.STOP, now)
        case Recovered():
            after, actions = _recovered(rules, state, event, now)
        case Reached():
            after, actions = replace(state, held_until=None), ()
        case Progressed():
            after, actions = (replace(state, message=event.message) if state.phase is Phase.PREPARING else state), ()
        case Prepared():
            after, actions = _prepared(state, event, now)
        case PrepareFailed():
            after, actions = _prepare_failed(rules, state, event, now)
        case Launched():
            after, actions = _launched(rules, state, event, now)
        case LaunchFailed():
            after, actions = _launch_failed(rules, state, event, now)
        case Ended():
            after, actions = _ended(rules, state, event.exit, now)
        case Probed():
            after, actions = probed(rules, state, event, now)
        case Suspending() | Parked() | ParkFailed() | Woken() | WakeFailed():
            after, actions = rested(rules, state, event, now)
        case Paused():
            after, actions = (replace(state, paused=event.paused) if state.phase.live else state), ()
        case Used():
            after, actions = used(rules, state, now, in_use=event.now), ()
        case Due():
            after, actions = _due(rules, state, now)
        case _:
            assert_never(event)
    if after.removed and after.phase.final and not after.erased:
        return replace(after, erased=True), (*actions, Erase())
    return after, actions


def _wanted(rules: Rules, state: State, desired: Desired, now: Now) -> Outcome:
    desired = advance(state.desired, desired)
    state = replace(state, desired=desired)
    match state.phase:
        case Phase.PENDING if desired is Desired.RUN:
            return enter(state, Phase.PREPARING, now), (Prepare(),)
        case Phase.PENDING:
            return enter(state, Phase.STOPPED, now), ()
        case Phase.PREPARING if desired is not Desired.RUN:
            return enter(state, Phase.STOPPED, now, message=""), (CancelPrepare(), Clean(all=True))
        case Phase.BACKOFF if desired is not Desired.RUN:
            return enter(state, Phase.STOPPED, now), (Clean(all=True),)
        case Phase.STARTING if desired is Desired.STOP:
            return enter(state, Phase.STOPPING, now, ready=False), ()
        case Phase.RUNNING if desired is Desired.STOP:
            if state.ending:
                return enter(state, Phase.STOPPING, now, kill_due=state.kill_due), ()
            if state.rest is not Rest.AWAKE or state.paused:
                return end(state, now)
            return terminate(rules, state, Phase.STOPPING, now)
        case _:
            return state, ()


def _recovered(rules: Rules, state: State, found: Recovered, now: Now) -> Outcome:
    match state.phase:
        case Phase.STOPPED | Phase.SUCCEEDED | Phase.FAILED | Phase.LOST:
            return state, (Clean(all=True),)
        case Phase.PENDING | Phase.PREPARING:
            if state.desired is not Desired.RUN:
                return enter(state, Phase.STOPPED, now), (Clean(all=True),)
            return _held(enter(state, Phase.PREPARING, now, retry_due=now.monotonic), now), (Clean(),)
        case Phase.BACKOFF:
            if state.desired is not Desired.RUN:
                return enter(state, Phase.STOPPED, now), (Clean(all=True),)
            due = now.monotonic + delay_of(rules, max(0, state.failures - 1))
            return _held(enter(state, Phase.BACKOFF, now, retry_due=due), now), (Clean(),)
        case Phase.STARTING | Phase.RUNNING | Phase.STOPPING:
            return _recovered_live(rules, state, found, now)


def _recovered_live(rules: Rules, state: State, found: Recovered, now: Now) -> Outcome:
    if found.pid is None and found.exit is None and found.present and state.phase is Phase.STARTING:
        return _held(enter(state, Phase.BACKOFF, now, retry_due=now.monotonic), now), (Clean(),)
    if found.pid is None:
        after, actions = _ended(rules, state, found.exit, now)
        # How it ended is kept until an agent has taken that in, so that this end has been told to nobody yet.
        return (after if found.exit is not None else _held(after, now)), actions
    if state.phase is Phase.STOPPING and state.rest is not Rest.AWAKE:
        after, actions = end(state, now, pid=found.pid)
        return after, (Watch(), *actions)
    if state.phase is Phase.STOPPING or (state.phase is Phase.STARTING and state.desired is Desired.STOP):
        after, actions = terminate(rules, state, Phase.STOPPING, now, pid=found.pid)
        return after, (Watch(), *actions)
    note = Note("adopted", "the agent was restarted and found the process running")
    if state.phase is Phase.STARTING:
        after, actions = _launched(rules, state, Launched(found.pid, now.wall), now)
        return after, (*actions, note)
    age_s = max(0.0, now.wall - (state.started_at or now.wall))
    if state.ending and state.rest is not Rest.AWAKE:
        # It could not be woken, and was about to be killed.
        after = enter(replace(state, pid=found.pid), Phase.RUNNING, now, kill_due=now.monotonic + KILL_REPEAT_S)
        return after, (Watch(), Kill())
    alive = replace(state, pid=found.pid, ending=False, running_since=now.monotonic - age_s)
    if state.rest is not Rest.AWAKE:
        after, actions = adopted(alive, now)
        return after, (Watch(), *actions, note)
    probing = rules.health is not None or ((rules.gate_port is not None or rules.warmed) and not state.ready)
    after = enter(alive, Phase.RUNNING, now, probe_due=now.monotonic if probing else None)
    return idle_again(rules, after, now), (Watch(), note)


def _held(state: State, now: Now) -> State:
    """Let the next start, if there is to be one, wait for the control plane, but not for ever."""
    return state if state.retry_due is None else replace(state, held_until=now.monotonic + HOLD_S)


def _prepared(state: State, event: Prepared, now: Now) -> Outcome:
    if state.phase is not Phase.PREPARING:
        return state, ()
    after = enter(
        state,
        Phase.STARTING,
        now,
        image_digest=event.image_digest,
        volume_digests=event.volume_digests,
        message="",
        address=event.address,
        ipv6=event.ipv6,
        stop_signal=event.stop_signal,
    )
    return after, (Launch(),)


def _prepare_failed(rules: Rules, state: State, event: PrepareFailed, now: Now) -> Outcome:
    if state.phase is not Phase.PREPARING:
        return state, ()
    note = Note("prepare-failed", event.message, Severity.WARNING)
    if not restarts(rules) and (not event.passing or state.failures + 1 >= PASSING_TRIES_MAX):
        return enter(state, Phase.FAILED, now, message=event.message), (Clean(all=True), note)
    return back_off(rules, state, event.message, now, note)


def _launched(rules: Rules, state: State, event: Launched, now: Now) -> Outcome:
    changes: dict[str, Any] = {
        "pid": event.pid,
        "started_at": event.at,
        "run": state.run + 1,
        "running_since": now.monotonic,
        "ready_at": None,
    }
    if state.phase is Phase.STOPPING:
        after, actions = terminate(rules, state, Phase.STOPPING, now, **changes)
        return after, (Watch(), *actions)
    if state.phase is not Phase.STARTING:
        return state, ()
    note = Note("started", f"started as process {event.pid}")
    changes |= {"message": "", "probes": 0, "misses": 0} | AWAKE | UNUSED
    first = first_probe_due(rules, now)
    if first is None and rests(rules, state):
        after, actions = park(enter(state, Phase.RUNNING, now, **changes), now)
        return after, (Watch(), note, *actions)
    changes |= {"ready": True, "ready_at": now.wall} if first is None else {"ready": False, "probe_due": first}
    return used(rules, enter(state, Phase.RUNNING, now, **changes), now, in_use=False), (Watch(), note)


def _launch_failed(rules: Rules, state: State, event: LaunchFailed, now: Now) -> Outcome:
    note = Note("start-failed", event.message, Severity.WARNING)
    match state.phase:
        case Phase.STOPPING:
            return enter(state, Phase.STOPPED, now, message=event.message), (Clean(all=True), note)
        case Phase.STARTING if not restarts(rules):
            return enter(state, Phase.FAILED, now, message=event.message), (Clean(all=True), note)
        case Phase.STARTING if state.desired is not Desired.RUN:
            return enter(state, Phase.STOPPED, now, message=event.message), (Clean(all=True), note)
        case Phase.STARTING:
            return back_off(rules, state, event.message, now, note)
        case _:
            return state, ()


def _ended(rules: Rules, state: State, exit: Exit | None, now: Now) -> Outcome:
    """The process is gone: stopped, done, failed, or to be started again."""
    if not state.phase.live:
        return state, ()
    code = exit.code if exit else None
    message = describe_exit(exit, rules.memory_bytes)
    if state.ending:
        message = state.message
    severity = Severity.ERROR if exit and exit.oom else Severity.INFO if code == 0 else Severity.WARNING
    note = Note("out-of-memory" if exit and exit.oom else "exited", message, severity)
    restart = rules.restart
    if state.phase is Phase.STOPPING or (restart is not None and state.desired is not Desired.RUN):
        after = enter(state, Phase.STOPPED, now, exit=exit, message=message)
        return after, (Clean(all=True), Note("stopped", message))
    done = code == 0 and not state.ending
    if restart is None or restart.policy is RestartPolicy.NEVER or (restart.policy is RestartPolicy.ON_FAILURE and done):
        final = Phase.SUCCEEDED if done else Phase.FAILED
        return enter(state, final, now, exit=exit, message="" if done else message), (Clean(all=True), note)
    ran_s = now.monotonic - state.running_since if state.running_since is not None else 0.0
    if ran_s >= restart.reset:
        state = replace(state, failures=0)
    return back_off(rules, replace(state, exit=exit), message, now, note)


def _due(rules: Rules, state: State, now: Now) -> Outcome:
    reached = now.monotonic + DUE_SLACK_S
    actions: list[Action] = []
    if state.start_due is not None and state.start_due <= reached and state.phase in (Phase.BACKOFF, Phase.PREPARING):
        return enter(state, Phase.PREPARING, now), (Prepare(),)
    if state.kill_due is not None and state.kill_due <= reached:
        state = replace(state, kill_due=now.monotonic + KILL_REPEAT_S)
        actions.append(Kill())
    if state.probe_due is not None and state.probe_due <= reached:
        state = replace(state, probe_due=None)
        actions.append(Probe(state.run))
    if state.idle_due is not None and state.idle_due <= reached:
        state, more = idled(rules, state, now)
        actions.extend(more)
    return state, tuple(actions)
