"""The service over a memory store: what users do with apps, jobs, secrets and tokens."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from late_store import Late
from msgspec.structs import replace

from atoll.api.http.answers import Lines
from atoll.api.service import KINDS, SYSTEM, Caller, RequestKey, Service
from atoll.api.service.events import DATA_BYTES_MAX, MESSAGE_CHARS_MAX, MINUTE_S, PER_MINUTE_MAX, Allowance
from atoll.api.service.feeds import LEFT_S
from atoll.api.service.reports import AHEAD_S
from atoll.api.service.watching import Watch
from atoll.api.service.workloads import pinned_digests
from atoll.model import codec, keys
from atoll.model.errors import (
    Conflict,
    Forbidden,
    ImageError,
    Invalid,
    NotFound,
    OutcomeUnknown,
    StaleRevision,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from atoll.model.ports.store import Compare, Op, Revision, TxnResult, WatchBatch
from atoll.model.records import (
    AppPhase,
    AppStatus,
    Capacity,
    Event,
    Heartbeat,
    Ingress,
    Instance,
    Job,
    JobPhase,
    JobStatus,
    Node,
    NodeHealth,
    NodeLiveness,
    OwnerKind,
    Prefetch,
    Release,
    Role,
    RouteClaim,
    Routing,
    Secret,
    Status,
    Token,
    Usage,
)
from atoll.model.spec import AppSpec, Constraint, JobSpec, Metrics, Operator, Placement, Port, Route, Scale, Volume
from atoll.model.states import Desired, Phase
from atoll.model.views import AppView, TokenRequest
from atoll.model.worker import KvNamespace, Worker
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

KEY = bytes(range(32))


class FakeClock:
    def __init__(self) -> None:
        self.at = 1_000_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class FakeImages:
    def __init__(self) -> None:
        self.tags: dict[tuple[str, str], str] = {}

    def digest_of(self, repository: str, tag: str) -> str | None:
        return self.tags.get((repository, tag))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def service(clock: FakeClock) -> AsyncIterator[Service]:
    store = MemoryStore(clock)
    seeded = random.Random(1)
    async with (
        State(store, KINDS) as state,
        Service(store, state, clock, seeded, KEY, "localhost", entropy=seeded.randbytes) as made,
    ):
        yield made
    await store.close()


def app_spec(name: str = "web", **changes: object) -> AppSpec:
    base = AppSpec(name=name, image="registry.test/web:1", ports=(Port(port=8000),))
    return replace(base, **changes)


async def put_record(service: Service, key: str, record: object) -> None:
    revision = await service.context.store.put(key, codec.encode(record))
    await service.context.reach(revision)


async def test_a_new_app_has_release_1_and_its_default_url(service: Service) -> None:
    await service.control_plane.register_ingress(Ingress(name="edge", http_port=8080))
    view = await service.apps.put(SYSTEM, app_spec())
    assert (view.app.release, view.app.replicas) == (1, 1)
    assert view.urls == ("http://web.localhost:8080/",)
    assert view.revision == service.context.state.revision
    assert service.apps.get("default", "web") == view


async def test_the_same_spec_again_makes_no_release_and_no_write(service: Service) -> None:
    first = await service.apps.put(SYSTEM, app_spec())
    again = await service.apps.put(SYSTEM, app_spec())
    assert again == first
    assert len(service.apps.releases("default", "web", limit=10).items) == 1


async def test_a_changed_spec_makes_the_next_release_and_keeps_the_replicas(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec(scale=Scale(replicas=3)))
    view = await service.apps.put(SYSTEM, app_spec(env={"A": "1"}))
    assert (view.app.release, view.app.replicas) == (2, 3)
    assert [r.number for r in service.apps.releases("default", "web", limit=10).items] == [2, 1]


async def test_only_another_scale_makes_no_release(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    view = await service.apps.put(SYSTEM, app_spec(scale=Scale(replicas=5)))
    assert (view.app.release, view.app.replicas) == (1, 5)


DEEP = Scale(replicas=1, max=4, metric="depth", target=8)


async def test_another_most_or_target_makes_no_release_and_another_metric_does(service: Service) -> None:
    first = app_spec(scale=DEEP, metrics=Metrics())
    await service.apps.put(SYSTEM, first)
    view = await service.apps.put(SYSTEM, replace(first, scale=replace(DEEP, max=9, target=2)))
    assert view.app.release == 1
    assert view.app.most == 9
    assert (await service.apps.put(SYSTEM, view.app.spec)).revision == view.revision
    view = await service.apps.put(SYSTEM, replace(first, scale=replace(DEEP, metric="width")))
    assert view.app.release == 2
    back = await service.apps.rollback(SYSTEM, "default", "web", 1)
    assert back.app.spec.scale == DEEP


async def test_a_rollback_keeps_how_the_app_is_scaled(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec(scale=DEEP, metrics=Metrics()))
    more = replace(DEEP, max=9)
    await service.apps.put(SYSTEM, app_spec(scale=more, metrics=Metrics(), env={"A": "1"}))
    back = await service.apps.rollback(SYSTEM, "default", "web")
    assert (back.app.release, back.app.spec.env, back.app.spec.scale) == (1, {}, more)


async def test_a_worker_with_state_never_comes_to_run_twice(service: Service) -> None:
    plain = Worker(main="index.js", compatibility_date="2026-11-01")
    stateful = Worker(main="index.js", compatibility_date="2026-11-01", kv=(KvNamespace(binding="KV"),))
    await service.apps.put(SYSTEM, AppSpec(name="w", image="x", worker=stateful))
    with pytest.raises(Invalid, match="it runs once"):
        await service.apps.scale("default", "w", 2)
    await service.apps.put(SYSTEM, AppSpec(name="w", image="x", worker=plain))
    await service.apps.scale("default", "w", 2)
    with pytest.raises(Invalid, match="it runs once"):  # what served as two cannot become it, nor go back to it
        await service.apps.put(SYSTEM, AppSpec(name="w", image="x", worker=stateful))
    with pytest.raises(Invalid, match="it runs once"):
        await service.apps.rollback(SYSTEM, "default", "w", 1)
    await service.apps.scale("default", "w", 1)
    assert (await service.apps.rollback(SYSTEM, "default", "w", 1)).app.spec.worker == stateful


async def test_scaling_an_app_that_scales_by_a_metric_sets_the_least(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec(scale=DEEP, metrics=Metrics()))
    view = await service.apps.scale("default", "web", 3)
    assert (view.app.replicas, view.app.most) == (3, 4)
    with pytest.raises(Invalid, match=r"above the app's scale\.max, 4") as caught:
        await service.apps.scale("default", "web", 5)
    assert caught.value.field == "replicas"
    told = [event.message for event in service.events.all("default", subject="app/web", limit=10).items]
    assert "the least was 1 and is 3" in told[0]
    stopped = await service.apps.scale("default", "web", 0)
    assert (stopped.app.replicas, stopped.app.most) == (0, None)


async def test_who_scales_beyond_the_most_is_told_by_what_the_app_scales(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec(scale=Scale(max=4, concurrency=8, cpu=0.5)))
    with pytest.raises(Invalid) as caught:
        await service.apps.scale("default", "web", 9)
    assert caught.value.mend == "it scales by concurrency and cpu, and this is the least; deploy it with a larger scale.max"


async def test_a_deploy_without_scale_keeps_the_number_that_the_metric_had_asked_for(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec(scale=DEEP, metrics=Metrics()))
    status = AppStatus(project="default", name="web", phase=AppPhase.RUNNING, release=1, scaled=3)
    context = service.context
    await context.state.reach(await context.store.put(keys.app_status("default", "web"), codec.encode(status)))
    view = await service.apps.put(SYSTEM, app_spec(metrics=Metrics()))
    assert (view.app.replicas, view.app.most) == (3, None)


async def test_a_heartbeat_with_more_metrics_than_a_spec_can_name_is_refused(service: Service) -> None:
    for metrics in ({f"m{n}": 1.0 for n in range(18)}, {"m" * 129: 1.0}):
        with pytest.raises(TooLarge, match="metrics of 'web-1'"):
            service.heartbeats.note(Heartbeat(node="n1", at=1.0, usage=(Usage(instance="web-1", metrics=metrics),)))


async def test_a_conditional_write_at_an_old_revision_is_refused(service: Service) -> None:
    first = await service.apps.put(SYSTEM, app_spec())
    await service.apps.scale("default", "web", 2, if_match=first.revision)
    with pytest.raises(StaleRevision):
        await service.apps.scale("default", "web", 3, if_match=first.revision)
    with pytest.raises(StaleRevision):
        await service.apps.put(SYSTEM, app_spec(), if_match=0)


async def test_restart_raises_the_generation_and_rollback_runs_an_older_release(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    await service.apps.put(SYSTEM, app_spec(env={"A": "1"}))
    assert (await service.apps.restart("default", "web")).app.generation == 2
    back = await service.apps.rollback(SYSTEM, "default", "web")
    assert back.app.release == 1
    assert back.app.spec.env == {}
    with pytest.raises(NotFound, match="release before 1"):
        await service.apps.rollback(SYSTEM, "default", "web")
    with pytest.raises(NotFound, match="release 9"):
        await service.apps.rollback(SYSTEM, "default", "web", 9)


async def test_after_a_rollback_a_new_spec_gets_a_number_never_used(service: Service) -> None:
    for value in "123":
        await service.apps.put(SYSTEM, app_spec(env={"A": value}))
    await service.apps.rollback(SYSTEM, "default", "web", 1)
    view = await service.apps.put(SYSTEM, app_spec(env={"A": "4"}))
    assert view.app.release == 4


async def test_old_releases_are_removed_beyond_the_bound(service: Service) -> None:
    for number in range(60):
        await service.apps.put(SYSTEM, app_spec(env={"A": str(number)}))
    numbers = [r.number for r in service.apps.releases("default", "web", limit=100).items]
    assert numbers == list(range(60, 10, -1))


async def test_a_route_has_one_owner(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec(routes=(Route(host="www.example.com"),)))
    other = app_spec("other", routes=(Route(host="www.example.com"),))
    with pytest.raises(Conflict, match="app 'web' in project 'default'"):
        await service.apps.put(SYSTEM, other)
    await service.projects.put("team")
    stranger = Caller(id="t", role=Role.DEPLOY, project="team")
    with pytest.raises(Conflict, match="another project"):
        await service.apps.put(stranger, replace(other, project="team"))
    assert service.context.state.get(Release, "default/other/00000001") is None


async def test_a_route_that_is_given_up_can_be_claimed(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec(routes=(Route(host="www.example.com"), Route(host="www.example.com", path="/api/"))))
    await service.apps.put(SYSTEM, app_spec())
    view = await service.apps.put(SYSTEM, app_spec("other", routes=(Route(host="www.example.com", path="/api"),)))
    assert view.app.release == 1


async def test_a_claim_whose_app_is_gone_can_be_taken_and_is_swept(service: Service) -> None:
    await put_record(service, keys.route("www.example.com", "/"), RouteClaim(project="default", app="gone"))
    await put_record(service, keys.route("old.example.com", "/"), RouteClaim(project="default", app="gone"))
    await service.apps.put(SYSTEM, app_spec(routes=(Route(host="www.example.com"),)))
    await service.housekeeping.sweep()
    await service.context.reach(await service.context.store.revision())
    assert sorted(service.context.state.records(RouteClaim)) == ["web.localhost/", "www.example.com/"]


@pytest.mark.parametrize(
    ("project", "host"), [("team", "web.localhost"), ("team", "a.other.localhost"), ("default", "x.team.localhost")]
)
async def test_a_name_under_the_domain_belongs_to_its_project(service: Service, project: str, host: str) -> None:
    await service.projects.put("team")
    with pytest.raises(Forbidden):
        await service.apps.put(SYSTEM, app_spec(project=project, routes=(Route(host=host),)))


@pytest.mark.parametrize("path", ["/a b", "/../x", "/a?b", "/a\x00", "/" + "x" * 600, "/ü"])
async def test_a_path_that_no_url_has_is_refused(service: Service, path: str) -> None:
    with pytest.raises(Invalid, match="path"):
        await service.apps.put(SYSTEM, app_spec(routes=(Route(host="www.example.com", path=path),)))


async def test_two_deploys_at_once_both_end_well(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    specs = [app_spec(env={"A": str(n)}) for n in range(4)]
    views = await asyncio.gather(*(service.apps.put(SYSTEM, spec) for spec in specs))
    assert sorted(view.app.release for view in views) == [2, 3, 4, 5]


async def test_a_repeated_request_key_gets_the_first_answer(service: Service) -> None:
    request = RequestKey(caller="t", key="k1", fingerprint="f1")
    first = await service.apps.put(SYSTEM, app_spec(), request=request)
    await service.apps.scale("default", "web", 7)
    assert await service.apps.put(SYSTEM, app_spec(), request=request) == first
    assert service.apps.get("default", "web").app.replicas == 7
    with pytest.raises(Conflict, match="Idempotency-Key"):
        await service.apps.scale("default", "web", 1, request=replace(request, fingerprint="f2"))


async def test_a_repeated_cancel_answers_with_the_jobs_status_as_the_first_did(service: Service) -> None:
    """A status counts failures by index; whole numbers as keys must survive being kept. (Found by the simulator, seed 50.)"""
    await service.jobs.create(SYSTEM, JobSpec(name="crunch", image="r/x"))
    status = JobStatus(project="default", name="crunch", phase=JobPhase.RUNNING, failures={0: 2}, retry_at={0: 5.0})
    await put_record(service, keys.job_status("default", "crunch"), status)
    request = RequestKey(caller="t", key="k1", fingerprint="f1")
    first = await service.jobs.cancel("default", "crunch", request=request)
    assert await service.jobs.cancel("default", "crunch", request=request) == first
    assert first.status == status


async def test_a_key_is_used_once_even_when_both_come_at_the_same_time(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    request = RequestKey(caller="t", key="k1", fingerprint="f1")
    views = await asyncio.gather(*(service.apps.restart("default", "web", request=request) for _ in range(5)))
    assert {view.app.generation for view in views} == {2}
    assert len({view.revision for view in views}) == 1


async def test_a_key_is_remembered_for_a_write_that_changed_nothing(service: Service) -> None:
    view = await service.apps.put(SYSTEM, app_spec())
    request = RequestKey(caller="t", key="k1", fingerprint="f1")
    assert await service.apps.put(SYSTEM, app_spec(), request=request) == view
    assert await service.apps.put(SYSTEM, app_spec(), request=request) == view
    with pytest.raises(Conflict):
        await service.apps.put(SYSTEM, app_spec(), request=replace(request, fingerprint="f2"))


async def test_what_was_refused_stays_refused_under_its_key(service: Service) -> None:
    """Else a try of it that is on its way for long acts after its user was told no. (Found by the simulator, seed 6866.)"""
    request = RequestKey(caller="t", key="k1", fingerprint="f1")
    with pytest.raises(NotFound, match="no app 'web'") as first:
        await service.apps.restart("default", "web", request=request)
    await service.apps.put(SYSTEM, app_spec())
    with pytest.raises(NotFound, match="no app 'web'") as again:
        await service.apps.restart("default", "web", request=request)
    assert (again.value.message, again.value.mend, again.value.field) == (first.value.message, first.value.mend, first.value.field)
    assert (await service.apps.restart("default", "web", request=replace(request, key="k2"))).app.generation == 2
    with pytest.raises(Conflict, match="Idempotency-Key"):
        await service.apps.restart("default", "web", request=replace(request, fingerprint="f2"))


async def test_a_refusal_that_may_be_another_next_time_is_not_kept(service: Service) -> None:
    view = await service.apps.put(SYSTEM, app_spec())
    request = RequestKey(caller="t", key="k1", fingerprint="f1")
    with pytest.raises(StaleRevision):
        await service.apps.scale("default", "web", 2, if_match=view.revision + 7, request=request)
    assert (await service.apps.scale("default", "web", 2, request=request)).app.replicas == 2


async def test_an_app_that_is_being_deleted_takes_no_changes(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    assert (await service.apps.delete("default", "web")).app.deleting
    assert (await service.apps.delete("default", "web")).app.deleting
    with pytest.raises(Conflict, match="being deleted"):
        await service.apps.put(SYSTEM, app_spec(env={"A": "1"}))
    with pytest.raises(Conflict, match="being deleted"):
        await service.apps.scale("default", "web", 2)


async def test_what_a_spec_names_must_be_there(service: Service) -> None:
    with pytest.raises(NotFound, match="no secret 'key'"):
        await service.apps.put(SYSTEM, app_spec(secrets={"KEY": "key"}))
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        await service.apps.put(SYSTEM, app_spec(project="nowhere"))
    with pytest.raises(ImageError, match="not in the cell's registry"):
        await service.apps.put(SYSTEM, app_spec(image="cell.internal/default/web:1"))


async def test_a_tag_of_the_cells_registry_is_pinned_when_a_release_is_made(service: Service) -> None:
    images = FakeImages()
    service.use_images(images)
    spec = app_spec(image="cell.internal/default/web:1")
    images.tags["default/web", "1"] = "sha256:" + "a" * 64
    assert (await service.apps.put(SYSTEM, spec)).app.spec.image == "cell.internal/default/web:1@sha256:" + "a" * 64
    assert (await service.apps.put(SYSTEM, spec)).app.release == 1
    images.tags["default/web", "1"] = "sha256:" + "b" * 64
    assert (await service.apps.put(SYSTEM, spec)).app.release == 2
    await service.projects.put("team")
    stranger = Caller(id="t", role=Role.DEPLOY, project="team")
    with pytest.raises(Forbidden, match="another project"):
        await service.apps.put(stranger, replace(spec, project="team"))


async def test_an_image_that_a_volume_shows_is_pinned_and_kept_like_the_app_s_own(service: Service) -> None:
    images = FakeImages()
    service.use_images(images)
    weights = Volume(name="weights", path="/models", image="cell.internal/default/weights:1")
    spec = app_spec(volumes=(Volume(name="data", path="/data"), weights))
    with pytest.raises(ImageError, match="not in the cell's registry") as caught:
        await service.apps.put(SYSTEM, spec)
    assert caught.value.field == "volumes[1].image"
    images.tags["default/weights", "1"] = digest = "sha256:" + "a" * 64
    view = await service.apps.put(SYSTEM, spec)
    assert [volume.image for volume in view.app.spec.volumes] == [None, f"cell.internal/default/weights:1@{digest}"]
    assert pinned_digests(view.app.spec) == {digest}
    images.tags["default/weights", "1"] = "sha256:" + "b" * 64
    assert (await service.apps.put(SYSTEM, spec)).app.release == 2, "other weights are another release"
    await service.projects.put("team")
    stranger = Caller(id="t", role=Role.DEPLOY, project="team")
    with pytest.raises(Forbidden, match="another project"):
        await service.apps.put(stranger, replace(spec, project="team"))


async def test_a_secret_is_sealed_and_comes_out_only_for_its_instance(service: Service) -> None:
    await service.secrets.put("default", "key", "hunter2")
    held = service.context.state.get(Secret, "default/key")
    assert held is not None
    assert b"hunter2" not in codec.encode(held.record)
    view = await service.apps.put(SYSTEM, app_spec(secrets={"KEY": "key"}))
    instance = Instance(
        id="web-1", project="default", owner_kind=OwnerKind.APP, owner="web", release=view.app.release, node="n1", created_at=1
    )
    await put_record(service, keys.instance("default", "web-1"), instance)
    assert await service.control_plane.instance_secrets("web-1") == {"KEY": "hunter2"}
    await asyncio.sleep(0)
    assert await service.control_plane.instance_secrets("web-1", "n1") == {"KEY": "hunter2"}
    with pytest.raises(NotFound):
        await service.control_plane.instance_secrets("web-1", "n2")
    with pytest.raises(Conflict, match="used by app 'web'"):
        await service.secrets.delete("default", "key")


async def test_a_sealed_secret_cannot_be_moved_to_another_name(service: Service) -> None:
    await service.secrets.put("default", "key", "hunter2")
    held = service.context.state.get(Secret, "default/key")
    assert held is not None
    await put_record(service, keys.secret("default", "mine"), replace(held.record, name="mine"))
    spec = app_spec(secrets={"KEY": "mine"})
    with pytest.raises(Exception, match="cannot be opened"):
        service.secrets.reveal("default", spec)


async def test_a_token_is_kept_as_a_digest_expires_and_can_be_withdrawn(service: Service, clock: FakeClock) -> None:
    made = await service.tokens.create(SYSTEM, TokenRequest(name="ci", role=Role.DEPLOY, project="default", expires_in_s=60))
    assert made.token is not None
    stored = [codec.encode(held.record) for held in service.context.state.records(Token).values()]
    assert made.token.encode() not in b"".join(stored)
    assert service.tokens.authenticate(made.token).project == "default"
    clock.at += 61
    with pytest.raises(Unauthenticated, match="expired"):
        service.tokens.authenticate(made.token)
    forever = await service.tokens.create(SYSTEM, TokenRequest(name="ops", role=Role.ADMIN))
    assert forever.token is not None
    await service.tokens.delete(SYSTEM, forever.id)
    with pytest.raises(Unauthenticated, match="not known"):
        service.tokens.authenticate(forever.token)


@pytest.mark.parametrize("token", ["", "x", "atoll_" + "a" * 43, "y" * 10_000, "ü€\udcff"])
async def test_a_token_that_is_none_is_refused(service: Service, token: str) -> None:
    with pytest.raises(Unauthenticated):
        service.tokens.authenticate(token)


async def test_nobody_makes_a_token_beyond_their_own(service: Service) -> None:
    mine = Caller(id="t", role=Role.ADMIN, project="team")
    with pytest.raises(Forbidden):
        await service.tokens.create(mine, TokenRequest(name="x", role=Role.ADMIN))
    with pytest.raises(Forbidden):
        await service.tokens.create(mine, TokenRequest(name="x", role=Role.AGENT, subject="n1"))
    with pytest.raises(Invalid, match="subject"):
        await service.tokens.create(SYSTEM, TokenRequest(name="x", role=Role.AGENT))
    other = await service.tokens.create(SYSTEM, TokenRequest(name="x", role=Role.READ, project="default"))
    with pytest.raises(NotFound):
        await service.tokens.delete(mine, other.id)
    assert service.tokens.all(mine, limit=10).items == ()


async def test_a_repeated_request_for_a_token_gets_the_same_token_and_the_store_never_holds_it(service: Service) -> None:
    request = RequestKey(caller="t", key="k1", fingerprint="f1")
    wanted = TokenRequest(name="ci", role=Role.READ)
    first = await service.tokens.create(SYSTEM, wanted, request=request)
    again = await service.tokens.create(SYSTEM, wanted, request=request)
    assert first.token is not None
    assert again == first
    everything = await service.context.store.range("")
    assert not any(first.token.encode() in item.value for item in everything.items)


async def test_a_job_is_made_once_cancelled_and_forgotten_when_it_has_finished(service: Service) -> None:
    spec = JobSpec(name="crunch", image="registry.test/x:1")
    view = await service.jobs.create(SYSTEM, spec)
    assert service.jobs.get("default", "crunch") == view
    with pytest.raises(Conflict):
        await service.jobs.create(SYSTEM, spec)
    with pytest.raises(Conflict, match="not finished"):
        await service.jobs.delete("default", "crunch")
    assert (await service.jobs.cancel("default", "crunch")).job.cancelled
    status = JobStatus(project="default", name="crunch", phase=JobPhase.CANCELLED)
    await put_record(service, keys.job_status("default", "crunch"), status)
    await service.jobs.delete("default", "crunch")
    assert service.context.state.get(Job, "default/crunch") is None


@pytest.mark.parametrize(
    ("spec", "what", "mend"),
    [
        (JobSpec(name="try", image="registry.test/x:1"), "job", "atoll jobs delete try"),
        (JobSpec(name="try", image="registry.test/x:1", sandbox=True), "sandbox", "atoll sandbox rm try"),
        (JobSpec(name="try", image="registry.test/x:1", sandbox=True, pool=0), "template", "atoll template rm try"),
    ],
)
async def test_a_name_that_is_taken_says_by_what_and_how_to_be_rid_of_it(
    service: Service, spec: JobSpec, what: str, mend: str
) -> None:
    await service.jobs.create(SYSTEM, spec)
    with pytest.raises(Conflict, match=f"a {what} 'try' is there already") as raised:
        await service.jobs.create(SYSTEM, JobSpec(name="try", image="registry.test/x:1"))
    assert mend in (raised.value.mend or "")


async def test_stopping_an_instance_drains_it_once(service: Service) -> None:
    instance = Instance(id="web-1", project="default", owner_kind=OwnerKind.APP, owner="web", node="n1", created_at=1)
    await put_record(service, keys.instance("default", "web-1"), instance)
    view = await service.instances.stop(SYSTEM, "default", "web-1")
    assert view.instance.desired is Desired.DRAIN
    assert await service.instances.stop(SYSTEM, "default", "web-1") == view


async def test_lists_come_in_pages(service: Service) -> None:
    for name in "abcde":
        await service.apps.put(SYSTEM, app_spec(name))
    first = service.apps.all("default", limit=2)
    assert [view.app.name for view in first.items] == ["a", "b"]
    rest = service.apps.all("default", limit=9, after=first.next or "")
    assert [view.app.name for view in rest.items] == ["c", "d", "e"]
    assert rest.next is None


async def test_events_come_newest_first(service: Service, clock: FakeClock) -> None:
    for number in range(100):
        event = Event(id=f"{number:06d}", at=clock.at + number, project="default", subject="app/web", code="x", message="m")
        await service.context.store.put(keys.event("default", event.id), codec.encode(event))
    await service.context.reach(await service.context.store.revision())
    page = service.events.all("default", limit=2)
    assert [event.id for event in page.items] == ["000099", "000098"]
    assert [event.id for event in service.events.all("default", limit=1, after=page.next or "").items] == ["000097"]


async def test_an_answer_given_for_a_key_names_the_revision_of_the_write(service: Service) -> None:
    request = RequestKey(caller="t", key="k1", fingerprint="f1")
    first = await service.apps.put(SYSTEM, app_spec(), request=request)
    held = await service.context.store.get(keys.app("default", "web"))
    assert held is not None
    assert first.revision == held.mod_revision
    assert isinstance(await service.apps.put(SYSTEM, app_spec(), request=request), AppView)


def running(instance: str, address: str, *, ready: bool = True, node: str = "n1") -> Status:
    return Status(instance=instance, project="default", node=node, phase=Phase.RUNNING, ready=ready, address=address)


async def put_instance(service: Service, id: str, release: int, *, node: str = "n1", ready: bool = True, **more: object) -> None:
    instance = Instance(id=id, project="default", owner_kind=OwnerKind.APP, owner="web", release=release, node=node, created_at=1)
    await put_record(service, keys.instance("default", id), replace(instance, **more))
    await put_record(service, keys.status("default", id), running(id, f"10.0.0.{id[-1]}", ready=ready, node=node))


async def routing_now(service: Service) -> Routing:
    feed = service.feeds.routing()
    batch = await anext(feed)
    await feed.aclose()  # type: ignore[attr-defined]
    return batch.put[0]


async def test_while_ports_change_requests_go_only_to_instances_that_listen_there(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    await put_instance(service, "web-1", 1)
    await put_instance(service, "web-2", 1)
    await service.apps.put(SYSTEM, app_spec(ports=(Port(port=9000),)))
    await put_instance(service, "web-3", 2)
    routing = await routing_now(service)
    assert routing.hosts == (("web.localhost", "/", 8000, False),)
    assert [endpoint.instance for endpoint in routing.endpoints] == ["web-1", "web-2"]
    await put_instance(service, "web-1", 1, desired=Desired.DRAIN)
    routing = await routing_now(service)
    assert routing.hosts == (("web.localhost", "/", 9000, False),), "at a tie the new release serves"
    assert [endpoint.instance for endpoint in routing.endpoints] == ["web-3"]


async def test_what_stands_by_or_is_parked_gets_no_request_and_is_no_endpoint_that_drains(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    await put_instance(service, "web-1", 1)
    await put_instance(service, "web-2", 1, standby=True)
    await put_instance(service, "web-3", 1, standby=True, desired=Desired.DRAIN)
    await put_instance(service, "web-4", 1, ready=False, desired=Desired.DRAIN)
    parked = replace(running("web-4", "10.0.0.4", ready=False), parked=True)
    await put_record(service, keys.status("default", "web-4"), parked)
    assert [endpoint.instance for endpoint in (await routing_now(service)).endpoints] == ["web-1"]


async def test_an_instance_that_is_not_ready_or_is_told_to_stop_gets_no_request(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    await put_instance(service, "web-1", 1, ready=False)
    await put_instance(service, "web-2", 1, desired=Desired.STOP)
    await put_instance(service, "web-3", 1, ready=False, desired=Desired.DRAIN)
    routing = await routing_now(service)
    assert [(endpoint.instance, endpoint.draining) for endpoint in routing.endpoints] == [("web-3", True)]


async def test_a_lost_nodes_endpoints_go_only_when_others_serve(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    await put_instance(service, "web-1", 1, node="n1")
    lost = NodeLiveness(name="n1", health=NodeHealth.LOST, since=1)
    await put_record(service, keys.node_liveness("n1"), lost)
    assert [endpoint.instance for endpoint in (await routing_now(service)).endpoints] == ["web-1"]
    await put_instance(service, "web-2", 1, node="n2")
    assert [endpoint.instance for endpoint in (await routing_now(service)).endpoints] == ["web-2"]


async def test_an_ingress_is_told_only_of_what_changes_its_routing(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    await put_instance(service, "web-1", 1)
    feed = service.feeds.routing()
    assert (await anext(feed)).complete
    following = asyncio.ensure_future(anext(feed))
    await put_record(service, keys.status("default", "web-1"), replace(running("web-1", "10.0.0.1"), restarts=5))
    await asyncio.sleep(0.02)
    assert not following.done()
    await put_record(service, keys.status("default", "web-1"), running("web-1", "10.0.0.9"))
    batch = await asyncio.wait_for(following, 5)
    assert [endpoint.address for endpoint in batch.put[0].endpoints] == ["10.0.0.9"]
    await service.context.store.delete(keys.app("default", "web"))
    batch = await asyncio.wait_for(anext(feed), 5)
    assert batch.removed == ("default/web",)
    await feed.aclose()  # type: ignore[attr-defined]


async def test_what_a_user_does_to_an_app_is_told_with_their_token_s_name(service: Service, clock: FakeClock) -> None:
    ann = Caller(id="t1", role=Role.DEPLOY, project="default", name="ann")
    await service.apps.put(ann, app_spec())
    await service.apps.put(ann, app_spec(env={"A": "2"}))
    view = await service.apps.scale("default", "web", 3, caller=ann)
    assert await service.apps.scale("default", "web", 3, caller=ann) == view, "nothing changes, nothing is told"
    clock.at += 1
    await service.apps.restart("default", "web", caller=ann)
    clock.at += 1
    await service.apps.rollback(ann, "default", "web")
    clock.at += 1
    before = await service.context.store.revision()
    await service.apps.delete("default", "web", caller=ann)
    assert await service.context.store.revision() == before + 1, "one transaction"
    events = service.events.all("default", subject="app/web", limit=10).items[::-1]
    assert [(event.code, event.message) for event in events] == [
        ("app-scaled", "scaled from 1 to 3, by ann"),
        ("app-restarted", "every instance is replaced, by ann"),
        ("app-rolled-back", "rolled back from release 2 to 1, by ann"),
        ("app-delete-asked", "is being deleted, by ann"),
    ]


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint(label="gpu", operator=Operator.REGEXP, value="h100("), "not a regular expression"),
        (Constraint(label="gpu", operator=Operator.REGEXP, value="(a+)+$"), "too long to match"),
        (Constraint(label="kernel", operator=Operator.VERSION, value="newer than 5"), "not a version rule"),
    ],
)
async def test_a_constraint_that_makes_no_sense_is_refused_with_its_place(
    service: Service, constraint: Constraint, words: str
) -> None:
    good = Constraint(label="disk", value="ssd")
    placement = Placement(constraints=(good, constraint))
    job = JobSpec(name="sum", image="registry.test/sum:1", placement=placement)
    for refused in (service.apps.put(SYSTEM, app_spec(placement=placement)), service.jobs.create(SYSTEM, job)):
        with pytest.raises(Invalid, match=words) as caught:
            await refused
        assert caught.value.field == "placement.constraints[1].value"
    assert (await service.apps.put(SYSTEM, app_spec(placement=Placement(constraints=(good,))))).app.release == 1


async def test_a_node_is_told_at_once_and_when_it_comes_back_which_images_it_may_need(service: Service) -> None:
    image = "cell.internal/default/web@sha256:" + "a" * 64
    store = service.context.store
    feed, other = service.feeds.assignments("n1"), service.feeds.assignments("n2")
    assert (await anext(feed)).prefetch == ()
    assert (await anext(other)).prefetch == ()
    await store.put(keys.prefetch("n1"), codec.encode(Prefetch(node="n1", images=(image,))))
    batch = await asyncio.wait_for(anext(feed), 5)
    assert (batch.complete, batch.put, batch.removed, batch.prefetch) == (False, (), (), (image,))
    await put_instance(service, "web-1", 1)
    assert (await asyncio.wait_for(anext(feed), 5)).prefetch is None, "said once"
    anew = service.feeds.assignments("n1")
    assert (await anext(anew)).prefetch == (image,)
    await store.delete(keys.prefetch("n1"))
    while (batch := await asyncio.wait_for(anext(feed), 5)).prefetch is None:
        pass
    assert batch.prefetch == ()
    for one in (feed, other, anew):
        await one.aclose()  # type: ignore[attr-defined]


async def test_who_sees_one_project_sees_no_images_of_a_node(service: Service) -> None:
    image = "cell.internal/other/web@sha256:" + "a" * 64
    await put_record(service, keys.node("n1"), Node(name="n1", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1)))
    await put_record(service, keys.prefetch("n1"), Prefetch(node="n1", images=(image,)))
    service.heartbeats.note(Heartbeat(node="n1", at=1.0, images=(image,), fetching=image))
    some = service.nodes.get("n1", Caller(id="x", name="x", role=Role.READ, project="default"))
    assert some.heartbeat is not None
    assert (some.prefetch, some.heartbeat.images, some.heartbeat.fetching) == ((), (), "")
    all_of_it = service.nodes.get("n1")
    assert all_of_it.heartbeat is not None
    assert (all_of_it.prefetch, all_of_it.heartbeat.images, all_of_it.heartbeat.fetching) == ((image,), (image,), image)
    with pytest.raises(TooLarge, match="images"):
        service.heartbeats.note(Heartbeat(node="n1", at=1.0, images=("x",) * 1_000))


async def test_what_cannot_be_read_is_kept_where_it_runs(service: Service) -> None:
    """A missing release, a damaged one, a damaged instance: none of them may look like the end of an instance."""
    await service.apps.put(SYSTEM, app_spec())
    await service.apps.put(SYSTEM, app_spec(env={"A": "2"}))
    for number in (1, 2, 3):
        await put_instance(service, f"web-{number}", 2 if number == 3 else 1)
    feed = service.feeds.assignments("n1")
    assert {one.instance.id for one in (await anext(feed)).put} == {"web-1", "web-2", "web-3"}
    store = service.context.store
    whole = await store.get(keys.release("default", "web", 1))
    assert whole is not None
    await store.put(keys.release("default", "web", 1), b"damaged")
    await store.put(keys.instance("default", "web-3"), b"damaged")
    await put_instance(service, "web-1", 1, desired=Desired.STOP)
    told: dict[str, Desired] = {}
    while told.keys() != {"web-1", "web-3"}:
        batch = await asyncio.wait_for(anext(feed), 5)
        assert batch.removed == ()
        told |= batch.kept
    assert told == {"web-1": Desired.STOP, "web-3": Desired.RUN}
    anew = service.feeds.assignments("n1")
    batch = await anext(anew)
    assert (batch.complete, batch.put) == (True, ())
    assert batch.kept == {"web-1": Desired.STOP, "web-2": Desired.RUN, "web-3": Desired.RUN}
    await store.put(keys.release("default", "web", 1), whole.value)
    await put_instance(service, "web-3", 2)
    put: set[str] = set()
    while len(put) < 2:  # what has become readable is told as it always was
        put |= {one.instance.id for one in (await asyncio.wait_for(anext(anew), 5)).put}
    await feed.aclose()  # type: ignore[attr-defined]
    await anew.aclose()  # type: ignore[attr-defined]


async def test_what_has_ended_for_good_is_not_handed_out_again(service: Service) -> None:
    """A node that lost power, or whose disk was full, may have forgotten the end, and would run a job's try twice."""
    await service.apps.put(SYSTEM, app_spec())
    store = service.context.store
    for name, phase in (("web-1", Phase.FAILED), ("web-2", Phase.RUNNING), ("web-3", Phase.LOST)):
        await put_instance(service, name, 1)
        told = Status(instance=name, project="default", node="n1", phase=phase)
        await service.context.state.reach(await store.put(keys.status("default", name), codec.encode(told)))
    feed = service.feeds.assignments("n1")
    batch = await asyncio.wait_for(anext(feed), 5)
    assert {one.instance.id for one in batch.put} == {"web-2", "web-3"}
    assert batch.kept == {"web-1": Desired.STOP}
    await feed.aclose()  # type: ignore[attr-defined]


