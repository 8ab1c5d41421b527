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
from atoll.model.spec import HealthKind, RestartPolicy, Stop
from atoll.model.states import Desired, Phase, advance, legal
from atoll.model.units import format_bytes, format_seconds
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
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Probed,
    Progressed,
    Recovered,
    Removed,
    Rules,
    Signal,
    State,
    Wanted,
    Watch,
)

KILL_REPEAT_S = 5.0
"""A process that survives SIGKILL (it hangs in the kernel) is killed again so often."""
PROBE_FIRST_S = 0.005
PROBE_EXEC_FIRST_S = 0.1
"""Starting a command costs the node tens of ms, so an exec probe begins later."""
PROBE_GROWTH = 1.5
"""Until the first success probes come fast, then slower, up to the check's interval."""
GATE_INTERVAL_S = 1.0
PASSING_TRIES_MAX = 5
"""Tries at a passing failure before the start of an instance that is never restarted."""
PREPARE_DELAY_S = 1.0
"""First delay after a passing failure where the spec has no restart rule."""
DUE_SLACK_S = 0.001
"""A timer that comes so much too early still counts."""
_DEFAULT_SIGNAL = Stop().signal

Outcome = tuple[State, tuple[Action, ...]]


def decide(rules: Rules, state: State, event: Happening, now: Now) -> Outcome:
    """Return the state after `event`, and what must be done now. An event that no longer matters changes nothing."""
    match event:
        case Wanted():
            after, actions = _wanted(rules, state, event.desired, now)
        case Removed():
            after, actions = _wanted(rules, replace(state, removed=True), Desired.STOP, now)
        case Recovered():
            after, actions = _recovered(rules, state, event, now)
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
            after, actions = _probed(rules, state, event, now)
        case Due():
            after, actions = _due(state, now)
        case _:
            assert_never(event)
    if after.removed and after.phase.final and not after.erased:
        return replace(after, erased=True), (*actions, Erase())
    return after, actions


def _enter(state: State, phase: Phase, now: Now, **changes: Any) -> State:
    if not legal(state.phase, phase):
        raise AssertionError(f"an instance cannot go from {state.phase} to {phase}")
    timers = {"retry_due": None, "kill_due": None, "probe_due": None}
    at = state.phase_at if phase is state.phase else now.wall
    if not phase.live:
        changes = {"ready": False, "pid": None, "ending": False, "running_since": None} | changes
    return replace(state, **(timers | {"phase": phase, "phase_at": at} | changes))


def _wanted(rules: Rules, state: State, desired: Desired, now: Now) -> Outcome:
    desired = advance(state.desired, desired)
    state = replace(state, desired=desired)
    match state.phase:
        case Phase.PENDING if desired is Desired.RUN:
            return _enter(state, Phase.PREPARING, now), (Prepare(),)
        case Phase.PENDING:
            return _enter(state, Phase.STOPPED, now), ()
        case Phase.PREPARING if desired is not Desired.RUN:
            return _enter(state, Phase.STOPPED, now, message=""), (CancelPrepare(), Clean(all=True))
        case Phase.BACKOFF if desired is not Desired.RUN:
            return _enter(state, Phase.STOPPED, now), (Clean(all=True),)
        case Phase.STARTING if desired is Desired.STOP:
            return _enter(state, Phase.STOPPING, now, ready=False), ()
        case Phase.RUNNING if desired is Desired.STOP:
            if state.ending:
                return _enter(state, Phase.STOPPING, now, kill_due=state.kill_due), ()
            return _terminate(rules, state, Phase.STOPPING, now)
        case _:
            return state, ()


def _terminate(rules: Rules, state: State, phase: Phase, now: Now, **changes: Any) -> Outcome:
    """Send the stop signal; SIGKILL follows when the grace is over."""
    name = state.stop_signal if state.stop_signal and rules.stop.signal == _DEFAULT_SIGNAL else rules.stop.signal
    changes = {"ready": False, "kill_due": now.monotonic + rules.stop.grace} | changes
    return _enter(state, phase, now, **changes), (Signal(name),)


