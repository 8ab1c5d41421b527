"""Mutual TLS to instances with a real Envoy: instances that take nobody without a certificate of the authority for callers."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from msgspec.structs import replace

from atoll.api.service import KINDS, Service
from atoll.api.service.callers import CallerAuthority
from atoll.ingress import envoy
from atoll.ingress.bootstrap import ACCESS_LOG
from atoll.ingress.clusters import CONNECT_TIMEOUT_S
from atoll.ingress.fake import FakeRouting
from atoll.ingress.fake_certificates import FakeCertificates
from atoll.ingress.resources import Kind
from atoll.ingress.service import Ingress
from atoll.ingress.sleepers import serving
from atoll.model.certificates import CallerCertificate, CallerRequest
from atoll.model.errors import AtollError
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, Health, IngressRules, InstanceTls, Port, check_app
from atoll.model.traffic import DemandReport
from atoll.model.units import Seconds
from atoll.model.worker import SERVICE_HEADER, SERVICES, SERVICES_SOCKET
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from made_certificates import Maker

TIMEOUT_S = 60.0
SHORT_S = 0.6
"""What an ingress is told that a certificate lives, so that it asks for another three times as often. They are good for a day."""


def _has_envoy() -> bool:
    try:
        envoy.find_binary()
    except AtollError:
        return False
    return True


pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not _has_envoy(), reason="Envoy is not installed"),
    pytest.mark.asyncio(loop_scope="module"),
]


class Past(SystemClock):
    """Two days ago."""

    def now(self) -> float:
        return super().now() - 2 * 86_400.0


class Signing:
    """The cell's own authority for callers; or one that is another's, or whose certificates have ended."""

    def __init__(self, authority: CallerAuthority) -> None:
        self.authority = authority
        self.asked = 0

    async def certify_caller(self, ingress: str, request: CallerRequest) -> CallerCertificate:
        self.asked += 1
        made = await self.authority.certify(ingress, request)
        return CallerCertificate(certificate=made.certificate, life_s=SHORT_S)


class Instance:
    """A server that speaks TLS to who shows a certificate by the authority of callers, and to nobody else."""

    def __init__(self, maker: Maker, authority: str, scratch: Path, *names: str) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        chain, key = maker.sign(*names)
        (scratch / "pem").write_text(chain + key)
        self._context.load_cert_chain(scratch / "pem")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.load_verify_locations(cadata=authority)
        self.callers: set[str] = set()
        """Who has called, by the names in what was shown."""
        self.serials: list[str] = []
        self.go_on = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shown = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.callers.update(str(name.value) for name in names)
        self.serials.append(f"{shown.serial_number:x}")
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /slow"):
                await self.go_on.wait()
            # Each request a connection of its own, and so a handshake with what is shown then.
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nhere")
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class Cell:
    def __init__(
        self, ingress: Ingress, routing: FakeRouting, signing: Signing, service: Service, maker: Maker, path: Path
    ) -> None:
        self.ingress, self.routing, self.signing, self.service, self.maker = ingress, routing, signing, service, maker
        self.directory = path

    async def instance(self, *names: str, authority: str | None = None) -> tuple[Instance, int]:
        root = (await self.service.callers.ensure()).certificate
        found = Instance(self.maker, authority or root, self.directory, *names)
        return found, await found.start()

    def serve(self, name: str, port: int, tls: InstanceTls | None = None, *, wakes: bool = False, awake: bool = True) -> Routing:
        """Have an app at `NAME.test`, in project `shop`."""
        rules = IngressRules(instance_tls=tls or InstanceTls(ca=self.maker.pem, mutual=True))
        spec = AppSpec(name=name, project="shop", image="none", ports=(Port(port=port),), ingress=rules)
        check_app(spec)
        endpoints = (Endpoint(instance=f"{name}-1", node="n", address="127.0.0.1"),)
        hosts = ((f"{name}.test", "/", port, False),)
        whole = Routing(project="shop", app=name, spec=spec, hosts=hosts, endpoints=endpoints, wakes=wakes)
        self.routing.put(whole if awake else replace(whole, endpoints=()))
        return whole

    async def get(self, host: str, path: str = "/", *headers: str, socket: Path | None = None) -> str:
        """Return the status of a request's answer, and its body."""
        async with asyncio.timeout(TIMEOUT_S):
            if socket is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.ingress.http_port)
            else:
                reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                lines = (f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", "")
                writer.write("\r\n".join(lines).encode())
                head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
                return f"{head.split(' ')[1]} {body}"
            finally:
                writer.close()

    async def becomes(self, host: str, status: str) -> str:
        async with asyncio.timeout(TIMEOUT_S):
            while not (answer := await self.get(host)).startswith(status):  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.05)
            return answer

    async def logged(self, host: str, status: int) -> str:
        """Return what Envoy's log says of why the last such request was answered so."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                lines = (self.directory / "i" / ACCESS_LOG).read_text().splitlines()
                found = [each for each in map(json.loads, lines) if each["host"] == host and each["status"] == status]
                if found:
                    return f"{found[-1]['flags']} {found[-1]['why']} {found[-1]['broke']}"
                await asyncio.sleep(0.1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cell() -> AsyncIterator[Cell]:
    clock = SystemClock()
    store = MemoryStore(clock)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="amtls-") as scratch:
        async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32), "apps.test") as service:
            routing, signing = FakeRouting(), Signing(service.callers)
            ingress = Ingress(
                routing,
                Path(scratch) / "i",
                name="edge",
                port=0,
                tls_port=0,
                certificates=FakeCertificates(),
                callers=signing,
                workers=2,
                stop_grace_s=0.2,
            )
            running = asyncio.create_task(ingress.run())
            try:
                ready = asyncio.create_task(ingress.ready.wait())
                await asyncio.wait({running, ready}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                assert ready.done(), running
                yield Cell(ingress, routing, signing, service, Maker(), Path(scratch))
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
        await store.close()


async def test_an_instance_sees_who_calls_and_what_is_shown_changes_under_load_without_a_lost_request(cell: Cell) -> None:
    instance, port = await cell.instance("hot.shop.internal")
    try:
        cell.serve("hot", port)
        assert await cell.becomes("hot.test", "200") == "200 here"
        assert instance.callers == {"spiffe://main/caller/edge"}
        # A stranger without a certificate gets no answer, so this was no open door.
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await _as_nobody(cell, port, "hot.shop.internal")
        slow = asyncio.create_task(cell.get("hot.test", "/slow"))
        failures: list[str] = []
        done = 0

        async def load() -> None:
            nonlocal done
            while len(set(instance.serials)) < 5:
                answer = await cell.get("hot.test")
                done += 1
                if answer != "200 here":
                    failures.append(answer)

        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*(load() for _ in range(8)))
        assert not failures, (len(failures), done, failures[0])
        assert not slow.done(), "it was under way all the time"
        instance.go_on.set()
        assert await slow == "200 here"
    finally:
        instance.close()


async def test_what_is_foreign_or_has_ended_is_turned_away_and_all_is_well_with_a_good_one_again(cell: Cell) -> None:
    instance, port = await cell.instance("shut.shop.internal")
    good = cell.signing.authority
    try:
        cell.serve("shut", port)
        await cell.becomes("shut.test", "200")
        served = len(instance.serials)
        other = Service(MemoryStore(SystemClock()), cell.service.context.state, Past(), random.Random(1), bytes(32), "x.test")
        clock = other.context.clock
        assert clock.now() < SystemClock().now() - 86_400
        # By the same authority, but of two days ago; and by another, of the same name.
        async with State(foreign_store := MemoryStore(SystemClock()), KINDS) as state:
            foreign = Service(foreign_store, state, SystemClock(), random.Random(2), bytes(32), "y.test")
            for context in (other.context, foreign.context):
                cell.signing.authority = CallerAuthority(context)
                assert "unavailable" in await cell.becomes("shut.test", "503")
                cell.signing.authority = good
                await cell.becomes("shut.test", "200")
        cell.signing.authority = good
        await cell.becomes("shut.test", "200")
        assert len(instance.serials) > served
        # And one who is asked by an authority that this ingress has nothing of.
        strict, strict_port = await cell.instance("strict.shop.internal", authority=Maker("stranger").pem)
        cell.serve("strict", strict_port)
        await cell.becomes("strict.test", "503")
        assert strict.serials == []
        strict.close()
        assert (await cell.get("shut.test")).startswith("200"), "nobody else notices"
    finally:
        cell.signing.authority = good
        instance.close()


async def test_an_instance_is_known_by_the_apps_own_name_and_not_by_the_authority_alone(cell: Cell) -> None:
    instance, port = await cell.instance("mine.shop.internal")
    try:
        cell.serve("mine", port)
        cell.serve("theirs", port)  # with the same authority, at an instance that is another app's
        await cell.becomes("mine.test", "200")
        before = len(instance.serials)
        await cell.becomes("theirs.test", "503")
        assert "TLS_error" in (why := await cell.logged("theirs.test", 503)), why
        assert len(instance.serials) == before, "no request came there"
    finally:
        instance.close()


async def test_it_wakes_what_sleeps_and_workers_call_it_too(cell: Cell) -> None:
    instance, port = await cell.instance("nap.shop.internal")
    try:
        whole = cell.serve("nap", port, wakes=True, awake=False)
        woken: list[str] = []

        def wake(report: DemandReport) -> None:
            if "shop/nap" in report.apps and not woken:
                woken.append("shop/nap")
                cell.routing.put(whole)

        cell.routing.on_demand = wake
        assert await cell.becomes("nap.test", "200") == "200 here"
        assert woken
        socket = cell.directory / "i" / SERVICES / SERVICES_SOCKET
        assert await cell.get("any.test", "/", f"{SERVICE_HEADER}: shop/nap/{port}", socket=socket) == "200 here"
        assert instance.callers == {"spiffe://main/caller/edge"}
    finally:
        cell.routing.on_demand = lambda report: None
        instance.close()


async def test_what_speaks_tls_and_takes_its_time_to_wake_is_waited_for_by_one_try(cell: Cell) -> None:
    instance, port = await cell.instance("deep.shop.internal")
    try:
        whole = cell.serve("deep", port, wakes=True, awake=False)
        assert whole.spec.ingress is not None
        whole = replace(whole, spec=replace(whole.spec, ingress=replace(whole.spec.ingress, retries=0)))
        cell.routing.put(replace(whole, endpoints=()))
        await cell.ingress.ads.applied((Kind.HOST, "http/deep.test"), "any", timeout_s=TIMEOUT_S)
        activator = cell.ingress.activator
        request = asyncio.create_task(cell.get("deep.test"))
        await asyncio.sleep(CONNECT_TIMEOUT_S + 0.5)
        assert activator.waiting == {"shop/deep"}
        cell.routing.put(whole)
        assert await request == "200 here"
        # What does not wake at all is said at its deadline, and not once more for each of Envoy's tries.
        lazy = replace(
            whole.spec, ingress=IngressRules(instance_tls=InstanceTls(ca=cell.maker.pem)), health=Health(start=Seconds(1))
        )
        cell.routing.put(replace(whole, spec=lazy, endpoints=()))
        async with asyncio.timeout(TIMEOUT_S):
            while serving(cell.ingress.table.endpoints_of("shop/deep")):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
            began = asyncio.get_running_loop().time()
            assert (await cell.get("deep.test")).startswith("503")
        assert 1 <= asyncio.get_running_loop().time() - began < 3
    finally:
        instance.close()


async def test_an_ingress_that_has_none_asks_no_instance_without_and_the_app_is_told_why(cell: Cell) -> None:
    routing, certificates = FakeRouting(), FakeCertificates()
    instance, port = await cell.instance("none.shop.internal")
    ingress = Ingress(
        routing,
        cell.directory / "j",
        name="other",
        port=0,
        tls_port=0,
        certificates=certificates,
        callers=_Away(),
        workers=1,
        stop_grace_s=0.1,
    )
    running = asyncio.create_task(ingress.run())
    alone = Cell(ingress, routing, cell.signing, cell.service, cell.maker, cell.directory)
    try:
        alone.serve("none", port)
        async with asyncio.timeout(TIMEOUT_S):
            await ingress.ready.wait()
            while not any("shop/none" in beat.problems for beat in routing.heartbeats):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
        words = next(beat.problems["shop/none"] for beat in routing.heartbeats if "shop/none" in beat.problems)
        assert "the certificate that this ingress shows to instances is not there" in words
        assert "no server is as new as this" in words
        assert (await alone.get("none.test")).startswith("503")
        assert instance.serials == [], "nobody was asked without one"
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        instance.close()


async def _as_nobody(cell: Cell, port: int, name: str) -> None:
    """Ask an instance without a certificate, and read the first byte of an answer."""
    context = ssl.create_default_context(cadata=cell.maker.pem)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await reader.readexactly(1)
    finally:
        writer.close()


class _Away:
    async def certify_caller(self, ingress: str, request: CallerRequest) -> CallerCertificate:
        raise AtollError("no server is as new as this")