async def test_an_app_that_cannot_be_read_keeps_its_routing(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    await service.apps.put(SYSTEM, app_spec("api"))
    feed = service.feeds.routing()
    assert len((await anext(feed)).put) == 2
    await service.context.store.put(keys.app("default", "web"), b"damaged")
    await service.context.store.delete(keys.app("default", "api"))
    assert (await asyncio.wait_for(anext(feed), 5)).removed == ("default/api",)
    anew = service.feeds.routing()
    batch = await anext(anew)
    assert (batch.complete, batch.put, batch.kept) == (True, (), ("default/web",))
    await feed.aclose()  # type: ignore[attr-defined]
    await anew.aclose()  # type: ignore[attr-defined]


async def test_many_changes_while_an_agent_is_busy_reach_it_as_one_batch(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    feed = service.feeds.assignments("n1")
    assert (await anext(feed)).put == ()
    for _ in range(50):
        await put_instance(service, "web-1", 1)
    await put_instance(service, "web-2", 1, node="n2")
    await asyncio.sleep(0.02)
    batch = await asyncio.wait_for(anext(feed), 5)
    assert [assignment.instance.id for assignment in batch.put] == ["web-1"]
    await feed.aclose()  # type: ignore[attr-defined]


async def test_closing_the_service_ends_every_feed_and_watch(service: Service) -> None:
    agent, edge = service.feeds.assignments("n1"), service.feeds.routing()
    await anext(agent)
    await anext(edge)
    stream = await service.watching.stream(Watch(kinds=frozenset({"apps"})))
    await anext(stream)
    waiting = [asyncio.ensure_future(anext(feed)) for feed in (agent, edge, stream)]
    await asyncio.sleep(0)
    await service.close()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable, Unavailable, Unavailable]


async def test_a_jump_over_phases_is_legal_but_not_back_from_an_end(service: Service) -> None:
    await put_record(service, keys.node("n1"), Node(name="n1", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1)))
    await put_instance(service, "web-1", 1)

    async def report(phase: Phase) -> Phase:
        status = replace(running("web-1", "10.0.0.1"), phase=phase)
        await service.control_plane.report("n1", [status])
        held = service.context.state.get(Status, "default/web-1")
        assert held is not None
        return held.record.phase

    assert await report(Phase.PREPARING) is Phase.PREPARING, "it crashed, waited and starts again"
    assert await report(Phase.STOPPING) is Phase.STOPPING
    assert await report(Phase.PENDING) is Phase.STOPPING
    assert await report(Phase.RUNNING) is Phase.RUNNING, "a machine that lost power may have forgotten that it had begun to stop"
    assert await report(Phase.STOPPED) is Phase.STOPPED
    assert await report(Phase.RUNNING) is Phase.STOPPED


