"""Jobs: create, look, cancel, delete."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.api.service.access import Caller, check_name
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.pages import page
from atoll.api.service.projects import require_project
from atoll.api.service.workloads import check_constraints, check_secrets, pin, require_image
from atoll.model import codec, keys
from atoll.model.errors import Conflict, NotFound
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import Instance, Job, JobStatus, OwnerKind
from atoll.model.spec import JobSpec, check_job
from atoll.model.views import JobView, Page
from atoll.store.cache import Held


class Jobs:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    def get(self, project: str, name: str) -> JobView:
        """Raises NotFound."""
        return self._view(self._held(project, name))

    def all(self, project: str, *, limit: int, after: str = "") -> Page[JobView]:
        require_project(self._context, project)
        return page(self._state, Job, project + "/", self._view, limit=limit, after=after)

    async def create(self, caller: Caller, spec: JobSpec, *, request: RequestKey | None = None) -> JobView:
        """Make a job. Without a request key, a repeat raises Conflict, because a job of that name is there.

        Raises Invalid, NotFound (project, secret), ImageError (not in the cell's registry), Conflict.
        """
        check_name(spec.project, "project")
        check_job(spec)
        check_constraints(spec)
        require_image(spec)

        def build() -> Draft[JobView]:
            require_project(self._context, spec.project)
            if self._state.get(Job, f"{spec.project}/{spec.name}") is not None:
                mend = "delete it, or give the new one another name"
                raise Conflict(f"a job '{spec.name}' is there already", field="name", mend=mend)
            if any(_of_job(held.record, spec) for held in self._state.records(Instance).values()):
                # They would be taken for the new job's.
                mend = "try again in a moment, or use another name"
                raise Conflict(f"instances of an earlier job '{spec.name}' are still being removed", field="name", mend=mend)
            check_secrets(self._context, spec)
            pinned = pin(self._context, caller, spec)
            job = Job(project=spec.project, name=spec.name, spec=pinned, created_at=self._context.clock.now())
            key = keys.job(job.project, job.name)
            # The status of an earlier job of this name would be taken for the new one's.
            status = keys.job_status(job.project, job.name)
            return Draft(
                compare=[absent(key)],
                ops=[Put(key, codec.encode(job)), *([Delete(status)] if self._status(job) else [])],
                answer=lambda revision: JobView(job=job, status=None, revision=revision),
            )

        return await self._context.write(JobView, build, request)

    async def cancel(self, project: str, name: str, *, request: RequestKey | None = None) -> JobView:
        """Have all its instances stopped. A job that has finished, or is cancelled already, stays as it is. Safe to repeat."""

        def build() -> Draft[JobView]:
            held = self._held(project, name)
            if held.record.cancelled or self._finished(held.record):
                return Draft(answer=lambda _: self._view(held))
            job = replace(held.record, cancelled=True)
            key = keys.job(project, name)
            return Draft(
                compare=[unchanged(key, held.revision)],
                ops=[Put(key, codec.encode(job))],
                answer=lambda revision: self._view(Held(job, revision, held.created)),
            )

        return await self._context.write(JobView, build, request)

    async def delete(self, project: str, name: str, *, request: RequestKey | None = None) -> JobView:
        """Forget a job that has finished. Raises Conflict while it has not."""

        def build() -> Draft[JobView]:
            held = self._held(project, name)
            if not self._finished(held.record):
                raise Conflict(f"job '{name}' has not finished", mend=f"cancel it first: atoll jobs cancel {name}")
            key = keys.job(project, name)
            view = self._view(held)
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: view)

        return await self._context.write(JobView, build, request)

    def _held(self, project: str, name: str) -> Held[Job]:
        held = self._state.get(Job, f"{project}/{name}")
        if held is None:
            require_project(self._context, project)
            raise NotFound(f"no job '{name[:60]}' in project '{project}'", mend="'atoll jobs list' lists them")
        return held

    def _status(self, job: Job) -> JobStatus | None:
        held = self._state.get(JobStatus, f"{job.project}/{job.name}")
        return held.record if held is not None else None

    def _finished(self, job: Job) -> bool:
        status = self._status(job)
        return status is not None and status.phase.final

    def _view(self, held: Held[Job]) -> JobView:
        return JobView(job=held.record, status=self._status(held.record), revision=held.revision)


def _of_job(instance: Instance, spec: JobSpec) -> bool:
    return instance.owner_kind is OwnerKind.JOB and (instance.project, instance.owner) == (spec.project, spec.name)
