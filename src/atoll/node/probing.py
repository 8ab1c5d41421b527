"""When an instance is probed, and what its answers mean: ready, not ready yet, or to be started again."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.model.records import Severity
from atoll.model.spec import HealthKind
from atoll.model.states import Desired, Phase
from atoll.node.moves import Outcome, terminate
from atoll.node.parking import park, rests
from atoll.node.transitions import Note, Now, Probed, Rest, Rules, State

PROBE_FIRST_S = 0.005
PROBE_EXEC_FIRST_S = 0.1
"""Starting a command costs the node tens of ms, so an exec probe begins later."""
PROBE_GROWTH = 1.5
"""Until the first success probes come fast, then slower, up to the check's interval."""
GATE_INTERVAL_S = 1.0


def first_probe_due(rules: Rules, now: Now) -> float | None:
    """Return when a process that has just started is probed; None for one that is ready without."""
    if rules.warmed:
        return now.monotonic
    if rules.health is None and rules.gate_port is None:
        return None
    by_command = rules.health is not None and rules.health.kind is HealthKind.EXEC
    return now.monotonic + (PROBE_EXEC_FIRST_S if by_command else PROBE_FIRST_S)


def probed(rules: Rules, state: State, event: Probed, now: Now) -> Outcome:
    """Take in a probe's answer."""
    if state.phase is not Phase.RUNNING or event.run != state.run or state.ending or state.rest is not Rest.AWAKE:
        return state, ()
    health = rules.health
    if not event.failure:
        due = now.monotonic + health.interval if health else None
        after = replace(state, misses=0, probe_due=due, message="")
        if state.ready:
            return after, ()
        if rests(rules, after):
            return park(after, now)
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
    after, actions = terminate(rules, state, Phase.RUNNING, now, ending=True, message=message)
    return after, (*actions, Note("unhealthy", message, Severity.WARNING))