def node_event(clock: FakeClock, number: int = 0, **changes: Any) -> Event:
    event = Event(id=f"e{number}", at=clock.at, project="default", subject="node/n1", code="gpu-broken", message="m")
    return replace(event, **changes)


async def put_node(service: Service, name: str = "n1") -> None:
    await put_record(service, keys.node(name), Node(name=name, capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1)))


def kept_events(service: Service, project: str = "default") -> list[Event]:
    return list(service.events.all(project, limit=5_000).items)


async def test_an_event_of_an_agent_is_of_no_later_than_now_and_within_its_bounds(service: Service, clock: FakeClock) -> None:
    await put_node(service)
    data = {"small": 1, "large": "x" * DATA_BYTES_MAX, "last": [2]}
    await service.control_plane.report("n1", [], [node_event(clock, at=clock.at + 1e9, message="m" * 10_000, data=data)])
    (event,) = kept_events(service)
    assert event.at == clock.at + AHEAD_S
    assert len(event.message) == MESSAGE_CHARS_MAX
    assert event.data == {"small": 1, "last": [2]}
    await service.control_plane.report("n1", [], [node_event(clock, 1, at=clock.at - 60, data={"a": "b"})])
    assert [(one.at, one.data) for one in kept_events(service) if one.id == "e1"] == [(clock.at - 60, {"a": "b"})]


