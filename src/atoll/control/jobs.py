"""Jobs: every index runs to completion once, some at a time, with new tries after failures.

The records of instances that have ended are kept with the job, because their logs live as long as they do; of each index at most
the newest `TRIES_KEPT`. An index's tries are numbered, and a failed try `n` means `n + 1` failures, so that counting them twice
changes nothing.
"""

from __future__ import annotations

from msgspec import Struct, structs

from atoll.control import evacuation, gpus
from atoll.control.actions import Create, Decision, Remove, RemoveJob, Seen, WriteJobStatus
from atoll.control.apps import UNPLACED_MAX
from atoll.control.leaving import how_it_ended, leave, leave_running, retire
from atoll.control.pools import decide_pool
from atoll.control.schedules import Run, decide_schedule
from atoll.model.records import Instance, Job, JobPhase, JobStatus, OwnerKind, Severity
from atoll.model.states import Desired, Phase
from atoll.model.units import format_seconds

RETRY_MIN_S = 1.0
RETRY_MAX_S = 60.0
STATUS_WRITES_PER_JOB = 500
"""About how often the status of a large job is written on its way."""
TRIES_KEPT = 3
"""Ended instances of one index whose records, and so logs, are kept until the job is removed."""


class JobFacts(Struct, frozen=True, kw_only=True):
    """All that a decision about one job may depend on."""

    job: Job
    revision: int
    created: int = 0
    """The revision that made the job."""
    status: JobStatus | None
    instances: tuple[Seen, ...]
    runs: tuple[Run, ...] = ()
    """Of a job with a schedule: what there is of its runs."""
    due_taken: bool = False
    """Of a job with a schedule: another job has the name of the run that is due."""
    stays: bool | None = None
    """Of a run: whether it is among those that its schedule keeps when they have finished; None for what is kept by time."""


def decide_job(facts: JobFacts, decision: Decision) -> None:
    """Compare the job with its instances and add to `decision` what is missing or too much."""
    if facts.job.spec.schedule is not None:
        decide_orphans(facts.instances, decision)
        decide_schedule(facts.job, facts.revision, facts.status, facts.runs, decision, facts.due_taken)
        return
    before = tuple(seen for seen in facts.instances if _earlier(seen, facts))
    if before:
        # Left of an earlier job of this name.
        decide_orphans(before, decision)
        facts = structs.replace(facts, instances=tuple(seen for seen in facts.instances if not _earlier(seen, facts)))
    if facts.job.spec.pool is not None:
        decide_pool(facts.job, facts.revision, facts.status, facts.instances, decision)
        return
    _Step(facts, decision).run()


def _earlier(seen: Seen, facts: JobFacts) -> bool:
    """Whether an instance is older than its job, and did not become the job's when that was made."""
    return seen.created < facts.created and seen.instance.taken_at != facts.job.created_at


