"""The SDK and the real API, over a real socket: both keep the contract that ARCHITECTURE.md writes down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from atoll.entry.config import Config
from atoll.entry.scratch import free_port
from atoll.entry.server import main as serve
from atoll.model import codec
from atoll.model.errors import Conflict, Forbidden, Invalid, NotFound, StaleRevision, Unauthenticated, Unavailable
from atoll.model.ports.control_plane import StreamKind, StreamRequest
from atoll.model.records import Capacity, Heartbeat, Ingress, Node, Role, Status, Usage
from atoll.model.rollouts import RolloutOrder, RolloutPhase
from atoll.model.spec import AppSpec, CanaryStep, JobSpec, Port, Quota, Rollout, RuntimeName, Strategy
from atoll.model.states import Phase
from atoll.model.streams import ErrorBody, ExecOptions, Kind, LogLine, LogOptions, pack, unpack
from atoll.model.traffic import Counts, ReleaseTraffic, TrafficReport
from atoll.model.views import LabelRequest, RolloutView, TaintRequest, TokenRequest
from atoll.sdk.client import Client
from atoll.sdk.context import load
from atoll.sdk.control_plane import HttpControlPlane
from atoll.sdk.http import HttpTransport

SPEC = AppSpec(name="web", image="registry.example/web:1", ports=(Port(port=80),), secrets={"DB": "db"})
NODE = Node(
    name="n1",
    capacity=Capacity(cpu_milli=4000, memory_bytes=8 << 30, disk_bytes=100 << 30),
    runtimes=(RuntimeName.RUNC,),
    address="10.0.0.1",
)


class World:
    """A server, its admin, and a node whose agent is this test."""

    def __init__(self, config: Config) -> None:
        saved = load(config.client_file)
        assert saved is not None
        self.address = saved.address
        self.client = Client(HttpTransport(saved.address, saved.token))
        self.agent = HttpControlPlane(saved.address, (config.agent_data / "token").read_text().strip())
        self.ingress = HttpControlPlane(saved.address, (config.ingress_data / "token").read_text().strip())

    async def run_one(self) -> str:
        """Deploy SPEC, take its instance up as the node's agent, and return its id."""
        await self.client.put_secret("default", "db", "hunter2")
        await self.agent.register_node(NODE)
        await self.agent.heartbeat(Heartbeat(node="n1", at=time.time()))
        await self.client.put_app(SPEC)
        batches = self.agent.assignments("n1")
        assigned = None
        async with asyncio.timeout(10):
            async for batch in batches:
                if batch.put:
                    assigned = batch.put[0]
                    break
        await batches.aclose()  # type: ignore[attr-defined]
        assert assigned is not None
        assert assigned.workload.image == SPEC.image
        id = assigned.instance.id
        status = Status(instance=id, project="default", node="n1", phase=Phase.RUNNING, ready=True, address="10.64.0.2", pid=7)
        await self.agent.report("n1", [status])
        return id


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with serving(tmp_path) as found:
        yield found


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[World]:
    config = Config(data=directory, api=f"127.0.0.1:{free_port()}", node="n1")
    stop = asyncio.Event()
    server = asyncio.create_task(serve(config, stop))
    try:
        async with asyncio.timeout(15):
            while True:
                assert not server.done(), server.result()
                try:
                    found = World(config)
                    await found.client.info()
                    break
                except (Unavailable, AssertionError, FileNotFoundError):
                    await asyncio.sleep(0.02)
        yield found
        await asyncio.gather(found.client.close(), found.agent.close(), found.ingress.close())
    finally:
        stop.set()
        await asyncio.wait_for(server, 15)


async def test_an_app_comes_from_the_client_to_the_agent_and_back(world: World) -> None:
    id = await world.run_one()
    async with asyncio.timeout(10):
        while True:
            view = await world.client.app("default", "web")
            if view.status is not None and view.status.ready == 1:
                break
            await asyncio.sleep(0.02)
    assert [each.instance.id for each in await world.client.instances("default", app="web")] == [id]
    assert await world.agent.instance_secrets(id) == {"DB": "hunter2"}
    assert [release.number for release in await world.client.releases("default", "web")] == [1]
    assert {event.code for event in (await world.client.events("default", subject="app/web")).items}
    with pytest.raises(StaleRevision):
        await world.client.put_app(SPEC, if_revision=1)


async def test_a_route_comes_to_the_ingress(world: World) -> None:
    await world.ingress.register_ingress(Ingress(name="n1", http_port=8080))
    await world.run_one()
    async with asyncio.timeout(10):
        async for batch in world.ingress.routing("n1"):
            if batch.put and batch.put[0].endpoints:
                assert batch.put[0].endpoints[0].address == "10.64.0.2"
                assert any(host == "web.localhost" for host, *_ in batch.put[0].hosts)
                break
    assert (await world.client.app("default", "web")).urls == ("http://web.localhost:8080/",)


