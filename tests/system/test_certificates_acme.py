"""Certificates by ACME from a real authority (pebble), proved through a real Envoy, with leaders that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
import httpx
import pytest
import pytest_asyncio

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.control.controllers import run_control
from atoll.control.orders import Pace
from atoll.control.world import KINDS as WORLD
from atoll.entry.certificates import signers_of
from atoll.ingress import envoy
from atoll.ingress.service import Ingress
from atoll.model import keys
from atoll.model.certificates import AcmeRequest, CertificateRequest, CertificateView
from atoll.model.chains import describe
from atoll.model.errors import AtollError
from atoll.model.ports.clock import SystemClock
from atoll.model.records.certificate import CertificatePhase, CertificateSource, CertificateStatus
from atoll.model.spec import AppSpec, IngressRules, Issuer, Port, Route
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from made_certificates import Maker

TIMEOUT_S = 60.0
EAB_KID, EAB_KEY = "kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
BLOCKED = "blocked.test"


def _pebble() -> str | None:
    return shutil.which("pebble", path=str(Path(sys.executable).parent)) or shutil.which("pebble")


def _missing() -> str:
    if _pebble() is None:
        return "pebble, the ACME authority for tests, is not built: scripts/setup.sh does where there is Go"
    try:
        envoy.find_binary()
    except AtollError:
        return "Envoy is not installed"
    return ""


pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(_missing()), reason=_missing()),
    pytest.mark.asyncio(loop_scope="module"),
]


async def resolve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Be a name server (over TCP, as pebble asks) to which every name is this machine."""
    try:
        while True:
            length = int.from_bytes(await reader.readexactly(2), "big")
            query = dns.message.from_wire(await reader.readexactly(length))
            answer = dns.message.make_response(query)
            answer.flags |= dns.flags.RA
            question = query.question[0]
            if question.rdtype == dns.rdatatype.A:
                answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", "127.0.0.1"))
            wire = answer.to_wire()
            writer.write(len(wire).to_bytes(2, "big") + wire)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


class Cell:
    """A server's service, an ingress with Envoy, and an authority that finds every hostname at it."""

    def __init__(self, service: Service, store: MemoryStore, state: State, ingress: Ingress, directory: Path, maker: Maker) -> None:
        self.service, self.ingress = service, ingress
        self.directory = directory
        self.acme_port = self.management_port = 0
        self._store, self._state, self._maker = store, state, maker
        self._leader: asyncio.Task[None] | None = None
        self._leaders = 0

    def lead(self) -> None:
        self._leaders += 1
        pace = Pace(settle_s=0.2, poll_s=0.2, retry_min_s=1.0, gather_s=0.05)
        clock = SystemClock()
        control = run_control(
            self._store,
            self._state,
            clock,
            random.Random(self._leaders),
            self.service.heartbeats.last_seen(),
            identity=f"leader-{self._leaders}",
            certificates=signers_of(self.service, pace),
        )
        self._leader = asyncio.create_task(control)

    async def kill(self) -> None:
        if self._leader is not None:
            self._leader.cancel()
            await asyncio.gather(self._leader, return_exceptions=True)

    async def choose(self, eab_key: str = EAB_KEY) -> None:
        url = f"https://127.0.0.1:{self.acme_port}/dir"
        contact = ("ops@example.com",)
        wish = AcmeRequest(directory=url, contact=contact, ca=self._maker.pem, eab_kid=EAB_KID, eab_key=eab_key)
        await self.service.certificate_roots.set_acme(wish)

    async def until(self, host: str, good: Callable[[CertificateView], bool]) -> CertificateView:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with contextlib.suppress(AtollError):
                    if good(view := self.service.certificates.get("default", host)):
                        return view
                await asyncio.sleep(0.05)

    async def valid(self, host: str) -> CertificateView:
        return await self.until(host, lambda view: view.state is CertificatePhase.VALID)

    async def shown(self, host: str, root: str) -> str:
        """Return the SHA-256 of what the ingress shows for `host`, once it can be verified by `root`."""
        context = ssl.create_default_context(cadata=root)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection(
                        "127.0.0.1", self.ingress.envoy.tls_port, ssl=context, server_hostname=host
                    )
                except OSError:
                    await asyncio.sleep(0.05)
                    continue
                found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                writer.close()
                return hashlib.sha256(found).hexdigest()

    async def root(self) -> str:
        context = ssl.create_default_context(cadata=self._maker.pem)
        async with httpx.AsyncClient(verify=context) as client:
            return (await client.get(f"https://127.0.0.1:{self.management_port}/roots/0")).text