class _Step:
    def __init__(self, facts: JobFacts, decision: Decision) -> None:
        self.facts = facts
        self.job = facts.job
        self.spec = facts.job.spec
        self.decision = decision
        last = facts.status
        self.last = last or JobStatus(project=self.job.project, name=self.job.name, phase=JobPhase.PENDING)
        self.succeeded = set(self.last.succeeded)
        self.failures = dict(self.last.failures)
        self.retry_at = dict(self.last.retry_at)
        self.active = {seen.instance.index: seen for seen in facts.instances if not seen.ended}
        self.why = ""

    def run(self) -> None:
        if self.last.phase.final:
            self._wind_down()
            return
        self._count()
        phase, message = self._phase()
        if phase.final:
            self._finish(phase, message)
            return
        self._replace()
        made = self._create()
        self._trim()
        started = any(seen.status and seen.status.started_at for seen in self.facts.instances)
        self._write(JobPhase.RUNNING if started or self.last.phase is JobPhase.RUNNING else JobPhase.PENDING, message, made)

    def _count(self) -> None:
        """Take over what has ended since the last decision."""
        for seen in self.facts.instances:
            instance = seen.instance
            if not seen.ended:
                if instance.desired is not Desired.RUN:
                    leave_running(self.decision, seen)
                continue
            if instance.excused:
                continue
            if seen.phase is Phase.SUCCEEDED:
                self.succeeded.add(instance.index)
                self.retry_at.pop(instance.index, None)
            elif seen.phase is Phase.STOPPED and instance.desired is Desired.RUN:
                continue  # nobody told it to: its node was shut down in order, which is no failure of the work
            elif self.failures.get(instance.index, 0) <= instance.attempt:
                if seen.phase is Phase.FAILED and gpus.excuses_left(seen, self.facts.instances):
                    self._excuse(seen)
                else:
                    self._failed(seen)

    def _excuse(self, seen: Seen) -> None:
        """Lay a failure to the device: the index is tried again, and nothing is counted, now or later."""
        gpus.tell(self.decision, seen)
        self.decision.update(seen, excused=True)

    def _replace(self) -> None:
        """End tries whose devices are sick or gone, and those that their nodes wait for no longer; each is made again when it has
        ended."""
        told: set[str] = set()
        for seen in gpus.due(self.facts.instances, self.decision, serving=True):
            gpus.tell(self.decision, seen)
            excused = gpus.excuses_left(seen, self.facts.instances)
            why = seen.ailment.why if seen.ailment else ""
            retire(self.decision, seen, why, drain_s=None, ingresses=frozenset(), excused=excused)
            told.add(seen.instance.id)
        for seen in evacuation.due_of_job(self.facts.instances, self.decision, self.spec):
            if seen.instance.id not in told:
                evacuation.tell(self.decision, seen)
                retire(self.decision, seen, evacuation.why(seen), drain_s=None, ingresses=frozenset(), excused=True)

    def _failed(self, seen: Seen) -> None:
        index, failures = seen.instance.index, seen.instance.attempt + 1
        self.failures[index] = failures
        ended_at = seen.lost_at or (seen.status.phase_at if seen.status else 0.0) or self.decision.now
        ended_at = min(ended_at, self.decision.now)  # the node's clock may be ahead of ours
        self.retry_at[index] = ended_at + min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(failures - 1, 30))
        self.why = how_it_ended(seen) if self.spec.sandbox else f"index {index}: {how_it_ended(seen)}"
        instance = seen.instance
        self.decision.tell(
            instance.project, f"instance/{instance.id}", "try-failed", self.why, Severity.WARNING, node=instance.node, index=index
        )
        if seen.phase is Phase.LOST and instance.desired is Desired.RUN:
            # Should the node come back, this try must not run beside the next one.
            self.decision.update(seen, desired=Desired.STOP, reason="its node was lost")

    def _phase(self) -> tuple[JobPhase, str]:
        if self.job.cancelled:
            return JobPhase.CANCELLED, "cancelled"
        if len(self.succeeded) >= self.spec.completions:
            return JobPhase.SUCCEEDED, ""
        over = {index for index, count in self.failures.items() if count > self.spec.retries}
        worst = sorted(over - self.succeeded)
        if worst:
            tries = self.failures[worst[0]]
            why = self.why or f"index {worst[0]}"
            if self.spec.sandbox:
                return JobPhase.FAILED, why  # of one instance that is tried once
            return JobPhase.FAILED, f"{why} (after {tries} {'try' if tries == 1 else 'tries'})"
        if self.spec.deadline is not None:
            at = self.job.created_at + self.spec.deadline
            if self.decision.now >= at:
                return JobPhase.FAILED, f"not done within its deadline of {format_seconds(self.spec.deadline)}"
            self.decision.wake(at)
        rejected = next((s.instance.rejection for s in self.active.values() if s.instance.rejection and not s.instance.node), None)
        return JobPhase.RUNNING, self.why or (rejected.message if rejected else "")

    def _create(self) -> int:
        """Start tries of indices that are due, as far as the parallelism allows; return how many."""
        waiting = [seen.instance for seen in self.active.values() if seen.instance.node is None]
        room = min(self.spec.parallelism - len(self.active), UNPLACED_MAX - len(waiting))
        made = 0
        for index in range(self.spec.completions):
            if made >= room:
                break
            if index in self.succeeded or index in self.active:
                continue
            due = self.retry_at.get(index, 0.0)
            if self.decision.now < due <= self.decision.now + RETRY_MAX_S:  # else a leader said so whose date was later
                self.decision.wake(due)
                continue
            self.retry_at.pop(index, None)
            self.decision.do(Create(self._instance(index)))
            made += 1
        if made == room == UNPLACED_MAX:
            self.decision.wake(self.decision.now)  # there may be room for more once these are placed
        return made

    def _instance(self, index: int) -> Instance:
        attempt = self.failures.get(index, 0)
        return Instance(
            id=self.decision.new_id(self.job.name),
            project=self.job.project,
            owner_kind=OwnerKind.JOB,
            owner=self.job.name,
            index=index,
            attempt=attempt,
            created_at=self.decision.now,
        )

    def _trim(self) -> None:
        by_index: dict[int, list[Seen]] = {}
        for seen in self.facts.instances:
            if seen.ended:
                by_index.setdefault(seen.instance.index, []).append(seen)
        for tries in by_index.values():
            for seen in sorted(tries, key=lambda s: (s.instance.attempt, s.instance.created_at))[:-TRIES_KEPT]:
                self.decision.do(Remove(seen.instance, seen.revision))

    def _finish(self, phase: JobPhase, message: str) -> None:
        for seen in self.active.values():
            if seen.instance.desired is Desired.RUN:
                retire(self.decision, seen, f"the job is over: {phase}", drain_s=None, ingresses=frozenset())
        self._write(phase, message, 0)
        code = {JobPhase.SUCCEEDED: "job-succeeded", JobPhase.FAILED: "job-failed"}.get(phase, "job-cancelled")
        severity = Severity.ERROR if phase is JobPhase.FAILED else Severity.INFO
        text = message or f"{self.spec.completions} of {self.spec.completions} done"
        self.decision.tell(self.job.project, f"job/{self.job.name}", code, text, severity)
        self.decision.wake(self.decision.now + self.spec.keep)

    def _wind_down(self) -> None:
        """The job is over: stop what runs still, and remove it all when its time is up."""
        for seen in self.active.values():
            if seen.instance.desired is Desired.RUN:
                retire(self.decision, seen, f"the job is over: {self.last.phase}", drain_s=None, ingresses=frozenset())
            else:
                leave_running(self.decision, seen)
        if len(self.active) != self.last.active:
            self._write(self.last.phase, self.last.message, 0)
        finished_at = self.last.finished_at or self.decision.now
        at = finished_at + self.spec.keep
        if self.facts.stays:
            self._trim()
            return
        if self.facts.stays is None and self.decision.now < at:
            self.decision.wake(at)
            self._trim()
            return
        if self.active:
            return
        for seen in self.facts.instances:
            self.decision.do(Remove(seen.instance, seen.revision))
        if not self.facts.instances:
            self.decision.do(RemoveJob(self.job.project, self.job.name, self.facts.revision))

    def _write(self, phase: JobPhase, message: str, made: int) -> None:
        starts = [seen.status.started_at for seen in self.facts.instances if seen.status and seen.status.started_at]
        started_at = self.last.started_at or min(starts, default=None)
        status = JobStatus(
            project=self.job.project,
            name=self.job.name,
            phase=phase,
            succeeded=tuple(sorted(self.succeeded)),
            failures=self.failures,
            retry_at={} if phase.final else self.retry_at,
            active=len(self.active) + made,
            message=message or self.last.message,
            started_at=started_at,
            finished_at=(self.last.finished_at or self.decision.now) if phase.final else None,
        )
        if phase is JobPhase.SUCCEEDED:
            status = structs.replace(status, message="")
        if self._worth_writing(status):
            self.decision.do(WriteJobStatus(status, self.facts.revision))

    def _worth_writing(self, status: JobStatus) -> bool:
        """Whether the record is to be written: of a large job not for every index, since it grows with them.

        Nothing is lost by that: which indices have succeeded can always be told from their instances.
        """
        last = self.facts.status
        if last is None or status.phase is not last.phase:
            return True
        step = self.spec.completions // STATUS_WRITES_PER_JOB
        small = len(status.succeeded) - len(last.succeeded) < step and sum(status.failures.values()) == sum(last.failures.values())
        return status != last and not (step > 1 and small)


def decide_orphans(instances: tuple[Seen, ...], decision: Decision) -> None:
    """Stop and remove instances whose owner is gone."""
    for seen in instances:
        if seen.instance.desired is Desired.RUN:
            retire(decision, seen, "its owner is gone", drain_s=None, ingresses=frozenset())
        else:
            leave(decision, seen, drain_s=None, ingresses=frozenset())
