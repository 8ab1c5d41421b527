"""Which jobs are runs of which schedule, kept current as jobs come and go."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from atoll.control.schedules import Run, run_name
from atoll.model.cron import tick_before
from atoll.model.records import Job, JobStatus
from atoll.store.cache import Delta, State


class Runs:
    """A join over a `State`; keys are `project/name`."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._of: dict[str, set[str]] = defaultdict(set)
        """Schedule → its runs."""

    def rebuild(self) -> None:
        self._of.clear()
        for key, held in self._state.records(Job).items():
            self._enter(key, held.record)

    def apply(self, delta: Delta) -> None:
        """Take over what became of a job."""
        if delta.old is not None and delta.old.record.parent:
            parent = _parent(delta.old.record)
            self._of[parent].discard(delta.key)
            if not self._of[parent]:
                del self._of[parent]
        if delta.new is not None:
            self._enter(delta.key, delta.new.record)

    def _enter(self, key: str, job: Any) -> None:
        if job.parent:
            self._of[_parent(job)].add(key)

    def family(self, key: str) -> list[str]:
        """Return what must be looked at when the job at `key` has changed: its schedule, and that one's other runs."""
        held = self._state.get(Job, key)
        if held is None or not held.record.parent:
            # Of a run that is gone only its name is left, which says whose it was.
            parent = key.rpartition("-")[0]
            return [parent, *self._of.get(parent, ())] if parent in self._of or self._state.get(Job, parent) else []
        parent = _parent(held.record)
        return [parent, *self._of.get(parent, ())]

    def of(self, key: str) -> tuple[Run, ...]:
        """Return the runs of a schedule, oldest first."""
        found = []
        for name in self._of.get(key, ()):
            held, status = self._state.get(Job, name), self._state.get(JobStatus, name)
            if held is not None:
                found.append(Run(job=held.record, revision=held.revision, status=status.record if status is not None else None))
        return tuple(sorted(found, key=lambda run: (run.job.created_at, run.job.name)))

    def taken(self, job: Job, now: float) -> bool:
        """Whether there is a job already with the name of the run that is due now."""
        schedule = job.spec.schedule
        due = tick_before(schedule, job.spec.timezone, now) if schedule is not None else None
        return due is not None and self._state.get(Job, f"{job.project}/{run_name(job.name, due)}") is not None

    def stays(self, run: Job) -> bool | None:
        """Whether a run that has finished is among those that its schedule keeps; None where there is no such schedule any more."""
        parent = self._state.get(Job, _parent(run))
        if parent is None or parent.record.spec.schedule is None:
            return None
        finished = [each.job.name for each in self.of(_parent(run)) if each.status is not None and each.status.phase.final]
        return run.name in finished[-parent.record.spec.runs_kept :]


def _parent(job: Job) -> str:
    return f"{job.project}/{job.parent}"
