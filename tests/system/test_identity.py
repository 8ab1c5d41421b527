"""Certificates on real TLS connections of loopback: who gets in, who does not, what is cut off, and several servers as one."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from atoll.api.http import machines
from atoll.api.http.app import ROUTES, create_app
from atoll.api.http.serve import ApiServer, BoundedProtocol, listen, serving
from atoll.api.http.streams import STREAMS
from atoll.api.service import KINDS, SYSTEM, Need, Service
from atoll.api.service import signing as certificates
from atoll.entry.config import Config
from atoll.entry.serving import ServerCertificate, peer_dial
from atoll.model import codec, keys
from atoll.model.errors import AtollError, Forbidden, NotFound, Revoked, Unauthenticated, Unavailable, VersionSkew
from atoll.model.membership import API_VERSION, JoinTokenRequest, MemberKind, Server
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import StreamRequest
from atoll.model.records import CELL, Capacity, Event, Heartbeat, Instance, Node, NodeHealth, NodeLiveness, OwnerKind, Role, Status
from atoll.model.spec import AppSpec
from atoll.model.states import Phase
from atoll.model.streams import ExecOptions, Kind, pack
from atoll.model.tls import trusting
from atoll.model.views import TokenRequest
from atoll.sdk.client import Client
from atoll.sdk.control_plane import HttpControlPlane
from atoll.sdk.failover import transport_to
from atoll.sdk.http import HttpTransport
from atoll.sdk.membership import Credentials, keep_renewed
from atoll.sdk.trust import Tls, fingerprint
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

DEADLINE_S = 20
KEY = bytes(32)


class Member:
    """One server of a cell, on a free port."""

    def __init__(self, service: Service, server: ApiServer, certificate: ServerCertificate, url: str, config: Config) -> None:
        self.service = service
        self.server = server
        self.certificate = certificate
        self.url = url
        self.ca = config.ca_file

    async def stop(self) -> None:
        """End as a process that is killed: nobody listens any more, and what is open breaks."""
        for server in self.server.servers:
            server.close()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]


class Cell:
    """Servers over one store, with real TLS between everyone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = SystemClock()
        self.store = MemoryStore(self.clock)
        self.servers: list[Member] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Cell:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        await self.store.close()

    async def start(self, *, protocol: type[BoundedProtocol] = BoundedProtocol, **options: Any) -> Member:
        id = f"s{len(self.servers)}"
        state = await self._stack.enter_async_context(State(self.store, KINDS))
        listener = listen("127.0.0.1", 0)
        config = Config(data=self.directory / id, listen=f"127.0.0.1:{listener.getsockname()[1]}", tls=True)
        url = config.advertised
        record = Server(id=id, urls=(url,), version="0", started_at=time.time())
        service = Service(
            self.store,
            state,
            self.clock,
            random.Random(len(self.servers)),
            KEY,
            server=record,
            dial=peer_dial(config.ca_file),
            **options,
        )
        await self._stack.enter_async_context(service)
        certificate = ServerCertificate(config, service, id, self.clock)
        await certificate.begin()
        server = await self._stack.enter_async_context(
            serving(create_app(service), service, listener, protocol, tls=certificate.tls)
        )
        for work in (service.servers.run(), certificate.run()):
            task = asyncio.create_task(work)
            self._stack.callback(task.cancel)
        member = Member(service, server, certificate, url, config)
        self.servers.append(member)
        await until(lambda: all(len(one.service.servers.all()) == len(self.servers) for one in self.servers))
        return member

    @property
    def service(self) -> Service:
        return self.servers[0].service

    @property
    def urls(self) -> str:
        return ",".join(member.url for member in self.servers)

    async def put(self, key: str, record: object) -> None:
        revision = await self.store.put(key, codec.encode(record))
        for member in self.servers:
            await member.service.context.reach(revision)

    async def token(self, role: Role, subject: str = "") -> str:
        view = await self.service.tokens.create(SYSTEM, TokenRequest(name="t", role=role, subject=subject))
        assert view.token is not None
        for member in self.servers:
            await member.service.context.reach(await self.store.revision())
        return view.token

    async def join(self, name: str, kind: MemberKind = MemberKind.NODE) -> Credentials:
        token = (await self.service.join_tokens.create(JoinTokenRequest(kind=kind, subject=name))).token
        assert token is not None
        credentials = Credentials(self.directory / name)
        await credentials.join(self.urls, token, "", random.Random(1))
        for member in self.servers:
            await member.service.context.reach(await self.store.revision())
        return credentials

    def agent(self, credentials: Credentials, node: str = "n1", urls: str | None = None) -> HttpControlPlane:
        address = urls or self.urls
        return HttpControlPlane(address, None, node=node, transport=transport_to(address, None, tls=credentials.tls()))

    async def client(self, url: str | None = None) -> Client:
        ca = self.servers[0].ca.read_text()
        return Client(transport_to(url or self.urls, await self.token(Role.ADMIN), ca=ca))

    async def instance(self, id: str, node: str) -> None:
        instance = Instance(id=id, project="default", owner_kind=OwnerKind.APP, owner="web", release=1, node=node, created_at=1)
        await self.put(keys.instance("default", id), instance)
        status = Status(instance=id, project="default", node=node, phase=Phase.RUNNING, ready=True, address="10.0.0.2")
        await self.put(keys.status("default", id), status)


