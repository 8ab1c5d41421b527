"""The spec of a job."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.spec.isolation import Isolation
from atoll.model.spec.placement import check_gang
from atoll.model.spec.values import REPLICAS_MAX, default
from atoll.model.spec.workload import Workload, check_workload
from atoll.model.units import Seconds


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


def check_job(spec: JobSpec) -> None:
    """Raise Invalid for a job spec that contradicts itself, naming the field."""
    check_workload(spec)
    if spec.isolation is Isolation.ISOLATE:
        raise Invalid("isolation: a job cannot be a worker", field="isolation", mend="use container, sandbox or vm")
    if spec.deadline is not None and spec.deadline <= 0:
        raise Invalid("deadline: must be above 0", field="deadline")
    check_gang(spec, min(spec.parallelism, spec.completions), "parallelism")
