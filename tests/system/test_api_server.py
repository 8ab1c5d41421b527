"""The API on a real server and real sockets: streams, WebSockets, the registry with skopeo, hostile connections, a clean end."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import random
import shutil
import socket
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atoll.api.http.app import create_app
from atoll.api.http.calls import QUERY_BYTES_MAX
from atoll.api.http.serve import HEADER_BYTES_MAX, ApiServer, BoundedProtocol, listen, serving
from atoll.api.http.streams import AHEAD_MAX
from atoll.api.registry.collect import collect
from atoll.api.registry.handlers import registry_handler
from atoll.api.registry.registry import Registry
from atoll.api.service import KINDS, SYSTEM, Service
from atoll.model import codec, keys
from atoll.model.certificates import CertificateRequest
from atoll.model.chains import check_chain
from atoll.model.errors import (
    AtollError,
    Conflict,
    DeadlineExceeded,
    Exhausted,
    Forbidden,
    NotFound,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import NEXT_STREAM, TAKEN, StreamKind, StreamRequest
from atoll.model.records import Ingress, Instance, NodeHealth, NodeLiveness, OwnerKind, Role, Status
from atoll.model.spec import AppSpec, Port
from atoll.model.states import Desired, Phase
from atoll.model.streams import MESSAGE_BYTES_MAX, ErrorBody, ExecOptions, Kind, NextCommand, pack, unpack
from atoll.model.views import TokenRequest
from atoll.sdk import client as sdk
from atoll.sdk.control_plane import HttpControlPlane
from atoll.sdk.http import HttpTransport
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from made_certificates import Maker

SPEC = AppSpec(name="web", image="registry.test/web:1", ports=(Port(port=8000),))
INSTANCES = "/v1/projects/default/instances"


class Cell:
    """A server on a free port of loopback, and tokens for it."""

    def __init__(self, service: Service, server: ApiServer, port: int, registry: Registry) -> None:
        self.service = service
        self.server = server
        self.port = port
        self.registry = registry
        self.address = f"http://127.0.0.1:{port}"

    async def token(self, role: Role, project: str = "*", subject: str = "") -> str:
        view = await self.service.tokens.create(SYSTEM, TokenRequest(name="t", role=role, project=project, subject=subject))
        assert view.token is not None
        return view.token

    async def agent(self, node: str = "n1") -> HttpControlPlane:
        return HttpControlPlane(self.address, await self.token(Role.AGENT, subject=node), node=node)

    async def put(self, key: str, record: object) -> None:
        await self.service.context.reach(await self.service.context.store.put(key, codec.encode(record)))

    async def instance(self, id: str, *, node: str | None = "n1", phase: Phase | None = None, **more: Any) -> None:
        record = Instance(
            id=id, project="default", owner_kind=OwnerKind.APP, owner="web", release=1, node=node, created_at=1, **more
        )
        await self.put(keys.instance("default", id), record)
        if phase is not None:
            status = Status(instance=id, project="default", node=node or "", phase=phase, ready=True, address="10.0.0.2")
            await self.put(keys.status("default", id), status)


@pytest.fixture
async def cell(tmp_path: Path) -> AsyncIterator[Cell]:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
        registry = Registry(tmp_path / "registry", service)
        app = create_app(service, mounts=[registry_handler(registry, service)])
        listener = listen("127.0.0.1", 0)
        async with serving(app, service, listener) as server:
            yield Cell(service, server, listener.getsockname()[1], registry)
    await store.close()


async def following(stream: AsyncIterator[Any]) -> Any:
    async with asyncio.timeout(10):
        return await anext(stream)


async def lines(cell: Cell, path: str, token: str) -> AsyncIterator[dict[str, Any]]:
    async with httpx.AsyncClient() as client:
        headers = {"authorization": f"Bearer {token}"}
        async with client.stream("GET", cell.address + path, headers=headers, timeout=15) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                yield json.loads(line)


async def test_a_watch_gives_the_state_a_bookmark_and_then_each_change_and_resumes_without_gap(cell: Cell) -> None:
    token = await cell.token(Role.READ)
    first = await cell.service.apps.put(SYSTEM, SPEC)
    stream = lines(cell, "/v1/watch?kinds=apps", token)
    line = await following(stream)
    assert (line["kind"], line["key"], line["revision"]) == ("apps", "default/web", first.revision)
    bookmark = await following(stream)
    assert list(bookmark) == ["revision"]
    second = await cell.service.apps.scale("default", "web", 2)
    assert (await following(stream))["record"]["replicas"] == 2
    await stream.aclose()  # type: ignore[attr-defined]
    third = await cell.service.apps.scale("default", "web", 3)
    resumed = lines(cell, f"/v1/watch?kinds=apps&from={second.revision + 1}", token)
    assert (await following(resumed))["revision"] == third.revision
    again = lines(cell, f"/v1/watch?kinds=apps&from={first.revision}", token)
    assert [(await following(again))["revision"] for _ in range(3)] == [first.revision, second.revision, third.revision]
    for open_stream in (resumed, again):
        await open_stream.aclose()  # type: ignore[attr-defined]


async def test_a_watch_shows_a_tenant_only_its_own_project_and_nobody_a_secret(cell: Cell) -> None:
    await cell.service.projects.put("team")
    token = await cell.token(Role.READ, "team")
    await cell.service.apps.put(SYSTEM, SPEC)
    await cell.service.secrets.put("team", "key", "hunter2")
    stream = lines(cell, "/v1/watch", token)
    assert (await following(stream))["key"] == "team"
    assert "kind" not in await following(stream)
    await cell.service.apps.scale("default", "web", 2)
    from msgspec.structs import replace

    await cell.service.apps.put(SYSTEM, replace(SPEC, project="team"))
    assert (await following(stream))["key"] == "team/web"
    await stream.aclose()  # type: ignore[attr-defined]


async def test_an_agent_gets_everything_first_and_then_changes_within_moments(cell: Cell) -> None:
    agent = await cell.agent()
    await cell.service.apps.put(SYSTEM, SPEC)
    await cell.instance("web-1")
    await cell.instance("other-1", node="n2")
    stream = agent.assignments("n1")
    batch = await following(stream)
    assert batch.complete
    assert [assignment.instance.id for assignment in batch.put] == ["web-1"]
    assert batch.put[0].workload.image == "registry.test/web:1"
    begin = time.perf_counter()
    await cell.instance("web-2")
    batch = await following(stream)
    took_ms = (time.perf_counter() - begin) * 1000
    assert [assignment.instance.id for assignment in batch.put] == ["web-2"]
    assert took_ms < 250, "a change reaches the agent at once"
    await cell.service.context.store.delete(keys.instance("default", "web-1"))
    batch = await following(stream)
    assert (batch.complete, batch.put, batch.removed) == (False, (), ("web-1",))
    await stream.aclose()  # type: ignore[attr-defined]
    await agent.close()


async def test_an_ingress_gets_ready_endpoints_marked_as_they_drain(cell: Cell) -> None:
    edge = HttpControlPlane(cell.address, await cell.token(Role.INGRESS, subject="edge"))
    await edge.register_ingress(Ingress(name="edge", http_port=8080))
    await cell.service.apps.put(SYSTEM, SPEC)
    stream = edge.routing("edge")
    batch = await following(stream)
    assert batch.complete
    assert batch.put[0].hosts == (("web.localhost", "/", 8000, False),)
    assert batch.put[0].endpoints == ()
    await cell.instance("web-1", phase=Phase.RUNNING)
    batch = await following(stream)
    assert [(e.instance, e.address, e.draining) for e in batch.put[0].endpoints] == [("web-1", "10.0.0.2", False)]
    await cell.service.instances.stop(SYSTEM, "default", "web-1")
    batch = await following(stream)
    assert batch.put[0].endpoints[0].draining
    await edge.drained("edge", ["web-1", "unknown-1"])
    held = await cell.service.context.store.get(keys.drained("web-1", "edge"))
    assert held is not None
    await cell.instance("web-1", desired=Desired.STOP)
    assert (await following(stream)).put[0].endpoints == ()
    await stream.aclose()  # type: ignore[attr-defined]
    await edge.close()


async def test_an_ingress_is_told_of_certificates_with_their_keys_and_an_agent_is_not(cell: Cell) -> None:
    client = sdk.Client.connect(cell.address, await cell.token(Role.ADMIN))
    chain, key = Maker().sign("www.test")
    await client.put_certificate("default", "www.test", CertificateRequest(chain=chain, key=key))
    assert [view.host for view in await client.certificates("default")] == ["www.test"]
    edge = HttpControlPlane(cell.address, await cell.token(Role.INGRESS, subject="edge"))
    stream = edge.certificates("edge")
    batch = await following(stream)
    assert batch.complete
    assert [(one.host, one.project) for one in batch.put] == [("www.test", "default")]
    assert check_chain("www.test", batch.put[0].chain, batch.put[0].key, time.time())
    await client.remove_certificate("default", "www.test")
    while not (batch := await following(stream)).removed:
        assert batch.put == ()
    assert batch.removed == ("www.test",)
    await stream.aclose()  # type: ignore[attr-defined]
    agent = HttpControlPlane(cell.address, await cell.token(Role.AGENT, subject="edge"))
    with pytest.raises(Forbidden):
        await following(agent.certificates("edge"))
    for each in (client, edge, agent):
        await each.close()


async def agent_echoes(agent: HttpControlPlane, node: str, requests: list[Any]) -> None:
    """An agent that answers each stream with what it is sent, upper-cased, and an exit of 7."""
    async for request in agent.stream_requests(node):
        requests.append(request)
        channel = await agent.open_stream(node, request.id)
        async with asyncio.timeout(10):
            while (message := await channel.receive()) is not None:
                kind, payload = unpack(message)
                if kind is Kind.STDIN_END:
                    await channel.send(pack(Kind.EXIT, b"7"))
                    break
                await channel.send(pack(Kind.STDOUT, payload.upper()))
        await channel.close()


async def connected(cell: Cell, node: str = "n1") -> None:
    for _ in range(500):
        if cell.service.tunnels.connected(node):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{node} does not connect")


async def test_exec_is_carried_to_the_agent_and_back(cell: Cell) -> None:
    agent = await cell.agent()
    requests: list[Any] = []
    task = asyncio.create_task(agent_echoes(agent, "n1", requests))
    await connected(cell)
    await cell.instance("web-1", phase=Phase.RUNNING)
    client = HttpTransport(cell.address, await cell.token(Role.DEPLOY, "default"))
    options = codec.encode(ExecOptions(argv=("cat", "-"), tty=True)).decode()
    channel = await client.channel(f"{INSTANCES}/web-1/exec?options={options}")
    big = b"x" * 100_000
    for data in (b"hello", big):
        await channel.send(pack(Kind.STDIN, data))
    await channel.send(pack(Kind.STDIN_END))
    received = [unpack(await channel.receive() or b"") for _ in range(3)]
    assert received == [(Kind.STDOUT, b"HELLO"), (Kind.STDOUT, big.upper()), (Kind.EXIT, b"7")]
    assert await channel.receive() is None
    assert (requests[0].kind, requests[0].instance) == (StreamKind.EXEC, "web-1")
    assert requests[0].options["argv"] == ["cat", "-"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await client.close()
    await agent.close()


async def refused(client: HttpTransport, path: str) -> AtollError:
    with pytest.raises(AtollError) as caught:
        await client.channel(path)
    return caught.value


async def test_a_stream_that_cannot_be_says_why(cell: Cell) -> None:
    client = HttpTransport(cell.address, await cell.token(Role.DEPLOY, "default"))
    options = "?options=" + codec.encode(ExecOptions(argv=("true",))).decode()
    assert isinstance(await refused(client, f"{INSTANCES}/gone-1/exec{options}"), NotFound)
    long = "?options=" + codec.encode(ExecOptions(argv=("sh", "-c", "x" * 20_000))).decode()
    assert isinstance(await refused(client, f"{INSTANCES}/gone-1/exec{long}"), NotFound)
    assert "65536 bytes" in (await refused(client, f"{INSTANCES}/gone-1/exec{long * 4}")).message
    await cell.instance("web-0", node=None)
    assert isinstance(await refused(client, f"{INSTANCES}/web-0/exec{options}"), Conflict)
    await cell.instance("web-1", phase=Phase.RUNNING)
    lost = NodeLiveness(name="n1", health=NodeHealth.LOST, since=0.0)
    await cell.service.context.reach(await cell.service.context.store.put(keys.node_liveness("n1"), codec.encode(lost)))
    error = await refused(client, f"{INSTANCES}/web-1/exec{options}")
    assert isinstance(error, Unavailable)
    assert "node 'n1' has no connection" in error.message
    assert (await refused(client, f"{INSTANCES}/web-1/exec?options=nope")).code == "invalid"
    assert (await refused(client, f"{INSTANCES}/web-1/exec")).field in ("argv", None)
    assert (await refused(client, f"{INSTANCES}/web-1/files?mode=eat")).field == "mode"
    reader = HttpTransport(cell.address, await cell.token(Role.READ, "default"))
    assert isinstance(await refused(reader, f"{INSTANCES}/web-1/exec{options}"), Forbidden)
    stranger = HttpTransport(cell.address, await cell.token(Role.DEPLOY, "team"))
    assert isinstance(await refused(stranger, f"{INSTANCES}/web-1/logs"), Forbidden)
    agent = HttpTransport(cell.address, await cell.token(Role.AGENT, subject="n1"))
    assert isinstance(await refused(agent, "/v1/nodes/n1/streams/abc"), NotFound)
    assert isinstance(await refused(agent, "/v1/nodes/n2/tunnel"), Forbidden)
    for one in (client, reader, stranger, agent):
        await one.close()


async def test_an_agent_that_never_answers_ends_in_a_clear_error(cell: Cell) -> None:
    silent = cell.service.tunnels.requests("n1")
    task = asyncio.ensure_future(anext(silent))
    await connected(cell)
    with pytest.raises(DeadlineExceeded, match="node 'n1' did not open the stream"):
        await cell.service.tunnels.open("n1", StreamKind.LOGS, "web-1", {}, answer_s=0.05)
    request = await task
    with pytest.raises(NotFound):
        cell.service.tunnels.accept("n1", request.id)


async def test_a_stream_waits_for_the_tunnel_of_an_agent_that_comes_back(cell: Cell) -> None:
    agent = await cell.agent()
    await cell.instance("web-1", phase=Phase.RUNNING)
    client = HttpTransport(cell.address, await cell.token(Role.DEPLOY, "default"))
    options = codec.encode(ExecOptions(argv=("cat",))).decode()
    opening = asyncio.create_task(client.channel(f"{INSTANCES}/web-1/exec?options={options}"))
    await asyncio.sleep(0.1)
    task = asyncio.create_task(agent_echoes(agent, "n1", []))
    channel = await asyncio.wait_for(opening, 3)
    await channel.send(pack(Kind.STDIN_END))
    assert unpack(await channel.receive() or b"") == (Kind.EXIT, b"7")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await client.close()
    await agent.close()


async def test_a_stream_that_an_agent_took_into_its_death_is_asked_of_the_next(cell: Cell) -> None:
    first = cell.service.tunnels.requests("n1")
    taking = asyncio.ensure_future(anext(first))
    await connected(cell)
    opening = asyncio.create_task(cell.service.tunnels.open("n1", StreamKind.LOGS, "web-1", {}))
    request = await taking
    await first.aclose()  # type: ignore[attr-defined]
    assert not cell.service.tunnels.connected("n1")
    assert await anext(cell.service.tunnels.requests("n1")) == request
    cell.service.tunnels.accept("n1", request.id)
    await (await opening).close()


async def test_nobody_waits_for_ever_for_a_tunnel(cell: Cell) -> None:
    with pytest.raises(Unavailable, match="no connection"):
        await cell.service.tunnels.open("n1", StreamKind.LOGS, "web-1", {}, answer_s=0.05)


async def test_a_stream_that_waits_is_given_to_the_next_client_and_no_agent_dials(cell: Cell) -> None:
    agent = await cell.agent()
    waiting = await agent.open_stream("n1", NEXT_STREAM)
    await cell.instance("web-1", phase=Phase.RUNNING)
    client = HttpTransport(cell.address, await cell.token(Role.DEPLOY, "default"))
    opening = asyncio.create_task(client.channel(f'{INSTANCES}/web-1/exec?options={{"argv":["true"]}}'))
    request = codec.decode(await waiting.receive() or b"", StreamRequest)
    assert (request.kind, request.instance, request.options["argv"]) == (StreamKind.EXEC, "web-1", ["true"])
    await waiting.send(TAKEN)
    await waiting.send(pack(Kind.EXIT, b"3"))
    channel = await opening
    assert unpack(await channel.receive() or b"") == (Kind.EXIT, b"3")
    stranger = HttpControlPlane(cell.address, await cell.token(Role.AGENT, subject="n2"))
    with pytest.raises(Forbidden):
        await stranger.open_stream("n1", NEXT_STREAM)
    for each in (client, agent, stranger):
        await each.close()


AHEAD = "/v1/projects/default/commands/next"


async def test_a_command_is_asked_for_on_a_stream_that_its_client_opened_before(cell: Cell) -> None:
    agent = await cell.agent()
    waiting = await agent.open_stream("n1", NEXT_STREAM)
    await cell.instance("web-1", phase=Phase.RUNNING)
    client = HttpTransport(cell.address, await cell.token(Role.DEPLOY, "default"))
    channel = await client.channel(AHEAD)
    await channel.send(codec.encode(NextCommand(instance="web-1", options=ExecOptions(argv=("true",)))))
    request = codec.decode(await waiting.receive() or b"", StreamRequest)
    assert (request.kind, request.instance, request.options["argv"]) == (StreamKind.EXEC, "web-1", ["true"])
    await waiting.send(TAKEN)
    await waiting.send(pack(Kind.STDOUT, b"hello"))
    await waiting.send(pack(Kind.EXIT, b"3"))
    assert await channel.receive() == TAKEN
    assert [unpack(await channel.receive() or b"") for _ in range(2)] == [(Kind.STDOUT, b"hello"), (Kind.EXIT, b"3")]
    await channel.close()
    for each in (client, agent):
        await each.close()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b'{"instance":"web-9","options":{"argv":["true"]}}', "not-found"),
        (b'{"instance":"../x","options":{"argv":["true"]}}', "invalid"),
        (b'{"instance":"web-1","options":{"argv":[]}}', "invalid"),
        (b"\xff", "invalid"),
        (b'{"instance":"other-1","options":{"argv":["true"]}}', "not-found"),
        (b'{"instance":"web-1","options":{"argv":["' + b"x" * QUERY_BYTES_MAX + b'"]}}', "too-large"),
    ],
)
async def test_what_is_asked_for_on_such_a_stream_is_checked_as_any_command(cell: Cell, said: bytes, code: str) -> None:
    await cell.instance("web-1", phase=Phase.RUNNING)
    client = HttpTransport(cell.address, await cell.token(Role.DEPLOY, "default"))
    channel = await client.channel(AHEAD)
    await channel.send(said)
    kind, payload = unpack(await channel.receive() or b"")
    assert (kind, codec.decode(payload, ErrorBody).code) == (Kind.ERROR, code)
    assert await channel.receive() is None
    await channel.close()
    await client.close()


async def test_streams_that_wait_for_a_command_are_few_and_end_with_their_token(cell: Cell) -> None:
    view = await cell.service.tokens.create(SYSTEM, TokenRequest(name="t", role=Role.DEPLOY, project="default"))
    client = HttpTransport(cell.address, view.token)
    open_ones = [await client.channel(AHEAD) for _ in range(AHEAD_MAX)]
    with pytest.raises(Exhausted, match="wait for a command"):
        await client.channel(AHEAD)
    for reader in (await cell.token(Role.READ, "default"), await cell.token(Role.DEPLOY, "shop")):
        other = HttpTransport(cell.address, reader)
        with pytest.raises(Forbidden):
            await other.channel(AHEAD)
        await other.close()
    await open_ones.pop().close()
    async with asyncio.timeout(5):
        while True:
            try:
                open_ones.append(await client.channel(AHEAD))
                break
            except Exhausted:
                await asyncio.sleep(0.01)
    await cell.service.tokens.delete(SYSTEM, view.id)
    for each in open_ones:
        with pytest.raises(Unavailable, match="closed"):
            await asyncio.wait_for(each.receive(), 5)
        await each.close()
    await client.close()


async def test_a_token_that_ended_by_its_time_gets_no_command_more(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = await cell.agent()
    waiting = await agent.open_stream("n1", NEXT_STREAM)
    await cell.instance("web-1", phase=Phase.RUNNING)
    client = HttpTransport(cell.address, await cell.token(Role.DEPLOY, "default"))
    channel = await client.channel(AHEAD)
    monkeypatch.setattr(cell.service.membership, "still", lambda caller: Unauthenticated("the token has expired"))
    await channel.send(codec.encode(NextCommand(instance="web-1", options=ExecOptions(argv=("true",)))))
    with pytest.raises(Unavailable, match="expired"):
        await channel.receive()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting.receive(), 0.1)
    for each in (channel, client, agent):
        await each.close()


async def test_what_would_end_an_agents_tunnel_is_refused(cell: Cell) -> None:
    with pytest.raises(TooLarge, match="with its variables"):
        await cell.service.tunnels.open("n1", StreamKind.EXEC, "web-1", {"env": {"A": "x" * MESSAGE_BYTES_MAX}})


async def test_a_stream_is_only_for_the_node_that_was_asked(cell: Cell) -> None:
    requests = cell.service.tunnels.requests("n1")
    task = asyncio.ensure_future(anext(requests))
    await connected(cell)
    opening = asyncio.create_task(cell.service.tunnels.open("n1", StreamKind.LOGS, "web-1", {}))
    request = await task
    with pytest.raises(NotFound):
        cell.service.tunnels.accept("n2", request.id)
    cell.service.tunnels.accept("n1", request.id)
    await (await opening).close()


async def test_a_client_that_leaves_ends_the_agents_stream(cell: Cell) -> None:
    agent = await cell.agent()
    ended = asyncio.Event()

    async def serve() -> None:
        async for request in agent.stream_requests("n1"):
            channel = await agent.open_stream("n1", request.id)
            while await channel.receive() is not None:
                pass
            ended.set()

    task = asyncio.create_task(serve())
    await connected(cell)
    await cell.instance("web-1", phase=Phase.RUNNING)
    client = HttpTransport(cell.address, await cell.token(Role.READ, "default"))
    channel = await client.channel(f"{INSTANCES}/web-1/logs")
    await channel.close()
    await asyncio.wait_for(ended.wait(), 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await client.close()
    await agent.close()


async def test_the_server_ends_its_streams_and_stops_at_once(cell: Cell) -> None:
    agent = await cell.agent()
    stream = agent.assignments("n1")
    await following(stream)
    watch = lines(cell, "/v1/watch", await cell.token(Role.READ))
    await following(watch)
    begin = time.perf_counter()
    cell.server.stop()
    with pytest.raises(Unavailable, match="the server"):
        await anext(batch async for batch in stream if batch.put)
    while True:
        try:
            line = await following(watch)
        except StopAsyncIteration:
            break
    assert time.perf_counter() - begin < 3
    assert "error" in line or "revision" in line
    await agent.close()


async def raw(cell: Cell, data: bytes, wait_s: float = 5) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", cell.port)
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(wait_s):
            return await reader.read(65_536)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n" + b"x-a: " + b"y" * (2 * HEADER_BYTES_MAX) + b"\r\n\r\n",
        b"GET /" + b"a" * (2 * HEADER_BYTES_MAX) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 40_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PUT /v1/projects/default/apps/web HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["long header", "long path", "many headers", "tls", "negative length", "bad chunk"],
)
async def test_a_hostile_request_is_cut_off_and_the_server_lives(cell: Cell, data: bytes) -> None:
    answer = await raw(cell, data)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), answer[:100]
    async with httpx.AsyncClient() as client:
        assert (await client.get(cell.address + "/healthz")).status_code == 200


class Hasty(BoundedProtocol):
    header_s = 0.2
    patience_s = 0.2


async def ends(server: ApiServer) -> None:
    """Return when the server has no connection any more."""
    for _ in range(500):
        if not server.server_state.connections:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a connection stays")


async def test_who_sends_no_headers_or_takes_no_answer_is_cut_off(cell: Cell) -> None:
    for number in range(40):
        spec = AppSpec(name=f"a{number}", image="x:1", env={f"A{n}": "x" * 30_000 for n in range(10)})
        await cell.service.apps.put(SYSTEM, spec)
    listener = listen("127.0.0.1", 0)
    token = await cell.token(Role.READ)
    async with serving(create_app(cell.service), cell.service, listener, Hasty) as server:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET /healthz HT")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        await ends(server)
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(listener.getsockname())
        stuck.sendall(f"GET /v1/watch HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        await asyncio.sleep(0.1)
        assert server.server_state.connections
        await ends(server)
        stuck.close()


async def test_an_endless_chunked_body_is_refused_at_its_bound(cell: Cell) -> None:
    token = await cell.token(Role.ADMIN)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 64 << 20:
            sent += 65_536
            yield b" " * 65_536

    async with httpx.AsyncClient() as client:
        url = cell.address + "/v1/projects/default/apps/web"
        try:
            response = await client.put(url, content=endless(), headers={"authorization": f"Bearer {token}"})
            assert response.status_code == 413
        except httpx.TransportError:
            pass  # the server closed while the client was still sending
    assert sent < 16 << 20


# The registry


def layout(folder: Path, text: bytes = b"hello") -> None:
    """Write an OCI layout with one small image."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def keep(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        entry = tarfile.TarInfo("hello")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    layer = keep(gzip.compress(tar.getvalue(), mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")
    diff = hashlib.sha256(tar.getvalue()).hexdigest()
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff}"]}}
    oci = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{oci}.manifest.v1+json",
        "config": keep(json.dumps(config).encode(), f"{oci}.config.v1+json"),
        "layers": [layer],
    }
    top = {
        **keep(json.dumps(manifest).encode(), f"{oci}.manifest.v1+json"),
        "annotations": {f"{'org.opencontainers'}.image.ref.name": "1"},
    }
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


