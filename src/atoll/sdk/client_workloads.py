"""Calls about what runs: apps and their rollouts, jobs, sandboxes."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.model.records import Release
from atoll.model.spec import AppSpec, JobSpec
from atoll.model.views import (
    AppGroup,
    AppView,
    DefragView,
    GroupView,
    JobView,
    PlanView,
    RollbackRequest,
    RolloutView,
    ScaleRequest,
    TakeRequest,
)
from atoll.sdk.calls import Calls
from atoll.sdk.transport import path


class WorkloadCalls(Calls):
    """Part of `Client`."""

    async def apps(self, project: str) -> list[AppView]:
        return await self._all(AppView, "projects", project, "apps")

    async def app(self, project: str, name: str) -> AppView:
        """Raises NotFound."""
        return await self._get(AppView, path("projects", project, "apps", name))

    async def put_app(self, spec: AppSpec, *, if_revision: int | None = None) -> AppView:
        """Make or change `spec.name` in `spec.project`; the same spec again makes no new release.

        With `if_revision`, raises StaleRevision when the app has changed since it was read (0: when it exists).
        """
        where = path("projects", spec.project, "apps", spec.name)
        return await self._write(AppView, "PUT", where, spec, if_revision=if_revision)

    async def put_apps(self, project: str, specs: Sequence[AppSpec]) -> GroupView:
        """Make or change several apps of a project: all of them, or none where one cannot be."""
        return await self._write(GroupView, "PUT", path("projects", project, "apps"), AppGroup(apps=tuple(specs)))

    async def delete_app(self, project: str, name: str) -> None:
        """Ask for the end of the app; it is gone when its last instance is."""
        await self._delete(path("projects", project, "apps", name))

    async def scale(self, project: str, name: str, replicas: int) -> AppView:
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "scale"), ScaleRequest(replicas))

    async def restart(self, project: str, name: str) -> AppView:
        """Replace every instance, keeping the app serving."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "restart"))

    async def rollback(self, project: str, name: str, release: int | None = None) -> AppView:
        """Go back to an earlier release; without `release`, to the one before the current."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollback"), RollbackRequest(release))

    async def rollout(self, project: str, name: str) -> RolloutView:
        """Return how the app's last rollout stands, with what was counted of each release."""
        return await self._get(RolloutView, path("projects", project, "apps", name, "rollout"))

    async def pause_rollout(self, project: str, name: str) -> AppView:
        """Have the rollout not go on by itself. Raises Conflict: none is under way."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "pause"))

    async def resume_rollout(self, project: str, name: str) -> AppView:
        """Go on after a pause or past a step that waits, or begin anew after a revert. Raises Conflict."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "resume"))

    async def promote_rollout(self, project: str, name: str) -> AppView:
        """Give the new release all requests. Raises Conflict."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "promote"))

    async def abort_rollout(self, project: str, name: str) -> AppView:
        """Give the release before all requests again, at once. Raises Conflict."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "abort"))

    async def undo_rollout(self, project: str, name: str) -> AppView:
        """Go back to what served before. Raises Conflict, NotFound."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "undo"))

    async def releases(self, project: str, name: str) -> list[Release]:
        """Return the app's releases, newest first."""
        return await self._all(Release, "projects", project, "apps", name, "releases")

    async def jobs(self, project: str) -> list[JobView]:
        return await self._all(JobView, "projects", project, "jobs")

    async def job(self, project: str, name: str) -> JobView:
        return await self._get(JobView, path("projects", project, "jobs", name))

    async def create_job(self, spec: JobSpec) -> JobView:
        """Raises Conflict when a job of that name is there."""
        return await self._write(JobView, "POST", path("projects", spec.project, "jobs"), spec)

    async def put_job(self, spec: JobSpec) -> JobView:
        """Make or change a job with a schedule, or a template of sandboxes."""
        return await self._write(JobView, "PUT", path("projects", spec.project, "jobs", spec.name), spec)

    async def take_sandbox(self, project: str, template: str, wish: TakeRequest) -> JobView:
        """Take a sandbox out of a template's pool; `instance` of the answer can be worked in at once, where it is not empty."""
        return await self._write(JobView, "POST", path("projects", project, "jobs", template, "take"), wish)

    async def suspend_job(self, project: str, name: str) -> JobView:
        return await self._write(JobView, "POST", path("projects", project, "jobs", name, "suspend"))

    async def resume_job(self, project: str, name: str) -> JobView:
        return await self._write(JobView, "POST", path("projects", project, "jobs", name, "resume"))

    async def trigger_job(self, project: str, name: str) -> JobView:
        """Make a run of a job with a schedule now, and return it."""
        return await self._write(JobView, "POST", path("projects", project, "jobs", name, "trigger"))

    async def cancel_job(self, project: str, name: str) -> JobView:
        return await self._write(JobView, "POST", path("projects", project, "jobs", name, "cancel"))

    async def delete_job(self, project: str, name: str) -> None:
        await self._delete(path("projects", project, "jobs", name))

    async def defrag(self) -> DefragView:
        """Return which instances could be moved, and what that would free. Nothing is moved."""
        return await self._get(DefragView, path("defrag"))

    async def plan(self, spec: AppSpec | JobSpec) -> PlanView:
        """Return where the spec's instances would go now. Nothing is written."""
        return await self._write(PlanView, "POST", path("plan"), spec)