def _recovered(rules: Rules, state: State, found: Recovered, now: Now) -> Outcome:
    match state.phase:
        case Phase.STOPPED | Phase.SUCCEEDED | Phase.FAILED | Phase.LOST:
            return state, (Clean(all=True),)
        case Phase.PENDING | Phase.PREPARING:
            if state.desired is not Desired.RUN:
                return _enter(state, Phase.STOPPED, now), (Clean(all=True),)
            return _enter(state, Phase.PREPARING, now), (Clean(), Prepare())
        case Phase.BACKOFF:
            if state.desired is not Desired.RUN:
                return _enter(state, Phase.STOPPED, now), (Clean(all=True),)
            due = now.monotonic + _delay(rules, max(0, state.failures - 1))
            return _enter(state, Phase.BACKOFF, now, retry_due=due), (Clean(),)
        case Phase.STARTING | Phase.RUNNING | Phase.STOPPING:
            return _recovered_live(rules, state, found, now)


def _recovered_live(rules: Rules, state: State, found: Recovered, now: Now) -> Outcome:
    if found.pid is None and found.exit is None and found.present and state.phase is Phase.STARTING:
        return _enter(state, Phase.BACKOFF, now, retry_due=now.monotonic), (Clean(),)
    if found.pid is None:
        return _ended(rules, state, found.exit, now)
    if state.phase is Phase.STOPPING or (state.phase is Phase.STARTING and state.desired is Desired.STOP):
        after, actions = _terminate(rules, state, Phase.STOPPING, now, pid=found.pid)
        return after, (Watch(), *actions)
    age_s = max(0.0, now.wall - (state.started_at or now.wall))
    adopted = replace(state, pid=found.pid, ending=False, running_since=now.monotonic - age_s)
    if state.phase is Phase.STARTING:
        after, actions = _launched(rules, adopted, Launched(found.pid, state.started_at or now.wall), now)
        return after, (*actions, Note("adopted", "the agent was restarted and found the process running"))
    probing = rules.health is not None or (rules.gate_port is not None and not state.ready)
    after = _enter(adopted, Phase.RUNNING, now, probe_due=now.monotonic if probing else None)
    return after, (Watch(), Note("adopted", "the agent was restarted and found the process running"))


def _prepared(state: State, event: Prepared, now: Now) -> Outcome:
    if state.phase is not Phase.PREPARING:
        return state, ()
    after = _enter(
        state,
        Phase.STARTING,
        now,
        image_digest=event.image_digest,
        message="",
        address=event.address,
        stop_signal=event.stop_signal,
    )
    return after, (Launch(),)


def _prepare_failed(rules: Rules, state: State, event: PrepareFailed, now: Now) -> Outcome:
    if state.phase is not Phase.PREPARING:
        return state, ()
    note = Note("prepare-failed", event.message, Severity.WARNING)
    if not _restarts(rules) and (not event.passing or state.failures + 1 >= PASSING_TRIES_MAX):
        return _enter(state, Phase.FAILED, now, message=event.message), (Clean(all=True), note)
    return _back_off(rules, state, event.message, now, note)


def _launched(rules: Rules, state: State, event: Launched, now: Now) -> Outcome:
    since = state.running_since if state.running_since is not None else now.monotonic
    changes: dict[str, Any] = {
        "pid": event.pid,
        "started_at": event.at,
        "run": state.run + 1,
        "running_since": since,
        "ready_at": None,
    }
    if state.phase is Phase.STOPPING:
        after, actions = _terminate(rules, state, Phase.STOPPING, now, **changes)
        return after, (Watch(), *actions)
    if state.phase is not Phase.STARTING:
        return state, ()
    note = Note("started", f"started as process {event.pid}")
    changes |= {"message": "", "probes": 0, "misses": 0}
    if rules.health is None and rules.gate_port is None:
        changes |= {"ready": True, "ready_at": now.wall}
        return _enter(state, Phase.RUNNING, now, **changes), (Watch(), note)
    exec_probe = rules.health is not None and rules.health.kind is HealthKind.EXEC
    first = now.monotonic + (PROBE_EXEC_FIRST_S if exec_probe else PROBE_FIRST_S)
    return _enter(state, Phase.RUNNING, now, **changes, ready=False, probe_due=first), (Watch(), note)


