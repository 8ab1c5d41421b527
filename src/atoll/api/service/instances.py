"""Instances, as users see them: look, and have one replaced."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.api.service.access import Caller
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.pages import page
from atoll.api.service.projects import require_project
from atoll.model import codec, keys
from atoll.model.errors import Conflict, NotFound
from atoll.model.ports.store import Put, unchanged
from atoll.model.records import Instance, OwnerKind, Status
from atoll.model.states import Desired
from atoll.model.views import InstanceView, Page
from atoll.store.cache import Held


class Instances:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    def get(self, project: str, id: str) -> InstanceView:
        """Raises NotFound."""
        return self._view(self._held(project, id))

    def all(
        self, project: str, *, app: str | None = None, job: str | None = None, limit: int, after: str = ""
    ) -> Page[InstanceView]:
        """Return the project's instances, or those of one app or job."""
        require_project(self._context, project)

        def keep(instance: Instance) -> bool:
            if instance.owner_kind is OwnerKind.APP:
                return instance.owner == app or (app is None and job is None)
            return instance.owner == job or (app is None and job is None)

        return page(self._state, Instance, project + "/", self._view, limit=limit, after=after, keep=keep)

    async def stop(self, caller: Caller, project: str, id: str, *, request: RequestKey | None = None) -> InstanceView:
        """Have one instance drained, stopped and replaced (a job's: stopped). Safe to repeat.

        The leader is the instance's writer; this one step that a user may take is conditional on the revision that was seen,
        and only ever moves `desired` forward, so that it and the leader cannot undo each other.
        """

        def build() -> Draft[InstanceView]:
            held = self._held(project, id)
            instance = held.record
            if instance.desired is not Desired.RUN:
                return Draft(answer=lambda _: self._view(held))
            # How long it may drain is left to the leader.
            stopped = replace(instance, desired=Desired.DRAIN, reason=_reason(caller))
            key = keys.instance(project, id)
            return Draft(
                compare=[unchanged(key, held.revision)],
                ops=[Put(key, codec.encode(stopped))],
                answer=lambda revision: self._view(Held(stopped, revision, held.created)),
            )

        return await self._context.write(InstanceView, build, request)

    def placed(self, project: str, id: str) -> Instance:
        """Return an instance that has a node, for a live stream. Raises NotFound, Conflict (still waiting for a node)."""
        instance = self._held(project, id).record
        if instance.node is None:
            waits = instance.rejection.message if instance.rejection is not None else "it waits for the scheduler"
            raise Conflict(f"instance '{id}' has no node yet: {waits}", mend="try again when it runs")
        return instance

    def running(self, project: str, id: str) -> Instance:
        """Return an instance in which something runs, for somebody to work in.

        Raises NotFound, Conflict (also for one in a template's pool, which is to be as it was made when it is taken).
        """
        instance = self.placed(project, id)
        if instance.standby and instance.owner_kind is OwnerKind.JOB:
            mend = f"take one: atoll sandbox create NAME --template {instance.owner}"
            raise Conflict(f"instance '{id}' waits in the pool of template '{instance.owner}'", mend=mend)
        status = self._state.get(Status, f"{project}/{id}")
        if status is None or not status.record.phase.live:
            phase = status.record.phase if status is not None else "pending"
            raise Conflict(f"instance '{id}' does not run; it is {phase}", mend="'atoll ps' shows those that run")
        return instance

    def _held(self, project: str, id: str) -> Held[Instance]:
        held = self._state.get(Instance, f"{project}/{id}")
        if held is None:
            require_project(self._context, project)
            raise NotFound(f"no instance '{id[:60]}' in project '{project}'", mend="'atoll ps' lists them")
        return held

    def _view(self, held: Held[Instance]) -> InstanceView:
        status = self._state.get(Status, f"{held.record.project}/{held.record.id}")
        return InstanceView(instance=held.record, status=status.record if status else None, revision=held.revision)


def _reason(caller: Caller) -> str:
    return f"stopped by {caller.name or caller.id}"
