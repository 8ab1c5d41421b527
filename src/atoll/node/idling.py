"""When a sandbox that nobody uses is ended, as part of an instance's state machine: pure, as `decide` is.

What counts is told by `Used`: a command, a copy of files. The time is kept with the state, so that the next agent goes on counting;
what was in use when an agent ended is idle from the moment on when the next one finds it.
"""

from __future__ import annotations

from msgspec.structs import replace

from atoll.model.records import Severity
from atoll.model.states import Phase
from atoll.model.units import format_seconds
from atoll.node.moves import KILL_REPEAT_S, Outcome, enter, terminate
from atoll.node.transitions import Kill, Note, Now, Rules, State


def used(rules: Rules, state: State, now: Now, *, in_use: bool) -> State:
    """Return the state once somebody uses it, or nobody does any more."""
    if state.phase is not Phase.RUNNING or state.ending:
        return state
    if rules.idle_limit_s is None or in_use:
        return replace(state, idle_since=None, idle_due=None)
    return replace(state, idle_since=now.wall, idle_due=now.monotonic + rules.idle_limit_s)


def idle_again(rules: Rules, state: State, now: Now) -> State:
    """Go on counting where an earlier agent left off."""
    limit_s, since = rules.idle_limit_s, state.idle_since
    if limit_s is None or since is None:
        return used(rules, state, now, in_use=False)
    left_s = min(limit_s, max(0.0, since + limit_s - now.wall))  # the date may have been set meanwhile
    return replace(state, idle_due=now.monotonic + left_s)


def idled(rules: Rules, state: State, now: Now) -> Outcome:
    """Its time is over: end it, as failed with that reason. What stands still would not hear a signal."""
    state = replace(state, idle_due=None)
    if state.phase is not Phase.RUNNING or state.ending or rules.idle_limit_s is None:
        return state, ()
    message = f"nobody used it for {format_seconds(rules.idle_limit_s)}, its idle limit"
    note = Note("idle", message, Severity.WARNING)
    if state.paused:
        changes = {"ready": False, "ending": True, "message": message, "kill_due": now.monotonic + KILL_REPEAT_S}
        return enter(state, Phase.RUNNING, now, **changes), (Kill(), note)
    after, actions = terminate(rules, state, Phase.RUNNING, now, ending=True, message=message)
    return after, (*actions, note)
