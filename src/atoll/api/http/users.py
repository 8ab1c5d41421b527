"""The calls of people and their tools: projects, apps, jobs, instances, secrets, events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from msgspec.structs import replace

from atoll.api.http.answers import Lines
from atoll.api.http.calls import Call, Query, Route
from atoll.api.service import Need, authorize
from atoll.api.service.watching import WATCHED, wanted
from atoll.model.errors import Invalid
from atoll.model.records import Event, Project, Release
from atoll.model.spec import AppSpec, JobSpec, Quota
from atoll.model.streams import Held
from atoll.model.views import (
    PAGE_LIMIT_MAX,
    AppGroup,
    AppView,
    DefragView,
    GroupView,
    InstanceExplanation,
    InstanceView,
    JobView,
    Page,
    PlanView,
    QuotaView,
    RollbackRequest,
    RolloutView,
    ScaleRequest,
    SecretRequest,
    SecretView,
    SnapshotsView,
    TakeRequest,
    WatchLine,
)

LIMIT = Query("limit", "items at most", {"type": "integer", "minimum": 1, "maximum": PAGE_LIMIT_MAX, "default": PAGE_LIMIT_MAX})
AFTER = Query("after", "the `next` of the page before")
PAGED = (LIMIT, AFTER)
_P = "/v1/projects"
_APP = f"{_P}/{{project}}/apps/{{app}}"
_JOB = f"{_P}/{{project}}/jobs/{{job}}"
_INSTANCE = f"{_P}/{{project}}/instances/{{instance}}"
_SECRET = f"{_P}/{{project}}/secrets/{{secret}}"


async def list_projects(call: Call) -> Page[Project]:
    return call.service.projects.all(call.caller, limit=call.limit, after=call.after)


async def put_project(call: Call) -> Project:
    return await call.service.projects.put(call.project, request=call.request_key)


async def put_quota(call: Call) -> Project:
    return await call.service.projects.set_quota(call.project, call.body(Quota), if_match=call.if_match, request=call.request_key)


async def get_quota(call: Call) -> QuotaView:
    return await call.service.quotas.get(call.project)


async def list_apps(call: Call) -> Page[AppView]:
    return call.service.apps.all(call.project, limit=call.limit, after=call.after)


async def get_app(call: Call) -> AppView:
    return call.service.apps.get(call.project, call.path["app"])


async def put_app(call: Call) -> AppView:
    spec = call.spec(AppSpec, call.path["app"])
    return await call.service.apps.put(call.caller, spec, if_match=call.if_match, request=call.request_key)


async def put_group(call: Call) -> GroupView:
    specs = call.body(AppGroup).apps
    # A spec that names no project is for the one of the path.
    specs = tuple(replace(spec, project=call.project) if spec.project == "default" else spec for spec in specs)
    return await call.service.groups.put(call.caller, call.project, specs, request=call.request_key)


async def delete_app(call: Call) -> AppView:
    return await call.service.apps.delete(
        call.project, call.path["app"], caller=call.caller, if_match=call.if_match, request=call.request_key
    )


async def scale_app(call: Call) -> AppView:
    replicas = call.body(ScaleRequest).replicas
    name = call.path["app"]
    return await call.service.apps.scale(
        call.project, name, replicas, caller=call.caller, if_match=call.if_match, request=call.request_key
    )


async def restart_app(call: Call) -> AppView:
    return await call.service.apps.restart(
        call.project, call.path["app"], caller=call.caller, if_match=call.if_match, request=call.request_key
    )


async def rollback_app(call: Call) -> AppView:
    wish = call.body(RollbackRequest) if call.has_body else RollbackRequest()
    return await call.service.apps.rollback(
        call.caller, call.project, call.path["app"], wish.release, if_match=call.if_match, request=call.request_key
    )


async def get_rollout(call: Call) -> RolloutView:
    return call.service.rollouts.get(call.project, call.path["app"])


async def pause_rollout(call: Call) -> AppView:
    return await _steer(call, call.service.rollouts.pause)


async def resume_rollout(call: Call) -> AppView:
    return await _steer(call, call.service.rollouts.resume)


async def promote_rollout(call: Call) -> AppView:
    return await _steer(call, call.service.rollouts.promote)


async def abort_rollout(call: Call) -> AppView:
    return await _steer(call, call.service.rollouts.abort)


async def undo_rollout(call: Call) -> AppView:
    return await _steer(call, call.service.rollouts.undo)


async def _steer(call: Call, ask: Callable[..., Awaitable[AppView]]) -> AppView:
    return await ask(call.caller, call.project, call.path["app"], if_match=call.if_match, request=call.request_key)


async def list_releases(call: Call) -> Page[Release]:
    return call.service.apps.releases(call.project, call.path["app"], limit=call.limit, after=call.after)


async def list_instances(call: Call) -> Page[InstanceView]:
    return call.service.instances.all(
        call.project, app=call.query("app"), job=call.query("job"), limit=call.limit, after=call.after
    )


async def get_instance(call: Call) -> InstanceView:
    return call.service.instances.get(call.project, call.path["instance"])


async def explain_instance(call: Call) -> InstanceExplanation:
    return await call.service.planning.explain(call.project, call.path["instance"], call.caller)


async def plan_spec(call: Call) -> PlanView:
    spec = call.any_spec()
    authorize(call.caller, Need.READ, project=spec.project)
    return await call.service.planning.plan(spec, call.caller)


async def defrag(call: Call) -> DefragView:
    return await call.service.planning.defrag()


async def stop_instance(call: Call) -> InstanceView:
    return await call.service.instances.stop(call.caller, call.project, call.path["instance"], request=call.request_key)


async def pause_instance(call: Call) -> Held:
    return await call.service.holds.hold(call.project, call.path["instance"], "pause")


async def resume_instance(call: Call) -> Held:
    return await call.service.holds.hold(call.project, call.path["instance"], "resume")


async def snapshot_instance(call: Call) -> Held:
    return await call.service.holds.hold(call.project, call.path["instance"], "snapshot")


async def list_snapshots(call: Call) -> SnapshotsView:
    return await call.service.snapshots.all(call.project, call.query("node"))


async def remove_snapshot(call: Call) -> SnapshotsView:
    node = call.query("node")
    if not node:
        raise Invalid("node: missing; a snapshot is on one", field="node", mend="name it in the query: ?node=NODE")
    return await call.service.snapshots.remove(call.project, f"sha256:{call.path['snapshot']}", node)


async def list_jobs(call: Call) -> Page[JobView]:
    return call.service.jobs.all(call.project, limit=call.limit, after=call.after)


async def create_job(call: Call) -> JobView:
    return await call.service.jobs.create(call.caller, call.spec(JobSpec, None), request=call.request_key)


async def get_job(call: Call) -> JobView:
    return call.service.jobs.get(call.project, call.path["job"])


async def cancel_job(call: Call) -> JobView:
    return await call.service.jobs.cancel(call.project, call.path["job"], request=call.request_key)


async def delete_job(call: Call) -> JobView:
    return await call.service.jobs.delete(call.project, call.path["job"], request=call.request_key)


async def put_job(call: Call) -> JobView:
    return await call.service.jobs.put(call.caller, call.spec(JobSpec, call.path["job"]), request=call.request_key)


async def suspend_job(call: Call) -> JobView:
    return await call.service.jobs.suspend(call.project, call.path["job"], True, request=call.request_key)


async def resume_job(call: Call) -> JobView:
    return await call.service.jobs.suspend(call.project, call.path["job"], False, request=call.request_key)


async def trigger_job(call: Call) -> JobView:
    return await call.service.jobs.trigger(call.project, call.path["job"], request=call.request_key)


async def take_sandbox(call: Call) -> JobView:
    wish = call.body(TakeRequest)
    return await call.service.pools.take(call.project, call.path["job"], wish, request=call.request_key)


async def list_secrets(call: Call) -> Page[SecretView]:
    return call.service.secrets.all(call.project, limit=call.limit, after=call.after)


async def put_secret(call: Call) -> SecretView:
    value = call.body(SecretRequest).value
    name = call.path["secret"]
    return await call.service.secrets.put(call.project, name, value, if_match=call.if_match, request=call.request_key)


async def delete_secret(call: Call) -> SecretView:
    return await call.service.secrets.delete(call.project, call.path["secret"], request=call.request_key)


async def list_events(call: Call) -> Page[Event]:
    return call.service.events.all(call.project, subject=call.query("subject"), limit=call.limit, after=call.after)


async def watch(call: Call) -> Lines:
    project = call.query("project")
    if project is not None:
        authorize(call.caller, Need.READ, project=project)
    wish = wanted(call.caller, call.query("kinds") or "", project, call.query("from"))
    return Lines(await call.service.watching.stream(wish))


def _write(method: str, path: str, run: Any, summary: str, answer: Any, body: Any = None, **more: Any) -> Route:
    return Route(
        method=method, path=path, need=Need.DEPLOY, run=run, summary=summary, answer=answer, body=body, repeatable=True, **more
    )


def _read(path: str, run: Any, summary: str, answer: Any, query: tuple[Query, ...] = ()) -> Route:
    return Route(method="GET", path=path, need=Need.READ, run=run, summary=summary, answer=answer, query=query)


def _hold(what: str, run: Any, summary: str) -> Route:
    return Route(method="POST", path=f"{_INSTANCE}/{what}", need=Need.DEPLOY, run=run, summary=summary, answer=Held)


ROUTES: tuple[Route, ...] = (
    _read(_P, list_projects, "The projects that the token reaches into", Page[Project], PAGED),
    Route(
        method="PUT",
        path=f"{_P}/{{project}}",
        need=Need.ADMIN,
        run=put_project,
        summary="Make a project",
        answer=Project,
        repeatable=True,
    ),
    Route(
        method="PUT",
        path=f"{_P}/{{project}}/quota",
        need=Need.ADMIN,
        run=put_quota,
        summary="Limit what a project's instances may hold together",
        body=Quota,
        answer=Project,
        conditional=True,
        repeatable=True,
    ),
    _read(f"{_P}/{{project}}/quota", get_quota, "What a project may have, and what its instances hold of it", QuotaView),
    _read(f"{_P}/{{project}}/apps", list_apps, "Apps", Page[AppView], PAGED),
    _write("PUT", f"{_P}/{{project}}/apps", put_group, "Make or change several apps, all of them or none", GroupView, AppGroup),
    _read(_APP, get_app, "An app", AppView),
    _write("PUT", _APP, put_app, "Make or change an app; the same spec again makes no release", AppView, AppSpec, conditional=True),
    _write("DELETE", _APP, delete_app, "Delete an app; gone when its last instance is", AppView, conditional=True, status=202),
    _write("POST", f"{_APP}/scale", scale_app, "Say how many instances an app has", AppView, ScaleRequest, conditional=True),
    _write("POST", f"{_APP}/restart", restart_app, "Replace every instance, as a rollout does", AppView, conditional=True),
    _write("POST", f"{_APP}/rollback", rollback_app, "Run an older release again", AppView, RollbackRequest, conditional=True),
    _read(f"{_APP}/rollout", get_rollout, "How an app's last rollout stands, with numbers of each release", RolloutView),
    _write("POST", f"{_APP}/rollout/pause", pause_rollout, "Have a rollout not go on by itself", AppView, conditional=True),
    _write("POST", f"{_APP}/rollout/resume", resume_rollout, "Go on, or begin anew after a revert", AppView, conditional=True),
    _write("POST", f"{_APP}/rollout/promote", promote_rollout, "Give the new release all requests", AppView, conditional=True),
    _write("POST", f"{_APP}/rollout/abort", abort_rollout, "Give the release before all requests again", AppView, conditional=True),
    _write("POST", f"{_APP}/rollout/undo", undo_rollout, "Go back to what served before", AppView, conditional=True),
    _read(f"{_APP}/releases", list_releases, "Releases of an app, newest first", Page[Release], PAGED),
    _read(
        f"{_P}/{{project}}/instances",
        list_instances,
        "Instances, of all or of one app or job",
        Page[InstanceView],
        (Query("app", "only this app's"), Query("job", "only this job's"), *PAGED),
    ),
    _read(_INSTANCE, get_instance, "An instance", InstanceView),
    _read(f"{_INSTANCE}/explain", explain_instance, "Why an instance is where it is, or has no node", InstanceExplanation),
    Route(
        method="POST",
        path="/v1/plan",
        need=Need.READ,
        run=plan_spec,
        summary="Where a spec's instances would go now; nothing is written (a job's spec says `kind`)",
        body=AppSpec | JobSpec,
        answer=PlanView,
    ),
    Route(
        method="GET",
        path="/v1/defrag",
        need=Need.ADMIN,
        run=defrag,
        summary="Which instances could be moved, and what that would free; nothing is moved",
        answer=DefragView,
    ),
    _write("POST", f"{_INSTANCE}/stop", stop_instance, "Have an instance drained, stopped and replaced", InstanceView),
    _hold("pause", pause_instance, "Have a running instance stand still"),
    _hold("resume", resume_instance, "Let an instance that was paused go on"),
    _hold("snapshot", snapshot_instance, "Write a running instance down on its node; a sandbox can go on from that"),
    _read(
        f"{_P}/{{project}}/snapshots",
        list_snapshots,
        "Snapshots, asked of the nodes that can have any",
        SnapshotsView,
        (Query("node", "only of this node"),),
    ),
    Route(
        method="DELETE",
        path=f"{_P}/{{project}}/snapshots/{{snapshot}}",
        need=Need.DEPLOY,
        run=remove_snapshot,
        summary="Remove a snapshot, named by the digits of its digest, from its node",
        answer=SnapshotsView,
        query=(Query("node", "the node that it is on"),),
    ),
    _read(f"{_P}/{{project}}/jobs", list_jobs, "Jobs", Page[JobView], PAGED),
    _write("POST", f"{_P}/{{project}}/jobs", create_job, "Make a job", JobView, JobSpec, status=201),
    _read(_JOB, get_job, "A job", JobView),
    _write("PUT", _JOB, put_job, "Make or change a job with a schedule, or a template of sandboxes", JobView, JobSpec),
    _write("POST", f"{_JOB}/cancel", cancel_job, "Stop a job", JobView),
    _write("POST", f"{_JOB}/suspend", suspend_job, "Have a schedule make no runs", JobView),
    _write("POST", f"{_JOB}/resume", resume_job, "Have a schedule make runs again", JobView),
    _write("POST", f"{_JOB}/trigger", trigger_job, "Make a run of a schedule now", JobView, status=201),
    _write("POST", f"{_JOB}/take", take_sandbox, "Take a sandbox out of a template's pool", JobView, TakeRequest, status=201),
    _write("DELETE", _JOB, delete_job, "Forget a job that has finished", JobView),
    Route(
        method="GET",
        path=f"{_P}/{{project}}/secrets",
        need=Need.DEPLOY,
        run=list_secrets,
        summary="Secrets, without their values",
        answer=Page[SecretView],
        query=PAGED,
    ),
    _write("PUT", _SECRET, put_secret, "Set a secret", SecretView, SecretRequest, conditional=True),
    _write("DELETE", _SECRET, delete_secret, "Remove a secret that no app uses", SecretView),
    _read(
        f"{_P}/{{project}}/events",
        list_events,
        "What happened, newest first",
        Page[Event],
        (Query("subject", "only of this subject, e.g. app/web"), *PAGED),
    ),
    Route(
        method="GET",
        path="/v1/watch",
        need=Need.READ,
        run=watch,
        summary="Records as they change; without `from`, the state first",
        answer=WatchLine,
        lines=True,
        query=(
            Query("kinds", f"some of {', '.join(sorted(WATCHED))}, with commas; all without it"),
            Query("project", "only of this project"),
            Query("from", "the revision to begin with: one more than that of the last line", {"type": "integer"}),
        ),
    ),
)