async def skopeo(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "skopeo", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, output.decode()


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
async def test_skopeo_pushes_and_pulls_and_a_release_pins_what_was_pushed(cell: Cell, tmp_path: Path) -> None:
    deploy, agent = await cell.token(Role.DEPLOY, "default"), await cell.token(Role.AGENT, subject="n1")
    stranger = await cell.token(Role.DEPLOY, "team")
    layout(tmp_path / "in")
    where = f"docker://127.0.0.1:{cell.port}/default/web:1"
    push = ("copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{tmp_path / 'in'}:1", where)
    assert (await skopeo(*push))[0] != 0, "no token"
    code, output = await skopeo(*push, f"--dest-creds=any:{stranger}")
    assert code != 0
    assert "403" in output
    code, output = await skopeo(*push, f"--dest-creds=any:{deploy}")
    assert code == 0, output
    pull = ("copy", "--insecure-policy", "--src-tls-verify=false", f"--src-creds=agent:{agent}", where, f"oci:{tmp_path / 'out'}:1")
    code, output = await skopeo(*pull)
    assert code == 0, output
    for blob in (tmp_path / "in" / "blobs" / "sha256").iterdir():
        assert (tmp_path / "out" / "blobs" / "sha256" / blob.name).read_bytes() == blob.read_bytes()
    code, output = await skopeo("list-tags", "--tls-verify=false", f"--creds=any:{deploy}", where.removesuffix(":1"))
    assert json.loads(output)["Tags"] == ["1"]
    from msgspec.structs import replace

    view = await cell.service.apps.put(SYSTEM, replace(SPEC, image="cell.internal/default/web:1"))
    index = json.loads((tmp_path / "in" / "index.json").read_text())
    assert view.app.spec.image == f"cell.internal/default/web:1@{index['manifests'][0]['digest']}"


class Client:
    """The distribution protocol by hand."""

    def __init__(self, cell: Cell, token: str) -> None:
        credentials = base64.b64encode(f"any:{token}".encode()).decode()
        self.http = httpx.AsyncClient(base_url=cell.address, headers={"authorization": f"Basic {credentials}"})

    async def push(self, repository: str, data: bytes) -> str:
        digest = sha256(data)
        response = await self.http.post(f"/v2/{repository}/blobs/uploads/?digest={digest}", content=data)
        assert response.status_code == 201, response.text
        return digest


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
async def registry(cell: Cell) -> AsyncIterator[Client]:
    client = Client(cell, await cell.token(Role.DEPLOY, "default"))
    yield client
    await client.http.aclose()


async def test_a_chunked_upload_resumes_where_it_was_cut_even_after_a_restart(cell: Cell, registry: Client, tmp_path: Path) -> None:
    data = random.Random(7).randbytes(300_000)
    begun = await registry.http.post("/v2/default/web/blobs/uploads/")
    assert begun.status_code == 202
    where = begun.headers["location"]
    first = await registry.http.patch(where, content=data[:100_000], headers={"content-range": "0-99999"})
    assert (first.status_code, first.headers["range"]) == (202, "0-99999")
    wrong = await registry.http.patch(where, content=b"x", headers={"content-range": "5-5"})
    assert wrong.status_code == 416
    cell.registry.blobs._open.clear()  # as a new process would find it
    seen = await registry.http.get(where)
    assert (seen.status_code, seen.headers["range"]) == (204, "0-99999")
    await registry.http.patch(where, content=data[100_000:200_000], headers={"content-range": "100000-199999"})
    gap = await registry.http.put(f"{where}?digest={sha256(data)}", content=b"x", headers={"content-range": "250000-250000"})
    assert (gap.status_code, gap.headers["range"]) == (416, "0-199999")
    done = await registry.http.put(f"{where}?digest={sha256(data)}", content=data[200_000:])
    assert done.status_code == 201
    got = await registry.http.get(done.headers["location"])
    assert got.content == data
    part = await registry.http.get(done.headers["location"], headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, data[100:200])
    rest = await registry.http.get(done.headers["location"], headers={"range": "bytes=299990-"})
    assert rest.content == data[-10:]
    head = await registry.http.head(done.headers["location"])
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "300000", b"")


