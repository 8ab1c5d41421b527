"""The moves that several decisions share: entering a phase, ending a process, backing off."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from atoll.model.records import Exit
from atoll.model.spec import RestartPolicy, Stop
from atoll.model.states import Desired, Phase, legal
from atoll.model.units import format_bytes, format_seconds
from atoll.node.transitions import Action, Clean, Note, Now, Rest, Rules, Signal, State

PREPARE_DELAY_S = 1.0
"""First delay after a passing failure where the spec has no restart rule."""
_DEFAULT_SIGNAL = Stop().signal

KILL_REPEAT_S = 5.0
"""A process that survives SIGKILL (it hangs in the kernel) is killed again so often."""
AWAKE: dict[str, Any] = {"rest": Rest.AWAKE, "kept_awake": False, "suspended": ()}
"""What is true of a process that has just begun, or is gone."""
UNUSED: dict[str, Any] = {"paused": False, "idle_since": None, "idle_due": None}
"""What is true of a process that is gone, and of one that begins until somebody counts."""

Outcome = tuple[State, tuple[Action, ...]]


def enter(state: State, phase: Phase, now: Now, **changes: Any) -> State:
    """Return the state in `phase`, with no timer but those in `changes`."""
    if not legal(state.phase, phase):
        raise AssertionError(f"an instance cannot go from {state.phase} to {phase}")
    timers = {"retry_due": None, "held_until": None, "kill_due": None, "probe_due": None}
    at = state.phase_at if phase is state.phase else now.wall
    if not phase.live:
        changes = {"ready": False, "pid": None, "ending": False, "running_since": None} | AWAKE | UNUSED | changes
    return replace(state, **(timers | {"phase": phase, "phase_at": at} | changes))


def terminate(rules: Rules, state: State, phase: Phase, now: Now, **changes: Any) -> Outcome:
    """Send the stop signal; SIGKILL follows when the grace is over."""
    name = state.stop_signal if state.stop_signal and rules.stop.signal == _DEFAULT_SIGNAL else rules.stop.signal
    changes = {"ready": False, "kill_due": now.monotonic + rules.stop.grace} | changes
    return enter(state, phase, now, **changes), (Signal(name),)


def back_off(rules: Rules, state: State, message: str, now: Now, note: Note) -> Outcome:
    """Clean up and start again after a delay, unless it is to go anyway."""
    delay = delay_of(rules, state.failures)
    if state.desired is not Desired.RUN:
        return enter(state, Phase.STOPPED, now, message=message), (Clean(all=True), note)
    after = enter(
        state,
        Phase.BACKOFF,
        now,
        message=f"{message}; next start after {format_seconds(delay)}",
        failures=state.failures + 1,
        retry_due=now.monotonic + delay,
    )
    return after, (Clean(), note)


def delay_of(rules: Rules, failures: int) -> float:
    """Return the seconds before the next start after `failures` ends in a row."""
    restart = rules.restart
    if restart is None:
        return PREPARE_DELAY_S * 2.0 ** min(failures, 16)
    # The exponent is bounded since 10.0 ** 400 overflows; long before that `delay_max` holds.
    return min(float(restart.delay_max), restart.delay * restart.factor ** min(failures, 64))


def restarts(rules: Rules) -> bool:
    """Whether a failure is followed by another start on this node."""
    return rules.restart is not None and rules.restart.policy is not RestartPolicy.NEVER


def describe_exit(exit: Exit | None, memory_bytes: int = 0) -> str:
    """Return in words how a process ended."""
    if exit is None:
        return "ended while the agent was away; how is not known"
    if exit.why:
        return exit.why
    if exit.oom:
        limit = f" of {format_bytes(memory_bytes)}" if memory_bytes else ""
        return f"out of memory: it went over its limit{limit} and the kernel killed it"
    if exit.signal is not None:
        return f"ended by {exit.signal}"
    return f"exited with status {exit.code}"
