"""Templates: the pool of sandboxes that each keeps running, to be taken by name. Pure.

A sandbox of a pool stands by like an app's (`control.standby`), but awake. Taking it, which the API does in one write, makes it
another job's; what is missing then is made here. What fails is made again with growing delays, so that a template that cannot run
costs little.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from atoll.control.actions import Create, Decision, Remove, Seen, WriteJobStatus
from atoll.control.apps import UNPLACED_MAX
from atoll.control.leaving import how_it_ended, leave_running
from atoll.control.standby import SERVED_MIN_S, Standbys
from atoll.model.records import Instance, Job, JobPhase, JobStatus, OwnerKind, Severity
from atoll.model.states import Desired, Phase

RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0
REFILL_S = 0.5
"""While one can be taken, what is missing is made so much later: to make one costs its node what whoever has just taken another
wants for his first command."""
_POOL = 0
"""Under which index a template's status counts its failures."""


def decide_pool(job: Job, revision: int, last: JobStatus | None, instances: Sequence[Seen], decision: Decision) -> None:
    """Compare a template with its pool and add to `decision` what is missing or too much."""
    wanted = 0 if job.cancelled else job.spec.pool or 0
    status = last or JobStatus(project=job.project, name=job.name, phase=JobPhase.PENDING)
    for seen in instances:
        if seen.instance.desired is not Desired.RUN:
            leave_running(decision, seen)
    pool = Standbys(instances, decision)
    for seen in pool.going:
        pool.retire(seen, "its node or its device is to be free")
    status = _count(job, status, pool, decision)
    missing = pool.keep(wanted, lambda seen: seen.instance.release == job.release) + len(pool.going)
    ready = any(is_ready(seen) for seen in pool.there)
    if missing > 0 and ready and _POOL not in status.retry_at:
        status = structs.replace(status, retry_at={_POOL: decision.now + REFILL_S})
    made = _create(job, status, pool, missing, decision)
    if not status.failures and (made or missing <= 0):
        status = structs.replace(status, retry_at={})
    alive = sum(not seen.ended and seen.instance.desired is Desired.RUN for seen in pool.there)
    started_at = status.started_at or (decision.now if ready else None)
    phase = JobPhase.RUNNING if ready or status.phase is JobPhase.RUNNING else JobPhase.PENDING
    message = status.message if status.failures else _waits(pool.there)
    status = structs.replace(status, phase=phase, active=alive + made, started_at=started_at, message=message)
    if status != last:
        decision.do(WriteJobStatus(status, revision))


def is_ready(seen: Seen) -> bool:
    """Whether a sandbox of a pool can be taken, as far as its node has said."""
    return seen.phase is Phase.RUNNING and seen.status is not None and seen.status.ready and not seen.away


def _count(job: Job, status: JobStatus, pool: Standbys, decision: Decision) -> JobStatus:
    """Take over what has ended by itself, and forget failures once all that is there has run for a while."""
    failed = [seen for seen in pool.failed if seen.phase is not Phase.STOPPED]  # else its node was shut down in order
    for seen in pool.failed:
        decision.do(Remove(seen.instance, seen.revision))
    if failed:
        failures = status.failures.get(_POOL, 0) + 1
        delay_s = min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(failures - 1, 30))
        why = how_it_ended(failed[0])
        decision.tell(
            job.project, f"job/{job.name}", "pool-failed", f"{failed[0].instance.id}: {why}", Severity.WARNING, count=len(failed)
        )
        return structs.replace(status, failures={_POOL: failures}, retry_at={_POOL: decision.now + delay_s}, message=why)
    if not status.failures or not pool.there:
        return status
    young = [_steady_at(seen, decision.now) for seen in pool.there]
    if max(young) <= decision.now:
        return structs.replace(status, failures={}, retry_at={}, message="")
    decision.wake(max(young))
    return status


def _steady_at(seen: Seen, now: float) -> float:
    """Return when a sandbox will have run for long enough to be of a template that works."""
    since = seen.status.ready_at if is_ready(seen) and seen.status is not None and seen.status.ready_at is not None else now
    return min(since, now) + SERVED_MIN_S


def _create(job: Job, status: JobStatus, pool: Standbys, missing: int, decision: Decision) -> int:
    """Make up to `missing` sandboxes, unless it is too early for that; return how many."""
    if missing <= 0:
        return 0
    at = status.retry_at.get(_POOL, 0.0)
    # A date farther off than was ever meant is from before the clock was set back: what waits for it is due.
    early = decision.now < at <= decision.now + (RETRY_MAX_S if status.failures else REFILL_S)
    if early and (status.failures or any(is_ready(seen) for seen in pool.there)):
        decision.wake(at)
        return 0
    waiting = sum(seen.instance.node is None for seen in pool.there)
    count = max(0, min(missing, UNPLACED_MAX - waiting))
    for _ in range(count):
        decision.do(
            Create(
                Instance(
                    id=decision.new_id(job.name),
                    project=job.project,
                    owner_kind=OwnerKind.JOB,
                    owner=job.name,
                    release=job.release,
                    created_at=decision.now,
                    standby=True,
                )
            )
        )
    return count


def _waits(there: Sequence[Seen]) -> str:
    found = (seen.instance.rejection for seen in there if seen.instance.node is None and seen.instance.rejection is not None)
    return next((rejection.message for rejection in found), "")