async def _listening(port: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def authority(cell: Cell, maker: Maker) -> AsyncIterator[None]:
    """Run pebble, which looks for answers at the ingress's plain port."""
    resolver = await asyncio.start_server(resolve, "127.0.0.1", 0)
    place = resolver.sockets[0].getsockname()
    chain, key = maker.sign("localhost", addresses=("127.0.0.1",))
    cell.acme_port, cell.management_port = envoy.free_port("127.0.0.1"), envoy.free_port("127.0.0.1")
    (cell.directory / "pebble.pem").write_text(chain)
    (cell.directory / "pebble.key").write_text(key)
    settings = {
        "listenAddress": f"127.0.0.1:{cell.acme_port}",
        "managementListenAddress": f"127.0.0.1:{cell.management_port}",
        "certificate": str(cell.directory / "pebble.pem"),
        "privateKey": str(cell.directory / "pebble.key"),
        "httpPort": cell.ingress.http_port,
        "tlsPort": cell.ingress.envoy.tls_port,
        "externalAccountBindingRequired": True,
        "externalAccountMACKeys": {EAB_KID: EAB_KEY},
        "domainBlocklist": [BLOCKED],
        "retryAfter": {"authz": 1, "order": 1},
        "keyAlgorithm": "ecdsa",
        "profiles": {"default": {"description": "for tests", "validityPeriod": 7_776_000}},
    }
    (cell.directory / "pebble.json").write_text(json.dumps({"pebble": settings}))
    pebble = _pebble()
    assert pebble is not None
    with (cell.directory / "pebble.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(pebble, "-config", str(cell.directory / "pebble.json"), "-dnsserver", f"{place[0]}:{place[1]}"),
            stdout=log,
            stderr=log,
            env={**os.environ, "PEBBLE_VA_NOSLEEP": "1"},
        )
    try:
        await _listening(cell.management_port)
        yield
    finally:
        process.kill()
        await process.wait()
        resolver.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cell() -> AsyncIterator[Cell]:
    clock, store, maker = SystemClock(), None, Maker()
    store = MemoryStore(clock)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="atla-") as scratch:
        async with (
            State(store, {**KINDS, **WORLD}) as state,
            Service(store, state, clock, random.Random(1), bytes(32), "cell.test") as service,
        ):
            ingress = Ingress(
                service.control_plane,
                Path(scratch) / "i",
                port=0,
                tls_port=0,
                certificates=service.certificate_feeds,
                domain="cell.test",
                workers=1,
                stop_grace_s=0.1,
            )
            running = asyncio.create_task(ingress.run())
            made = Cell(service, store, state, ingress, Path(scratch), maker)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await ingress.ready.wait()
                async with authority(made, maker):
                    made.lead()
                    yield made
                    await made.kill()
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
        await store.close()


def app(name: str, *hosts: str) -> AppSpec:
    """Have an app that wants TLS only, so that its own routes would lead the authority away."""
    rules = IngressRules(certificate=Issuer.ACME, https_only=True)
    routes = tuple(Route(host=host) for host in hosts)
    return AppSpec(name=name, image="x.test/web:1", ports=(Port(port=80),), routes=routes, ingress=rules)


async def test_the_hostnames_of_an_app_that_asks_are_proved_signed_and_shown(cell: Cell) -> None:
    await cell.choose()
    await cell.service.apps.put(SYSTEM, app("web", "www.shop.test"))
    root = await cell.root()
    for host in ("www.shop.test", "web.cell.test"):
        view = await cell.valid(host)
        assert view.names == (host,)
        assert view.app == "web"
        assert view.renew_at is not None
        assert await cell.shown(host, root) == view.fingerprint
    events = cell.service.events.all("default", limit=100).items
    assert {event.subject for event in events if event.code == "certificate-issued"} >= {
        "certificate/www.shop.test",
        "certificate/web.cell.test",
    }


async def test_a_hostname_that_the_authority_refuses_is_said_in_its_words_and_stops_no_other(cell: Cell) -> None:
    await cell.choose()
    wish = CertificateRequest(source=CertificateSource.ACME)
    await cell.service.certificates.put(SYSTEM, "default", BLOCKED, wish)
    await cell.service.certificates.put(SYSTEM, "default", "allowed.test", wish)
    failed = await cell.until(BLOCKED, lambda view: bool(view.error))
    assert "the authority refuses" in failed.error
    assert "blocked" in failed.error.lower() or "policy" in failed.error.lower()
    assert failed.retry_at is not None
    await cell.valid("allowed.test")
    await cell.service.certificates.remove("default", BLOCKED)


async def test_the_next_leader_goes_on_with_the_order_of_one_that_was_killed(cell: Cell) -> None:
    await cell.choose()
    host = "resumed.test"
    state = cell.service.context.state
    await cell.service.certificates.put(SYSTEM, "default", host, CertificateRequest(source=CertificateSource.ACME))

    async def ordered() -> CertificateStatus:
        async for _ in state.changes():
            held = state.get(CertificateStatus, host)
            if held is not None and held.record.order:
                return held.record
        raise AssertionError("the cache has ended")

    async with asyncio.timeout(TIMEOUT_S):
        before = await ordered()
    await cell.kill()
    assert before.phase is CertificatePhase.ORDERING
    cell.lead()
    view = await cell.valid(host)
    sealed = cell.service.context.sealer
    # The key is the one that the killed leader had made for this order.

    wanted = sealed.open(before.next_sealed, keys.certificate_status(host) + "/next")
    held = state.get(CertificateStatus, host)
    assert held is not None
    assert sealed.open(held.record.sealed, keys.certificate_status(host)) == wanted
    assert await cell.shown(host, await cell.root()) == view.fingerprint == describe(held.record.chain).fingerprint


async def test_a_binding_that_is_wrong_is_said_and_mended_by_choosing_again(cell: Cell) -> None:
    await cell.service.certificate_roots.forget_acme()
    await cell.choose("bm90LXRoZS1rZXktYXQtYWxsLW5vdC1hdC1hbGw")
    host = "bound.test"
    await cell.service.certificates.put(SYSTEM, "default", host, CertificateRequest(source=CertificateSource.ACME))
    failed = await cell.until(host, lambda view: bool(view.error))
    assert "the authority refuses" in failed.error
    await cell.choose()
    await cell.valid(host)


async def test_a_directory_that_cannot_be_trusted_or_reached_is_said(cell: Cell) -> None:
    roots = cell.service.certificate_roots
    host = "unreached.test"
    await roots.set_acme(AcmeRequest(directory=f"https://127.0.0.1:{cell.acme_port}/dir", ca=Maker("stranger").pem))
    await cell.service.certificates.put(SYSTEM, "default", host, CertificateRequest(source=CertificateSource.ACME))
    failed = await cell.until(host, lambda view: bool(view.error))
    assert "cannot be reached" in failed.error
    assert "certificate verify failed" in failed.error
    await cell.choose()
    await cell.valid(host)
