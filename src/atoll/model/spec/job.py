"""The spec of a job."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from atoll.model.cron import EXPRESSION_CHARS_MAX, ZONE_CHARS_MAX, check_cron
from atoll.model.errors import Invalid
from atoll.model.names import NAME_CHARS_MAX
from atoll.model.spec.isolation import Isolation
from atoll.model.spec.placement import check_gang
from atoll.model.spec.values import REPLICAS_MAX, default
from atoll.model.spec.workload import Workload, check_workload
from atoll.model.units import Seconds

SNAPSHOT_DIGEST = "^sha256:[0-9a-f]{64}$"
POOL_MAX = 100
"""Sandboxes that one template keeps ready."""
IDLE_LIMIT_MIN_S = 1.0
RUN_SUFFIX_CHARS = 9
"""What the name of a run has behind its schedule's: a dash, and its time in minutes since the epoch."""


class Overlap(enum.StrEnum):
    """What becomes of a time of the schedule while the run before still runs."""

    SKIP = "skip"
    ALLOW = "allow"
    REPLACE = "replace"
    """The one before is cancelled; the new one begins when it has ended."""


class JobSpec(Workload, frozen=True, kw_only=True, tag_field="kind", tag="job"):
    """Work that runs to completion: `completions` instances with indices 0…, at most `parallelism` at a time."""

    completions: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] = 1
    parallelism: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] = 1
    retries: Annotated[int, Meta(ge=0, le=1000)] = 0
    """New tries of each index after a failure; the delay between them doubles from 1 s to 60 s."""
    deadline: Seconds | None = None
    """From the job's creation; what still runs then is stopped, and the job has failed."""
    keep: Seconds = default(Seconds(86_400))
    """How long a finished job and its logs are kept."""
    schedule: Annotated[str, Meta(max_length=EXPRESSION_CHARS_MAX)] | None = None
    """A cron expression: at each of its times a run of the job is made, a job of its own."""
    timezone: Annotated[str, Meta(max_length=ZONE_CHARS_MAX)] = "UTC"
    overlap: Overlap = Overlap.SKIP
    starting_deadline: Seconds | None = None
    """How late a run may begin; what is later counts as missed. Of several times that came while nobody looked, only the last
    is run."""
    runs_kept: Annotated[int, Meta(ge=1, le=100)] = 3
    """Finished runs that are kept, whatever `keep` says."""
    sandbox: bool = False
    """It is a sandbox: one instance that is made to be worked in; `deadline` is its time limit."""
    snapshot: Annotated[str, Meta(pattern=SNAPSHOT_DIGEST, description="'sha256:' and 64 hexadecimal digits")] | None = None
    """Of a sandbox: the snapshot that it goes on from, on the node that a constraint names."""
    idle_limit: Seconds | None = None
    """Of a sandbox: it is ended when no command and no copy of files was under way in it for so long, paused or not."""
    pool: Annotated[int, Meta(ge=0, le=POOL_MAX)] | None = None
    """It is a template of sandboxes: so many are kept running, to be taken by name. Their `deadline` begins then."""


def check_job(spec: JobSpec) -> None:
    """Raise Invalid for a job spec that contradicts itself, naming the field."""
    check_workload(spec)
    if spec.isolation is Isolation.ISOLATE:
        raise Invalid("isolation: a job cannot be a worker", field="isolation", mend="use container, sandbox or vm")
    if spec.deadline is not None and spec.deadline <= 0:
        raise Invalid("deadline: must be above 0", field="deadline")
    if spec.snapshot is not None and not spec.sandbox:
        raise Invalid("snapshot: only a sandbox goes on from one", field="snapshot", mend="add sandbox = true")
    if spec.snapshot is not None and (spec.resources.gpu is not None or spec.resources.devices):
        raise Invalid(
            "snapshot: none holds devices of a node", field="snapshot", mend="leave resources.gpu and resources.devices out"
        )
    if spec.sandbox and (spec.completions > 1 or spec.schedule is not None or spec.retries):
        text = "sandbox: it is one instance, made once; completions, retries and schedule are for other jobs"
        raise Invalid(text, field="sandbox", mend="leave them out")
    if spec.pool is not None and not spec.sandbox:
        raise Invalid("pool: only sandboxes are kept ready; an app has scale.standby", field="pool", mend="add sandbox = true")
    if spec.idle_limit is not None and not spec.sandbox:
        raise Invalid("idle_limit: only a sandbox is idle", field="idle_limit", mend="add sandbox = true, or leave it out")
    if spec.idle_limit is not None and spec.idle_limit < IDLE_LIMIT_MIN_S:
        raise Invalid(f"idle_limit: below {IDLE_LIMIT_MIN_S:g} s", field="idle_limit", mend="set it to '1s' or more")
    check_gang(spec, min(spec.parallelism, spec.completions), "parallelism")
    if spec.schedule is not None:
        check_cron(spec.schedule, spec.timezone, field="schedule")
        most = NAME_CHARS_MAX - RUN_SUFFIX_CHARS
        if len(spec.name) > most:
            text = f"name: over {most} characters; the name of each run is longer by {RUN_SUFFIX_CHARS}"
            raise Invalid(text, field="name", mend="give a job with a schedule a shorter name")