@pytest.mark.parametrize(
    "wrong", [{"code": "x" * 10_000}, {"code": "Two words"}, {"subject": "instance/" + "x" * 10_000}, {"subject": "instance/a/b"}]
)
async def test_an_event_with_a_code_or_subject_that_is_none_is_refused(
    service: Service, clock: FakeClock, wrong: dict[str, str]
) -> None:
    await put_node(service)
    with pytest.raises(Invalid, match=r"events\.(code|subject)"):
        await service.control_plane.report("n1", [], [node_event(clock, **wrong)])
    assert not kept_events(service)


async def test_an_agent_writes_events_only_in_the_cell_s_project_and_in_those_that_have_something_there(
    service: Service, clock: FakeClock
) -> None:
    await put_node(service)
    for project, node in (("mine", "n1"), ("theirs", "n2")):
        await service.projects.put(project)
        await put_instance(service, f"{project}-1", 1, node=node)
        await put_record(
            service,
            keys.instance(project, f"{project}-1"),
            Instance(id=f"{project}-1", project=project, owner_kind=OwnerKind.APP, owner="web", node=node, created_at=1),
        )
    events = [
        node_event(clock, 1, project="mine", subject="instance/mine-1", code="started"),
        node_event(clock, 2, project="mine", subject="instance/mine-0", code="stopped"),  # gone already
        node_event(clock, 3, project="theirs", subject="instance/theirs-0", code="started"),
        node_event(clock, 4, project="theirs"),
        node_event(clock, 5),
    ]
    await service.control_plane.report("n1", [], events)
    kept = {project: sorted(event.id for event in kept_events(service, project)) for project in ("default", "mine", "theirs")}
    assert kept == {"default": ["e5"], "mine": ["e1", "e2"], "theirs": []}