def node(name: str) -> Node:
    return Node(name=name, capacity=Capacity(cpu_milli=1000, memory_bytes=1 << 30, disk_bytes=1 << 30))


@pytest.fixture
async def cell(tmp_path: Path) -> AsyncIterator[Cell]:
    async with Cell(tmp_path) as made:
        await made.start()
        yield made


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():  # noqa: ASYNC110 (what is waited for tells nobody)
            await asyncio.sleep(0.01)


async def refused(call: Awaitable[Any], kind: type[AtollError]) -> AtollError:
    with pytest.raises(kind) as error:
        async with asyncio.timeout(DEADLINE_S):
            await call
    return error.value


def forge(directory: Path, authority: str, authority_key: bytes, *, begins_s: float, life_s: float) -> Credentials:
    """Write the files of a machine whose certificate `authority` has signed at another time."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = certificates.Subject(kind="node", name="n1", enrolment="x")
    signed = certificates.sign(authority, authority_key, subject, key.public_key(), time.time() + begins_s, life_s)
    directory.mkdir()
    (directory / "ca.pem").write_text(authority)
    (directory / "identity.pem").write_bytes(certificates.key_pem(key) + signed.certificate.encode())
    return Credentials(directory)


async def test_an_agent_does_its_work_by_its_certificate_alone(cell: Cell) -> None:
    credentials = await cell.join("n1")
    agent = cell.agent(credentials)
    await agent.register_node(node("n1"))
    await agent.heartbeat(Heartbeat(node="n1", at=time.time()))
    await cell.instance("i1", "n1")
    stream = agent.assignments("n1")
    async with asyncio.timeout(DEADLINE_S):
        batch = await anext(stream)
    assert batch.complete
    status = Status(instance="i1", project="default", node="n1", phase=Phase.RUNNING, ready=True, address="10.0.0.3")
    await agent.report("n1", [status])
    assert (await cell.store.get(keys.status("default", "i1"))) is not None
    await stream.aclose()  # type: ignore[attr-defined]
    await agent.close()
    assert credentials.file.stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in credentials.bundle.read_bytes()


AGENT_CALLS = [(route.method, route.path) for route in ROUTES if route.need is Need.AGENT]
AGENT_STREAMS = [path for path, need, _ in STREAMS if need is Need.AGENT]
INGRESS_CALLS = [(route.method, route.path) for route in ROUTES if route.need is Need.INGRESS]
OTHERS = [route for route in ROUTES if route.need in (Need.READ, Need.DEPLOY, Need.ADMIN, Need.ADMIN_OF_PROJECT)]


def filled(path: str, **parts: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], "x1"), path)


async def test_every_call_of_an_agent_is_refused_for_another_node(cell: Cell) -> None:
    tls = (await cell.join("n1")).tls()
    transport = HttpTransport(cell.urls, tls=tls)
    assert len(AGENT_CALLS) >= 5
    assert {route.path for route in machines.ROUTES if "{node}" in route.path} <= {path for _, path in AGENT_CALLS}
    for method, path in AGENT_CALLS:
        answer = await transport.request(method, filled(path, node="n2"), body=b"{}" if method != "GET" else b"")
        assert (answer.status, b"'n1', not 'n2'" in answer.body) == (403, True), (method, path, answer.body)
    for path in AGENT_STREAMS:
        await refused(transport.channel(filled(path, node="n2")), Forbidden)
    for method, path in INGRESS_CALLS:
        answer = await transport.request(method, filled(path, ingress="n1"), body=b"{}" if method != "GET" else b"")
        assert answer.status == 403, (method, path)
    await transport.close()


async def test_an_agent_may_not_call_what_is_for_people_or_for_servers(cell: Cell) -> None:
    transport = HttpTransport(cell.urls, tls=(await cell.join("n1")).tls())
    for route in OTHERS:
        answer = await transport.request(route.method, filled(route.path, node="n1"), body=b"{}" if route.method != "GET" else b"")
        assert answer.status == 403, (route.method, route.path, answer.body)
    await refused(transport.channel("/v1/servers/streams?node=n1&kind=exec&instance=i1"), Unauthenticated)
    await transport.close()


async def test_an_agent_may_speak_only_of_its_own_instances(cell: Cell) -> None:
    agent = cell.agent(await cell.join("n1"))
    await agent.register_node(node("n1"))
    await cell.instance("theirs", "n2")
    claims: list[tuple[Callable[[], Awaitable[Any]], type[AtollError]]] = [
        (lambda: agent.report("n1", [_status("theirs", "n1")]), Forbidden),
        (lambda: agent.report("n1", [_status("theirs", "n2")]), Forbidden),
        (lambda: agent.report("n1", (), [_event("instance/theirs")]), Forbidden),
        (lambda: agent.report("n1", (), [_event("node/n2")]), Forbidden),
        (lambda: agent.report("n1", (), [_event("app/web")]), Forbidden),
        (lambda: agent.register_node(node("n2")), Forbidden),
        (lambda: agent.heartbeat(Heartbeat(node="n2", at=1)), Forbidden),
        (lambda: _mine(agent).instance_secrets("theirs"), NotFound),
        (lambda: agent.open_stream("n1", "0" * 32), NotFound),
    ]
    before = await cell.store.revision()
    for claim, kind in claims:
        await refused(claim(), kind)
    assert await cell.store.revision() == before, "nothing was written"


def _mine(agent: HttpControlPlane) -> HttpControlPlane:
    agent._node = "n1"
    return agent


def _status(id: str, on: str) -> Status:
    return Status(instance=id, project="default", node=on, phase=Phase.RUNNING)


def _event(subject: str) -> Event:
    return Event(id="e1", at=1, project="default", subject=subject, code="x", message="x")


async def test_certificates_that_are_foreign_expired_or_not_yet_good_end_the_handshake_and_harm_nobody(
    cell: Cell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = cell.agent(await cell.join("n1"))
    await good.register_node(node("n1"))
    ours = await cell.service.authorities.ensure()
    our_key = cell.service.authorities.key_of(ours)
    foreign, foreign_key = certificates.new_authority("first", CELL, time.time())
    cases = {
        "unknown ca": forge(tmp_path / "foreign", foreign, foreign_key, begins_s=0, life_s=3600),
        "certificate expired": forge(tmp_path / "expired", ours.certificate, our_key, begins_s=-7200, life_s=3600),
        "bad certificate": forge(tmp_path / "future", ours.certificate, our_key, begins_s=3600, life_s=3600),
    }
    for said, credentials in cases.items():
        tls = Tls(ours.certificate, credentials.file)
        error = await refused(HttpTransport(cell.urls, tls=tls).request("GET", "/v1/info"), AtollError)
        assert f"refused our certificate: {said}" in str(error)
        assert "clock" in (error.mend or "")
        await refused(HttpTransport(cell.urls, tls=tls).channel("/v1/nodes/n1/tunnel"), AtollError)
    logged = capsys.readouterr().out
    for cause in ("certificate has expired", "certificate is not yet valid"):
        assert cause in logged
    assert logged.count("a client's certificate was refused") >= 4
    await good.heartbeat(Heartbeat(node="n1", at=1))
    await good.close()


async def test_who_shows_neither_certificate_nor_token_is_told_so(cell: Cell) -> None:
    transport = HttpTransport(cell.urls, tls=Tls(cell.servers[0].ca))
    answer = await transport.request("GET", "/v1/nodes/n1/assignments")
    assert (answer.status, b"no token" in answer.body) == (401, True)
    await transport.close()


async def test_a_certificate_of_an_enrolment_that_ended_is_refused_behind_the_handshake(cell: Cell, tmp_path: Path) -> None:
    ours = await cell.service.authorities.ensure()
    unknown = forge(tmp_path / "u", ours.certificate, cell.service.authorities.key_of(ours), begins_s=0, life_s=3600)
    error = await refused(cell.agent(unknown).register_node(node("n1")), Unauthenticated)
    assert "not of this cell" in str(error)


async def test_a_revoked_node_is_cut_off_at_every_server_also_on_streams_that_are_open(cell: Cell) -> None:
    other = await cell.start()
    credentials = await cell.join("n1")
    agent = cell.agent(credentials, urls=other.url)
    await agent.register_node(node("n1"))
    bystander = cell.agent(await cell.join("n2"), "n2", urls=other.url)
    await bystander.register_node(node("n2"))
    assignments, unharmed = agent.assignments("n1"), bystander.assignments("n2")
    async with asyncio.timeout(DEADLINE_S):
        await anext(assignments)
        await anext(unharmed)
        requests = agent.stream_requests("n1")
        waiting = asyncio.ensure_future(anext(requests))
        await until(lambda: other.service.tunnels.connected("n1"))
        await (await cell.client(cell.servers[0].url)).revoke_node("n1")
        began = time.monotonic()
        await refused(anext(assignments), Revoked)
        error = await refused(waiting, Unavailable)
        assert time.monotonic() - began < 2.0
        assert "revoked" in str(error)
        await refused(agent.heartbeat(Heartbeat(node="n1", at=1)), Revoked)
        await refused(anext(cell.agent(credentials).assignments("n1")), Revoked)
        await bystander.heartbeat(Heartbeat(node="n2", at=1))
        await unharmed.aclose()  # type: ignore[attr-defined]


async def test_strangers_that_speak_no_tls_or_send_too_much_get_nothing_and_harm_nobody(cell: Cell) -> None:
    port = int(cell.urls.rpartition(":")[2])
    for junk in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 70_000, b"\0" * 200_000):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(junk)
        async with asyncio.timeout(DEADLINE_S):
            answer = b""
            with suppress(ConnectionError):
                answer = await reader.read()
        assert b"HTTP/1.1 200" not in answer
        writer.close()
    transport = HttpTransport(cell.urls, tls=Tls(cell.servers[0].ca))
    for path in ("/v1/identity/join", "/v1/identity/renew"):
        for body, status in ((b"{" * 1000, 400), (b"[]", 400), (b"{}", 400), (b"", 400), (b" " * 100_000, 413)):
            answer = await transport.request("POST", path, body=body)
            assert answer.status == status, (path, body[:10], answer.body)
            assert b"mend" in answer.body
    assert (await transport.request("GET", "/healthz")).status == 200
    await transport.close()


async def test_a_new_machine_tells_its_token_to_nobody_but_the_pinned_cell(cell: Cell, tmp_path: Path) -> None:
    token = (await cell.service.join_tokens.create(JoinTokenRequest(subject="n1"))).token
    assert token is not None
    async with Cell(tmp_path / "imposter") as imposter:
        await imposter.start()
        error = await refused(Credentials(tmp_path / "m").join(imposter.urls, token, "", random.Random(1)), Unauthenticated)
        assert "not the cell that was meant" in str(error)
        assert not imposter.service.context.state.records(Event), "it was not even asked to let the machine in"
    await Credentials(tmp_path / "m").join(cell.urls, token, "", random.Random(1))


async def test_clients_know_servers_by_the_cell_s_authority_or_its_pin_and_a_node_s_certificate_serves_nobody(
    cell: Cell, tmp_path: Path
) -> None:
    authority = await cell.service.authorities.ensure()
    token = await cell.token(Role.READ)
    for ca in (authority.certificate, fingerprint(authority.certificate)):
        transport = transport_to(cell.urls, token, ca=ca)
        assert (await transport.request("GET", "/v1/info")).status == 200
        await transport.close()
    await refused(transport_to(cell.urls, token, ca="sha256:" + "0" * 64).request("GET", "/v1/info"), Unauthenticated)
    await refused(transport_to(cell.urls, token).request("GET", "/v1/info"), Unavailable)
    foreign, _ = certificates.new_authority("first", CELL, time.time())
    await refused(transport_to(cell.urls, token, ca=foreign).request("GET", "/v1/info"), Unavailable)
    node_file = (await cell.join("n1")).file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(node_file)
    fake = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{fake.sockets[0].getsockname()[1]}"
    await refused(transport_to(url, token, ca=authority.certificate).request("GET", "/v1/info"), Unavailable)
    fake.close()


async def test_a_certificate_is_renewed_while_streams_go_on_and_the_next_connection_shows_the_new_one(cell: Cell) -> None:
    credentials = await cell.join("n1")
    tls = credentials.tls()
    transport = HttpTransport(cell.urls, tls=tls)
    agent = HttpControlPlane(cell.urls, None, node="n1", transport=transport)
    await agent.register_node(node("n1"))
    stream = agent.assignments("n1")
    async with asyncio.timeout(DEADLINE_S):
        await anext(stream)
    before = credentials.file.read_bytes()

    class Later:
        """A clock that has jumped to shortly before the certificate's end."""

        def now(self) -> float:
            return time.time() + 80_000

        def monotonic(self) -> float:
            return time.monotonic()

    said: list[str] = []

    async def say(code: str, message: str, bad: bool) -> None:
        said.append(code)

    def anonymous() -> HttpTransport:
        return HttpTransport(cell.urls, tls=Tls(credentials.bundle))

    keeping = asyncio.create_task(keep_renewed(credentials, anonymous, tls, Later(), random.Random(1), say))
    await until(lambda: tls.generation > 0)
    keeping.cancel()
    assert credentials.file.read_bytes() != before
    await agent.heartbeat(Heartbeat(node="n1", at=1))
    shown = x509.load_pem_x509_certificate(credentials.file.read_bytes()[credentials.file.read_bytes().index(b"-----BEGIN CERT") :])
    held = next(iter(cell.service.membership.identities()))
    assert held.expires_at == shown.not_valid_after_utc.timestamp()
    following = asyncio.ensure_future(anext(stream))
    await cell.instance("i1", "n1")
    async with asyncio.timeout(DEADLINE_S):
        await following
    assert not said
    await stream.aclose()  # type: ignore[attr-defined]
    await agent.close()


