"""Jobs as users want them, and how they stand."""

from __future__ import annotations

import enum

from atoll.model.records.basis import Record
from atoll.model.spec import JobSpec


class Job(Record, frozen=True, kw_only=True):
    """A job as the user wants it. Writer: API, and the job controller for the runs of one with a schedule and for its end after
    `keep`."""

    project: str
    name: str
    spec: JobSpec
    created_at: float
    cancelled: bool = False
    parent: str = ""
    """The job with a schedule of which this is a run."""
    tick: float | None = None
    """The time of its schedule that it runs for; None for a run that was asked for by hand."""
    suspended: bool = False
    """Its schedule makes no runs."""
    scheduled_from: float | None = None
    """Only later times of its schedule count: since it was made, changed or resumed."""
    release: int = 0
    """Of a template: how often what its sandboxes are made of has changed; those of an older one are replaced."""
    template: str = ""
    """The template that it was made by: an instance of its pool became this job's, or one was made where it had none ready."""


class JobPhase(enum.StrEnum):
    SCHEDULED = "scheduled"
    """It has a schedule, and makes runs."""
    SUSPENDED = "suspended"
    """It has a schedule, and makes none for now."""
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobPhase.SUCCEEDED, JobPhase.FAILED, JobPhase.CANCELLED)


class JobStatus(Record, frozen=True, kw_only=True):
    """How a job stands. Writer: job controller."""

    project: str
    name: str
    phase: JobPhase
    succeeded: tuple[int, ...] = ()
    """Indices that have completed."""
    failures: dict[int, int] = {}
    """Index → failed tries."""
    retry_at: dict[int, float] = {}
    active: int = 0
    message: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    ticked_at: float | None = None
    """Of a job with a schedule: the last time that was run, skipped or missed. None later than this was."""
    awaited_at: float | None = None
    """Of a job with a schedule that replaces: the time whose run waits for those before to end; it is not late for that."""
    next_at: float | None = None
    """Of a job with a schedule: its next time."""
    missed: int = 0
    """Of a job with a schedule: times that came while nobody led, or too late for `starting_deadline`."""
    skipped: int = 0
    """Of a job with a schedule: times that came while the run before still ran."""
