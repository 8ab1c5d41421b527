"""TLS at the ingress with a real Envoy, started once for the file: certificates by name, changed under load."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from atoll.ingress import envoy
from atoll.ingress.fake import FakeRouting
from atoll.ingress.fake_certificates import FakeCertificates
from atoll.ingress.service import Ingress
from atoll.model.certificates import CHALLENGE_PATH, ChallengeAnswer, Material
from atoll.model.errors import AtollError, Conflict
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, IngressRules, InstanceTls, Port, check_app
from made_certificates import Maker

TIMEOUT_S = 30.0
BODY = b"here"


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


def trusting(maker: Maker, *alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=maker.pem)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


class Cell:
    """An ingress that speaks TLS, its control plane, an authority, and an instance that says `here` to everyone."""

    def __init__(self, ingress: Ingress, routing: FakeRouting, certificates: FakeCertificates, maker: Maker, port: int) -> None:
        self.ingress, self.routing, self.certificates, self.maker, self._port = ingress, routing, certificates, maker, port

    @property
    def tls_port(self) -> int:
        return self.ingress.envoy.tls_port

    async def serve(self, name: str, *hosts: str, project: str = "default", https_only: bool = False) -> None:
        """Have an app that answers at these hostnames."""
        rules = IngressRules(https_only=True) if https_only else None
        spec = AppSpec(name=name, project=project, image="none", ports=(Port(port=self._port),), ingress=rules)
        routing = Routing(
            project=project,
            app=name,
            spec=spec,
            hosts=tuple((host, "/", self._port, False) for host in hosts),
            endpoints=(Endpoint(instance=f"{name}-1", node="n", address="127.0.0.1"),),
        )
        self.routing.put(routing)
        await eventually(lambda: self.answers(hosts[-1], "503" if https_only else "200"))

    def show(self, *materials: Material) -> None:
        self.certificates.put(*materials)

    async def answers(self, host: str, status: str, path: str = "/") -> bool:
        return (await self.plain(host, path)).startswith(f"HTTP/1.1 {status}".encode())

    async def plain(self, host: str, path: str = "/", *headers: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ingress.http_port)
        try:
            return await ask(reader, writer, host, path, *headers)
        finally:
            writer.close()

    async def dial(self, host: str, *alpn: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.open_connection("127.0.0.1", self.tls_port, ssl=trusting(self.maker, *alpn), server_hostname=host)

    async def shown(self, host: str) -> str | None:
        """Return the SHA-256 of the certificate that a client gets who asks for `host`; None where it gets none."""
        try:
            _, writer = await self.dial(host)
        except (ssl.SSLError, ConnectionError, OSError):
            return None
        tls = writer.get_extra_info("ssl_object")
        writer.close()
        return hashlib.sha256(tls.getpeercert(binary_form=True)).hexdigest()

    async def get(self, host: str) -> bytes:
        reader, writer = await self.dial(host)
        try:
            return await ask(reader, writer, host)
        finally:
            writer.close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, path: str = "/", *headers: str) -> bytes:
    """Send a request on a connection that stays open, and return the whole answer."""
    async with asyncio.timeout(TIMEOUT_S):
        lines = (f"GET {path} HTTP/1.1", f"Host: {host}", *headers, "", "")
        writer.write("\r\n".join(lines).encode())
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        return head + await reader.readexactly(int(lengths[0]) if lengths else 0)


async def eventually(condition: object) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            result = condition()  # type: ignore[operator]
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.02)


def fingerprint(material: Material) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(material.chain.split("-----END")[0] + "-----END CERTIFICATE-----\n")).hexdigest()


async def _instance(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cell() -> AsyncIterator[Cell]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="atls-") as scratch:
        server = await asyncio.start_server(_instance, "127.0.0.1", 0)
        routing, certificates, maker = FakeRouting(), FakeCertificates(), Maker()
        ingress = Ingress(routing, Path(scratch) / "i", port=0, tls_port=0, certificates=certificates, workers=2, stop_grace_s=0.2)
        running = asyncio.create_task(ingress.run())
        try:
            ready = asyncio.create_task(ingress.ready.wait())
            await asyncio.wait({running, ready}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            assert ready.done(), running
            yield Cell(ingress, routing, certificates, maker, server.sockets[0].getsockname()[1])
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            server.close()


async def test_each_name_is_shown_its_own_certificate(cell: Cell) -> None:
    await cell.serve("two", "one.test", "two.test")
    one, two = cell.maker.material("one.test"), cell.maker.material("two.test")
    cell.show(one, two)
    await eventually(lambda: known(cell, "two.test"))
    assert await cell.shown("one.test") == fingerprint(one)
    assert await cell.shown("two.test") == fingerprint(two)
    answer = await cell.get("one.test")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(BODY)


async def known(cell: Cell, host: str) -> bool:
    return cell.ingress.certificates.material(host) is not None


async def test_a_name_without_certificate_is_refused_at_once_and_harms_nobody(cell: Cell) -> None:
    await cell.serve("bare", "bare.test", "dressed.test")
    cell.show(cell.maker.material("dressed.test"))
    await eventually(lambda: known(cell, "dressed.test"))
    assert await cell.shown("bare.test") is None
    assert await cell.shown("made-up.test") is None
    assert (await cell.get("dressed.test")).startswith(b"HTTP/1.1 200")
    # Once it has one it is served: that there was none is not remembered.
    late = cell.maker.material("bare.test")
    cell.show(late)
    await eventually(lambda: known(cell, "bare.test"))
    assert await cell.shown("bare.test") == fingerprint(late)


async def test_a_client_that_says_no_name_is_refused(cell: Cell) -> None:
    context = trusting(cell.maker)
    context.check_hostname = False
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", cell.tls_port, ssl=context, server_hostname="")


async def test_a_wildcard_serves_every_name_below_it_until_one_has_its_own(cell: Cell) -> None:
    await cell.serve("wild", "a.wild.test", "b.wild.test")
    wild, own = cell.maker.material("*.wild.test"), cell.maker.material("b.wild.test")
    cell.show(wild)
    await eventually(lambda: known(cell, "a.wild.test"))
    assert await cell.shown("a.wild.test") == fingerprint(wild)
    assert await cell.shown("b.wild.test") == fingerprint(wild)
    assert await cell.shown("deep.a.wild.test") is None
    cell.show(own)
    await eventually(lambda: shows(cell, "b.wild.test", own))
    assert await cell.shown("a.wild.test") == fingerprint(wild)
    newer = cell.maker.material("*.wild.test")
    cell.show(newer)
    await eventually(lambda: shows(cell, "a.wild.test", newer))
    cell.certificates.remove("b.wild.test")
    await eventually(lambda: shows(cell, "b.wild.test", newer))


async def shows(cell: Cell, host: str, material: Material) -> bool:
    return await cell.shown(host) == fingerprint(material)


async def test_a_certificate_of_another_project_is_not_shown_for_a_hostname(cell: Cell) -> None:
    await cell.serve("theirs", "app.theirs.test", project="theirs")
    cell.show(cell.maker.material("*.theirs.test", project="ours"))
    await eventually(lambda: known(cell, "nobodys.theirs.test"))
    assert await cell.shown("app.theirs.test") is None
    shared = cell.maker.material("*.theirs.test", project="ours", shared=True)
    cell.show(shared)
    await eventually(lambda: shows(cell, "app.theirs.test", shared))


async def test_http2_is_agreed_on_by_alpn(cell: Cell) -> None:
    await cell.serve("two-h", "h2.test")
    cell.show(cell.maker.material("h2.test"))
    await eventually(lambda: known(cell, "h2.test"))
    _, writer = await cell.dial("h2.test", "h2", "http/1.1")
    assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
    writer.close()
    _, writer = await cell.dial("h2.test", "http/1.1")
    assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
    writer.close()


async def test_a_certificate_changes_under_load_without_a_lost_request_or_connection(cell: Cell) -> None:
    await cell.serve("hot", "hot.test")
    first = cell.maker.material("hot.test")
    cell.show(first)
    await eventually(lambda: known(cell, "hot.test"))
    kept = await cell.dial("hot.test")
    stop, failures, done = asyncio.Event(), [], 0

    async def load() -> None:
        nonlocal done
        while not stop.is_set():
            try:
                answer = await cell.get("hot.test")
                assert answer.startswith(b"HTTP/1.1 200")
                done += 1
            except (AssertionError, OSError, asyncio.IncompleteReadError) as error:
                failures.append(repr(error))

    loads = [asyncio.create_task(load()) for _ in range(4)]
    try:
        for _ in range(10):
            newer = cell.maker.material("hot.test")
            cell.show(newer)
            await eventually(lambda newer=newer: shows(cell, "hot.test", newer))
            # The connection from before all changes goes on.
            assert (await ask(*kept, "hot.test")).startswith(b"HTTP/1.1 200")
    finally:
        stop.set()
        await asyncio.gather(*loads)
        kept[1].close()
    assert failures == []
    assert done > 10


async def test_what_was_shown_is_shown_while_the_control_plane_is_away_and_catches_up(cell: Cell) -> None:
    await cell.serve("away", "away.test", "later.test")
    one = cell.maker.material("away.test")
    cell.show(one)
    await eventually(lambda: shows(cell, "away.test", one))
    cell.certificates.available = False
    assert await cell.shown("away.test") == fingerprint(one)
    later, newer = cell.maker.material("later.test"), cell.maker.material("away.test")
    cell.show(later, newer)
    watches = cell.certificates.watches
    cell.certificates.available = True
    await eventually(lambda: cell.certificates.watches > watches)
    await eventually(lambda: shows(cell, "away.test", newer))
    await eventually(lambda: shows(cell, "later.test", later))


async def test_a_certificate_that_envoy_does_not_take_stops_no_other(cell: Cell) -> None:
    await cell.serve("broken", "broken.test", "whole.test")
    good = cell.maker.material("broken.test")
    cell.show(good, cell.maker.material("whole.test"))
    await eventually(lambda: shows(cell, "broken.test", good))
    # As no check lets it through; should one ever, the last good one serves.
    cell.show(Material(host="broken.test", project="default", chain=good.chain, key=cell.maker.material("x.test").key))
    cell.show(Material(host="never.test", project="default", chain="none", key="none"))
    newer = cell.maker.material("whole.test")
    cell.show(newer)
    await eventually(lambda: shows(cell, "whole.test", newer))
    assert await cell.shown("broken.test") == fingerprint(good)
    assert await cell.shown("never.test") is None
    assert (await cell.get("broken.test")).startswith(b"HTTP/1.1 200")


async def test_an_app_that_wants_tls_leads_there_and_others_are_served_without(cell: Cell) -> None:
    await cell.serve("strict", "strict.test", https_only=True)
    await cell.serve("lax", "lax.test")
    cell.show(cell.maker.material("strict.test"))
    await eventually(lambda: cell.answers("strict.test", "308"))
    # A client that names a port gets the port of TLS beside it; one that names none came by 80, and is led to 443.
    for host, place in ((f"strict.test:{cell.ingress.http_port}", f"strict.test:{cell.tls_port}"), ("strict.test", "strict.test")):
        answer = await cell.plain(host, "/a/b?c=d", "x-forwarded-proto: https")
        assert answer.startswith(b"HTTP/1.1 308")
        assert f"location: https://{place}/a/b?c=d\r\n".encode() in answer.replace(b":443/", b"/")
        assert answer.endswith(b"\r\n\r\n"), "there is no body of an error"
    assert (await cell.get("strict.test")).startswith(b"HTTP/1.1 200")
    assert await cell.answers("lax.test", "200")


async def test_challenges_are_answered_for_every_hostname_before_its_app_and_before_its_wish_for_tls(cell: Cell) -> None:
    await cell.serve("led", "led.test", https_only=True)
    answers = [ChallengeAnswer(host=host, token="tok-1_x", answer=f"tok-1_x.{host}") for host in ("led.test", "appless.test")]
    cell.certificates.challenge(*answers)
    for host in ("led.test", "appless.test"):
        await eventually(lambda host=host: cell.answers(host, "200", f"{CHALLENGE_PATH}tok-1_x"))
        assert (await cell.plain(host, f"{CHALLENGE_PATH}tok-1_x")).endswith(f"tok-1_x.{host}".encode())
        assert not (await cell.plain(host, f"{CHALLENGE_PATH}other")).startswith(b"HTTP/1.1 200")
    assert await cell.answers("led.test", "503")
    cell.certificates.challenge()
    await eventually(lambda: cell.answers("appless.test", "404", f"{CHALLENGE_PATH}tok-1_x"))
    await eventually(lambda: cell.answers("led.test", "503", f"{CHALLENGE_PATH}tok-1_x"))


async def test_an_instance_that_speaks_tls_gets_requests_only_if_it_is_who_the_app_says(cell: Cell, tmp_path: Path) -> None:
    chain, key = cell.maker.sign("web.internal")
    (tmp_path / "pem").write_text(chain + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    server = await asyncio.start_server(_instance, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    public = x509.load_pem_x509_certificate(chain.encode()).public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    pin, other = (base64.b64encode(hashlib.sha256(each).digest()).decode() for each in (der, b"another key"))
    known_by = {
        "ca": (InstanceTls(ca=cell.maker.pem), "200"),
        "name": (InstanceTls(ca=cell.maker.pem, name="web.internal"), "200"),
        "pin": (InstanceTls(pins=(other, pin)), "200"),
        "wrong-ca": (InstanceTls(ca=Maker("stranger").pem), "503"),
        "wrong-name": (InstanceTls(ca=cell.maker.pem, name="other.internal"), "503"),
        "wrong-pin": (InstanceTls(pins=(other,)), "503"),
    }
    for name, (wanted, _) in known_by.items():
        spec = AppSpec(name=name, image="none", ports=(Port(port=port),), ingress=IngressRules(instance_tls=wanted))
        check_app(spec)
        endpoints = (Endpoint(instance=f"{name}-1", node="n", address="127.0.0.1"),)
        hosts = ((f"{name}.inside.test", "/", port, False),)
        cell.routing.put(Routing(project="default", app=name, spec=spec, hosts=hosts, endpoints=endpoints))
    try:
        for name, (_, status) in known_by.items():
            await eventually(lambda name=name, status=status: cell.answers(f"{name}.inside.test", status))
    finally:
        server.close()


async def test_a_port_for_tls_that_is_taken_is_named_or_done_without(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with tempfile.TemporaryDirectory(dir="/tmp", prefix="atls-") as scratch:
            feed = FakeCertificates()
            with pytest.raises(Conflict, match=str(port)):
                await Ingress(FakeRouting(), Path(scratch) / "a", port=0, tls_port=port, certificates=feed).run()
            ingress = Ingress(
                FakeRouting(), Path(scratch) / "b", port=0, tls_port=port, tls_needed=False, certificates=feed, stop_grace_s=0.1
            )
            running = asyncio.create_task(ingress.run())
            try:
                await eventually(ingress.ready.is_set)
                assert ingress.envoy.tls_port == 0
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