async def test_a_renewal_that_fails_is_said_once_and_tried_again(cell: Cell) -> None:
    credentials = await cell.join("n1")
    await cell.service.membership.revoke(MemberKind.NODE, "n1", SYSTEM)
    said: list[str] = []
    told = asyncio.Event()

    async def say(code: str, message: str, bad: bool) -> None:
        said.append(message)
        told.set()

    class Later(SystemClock):
        def now(self) -> float:
            return time.time() + 80_000

    def anonymous() -> HttpTransport:
        return HttpTransport(cell.urls, tls=Tls(credentials.bundle))

    keeping = asyncio.create_task(keep_renewed(credentials, anonymous, credentials.tls(), Later(), random.Random(1), say))
    async with asyncio.timeout(DEADLINE_S):
        await told.wait()
    keeping.cancel()
    assert "was revoked" in said[0]
    assert credentials.load() is not None, "what was held stays"


async def test_the_server_shows_a_new_certificate_when_the_authority_changes_and_old_connections_go_on(cell: Cell) -> None:
    transport = HttpTransport(cell.urls, await cell.token(Role.READ), tls=Tls(cell.servers[0].ca))
    await transport.request("GET", "/v1/info")
    first = await _shown(cell.urls)
    await cell.service.authorities.rotate(at_once=True)
    async with asyncio.timeout(DEADLINE_S):
        while (second := await _shown(cell.urls)).issuer == first.issuer:  # noqa: ASYNC110 (as in `until`)
            await asyncio.sleep(0.02)
    assert (await transport.request("GET", "/v1/info")).status == 200
    authority = next(iter(cell.service.authorities.trusted())).record
    second.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.certificate.encode()))
    assert cell.servers[0].ca.read_text() == authority.certificate
    await transport.close()