async def test_every_list_and_view_is_understood(world: World) -> None:
    id = await world.run_one()
    client = world.client
    await world.agent.heartbeat(Heartbeat(node="n1", at=time.time(), usage=(Usage(instance=id, cpu_milli=5, memory_bytes=1),)))
    assert (await client.info()).store == "sqlite"
    assert [usage.cpu_milli for usage in await client.usage("default")] == [5]
    assert (await client.node("n1")).node.name == "n1"
    assert (await client.cordon("n1")).policy is not None
    assert (await client.uncordon("n1")).node.name == "n1"
    assert [secret.name for secret in await client.secrets("default")] == ["db"]
    assert (await client.put_project("shop")).name == "shop"
    assert {project.name for project in await client.projects()} >= {"shop"}
    assert (await client.set_quota("shop", Quota(instances=3))).quota == Quota(instances=3)
    quota = await client.quota("shop")
    assert (await client.set_quota("shop", Quota(instances=4), if_revision=quota.revision)).quota == Quota(instances=4)
    with pytest.raises(StaleRevision):
        await client.set_quota("shop", Quota(instances=5), if_revision=quota.revision)
    quota = await client.quota("default")
    assert (quota.quota, quota.used.instances, quota.used.cpu_milli) == (None, 1, 100)
    assert (await client.label("n1", LabelRequest(labels={"rack": "a7"}))).node.labels == {"rack": "a7"}
    assert (await client.taint("n1", TaintRequest(add=("spot:PreferNoSchedule",)))).node.taints == ("spot:prefer-no-schedule",)
    with pytest.raises(Invalid, match="no taint 'other'"):
        await client.taint("n1", TaintRequest(remove=("other",)))
    assert (await client.create_job(JobSpec(name="sum", image="x/y"))).job.name == "sum"
    with pytest.raises(Conflict):
        await client.create_job(JobSpec(name="sum", image="x/y"))
    assert (await client.cancel_job("default", "sum")).job.cancelled
    assert [view.job.name for view in await client.jobs("default")] == ["sum"]
    assert (await client.scale("default", "web", 2)).app.replicas == 2
    assert (await client.restart("default", "web")).app.generation == 2
    assert (await client.stop_instance("default", id)).instance.id == id
    with pytest.raises(NotFound):
        await client.app("default", "nope")
    assert "$defs" in await client.schema("app")
    with pytest.raises(Conflict, match="used by app"):
        await client.delete_secret("default", "db")
    await client.put_secret("default", "other", "x")
    await client.delete_secret("default", "other")
    await client.delete_job("default", "sum")
    await client.delete_app("default", "web")


async def test_tokens_hold_people_to_their_role(world: World) -> None:
    made = await world.client.create_token(TokenRequest(name="ci", role=Role.READ, project="default"))
    reader = Client(HttpTransport(world.address, made.token))
    assert await reader.apps("default") == []
    with pytest.raises(Forbidden):
        await reader.put_app(SPEC)
    await world.client.delete_token(made.id)
    with pytest.raises(Unauthenticated):
        await reader.apps("default")
    await reader.close()


async def test_a_watch_tells_the_state_and_then_what_changes(world: World) -> None:
    await world.client.put_project("shop")
    lines = world.client.watch(("apps", "app-statuses", "instances", "statuses", "events"), project="default", bookmarks=True)
    async with asyncio.timeout(10):
        while (await anext(lines)).kind is not None:
            pass
        await world.run_one()
        seen = set()
        async for line in lines:
            seen.add(line.kind)
            if seen >= {"apps", "app-statuses", "instances", "statuses", "events"}:
                break
    await lines.aclose()  # type: ignore[attr-defined]


async def agent_serves(agent: HttpControlPlane) -> None:
    """An agent that answers an exec, a log and copies of files in few words."""
    async for request in agent.stream_requests("n1"):
        await answer(agent, request)


async def answer(agent: HttpControlPlane, request: StreamRequest) -> None:
    channel = await agent.open_stream("n1", request.id)
    match request.kind:
        case StreamKind.EXEC:
            while (message := await channel.receive()) is not None:
                kind, payload = unpack(message)
                if kind is Kind.STDIN:
                    await channel.send(pack(Kind.STDOUT, payload))
                elif kind is Kind.STDIN_END:
                    await channel.send(pack(Kind.EXIT, b"7"))
                    break
        case StreamKind.LOGS:
            await channel.send(pack(Kind.LOG, codec.encode(LogLine(at=1.0, stream="stdout", text="hello"))))
            await channel.send(pack(Kind.END))
        case StreamKind.FILES_GET:
            told = ErrorBody(code="not-found", message="no such file")
            await channel.send(pack(Kind.ERROR, codec.encode(told)))
        case _:
            while (message := await channel.receive()) is not None and unpack(message)[0] is not Kind.END:
                pass
            await channel.send(pack(Kind.END))
    async with asyncio.timeout(5):
        while await channel.receive() is not None:
            pass
    await channel.close()