async def test_the_last_words_on_a_project_s_last_instance_on_a_node_are_kept_though_it_is_gone(
    service: Service, clock: FakeClock
) -> None:
    service.feeds.start()
    await put_node(service)
    for project in ("mine", "theirs"):
        await service.projects.put(project)
    gone = Instance(id="web-1", project="mine", owner_kind=OwnerKind.APP, owner="web", node="n1", created_at=1)
    await put_record(service, keys.instance("mine", "web-1"), gone)
    await service.context.reach(await service.context.store.delete(keys.instance("mine", "web-1")))
    await asyncio.sleep(0.01)
    last, strange = (node_event(clock, 1, subject="instance/web-1", project=project) for project in ("mine", "theirs"))
    await service.control_plane.report("n1", [], [last, strange])
    assert [event.id for event in kept_events(service, "mine")] == [last.id]
    assert not kept_events(service, "theirs")
    clock.at += LEFT_S
    await service.control_plane.report("n1", [], [node_event(clock, 3, subject="instance/web-1", project="mine")])
    assert len(kept_events(service, "mine")) == 1


async def test_an_event_in_a_project_that_this_server_has_not_heard_of_yet_is_taken(clock: FakeClock) -> None:
    store = Late(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), KEY, "localhost") as service:
        await put_node(service)
        store.flows.clear()
        instance = Instance(id="mine-1", project="mine", owner_kind=OwnerKind.APP, owner="web", node="n1", created_at=1)
        await store.put(keys.instance("mine", "mine-1"), codec.encode(instance))
        event = node_event(clock, project="mine", subject="instance/mine-1", code="started")
        reporting = asyncio.ensure_future(service.control_plane.report("n1", [], [event]))
        await asyncio.sleep(0)
        assert not reporting.done()
        store.flows.set()
        await reporting
        assert await store.get(keys.event("mine", event.id)) is not None
    await store.close()