async def _shown(url: str) -> x509.Certificate:
    """Return the certificate that a server shows now."""
    host, _, port = url.removeprefix("https://").rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.close()
    return x509.load_der_x509_certificate(shown)


async def test_an_exec_goes_through_a_server_that_the_agent_is_not_connected_to(cell: Cell) -> None:
    other = await cell.start()
    agent = cell.agent(await cell.join("n1"), urls=other.url)
    await agent.register_node(node("n1"))
    await cell.instance("i1", "n1")

    async def serve() -> None:
        async for request in agent.stream_requests("n1"):
            assert isinstance(request, StreamRequest)
            channel = await agent.open_stream("n1", request.id)
            while (message := await channel.receive()) is not None:
                await channel.send(message)
            await channel.close()

    serving_agent = asyncio.create_task(serve())
    client = await cell.client(cell.servers[0].url)
    async with asyncio.timeout(DEADLINE_S):
        channel = await client._transport.channel(
            f"/v1/projects/default/instances/i1/exec?options={codec.encode(ExecOptions(argv=('cat',))).decode()}".replace(
                '"', "%22"
            )
        )
        for word in (b"hello", b"x" * 60_000):
            await channel.send(pack(Kind.STDIN, word))
            assert await channel.receive() == pack(Kind.STDIN, word)
        await channel.close()
    assert not cell.servers[0].service.tunnels.connected("n1")
    serving_agent.cancel()
    await asyncio.gather(serving_agent, return_exceptions=True)
    await cell.put(keys.node_liveness("n1"), NodeLiveness(name="n1", health=NodeHealth.LOST, since=1))
    error = await refused(client._transport.channel("/v1/projects/default/instances/i1/logs"), Unavailable)
    assert "no connection to any server" in str(error)
    await client.close()


