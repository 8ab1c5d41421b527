"""What a decision about an app says of it in the end: its status, and the events of the app itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, Struct

from atoll.control import evacuation
from atoll.control.actions import Decision, Seen, WriteAppStatus
from atoll.control.appstatus import Rollout, status_of, why_not_ready
from atoll.control.facts import AppFacts
from atoll.control.rollouts import Plan
from atoll.model.records import AppPhase, AppStatus, Severity
from atoll.model.rollouts import RolloutPhase
from atoll.model.units import format_seconds
from atoll.scheduling.demand import holds_volumes


class Standing(Struct, frozen=True, kw_only=True):
    """How an app stands after a decision."""

    wanted: int
    ready: int
    updated: int
    """Ready ones of what is wanted that last."""
    total: int
    parked: int
    crashed: bool
    unready: Sequence[Seen]
    """Of what is wanted."""
    movers: Sequence[Seen]
    """They serve, and leave their nodes when others serve in their place."""
    all: Sequence[Seen]


def report_app(facts: AppFacts, rollout: Rollout, plan: Plan, standing: Standing, decision: Decision) -> None:
    """Write the app's status where it has changed, and tell what that means."""
    app, last = facts.app, facts.status
    phase, message = _phase(facts, rollout, plan, standing, decision.now)
    status = status_of(
        app,
        last,
        phase=phase,
        ready=standing.ready,
        updated=standing.updated,
        total=standing.total,
        message=message,
        progressed_at=rollout.progressed_at,
        served_release=rollout.served,
        homes=_homes(facts, standing),
        scaled=standing.wanted if app.most is not None else None,
        parked=standing.parked,
        rollout=plan.status,
        sites=facts.sites,
    )
    write_status(facts, decision, status)
    _tell_scaled(facts, decision)
    _tell_awake(facts, decision)
    if last is None or last.release != app.release:
        tell(facts, decision, "app-deployed", f"release {app.release} is being rolled out", release=app.release)
    for told in plan.told:
        tell(facts, decision, told.code, told.message, told.severity, **told.data)
    if (
        rollout.complete
        and standing.wanted
        and rollout.served == app.release
        and (last is None or last.served_release != app.release)
    ):
        tell(facts, decision, "rollout-finished", f"release {app.release} serves", release=app.release)
    if rollout.failed and (last is None or last.phase is not AppPhase.FAILED):
        tell(facts, decision, "rollout-failed", message, Severity.ERROR, release=app.release)


def write_status(facts: AppFacts, decision: Decision, status: AppStatus) -> None:
    if status != facts.status:
        decision.do(WriteAppStatus(status))


def tell(facts: AppFacts, decision: Decision, code: str, message: str, severity: Severity = Severity.INFO, **data: Any) -> None:
    """Record an event of the app."""
    decision.tell(facts.app.project, f"app/{facts.app.name}", code, message, severity, **data)


def _tell_scaled(facts: AppFacts, decision: Decision) -> None:
    choice, scale = facts.choice, facts.app.spec.scale
    if choice is None or choice.wanted == choice.before or scale is UNSET:
        return
    up = choice.wanted > choice.before
    text = f"scaled {'up' if up else 'down'} from {choice.before} to {choice.wanted}: {choice.cause.text}"
    data: dict[str, Any] = {
        "from": choice.before,
        "to": choice.wanted,
        "metric": choice.cause.name,
        "value": choice.cause.value,
        "target": choice.cause.target,
    }
    tell(facts, decision, "scaled-up" if up else "scaled-down", text, **data)


def _tell_awake(facts: AppFacts, decision: Decision) -> None:
    before = facts.status.scaled if facts.status is not None else None
    if facts.awake is None or before is None or facts.awake is (before > 0):
        return
    if facts.awake:
        why = "a request is expected" if facts.foreseen else "there is something to do for it"
        tell(facts, decision, "app-woken", f"woken: {why}")
    elif facts.foreseen:
        tell(facts, decision, "app-asleep", "sleeps: no request is expected soon enough")
    else:
        idle = facts.app.spec.scale.idle_after if facts.app.spec.scale is not UNSET else 0.0
        tell(facts, decision, "app-asleep", f"sleeps: no request for {format_seconds(idle)}")


def _homes(facts: AppFacts, standing: Standing) -> tuple[str, ...]:
    """Return the nodes that hold the app's volumes; while none is wanted, those of before."""
    before = facts.status.homes if facts.status else ()
    if not holds_volumes(facts.app.spec):
        return ()
    if not standing.wanted:
        return before
    used = [seen.instance.node for seen in standing.all if seen.instance.node]
    return tuple(dict.fromkeys((*used, *before)))[: standing.wanted]


def _phase(facts: AppFacts, rollout: Rollout, plan: Plan, standing: Standing, now: float) -> tuple[AppPhase, str]:
    last, rules, status = facts.status, facts.app.spec.rollout, plan.status
    said = why_not_ready(standing.unready)
    if not standing.wanted:
        return (AppPhase.ASLEEP, "the next request wakes it") if facts.awake is False else (AppPhase.STOPPED, "")
    if status is not None and status.phase is RolloutPhase.REVERTED:
        note = f" ({said})" if said else ""
        left = status.leaving.weight if status.leaving is not None else 0
        part = f"has {100 - left} % of the requests, and gets more as it comes back" if left else "serves"
        text = f"release {facts.app.release} was taken back: {status.message}; release {status.stable} {part}{note}"
        return AppPhase.FAILED, text
    if rollout.complete:
        return AppPhase.RUNNING, ""
    if not said and standing.crashed and last is not None and last.release == facts.app.release:
        # Its next try has just begun: what ended the one before is still the best word on it.
        if rollout.failed and last.phase is AppPhase.FAILED:
            return AppPhase.FAILED, last.message
        said = last.message
    if standing.movers and not rollout.under_way and standing.ready >= standing.wanted:
        return AppPhase.RUNNING, f"{standing.movers[0].instance.id} leaves {evacuation.why(standing.movers[0])}"
    if rollout.failed:
        waited = format_seconds(rules.deadline)
        return AppPhase.FAILED, f"release {facts.app.release} made no progress for {waited}" + (f": {said}" if said else "")
    if rollout.under_way or all(_fresh(seen, rules.deadline, now) for seen in standing.unready):
        return AppPhase.DEPLOYING, said or (status.message if status is not None else "")
    return AppPhase.DEGRADED, said


def _fresh(seen: Seen, deadline_s: float, now: float) -> bool:
    """Whether the instance is on its first way to being ready, as after a scale-up."""
    if seen.away:
        return False
    if seen.idle:
        return True  # it is being woken
    young = now - seen.instance.created_at < deadline_s
    return young and not seen.ended and seen.instance.attempt == 0 and (seen.status is None or seen.status.restarts == 0)