async def test_of_a_node_s_events_so_many_are_taken_in_a_minute_and_the_rest_is_told_once(
    service: Service, clock: FakeClock
) -> None:
    for name in ("n1", "n2"):
        await put_node(service, name)
    for first in range(0, 1_000, 250):
        await service.control_plane.report("n1", [], [node_event(clock, number) for number in range(first, first + 250)])
    await service.control_plane.report("n1", [], [node_event(clock, number) for number in range(250)])  # said again, and known
    assert len(kept_events(service)) == PER_MINUTE_MAX
    other = node_event(clock, 5_000, subject="node/n2")
    await service.control_plane.report("n2", [], [other])
    assert len(kept_events(service)) == PER_MINUTE_MAX + 1, "what one has too many is nothing to another"
    clock.at += MINUTE_S
    for number in (6_000, 6_001):
        await service.control_plane.report("n1", [], [node_event(clock, number)])
    (told,) = (event for event in kept_events(service) if event.code == "events-left-out")
    assert told.message.startswith("400 events of node n1 were left out")
    assert len(kept_events(service)) == PER_MINUTE_MAX + 4


async def test_events_whose_write_failed_are_taken_when_they_are_said_again(clock: FakeClock) -> None:
    allowance = Allowance(clock)
    with allowance.of("n1", PER_MINUTE_MAX + 5) as (room, _):
        assert room == PER_MINUTE_MAX
    clock.at += MINUTE_S
    for _ in range(3):
        with contextlib.suppress(Unavailable), allowance.of("n1", PER_MINUTE_MAX) as found:
            raise Unavailable("the store")
        assert found == (PER_MINUTE_MAX, 5)