async def test_what_arrived_of_a_cut_upload_is_kept(registry: Client, cell: Cell) -> None:
    begun = await registry.http.post("/v2/default/web/blobs/uploads/")
    where = begun.headers["location"]
    _reader, writer = await asyncio.open_connection("127.0.0.1", cell.port)
    credentials = registry.http.headers["authorization"]
    head = f"PATCH {where} HTTP/1.1\r\nHost: a\r\nAuthorization: {credentials}\r\nContent-Length: 1000000\r\n\r\n"
    writer.write(head.encode() + b"x" * 50_000)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    for _ in range(200):
        seen = await registry.http.get(where)
        if seen.headers.get("range") == "0-49999":
            break
        await asyncio.sleep(0.01)
    assert seen.headers["range"] == "0-49999"
    done = await registry.http.put(f"{where}?digest={sha256(b'x' * 50_001)}", content=b"x")
    assert done.status_code == 201


async def test_content_that_is_not_what_its_digest_says_is_refused_and_gone(cell: Cell, registry: Client) -> None:
    response = await registry.http.post(f"/v2/default/web/blobs/uploads/?digest={sha256(b'a')}", content=b"b")
    assert response.status_code == 400
    assert response.json()["errors"][0]["code"] == "DIGEST_INVALID"
    assert list((cell.registry.blobs.root / "uploads").iterdir()) == []
    assert (await registry.http.get(f"/v2/default/web/blobs/{sha256(b'a')}")).status_code == 404


