"""How an app stands, from how its instances stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from atoll.control.actions import Decision, Seen
from atoll.control.gpus import urgency_of
from atoll.model.records import App, AppPhase, AppStatus, Exit
from atoll.model.rollouts import RolloutStatus
from atoll.model.spec import AppSpec
from atoll.model.states import Phase

SETTLE_FIRST_S = 0.3
"""How long an instance without a health check must have been up until it counts: what dies at once never served."""
SETTLE_REPLACING_S = 1.0
"""The same where an older one would be taken away for it."""
SETTLE_CRASHED_S = 10.0
"""The same, health check or not, once an instance of the release has ended by itself: a crash loop is up for moments, too."""


class Rollout(Struct, frozen=True, kw_only=True):
    complete: bool
    under_way: bool
    failed: bool
    """Under way without progress for longer than its deadline."""
    progressed_at: float
    served: int
    """The last release that was fully rolled out; 0 for none."""


def settled(seen: Seen, spec: AppSpec, decision: Decision, *, replacing: bool, crashed: bool) -> float:
    """Return from when on a ready instance counts as one that lasts, in seconds since the epoch."""
    status = seen.status
    since = (status.ready_at or status.started_at or status.phase_at) if status else 0.0
    if not 0.0 < since <= decision.now:
        # The node's clock is ahead of ours: what it says must not hold the rollout up.
        since = decision.past(seen.instance.created_at)
    if crashed:
        return since + SETTLE_CRASHED_S
    if spec.health is not None:
        return since
    return since + (SETTLE_REPLACING_S if replacing else SETTLE_FIRST_S)


def has_crashed(seen: Seen) -> bool:
    """Whether the instance, or one that it stands in for, has ended by itself."""
    return seen.instance.attempt > 0 or seen.phase in (Phase.FAILED, Phase.BACKOFF) or bool(seen.status and seen.status.restarts)


def exit_in_words(exit: Exit) -> str:
    if exit.oom:
        return "was killed for going over its memory limit"
    return f"was ended by {exit.signal}" if exit.signal else f"exited with status {exit.code}"


def why_not_ready(unready: Iterable[Seen]) -> str:
    """Return the most telling reason among instances that should serve and do not; empty while they merely start."""
    best = (0, "")
    for seen in unready:
        best = max(best, _reason(seen), key=lambda pair: pair[0])
    return best[1]


def _reason(seen: Seen) -> tuple[int, str]:
    instance, status = seen.instance, seen.status
    if seen.away:
        return 5, f"{instance.id}: node {instance.node} is lost, and it waits for it"
    if seen.phase is Phase.LOST:
        return 2, f"{instance.id}: node {instance.node} is lost"
    if instance.rejection is not None and instance.node is None:
        return 3, f"{instance.id} has no node: {instance.rejection.message}"
    if status is None:
        return 0, ""
    if seen.ailment is not None and urgency_of(seen) is not None:
        return 5, f"{instance.id} on {instance.node}: {seen.ailment.why}"
    where = f"{instance.id} on {status.node}"
    again = f" ({status.restarts} restarts)" if status.restarts else ""
    told = status.message or (exit_in_words(status.exit) if status.exit else "")
    if status.phase in (Phase.FAILED, Phase.BACKOFF):
        return 4, f"{where}: {told or 'failed'}{again}"
    if told:
        return 2, f"{where}: {told}{again}"
    if status.phase is Phase.RUNNING and not status.ready:
        return 1, f"{where}: runs, but is not ready{again}"
    return 0, ""


def status_of(
    app: App,
    last: AppStatus | None,
    *,
    phase: AppPhase,
    ready: int = 0,
    updated: int = 0,
    total: int = 0,
    message: str = "",
    progressed_at: float | None = None,
    served_release: int | None = None,
    homes: tuple[str, ...] | None = None,
    scaled: int | None = None,
    parked: int = 0,
    rollout: RolloutStatus | None = None,
    sites: Mapping[str, int] = {},
) -> AppStatus:
    """Return the app's status; what is not given stays as it was, but for `scaled`, `parked`, `rollout` and `sites`."""
    return AppStatus(
        project=app.project,
        name=app.name,
        phase=phase,
        release=app.release,
        ready=ready,
        updated=updated,
        total=total,
        message=message,
        progressed_at=progressed_at if progressed_at is not None else (last.progressed_at if last else 0.0),
        served_release=served_release if served_release is not None else (last.served_release if last else 0),
        homes=homes if homes is not None else (last.homes if last else ()),
        scaled=scaled,
        parked=parked,
        rollout=rollout,
        sites=dict(sites),
    )