async def test_what_an_instance_uses_is_what_its_own_node_tells(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    await put_instance(service, "web-1", 1)
    for node, cpu_milli in (("n0", 9), ("n1", 5), ("n2", 9)):
        service.heartbeats.note(Heartbeat(node=node, at=1.0, usage=(Usage(instance="web-1", cpu_milli=cpu_milli),)))
    assert [usage.cpu_milli for usage in service.nodes.usage(SYSTEM, None)] == [5]
    assert [usage.cpu_milli for usage in service.nodes.usage(SYSTEM, "default")] == [5]


async def test_a_job_waits_until_an_earlier_one_of_its_name_has_left_nothing(service: Service) -> None:
    old = Instance(id="crunch-1", project="default", owner_kind=OwnerKind.JOB, owner="crunch", node="n1", created_at=1)
    await put_record(service, keys.instance("default", "crunch-1"), old)
    status = JobStatus(project="default", name="crunch", phase=JobPhase.SUCCEEDED, succeeded=(0,))
    await put_record(service, keys.job_status("default", "crunch"), status)
    spec = JobSpec(name="crunch", image="registry.test/x:1")
    with pytest.raises(Conflict, match="still being removed"):
        await service.jobs.create(SYSTEM, spec)
    await service.context.reach(await service.context.store.delete(keys.instance("default", "crunch-1")))
    await service.jobs.create(SYSTEM, spec)
    assert service.jobs.get("default", "crunch").status is None


async def test_request_keys_go_on_when_their_lease_has_ended_early(service: Service) -> None:
    await service.apps.put(SYSTEM, app_spec())
    first = RequestKey(caller="t", key="k1", fingerprint="f1")
    await service.apps.restart("default", "web", request=first)
    item = await service.context.store.get(keys.request("t", "k1"))
    assert item is not None
    await service.context.store.lease_revoke(item.lease)
    view = await service.apps.restart("default", "web", request=replace(first, key="k2"))
    assert view.app.generation == 3


async def test_a_reader_that_takes_nothing_is_cut_off(service: Service) -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and sent:
            await asyncio.Event().wait()
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.Event().wait()

    stream = await service.watching.stream(Watch(kinds=frozenset({"apps"})))
    answer = Lines(stream, patience_s=0.02)
    scope: Any = {"type": "http"}
    await asyncio.wait_for(answer(scope, receive, send), 5)
    assert sent == [b""], "only the head of the answer was taken"


class Forgetful(MemoryStore):
    """A store that does what it is asked and then does not say so, every other time."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.calls = 0

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        result = await super().txn(compare, then, otherwise)
        self.calls += 1
        if self.calls % 2:
            raise OutcomeUnknown("the answer was lost")
        return result


async def test_a_write_whose_outcome_is_unknown_happens_once_when_it_is_repeated_under_its_key(clock: FakeClock) -> None:
    store = Forgetful(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), KEY) as service:

        async def until_answered(number: int) -> AppView:
            request = RequestKey(caller="t", key=f"k{number}", fingerprint=f"f{number}")
            for _ in range(10):
                try:
                    if number == 0:
                        return await service.apps.put(SYSTEM, app_spec(), request=request)
                    return await service.apps.restart("default", "web", request=request)
                except OutcomeUnknown:
                    await service.context.reach(await store.revision())
            raise AssertionError("never answered")

        for number in range(6):
            view = await until_answered(number)
            assert view.app.generation == number + 1
    await store.close()


class Deaf(MemoryStore):
    """Who watches it hears nothing while it is `deaf`."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.hears = asyncio.Event()
        self.hears.set()

    async def _heard(self, batches: AsyncIterator[WatchBatch]) -> AsyncIterator[WatchBatch]:
        async for batch in batches:
            await self.hears.wait()
            yield batch

    def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        return self._heard(super().watch(prefix, start=start))


async def test_that_there_is_nothing_is_said_once_all_that_was_written_is_known(clock: FakeClock) -> None:
    """Else who waits for an app to be gone is told so by a server that has not heard of it. (Found by the simulator, seed 3633.)"""
    store = Deaf(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), KEY) as service:
        other = State(store, KINDS)
        async with other, Service(store, other, clock, random.Random(2), KEY) as elsewhere:
            with pytest.raises(NotFound):
                await service.context.look(lambda: found(service))
            await service.context.reach(await store.revision())
            store.hears.clear()
            writing = asyncio.ensure_future(elsewhere.apps.put(SYSTEM, app_spec()))
            while (await store.get(keys.app("default", "web"))) is None:  # noqa: ASYNC110 - it is written before it is heard of
                await asyncio.sleep(0)
            looking = asyncio.ensure_future(service.context.look(lambda: found(service)))
            await asyncio.sleep(0.05)
            assert not looking.done()
            store.hears.set()
            assert (await looking).app.name == "web"
            await writing
    await store.close()


async def found(service: Service) -> AppView:
    return service.apps.get("default", "web")


async def test_the_default_project_is_there_from_the_beginning(service: Service) -> None:
    assert [project.name for project in service.projects.all(SYSTEM, limit=10).items] == ["default"]
    await service.projects.put("alpha")
    await service.projects.put("zulu")
    first = service.projects.all(SYSTEM, limit=2)
    assert [project.name for project in first.items] == ["alpha", "default"]
    rest = service.projects.all(SYSTEM, limit=2, after=first.next or "")
    assert [project.name for project in rest.items] == ["zulu"]
    assert rest.next is None
    mine = Caller(id="t", role=Role.READ, project="alpha")
    assert [project.name for project in service.projects.all(mine, limit=10).items] == ["alpha"]