async def test_a_blob_is_seen_only_through_a_repository_that_has_it(cell: Cell, registry: Client) -> None:
    digest = await registry.push("default/web", b"data")
    assert (await registry.http.get(f"/v2/default/other/blobs/{digest}")).status_code == 404
    mounted = await registry.http.post(f"/v2/default/other/blobs/uploads/?mount={digest}&from=default/web")
    assert mounted.status_code == 201
    assert (await registry.http.get(f"/v2/default/other/blobs/{digest}")).content == b"data"
    await cell.service.projects.put("team")
    stranger = Client(cell, await cell.token(Role.DEPLOY, "team"))
    refused = await stranger.http.post(f"/v2/team/web/blobs/uploads/?mount={digest}&from=default/web")
    assert refused.status_code == 202, "not told whether it is there: upload it"
    assert (await stranger.http.get(f"/v2/default/web/blobs/{digest}")).status_code == 403
    assert (await stranger.http.get(f"/v2/team/web/blobs/{digest}")).status_code == 404
    await stranger.http.aclose()


async def test_a_manifest_needs_its_blobs_and_tags_name_the_newest(registry: Client) -> None:
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": []}
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(b"{}"), "size": 2}
    body = json.dumps({**manifest, "config": config}).encode()
    missing = await registry.http.put("/v2/default/web/manifests/1", content=body)
    assert missing.json()["errors"][0]["code"] == "MANIFEST_BLOB_UNKNOWN"
    await registry.push("default/web", b"{}")
    made = await registry.http.put("/v2/default/web/manifests/1", content=body)
    assert (made.status_code, made.headers["docker-content-digest"]) == (201, sha256(body))
    got = await registry.http.get("/v2/default/web/manifests/1")
    assert (got.content, got.headers["content-type"]) == (body, manifest["mediaType"])
    assert (await registry.http.head(f"/v2/default/web/manifests/{sha256(body)}")).status_code == 200
    for tag in ("2", "3"):
        await registry.http.put(f"/v2/default/web/manifests/{tag}", content=body)
    page = await registry.http.get("/v2/default/web/tags/list?n=2")
    assert page.json() == {"name": "default/web", "tags": ["1", "2"]}
    assert (await registry.http.get(page.headers["link"][1:].split(">")[0])).json()["tags"] == ["3"]
    assert (await registry.http.delete("/v2/default/web/manifests/1")).status_code == 202
    assert (await registry.http.get("/v2/default/web/manifests/1")).status_code == 404
    assert (await registry.http.get("/v2/default/web/manifests/2")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/default/..%2f..%2fx/tags/list", 404),
        ("GET", "/v2/../../etc/passwd/tags/list", 404),
        ("GET", "/v2/default/WEB/tags/list", 400),
        ("GET", "/v2/web/tags/list", 404),
        ("GET", "/v2/default/web/blobs/sha256:..", 400),
        ("GET", "/v2/default/web/blobs/md5:abc", 400),
        ("GET", "/v2/default/web/manifests/.hidden", 400),
        ("PUT", "/v2/default/web/manifests/1", 400),
        ("GET", "/v2/default/web/blobs/uploads/..", 404),
        ("PATCH", "/v2/default/web/blobs/uploads/" + "0" * 32, 404),
        ("DELETE", "/v2/default/web/tags/list", 405),
        ("GET", "/v2/nowhere/web/tags/list", 403),
        ("GET", "/v2/default/web/nope", 404),
    ],
)
async def test_tricks_on_the_registry_get_one_clear_error(registry: Client, method: str, path: str, status: int) -> None:
    response = await registry.http.request(method, path)
    assert response.status_code in (status, 404), response.text
    body = response.json()
    assert body.get("errors", [body.get("error")])[0]["message"]


