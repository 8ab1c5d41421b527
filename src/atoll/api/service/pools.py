"""Taking a sandbox out of a template's pool: one write makes the job and gives it an instance that runs already.

The instance's writer is the leader; this one step that a user may take is conditional on the revision that was seen, as is each of
the leader's. So of two that want the same instance, or of a taker and a leader that ends it, one has it, and the other looks again.
"""

from __future__ import annotations

from msgspec.structs import replace

from atoll.api.service.access import check_name
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.jobs import check_free
from atoll.api.service.lookups import by_owner
from atoll.api.service.projects import require_project
from atoll.model import codec, keys, stored
from atoll.model.errors import NotFound
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import Instance, Job, JobStatus, NodeHealth, NodeLiveness, NodePolicy, OwnerKind, Status
from atoll.model.spec import check_job
from atoll.model.states import Desired, Phase
from atoll.model.views import JobView, TakeRequest
from atoll.store.cache import Held


class Pools:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state
        self._wanted: set[str] = set()
        """Instances that calls of this server are about to take: others of its calls take another, instead of losing a race."""

    async def take(self, project: str, template: str, wish: TakeRequest, *, request: RequestKey | None = None) -> JobView:
        """Make the sandbox `wish.name` of an instance in the template's pool, and return it with that instance, which runs; where
        none is ready, one is made as for any sandbox. An instance is given to one alone. Safe to repeat with the same request key.

        Raises Invalid, NotFound (no such template), Conflict (a job of that name is there).
        """
        check_name(wish.name, "name")
        mine: list[str] = []

        def let_go() -> None:
            self._wanted.difference_update(mine)
            mine.clear()

        def build() -> Draft[JobView]:
            let_go()
            held = self._template(project, template)
            check_free(self._context, project, wish.name)
            spec = held.record.spec
            spec = replace(
                spec,
                name=wish.name,
                pool=None,
                env={**spec.env, **wish.env},
                deadline=wish.deadline if wish.deadline is not None else spec.deadline,
                idle_limit=wish.idle_limit if wish.idle_limit is not None else spec.idle_limit,
            )
            check_job(spec)
            now = self._context.clock.now()
            job = Job(project=project, name=wish.name, spec=spec, created_at=now, template=template)
            key = keys.job(project, wish.name)
            compare, ops = [absent(key)], [Put(key, stored.encode(job))]
            found = self._ready(held.record)
            if found is not None:
                instance = found.record
                mine.append(instance.id)
                self._wanted.add(instance.id)
                owned = replace(instance, owner=wish.name, release=0, standby=False, taken_at=now)
                compare.append(unchanged(keys.instance(project, instance.id), found.revision))
                # Of a template that was changed or removed meanwhile nothing is taken.
                compare.append(unchanged(keys.job(project, template), held.revision))
                ops.append(Put(keys.instance(project, instance.id), codec.encode(owned)))
            status = keys.job_status(project, wish.name)
            left = self._state.get(JobStatus, f"{project}/{wish.name}") is not None  # of an earlier job of this name
            return Draft(
                compare=compare,
                ops=[*ops, *([Delete(status)] if left else [])],
                answer=lambda revision: JobView(job=job, revision=revision, instance=found.record.id if found else ""),
            )

        try:
            return await self._context.write(JobView, build, request)
        finally:
            let_go()

    def variables(self, instance: Instance) -> dict[str, str]:
        """Return what a command in an instance sees beside what the instance was started with: of one that was taken, who it is."""
        if instance.taken_at is None:
            return {}
        job = self._state.get(Job, f"{instance.project}/{instance.owner}")
        given = job.record.spec.env if job is not None else {}
        return {"ATOLL_JOB": instance.owner, "ATOLL_INDEX": "0", "ATOLL_ATTEMPT": "0", **given}

    def _template(self, project: str, name: str) -> Held[Job]:
        held = self._state.get(Job, f"{project}/{name}")
        if held is None or held.record.spec.pool is None:
            require_project(self._context, project)
            raise NotFound(f"no template '{name[:60]}' in project '{project}'", mend="'atoll template list' lists them")
        return held

    def _ready(self, template: Job) -> Held[Instance] | None:
        """Return one of the pool that can be taken, any: so that servers seldom choose the same."""
        pool = self._state.found(Instance, by_owner, (OwnerKind.JOB, template.project, template.name))
        ready = [held for held in pool.values() if self._can_be_taken(held.record, template)]
        return self._context.random.choice(sorted(ready, key=lambda held: held.record.id)) if ready else None

    def _can_be_taken(self, instance: Instance, template: Job) -> bool:
        if not instance.standby or instance.desired is not Desired.RUN or instance.release != template.release:
            return False
        if instance.node is None or instance.id in self._wanted:
            return False
        status = self._state.get(Status, f"{instance.project}/{instance.id}")
        if status is None or status.record.phase is not Phase.RUNNING or not status.record.ready or status.record.paused:
            return False
        liveness, policy = self._state.get(NodeLiveness, instance.node), self._state.get(NodePolicy, instance.node)
        answers = liveness is None or liveness.record.health is NodeHealth.READY
        return answers and (policy is None or policy.record.drain is None)