def _launch_failed(rules: Rules, state: State, event: LaunchFailed, now: Now) -> Outcome:
    note = Note("start-failed", event.message, Severity.WARNING)
    match state.phase:
        case Phase.STOPPING:
            return _enter(state, Phase.STOPPED, now, message=event.message), (Clean(all=True), note)
        case Phase.STARTING if not _restarts(rules):
            return _enter(state, Phase.FAILED, now, message=event.message), (Clean(all=True), note)
        case Phase.STARTING if state.desired is not Desired.RUN:
            return _enter(state, Phase.STOPPED, now, message=event.message), (Clean(all=True), note)
        case Phase.STARTING:
            return _back_off(rules, state, event.message, now, note)
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
        after = _enter(state, Phase.STOPPED, now, exit=exit, message=message)
        return after, (Clean(all=True), Note("stopped", message))
    done = code == 0 and not state.ending
    if restart is None or restart.policy is RestartPolicy.NEVER or (restart.policy is RestartPolicy.ON_FAILURE and done):
        final = Phase.SUCCEEDED if done else Phase.FAILED
        return _enter(state, final, now, exit=exit, message="" if done else message), (Clean(all=True), note)
    ran_s = now.monotonic - state.running_since if state.running_since is not None else 0.0
    if ran_s >= restart.reset:
        state = replace(state, failures=0)
    return _back_off(rules, replace(state, exit=exit), message, now, note)


def _back_off(rules: Rules, state: State, message: str, now: Now, note: Note) -> Outcome:
    delay = _delay(rules, state.failures)
    if state.desired is not Desired.RUN:
        return _enter(state, Phase.STOPPED, now, message=message), (Clean(all=True), note)
    after = _enter(
        state,
        Phase.BACKOFF,
        now,
        message=f"{message}; next start after {format_seconds(delay)}",
        failures=state.failures + 1,
        retry_due=now.monotonic + delay,
    )
    return after, (Clean(), note)


def _delay(rules: Rules, failures: int) -> float:
    restart = rules.restart
    if restart is None:
        return PREPARE_DELAY_S * 2.0 ** min(failures, 16)
    # The exponent is bounded since 10.0 ** 400 overflows; long before that `delay_max` holds.
    return min(float(restart.delay_max), restart.delay * restart.factor ** min(failures, 64))


def _restarts(rules: Rules) -> bool:
    return rules.restart is not None and rules.restart.policy is not RestartPolicy.NEVER


def _probed(rules: Rules, state: State, event: Probed, now: Now) -> Outcome:
    if state.phase is not Phase.RUNNING or event.run != state.run or state.ending:
        return state, ()
    health = rules.health
    if not event.failure:
        due = now.monotonic + health.interval if health else None
        after = replace(state, misses=0, probe_due=due, message="")
        if state.ready:
            return after, ()
        return replace(after, ready=True, ready_at=now.wall), (Note("ready", "ready for requests"),)
    growing = PROBE_FIRST_S * PROBE_GROWTH ** min(state.probes, 64)
    if health is None:
        due = now.monotonic + min(GATE_INTERVAL_S, growing)
        return replace(state, probe_due=due, probes=state.probes + 1, message=event.failure), ()
    if health.kind is HealthKind.EXEC:
        growing = max(PROBE_EXEC_FIRST_S, growing)
    since = state.running_since if state.running_since is not None else now.monotonic
    if state.ready_at is None and now.monotonic - since < health.start:
        due = now.monotonic + min(float(health.interval), growing)
        return replace(state, probe_due=due, probes=state.probes + 1, message=event.failure), ()
    misses = state.misses + 1
    if misses < health.retries or state.desired is not Desired.RUN:
        return replace(state, misses=misses, probe_due=now.monotonic + health.interval, message=event.failure), ()
    message = f"failed its health check {misses} times: {event.failure}"
    after, actions = _terminate(rules, state, Phase.RUNNING, now, ending=True, message=message)
    return after, (*actions, Note("unhealthy", message, Severity.WARNING))


def _due(state: State, now: Now) -> Outcome:
    reached = now.monotonic + DUE_SLACK_S
    actions: list[Action] = []
    if state.retry_due is not None and state.retry_due <= reached and state.phase is Phase.BACKOFF:
        return _enter(state, Phase.PREPARING, now), (Prepare(),)
    if state.kill_due is not None and state.kill_due <= reached:
        state = replace(state, kill_due=now.monotonic + KILL_REPEAT_S)
        actions.append(Kill())
    if state.probe_due is not None and state.probe_due <= reached:
        state = replace(state, probe_due=None)
        actions.append(Probe(state.run))
    return state, tuple(actions)


def describe_exit(exit: Exit | None, memory_bytes: int = 0) -> str:
    """Return in words how a process ended."""
    if exit is None:
        return "ended while the agent was away; how is not known"
    if exit.oom:
        limit = f" of {format_bytes(memory_bytes)}" if memory_bytes else ""
        return f"out of memory: it went over its limit{limit} and the kernel killed it"
    if exit.signal is not None:
        return f"ended by {exit.signal}"
    return f"exited with status {exit.code}"
