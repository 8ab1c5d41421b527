"""Jobs: create, look, cancel, delete."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.api.service.access import Caller, check_name
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.lookups import by_owner
from atoll.api.service.pages import page
from atoll.api.service.projects import require_project
from atoll.api.service.workloads import check_constraints, check_secrets, pin, require_image
from atoll.model import keys, stored
from atoll.model.errors import Conflict, Invalid, NotFound
from atoll.model.ports.store import Delete, Op, Put, absent, unchanged
from atoll.model.records import Instance, Job, JobStatus, OwnerKind, new_suffix
from atoll.model.spec import RUN_SUFFIX_CHARS, JobSpec, check_job
from atoll.model.views import JobView, Page
from atoll.store.cache import Held


def check_free(context: Context, project: str, name: str) -> None:
    """Raise Conflict, with how to be rid of it, for a name that a job, a sandbox or a template has, or an instance of an earlier
    one."""
    held = context.state.get(Job, f"{project}/{name}")
    if held is not None:
        spec = held.record.spec
        what, end = ("job", "jobs delete")
        if spec.sandbox:
            what, end = ("sandbox", "sandbox rm") if spec.pool is None else ("template", "template rm")
        mend = f"remove it (atoll {end} {name}), or give the new one another name"
        raise Conflict(f"a {what} '{name}' is there already", field="name", mend=mend)
    if context.state.found(Instance, by_owner, (OwnerKind.JOB, project, name)):
        # They would be taken for the new job's.
        mend = "try again in a moment, or use another name"
        raise Conflict(f"instances of an earlier job '{name}' are still being removed", field="name", mend=mend)


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
            check_free(self._context, spec.project, spec.name)
            check_secrets(self._context, spec)
            pinned = pin(self._context, caller, spec)
            now = self._context.clock.now()
            since = now if spec.schedule is not None else None
            job = Job(project=spec.project, name=spec.name, spec=pinned, created_at=now, scheduled_from=since)
            key = keys.job(job.project, job.name)
            # The status of an earlier job of this name would be taken for the new one's.
            status = keys.job_status(job.project, job.name)
            return Draft(
                compare=[absent(key)],
                ops=[Put(key, stored.encode(job)), *([Delete(status)] if self._status(job) else [])],
                answer=lambda revision: JobView(job=job, status=None, revision=revision),
            )

        return await self._context.write(JobView, build, request)

    async def put(self, caller: Caller, spec: JobSpec, *, request: RequestKey | None = None) -> JobView:
        """Make or change a job with a schedule, whose runs go on as they were, or a template, whose pool is replaced where what it
        is made of has changed. Safe to repeat.

        Raises what `create` does; Conflict for a job that is there and is neither.
        """
        check_job(spec)
        check_constraints(spec)
        require_image(spec)
        if spec.schedule is None and spec.pool is None:
            raise Invalid("schedule: missing; only what has one can be changed", field="schedule", mend="make it with POST")

        def build() -> Draft[JobView]:
            require_project(self._context, spec.project)
            held = self._state.get(Job, f"{spec.project}/{spec.name}")
            if held is not None and (held.record.spec.schedule is None, held.record.spec.pool is None) != (
                spec.schedule is None,
                spec.pool is None,
            ):
                what = "schedule" if spec.schedule is not None else "pool, so it is no template"
                raise Conflict(f"job '{spec.name}' has no {what}", field="name", mend="delete it, or use another name")
            check_secrets(self._context, spec)
            pinned = pin(self._context, caller, spec)
            if held is not None and held.record.spec == pinned:
                return Draft(answer=lambda _: self._view(held))
            now = self._context.clock.now()
            # Times that the old schedule would have had are none of the new one's.
            since = now if spec.schedule is not None else None
            job = (
                replace(held.record, spec=pinned, scheduled_from=since, release=held.record.release + _differs(held.record, pinned))
                if held is not None
                else Job(project=spec.project, name=spec.name, spec=pinned, created_at=now, scheduled_from=since)
            )
            return self._written(job, held)

        return await self._context.write(JobView, build, request)

    async def suspend(self, project: str, name: str, suspended: bool, *, request: RequestKey | None = None) -> JobView:
        """Have a schedule make no runs, or make them again; times that come meanwhile are not caught up. Safe to repeat."""

        def build() -> Draft[JobView]:
            held = self._scheduled(project, name)
            if held.record.suspended is suspended:
                return Draft(answer=lambda _: self._view(held))
            return self._written(replace(held.record, suspended=suspended, scheduled_from=self._context.clock.now()), held)

        return await self._context.write(JobView, build, request)

    async def trigger(self, project: str, name: str, *, request: RequestKey | None = None) -> JobView:
        """Make a run of a job with a schedule now, beside what runs, and return it. A repeat makes another."""

        def build() -> Draft[JobView]:
            held = self._scheduled(project, name)
            run = f"{name}-{new_suffix(self._context.random.choice, RUN_SUFFIX_CHARS - 1)}"
            spec = replace(held.record.spec, name=run, schedule=None)
            job = Job(project=project, name=run, spec=spec, created_at=self._context.clock.now(), parent=name)
            return self._written(job, None)

        return await self._context.write(JobView, build, request)

    def _scheduled(self, project: str, name: str) -> Held[Job]:
        held = self._held(project, name)
        if held.record.spec.schedule is None:
            raise Conflict(f"job '{name}' has no schedule", mend="it runs once; run it again under another name")
        return held

    def _written(self, job: Job, held: Held[Job] | None) -> Draft[JobView]:
        key = keys.job(job.project, job.name)
        return Draft(
            compare=[absent(key) if held is None else unchanged(key, held.revision)],
            ops=[Put(key, stored.encode(job))],
            answer=lambda revision: self._view(Held(job, revision, held.created if held is not None else revision)),
        )

    async def cancel(self, project: str, name: str, *, request: RequestKey | None = None) -> JobView:
        """Have all its instances stopped. A job that has finished, or is cancelled already, stays as it is. Safe to repeat."""

        def build() -> Draft[JobView]:
            held = self._held(project, name)
            if held.record.spec.pool is not None:
                mend = f"remove it: atoll template rm {name}"
                raise Conflict(f"job '{name}' is a template, which does not end", mend=mend)
            if held.record.spec.schedule is not None:
                mend = f"suspend it (atoll jobs suspend {name}), or cancel one of its runs"
                raise Conflict(f"job '{name}' is a schedule, which does not run itself", mend=mend)
            if held.record.cancelled or self._finished(held.record):
                return Draft(answer=lambda _: self._view(held))
            job = replace(held.record, cancelled=True)
            key = keys.job(project, name)
            return Draft(
                compare=[unchanged(key, held.revision)],
                ops=[Put(key, stored.encode(job))],
                answer=lambda revision: self._view(Held(job, revision, held.created)),
            )

        return await self._context.write(JobView, build, request)

    async def delete(self, project: str, name: str, *, request: RequestKey | None = None) -> JobView:
        """Forget a job that has finished; a schedule, whose runs are cancelled; or a template, whose pool is ended, and nothing of
        what was taken from it. Raises Conflict while it has not finished."""

        def build() -> Draft[JobView]:
            held = self._held(project, name)
            if held.record.spec.schedule is not None:
                return self._forget_schedule(held)
            if held.record.spec.pool is None and not self._finished(held.record):
                raise Conflict(f"job '{name}' has not finished", mend=f"cancel it first: atoll jobs cancel {name}")
            key = keys.job(project, name)
            view = self._view(held)
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: view)

        return await self._context.write(JobView, build, request)

    def _forget_schedule(self, held: Held[Job]) -> Draft[JobView]:
        """Finished runs go by and by, as other jobs do; the others are cancelled in the same write."""
        job = held.record
        compare, ops = [unchanged(keys.job(job.project, job.name), held.revision)], list[Op]()
        for each in self._state.records(Job).values():
            run = each.record
            if (run.project, run.parent) == (job.project, job.name) and not run.cancelled and not self._finished(run):
                key = keys.job(run.project, run.name)
                compare.append(unchanged(key, each.revision))
                ops.append(Put(key, stored.encode(replace(run, cancelled=True))))
        view = self._view(held)
        return Draft(compare=compare, ops=[*ops, Delete(keys.job(job.project, job.name))], answer=lambda _: view)

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


def _differs(job: Job, spec: JobSpec) -> bool:
    """Whether a template's sandboxes are to be made anew. Their number and what is said when one is taken are nothing of them."""
    said = {"pool": None, "deadline": None, "idle_limit": None, "keep": spec.keep}
    return spec.pool is not None and replace(job.spec, **said) != replace(spec, **said)
