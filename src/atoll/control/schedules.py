"""Jobs with a schedule: at each of its times a run is made, a job of its own. Pure.

A run's name is made of its time, and it is written together with the mark up to which times have been dealt with. So there is one
run for a time, whoever leads and however often it is decided. Of several times that came while nobody looked only the last is run.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, structs

from atoll.control.actions import CreateJob, Decision, UpdateJob, WriteJobStatus
from atoll.model.cron import tick_after, tick_before, ticks_between
from atoll.model.records import Job, JobPhase, JobStatus, Severity
from atoll.model.spec import JobSpec, Overlap
from atoll.model.units import format_seconds

RUNS_MAX = 100
"""Runs of one schedule at a time; a time that would make more is skipped."""


class Run(Struct, frozen=True, kw_only=True):
    """A run of a schedule, as it stands."""

    job: Job
    revision: int
    status: JobStatus | None = None

    @property
    def active(self) -> bool:
        """Whether something of it runs, or is about to."""
        return self.status is None or not self.status.phase.final or self.status.active > 0


def run_name(name: str, tick: float) -> str:
    """Return what the run of a schedule for a time is called: `report-29925360`, in minutes since the epoch."""
    return f"{name}-{int(tick // 60)}"


def run_spec(spec: JobSpec, name: str) -> JobSpec:
    """Return the spec of one run."""
    return structs.replace(spec, name=name, schedule=None)


def decide_schedule(job: Job, revision: int, last: JobStatus | None, runs: Sequence[Run], decision: Decision, taken: bool) -> None:
    """Make the run that is due, if one is, and say when to look again. `taken` says that another job has the name of that run."""
    spec = job.spec
    if spec.schedule is None:
        raise AssertionError("only jobs with a schedule are decided here")
    status = last or JobStatus(project=job.project, name=job.name, phase=JobPhase.SCHEDULED)
    since = max(decision.past(job.scheduled_from or job.created_at), decision.past(status.ticked_at or 0.0))
    active = [run for run in runs if run.active]
    made = 0
    if not job.suspended:
        due = tick_before(spec.schedule, spec.timezone, decision.now)
        if due is not None and due > since:
            status, made = _settle(job, status, active, since, due, decision, taken)
        following = tick_after(spec.schedule, spec.timezone, decision.now)
        if following is not None:
            decision.wake(following)
        status = structs.replace(status, next_at=following)
    else:
        status = structs.replace(status, next_at=None)
    phase = JobPhase.SUSPENDED if job.suspended else JobPhase.SCHEDULED
    status = structs.replace(status, phase=phase, active=len(active) + made)
    if status != last:
        decision.do(WriteJobStatus(status, revision))


def _settle(
    job: Job, status: JobStatus, active: Sequence[Run], since: float, due: float, decision: Decision, taken: bool
) -> tuple[JobStatus, int]:
    """Deal with the time `due`, and those between it and `since`; return the new status, and how many runs were made."""
    spec, late_s = job.spec, decision.now - due
    count = ticks_between(spec.schedule or "", spec.timezone, since, due)
    passed = structs.replace(status, ticked_at=due, awaited_at=None, missed=status.missed + count - 1)
    owed = status.awaited_at is not None and status.awaited_at > since  # what it replaces was cancelled for it: it must follow
    late = spec.starting_deadline is not None and late_s > spec.starting_deadline and not owed
    full = len(active) >= RUNS_MAX
    if active and spec.overlap is Overlap.REPLACE and not (late or taken or full):
        # The time is dealt with once those before have ended, which is looked at with every change of theirs.
        for run in active:
            if not run.job.cancelled and (run.status is None or not run.status.phase.final):
                decision.do(UpdateJob(structs.replace(run.job, cancelled=True), run.revision))
        return structs.replace(status, awaited_at=due), 0
    if count > 1:
        _tell(decision, job, "runs-missed", f"{count - 1} times came while nobody looked; only the last is run", Severity.WARNING)
    if late:
        _tell(decision, job, "run-missed", f"it came {format_seconds(late_s)} too late to be run", Severity.WARNING)
        return structs.replace(passed, missed=passed.missed + 1), 0
    if taken:
        _tell(decision, job, "run-missed", f"another job is called {run_name(job.name, due)}", Severity.WARNING)
        return structs.replace(passed, missed=passed.missed + 1), 0
    if (active and spec.overlap is Overlap.SKIP) or full:
        _tell(decision, job, "run-skipped", f"{active[0].job.name} still runs")
        return structs.replace(passed, skipped=passed.skipped + 1), 0
    name = run_name(job.name, due)
    made = Job(project=job.project, name=name, spec=run_spec(spec, name), created_at=decision.now, parent=job.name, tick=due)
    decision.do(CreateJob(made))
    _tell(decision, job, "run-made", f"made {name}")
    return passed, 1


def _tell(decision: Decision, job: Job, code: str, message: str, severity: Severity = Severity.INFO) -> None:
    decision.tell(job.project, f"job/{job.name}", code, message, severity)