async def test_live_streams_meet_in_the_server(world: World) -> None:
    id = await world.run_one()
    agent = asyncio.create_task(agent_serves(world.agent))
    try:
        async with asyncio.timeout(20):
            while True:
                try:
                    running = await world.client.exec("default", id, ExecOptions(argv=("cat",)))
                    break
                except Unavailable:
                    await asyncio.sleep(0.02)  # the tunnel is not there yet
            big = bytes(range(256)) * 2_000
            sending = asyncio.create_task(running.send(big))
            sending.add_done_callback(lambda _: asyncio.ensure_future(running.end_input()))
            got = b"".join([data async for _, data in running])
            assert (got, running.code) == (big, 7)
            await running.close()
            assert [line.text async for line in world.client.logs("default", id, LogOptions(tail=1))] == ["hello"]
            with pytest.raises(NotFound, match="no such file"):
                [_ async for _ in world.client.get_files("default", id, "/nope")]

            async def parts() -> AsyncIterator[bytes]:
                for _ in range(20):
                    yield bytes(100_000)

            await world.client.put_files("default", id, "/tmp", parts())
    finally:
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)


async def test_an_exec_where_no_agent_is_connected_says_so(world: World) -> None:
    id = await world.run_one()
    with pytest.raises(Unavailable, match="n1"):
        await world.client.exec("default", id, ExecOptions(argv=("true",)))


async def test_a_report_takes_a_few_milliseconds(world: World) -> None:
    """Twenty durable reports, one after the other; generous, because the machine may be busy."""
    id = await world.run_one()
    status = Status(instance=id, project="default", node="n1", phase=Phase.RUNNING, ready=True, address="10.64.0.2", pid=7)
    took = []
    for number in range(20):
        began = time.perf_counter()
        await world.agent.report(
            "n1", [Status(**{**{f: getattr(status, f) for f in status.__struct_fields__}, "restarts": number})]
        )
        took.append(time.perf_counter() - began)
    assert sorted(took)[10] < 0.1


async def test_a_rollout_is_steered_and_seen_with_what_ingresses_counted(world: World) -> None:
    client = world.client

    async def until(phase: RolloutPhase, attempt: int = 0) -> RolloutView:
        async with asyncio.timeout(15):
            while True:
                view = await client.rollout("default", "web")
                if view.status is not None and (view.status.phase, view.status.attempt) == (phase, attempt):
                    return view
                await asyncio.sleep(0.05)

    await world.run_one()
    async with asyncio.timeout(15):
        while True:
            status = (await client.app("default", "web")).status
            if status is not None and status.served_release == 1:
                break
            await asyncio.sleep(0.05)
    with pytest.raises(Conflict):
        await client.pause_rollout("default", "web")
    rules = Rollout(strategy=Strategy.CANARY, steps=(CanaryStep(weight=5),))
    await client.put_app(replace(SPEC, env={"V": "2"}, rollout=rules))
    await until(RolloutPhase.PROGRESSING)
    counted = ReleaseTraffic(project="default", app="web", release=1, counts=Counts(200, 3, (0, 200)))
    await world.ingress.traffic(TrafficReport(ingress="n1", started=1.0, releases=(counted,)))
    with pytest.raises(Forbidden):
        await world.agent.traffic(TrafficReport(ingress="n1", started=1.0))
    releases = {each.release: each for each in (await client.rollout("default", "web")).releases}
    assert (releases[1].requests, releases[1].errors, releases[1].weight) == (200, 3, 100)
    assert (releases[2].weight, releases[2].ready) == (0, 0)
    assert (await client.pause_rollout("default", "web")).app.order == RolloutOrder(release=2, paused=True, by="admin")
    await client.abort_rollout("default", "web")
    view = await until(RolloutPhase.REVERTED)
    assert view.status is not None
    assert "aborted by admin" in view.status.message
    await client.resume_rollout("default", "web")
    await until(RolloutPhase.PROGRESSING, attempt=1)
    await client.promote_rollout("default", "web")
    await until(RolloutPhase.PROMOTING, attempt=1)
    await client.undo_rollout("default", "web")
    await until(RolloutPhase.REVERTED, attempt=1)