async def test_when_a_server_dies_calls_and_streams_go_on_at_the_next_within_a_second(cell: Cell) -> None:
    await cell.start()
    client = await cell.client()
    await client.put_project("p1")
    watched = client.watch(["projects"], bookmarks=True)
    seen: list[str | None] = []
    async with asyncio.timeout(DEADLINE_S):
        async for line in watched:
            if line.kind is None:
                break
        await cell.servers[0].stop()
        began = time.monotonic()
        await client.put_project("p2")
        assert [project.name for project in await client.projects()][-2:] == ["p1", "p2"]
        async for line in watched:
            seen.append(line.key)
            if line.key == "p2":
                break
    assert time.monotonic() - began < 3.0
    await client.close()


async def test_a_server_that_does_not_even_refuse_is_left_within_a_second(cell: Cell) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        full = [socket.create_connection(silent.getsockname()) for _ in range(2)]
        hole = f"https://127.0.0.1:{silent.getsockname()[1]}"
        transport = transport_to(f"{hole},{cell.urls}", await cell.token(Role.READ), ca=cell.servers[0].ca.read_text())
        began = time.monotonic()
        assert (await transport.request("GET", "/v1/info")).status == 200
        assert time.monotonic() - began < 2.5
        assert (await transport.request("GET", "/v1/info")).status == 200
        assert time.monotonic() - began < 3.0, "it is not tried again"
        await transport.close()
        for one in full:
            one.close()