async def test_given_up_uploads_and_unneeded_blobs_are_removed_but_what_a_tag_or_release_names_stays(
    cell: Cell, registry: Client
) -> None:
    lost = await registry.push("default/web", b"nobody names this")
    config = await registry.push("default/web", b"{}")
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"digest": config, "size": 2},
            "layers": [],
        }
    ).encode()
    await registry.http.put("/v2/default/web/manifests/1", content=manifest)
    begun = await registry.http.post("/v2/default/web/blobs/uploads/")
    await registry.http.patch(begun.headers["location"], content=b"half")
    blobs, repositories = cell.registry.blobs, cell.registry.repositories
    assert collect(blobs, repositories, set()) == 0, "young things stay"
    far = time.time() + 30 * 86_400
    assert collect(blobs, repositories, set(), now=far) == len(b"nobody names this")
    assert blobs.size(lost) is None
    assert blobs.size(config) == 2
    assert blobs.sweep_uploads(3600) == 0
    for upload in blobs._open.values():
        upload.touched -= 7200
    import os

    for path in (blobs.root / "uploads").iterdir():
        os.utime(path, (1, 1))
    assert blobs.sweep_uploads(3600) == 2
    assert list((blobs.root / "uploads").iterdir()) == []
    await registry.http.delete("/v2/default/web/manifests/1")
    assert collect(blobs, repositories, {sha256(manifest)}, now=far) == 0, "a release runs it"
    assert collect(blobs, repositories, set(), now=far) == 0, "a rollback by hand still finds it"
    assert collect(blobs, repositories, set(), now=far + 8 * 86_400) > 0