@pytest.mark.parametrize(("server_version", "fine"), [(API_VERSION - 1, True), (API_VERSION + 1, True), (API_VERSION + 2, False)])
async def test_one_version_of_skew_is_fine_and_more_is_refused_with_the_mend(
    tmp_path: Path, server_version: int, fine: bool
) -> None:
    async with Cell(tmp_path) as cell:
        await cell.start(api_version=server_version)
        token = await cell.token(Role.READ)
        transport = HttpTransport(cell.urls, token, tls=Tls(cell.servers[0].ca))
        if fine:
            assert (await transport.request("GET", "/v1/info")).status == 200
            return
        error = await refused(transport.request("GET", "/v1/info"), VersionSkew)
        assert "update this side first" in (error.mend or "")
        old = HttpTransport(cell.urls, token, tls=Tls(cell.servers[0].ca), api_version=server_version)
        assert (await old.request("GET", "/v1/info")).status == 200
        # The server refuses, too, whoever does not look himself.
        ahead = HttpTransport(cell.urls, token, tls=Tls(cell.servers[0].ca), api_version=server_version - 2)
        await refused(ahead.channel("/v1/projects/default/instances/i1/logs"), VersionSkew)


class Hasty(BoundedProtocol):
    patience_s = 0.2


async def test_a_slow_reader_of_a_watch_is_cut_off_and_the_others_are_served(cell: Cell) -> None:
    hasty = await cell.start(protocol=Hasty)
    for number in range(40):
        await cell.service.apps.put(SYSTEM, AppSpec(name=f"a{number}", image="x:1", env={f"A{n}": "x" * 30_000 for n in range(10)}))
    token = await cell.token(Role.READ)
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.setblocking(False)
    await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", int(hasty.url.rpartition(":")[2])))
    context = trusting(cell.servers[0].ca)
    _, writer = await asyncio.open_connection(sock=line, ssl=context, server_hostname="", limit=1024)
    writer.write(f"GET /v1/watch HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
    connections = hasty.server.server_state.connections
    await until(lambda: bool(connections))
    await until(lambda: not connections)
    writer.close()
    client = await cell.client(hasty.url)
    assert len(await client.apps("default")) == 40
    await client.close()
