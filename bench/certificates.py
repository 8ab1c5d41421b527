"""Certificates by the thousand: on demand, beside an Envoy with a filter chain for each hostname: memory, changes, handshakes."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import logging
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from atoll.ingress import envoy
from atoll.ingress.fake import FakeRouting
from atoll.ingress.fake_certificates import FakeCertificates
from atoll.ingress.service import Ingress
from atoll.model.certificates import Material
from bench.report import Report, Result, percentile

NAMES = 10_000
CHANGES = 20
CHAIN_CHANGES = 2
"""Of the peer: each takes many seconds."""
SAMPLE = 500
"""Handshakes that are timed one by one."""
AT_ONCE = 8
WAIT_S = 120.0
_CLIENT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_CLIENT.check_hostname = False
_CLIENT.verify_mode = ssl.CERT_NONE
_TYPE = "@type"
_EXTENSIONS = "type.googleapis.com/envoy.extensions"
Put = Callable[[Material], Awaitable[None]]


def run(arguments: Sequence[str]) -> Report:
    parser = argparse.ArgumentParser(prog="python -m bench certificates")
    parser.add_argument("--names", type=int, default=NAMES)
    parser.add_argument("--changes", type=int, default=CHANGES)
    parser.add_argument("--chain-changes", type=int, default=CHAIN_CHANGES)
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    names = [f"h{number}.many.test" for number in range(options.names)]
    ours, peer = asyncio.run(_both(names, options.changes, options.chain_changes))
    report = Report("certificates")
    count = f"{options.names:,} names"
    each = (ours.full_mib - ours.empty_mib) * 1024 / options.names
    report.add(Result(f"Envoy's memory, {count}, none asked for yet", ours.empty_mib, "MiB", peer.empty_mib))
    report.add(Result(f"Envoy's memory, {count}, all asked for", ours.full_mib, "MiB", peer.full_mib))
    report.add(Result("memory for each name that was asked for", each, "KiB"))
    rows = (
        (f"a changed certificate is shown, {count}", ours.change_ms, peer.change_ms),
        (f"a new hostname is shown, {count}", ours.new_ms, peer.new_ms),
        ("handshake of a name asked for before", ours.warm_ms, peer.warm_ms),
        ("handshake of a name asked for the first time", ours.cold_ms, peer.cold_ms),
    )
    for what, mine, theirs in rows:
        for share in (50, 99):
            report.add(Result(f"{what}, p{share}", percentile(mine, share), "ms", percentile(theirs, share)))
    report.add(Result("from the start until every name can be shown", ours.ready_s, "s", peer.ready_s))
    report.notes.append(
        "reference: the same Envoy, one filter chain for each hostname, its listener read anew from a file at each change"
    )
    report.notes.append(
        "a change: from the call to the first handshake that shows it, asked for again and again; ECDSA P-256, TLS 1.3"
    )
    report.notes.append("handshakes of both by turns, one by one, the client's part (Python) among it")
    return report


class Side:
    """One of the two Envoys, and what was measured of it."""

    def __init__(self, port: int, pid: int | None, put: Put, ready_s: float) -> None:
        self.port, self.pid, self.put, self.ready_s = port, pid, put, ready_s
        self.empty_mib = _rss_mib(pid)
        self.full_mib = 0.0
        self.cold_ms: list[float] = []
        self.warm_ms: list[float] = []
        self.change_ms: list[float] = []
        self.new_ms: list[float] = []


async def _both(names: list[str], changes: int, chain_changes: int) -> tuple[Side, Side]:
    async with _on_demand(names) as ours, _chains(names) as peer:
        for host in names[:SAMPLE]:
            for side in (ours, peer):
                side.cold_ms.append(await _handshake(side.port, host))
        for side in (ours, peer):
            await _all(side.port, names)
            side.full_mib = _rss_mib(side.pid)
        for host in names[:SAMPLE]:
            for side in (ours, peer):
                side.warm_ms.append(await _handshake(side.port, host))
        for side, count in ((ours, changes), (peer, chain_changes)):
            side.change_ms = [await _change(side, host) for host in names[:count]]
            side.new_ms = [await _change(side, f"new{number}.test") for number in range(count)]
        return ours, peer


def _material(host: str) -> Material:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Material(
        host=host,
        project="default",
        chain=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        key=key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode(),
    )


@asynccontextmanager
async def _on_demand(names: list[str]) -> AsyncIterator[Side]:
    feed = FakeCertificates()
    feed.put(*(_material(host) for host in names))

    async def put(material: Material) -> None:
        feed.put(material)

    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        began = time.perf_counter()
        ingress = Ingress(FakeRouting(), Path(scratch) / "i", port=0, tls_port=0, certificates=feed, stop_grace_s=0.1)
        task = asyncio.create_task(ingress.run())
        try:
            await asyncio.wait_for(ingress.ready.wait(), WAIT_S)
            await _until_shown(ingress.envoy.tls_port, names[-1], None)
            yield Side(ingress.envoy.tls_port, ingress.envoy.pid, put, time.perf_counter() - began)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _chains(names: list[str]) -> AsyncIterator[Side]:
    materials = {host: _material(host) for host in names}
    port = envoy.free_port("127.0.0.1")
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        place = Path(scratch)

        def write() -> None:
            partial = place / "partial.json"
            partial.write_text(json.dumps({"resources": [_listener(port, materials)]}))
            partial.replace(place / "lds.json")

        async def put(material: Material) -> None:
            materials[material.host] = material
            write()

        write()
        lds = {"path_config_source": {"path": str(place / "lds.json")}, "resource_api_version": "V3"}
        bootstrap = {"node": {"id": "peer", "cluster": "peer"}, "dynamic_resources": {"lds_config": lds}}
        (place / "bootstrap.json").write_text(json.dumps(bootstrap))
        began = time.perf_counter()
        command = [str(envoy.find_binary()), "-c", str(place / "bootstrap.json"), "--disable-hot-restart", "--log-level", "error"]
        process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
        try:
            await _until_shown(port, names[-1], None)
            yield Side(port, process.pid, put, time.perf_counter() - began)
        finally:
            process.kill()
            await process.wait()


def _listener(port: int, materials: dict[str, Material]) -> dict[str, Any]:
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
    manager = {
        _TYPE: f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "peer",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {_TYPE: f"{_EXTENSIONS}.filters.http.router.v3.Router"}}],
    }
    chains = []
    for host, material in materials.items():
        shown = {"certificate_chain": {"inline_string": material.chain}, "private_key": {"inline_string": material.key}}
        context = {
            _TYPE: f"{_EXTENSIONS}.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {"alpn_protocols": ["h2", "http/1.1"], "tls_certificates": [shown]},
            "disable_stateless_session_resumption": True,
        }
        chains.append(
            {
                "name": host,
                "filter_chain_match": {"server_names": [host]},
                "filters": [{"name": "http", "typed_config": manager}],
                "transport_socket": {"name": "tls", "typed_config": context},
            }
        )
    inspector = {"name": "tls", "typed_config": {_TYPE: f"{_EXTENSIONS}.filters.listener.tls_inspector.v3.TlsInspector"}}
    return {
        _TYPE: "type.googleapis.com/envoy.config.listener.v3.Listener",
        "name": "https",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "listener_filters": [inspector],
        "filter_chains": chains,
    }


async def _change(side: Side, host: str) -> float:
    """Return the milliseconds from the change of a certificate to the first handshake that shows it."""
    material = _material(host)
    wanted = ssl.PEM_cert_to_DER_cert(material.chain)
    began = time.perf_counter()
    await side.put(material)
    await _until_shown(side.port, host, wanted)
    return (time.perf_counter() - began) * 1000


async def _until_shown(port: int, host: str, wanted: bytes | None) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                shown = await _shown(port, host)
            except OSError:
                await asyncio.sleep(0.001)
                continue
            if wanted is None or shown == wanted:
                return


async def _all(port: int, names: list[str]) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(host: str) -> None:
        async with gate:
            await _shown(port, host)

    await asyncio.gather(*(one(host) for host in names))


async def _handshake(port: int, host: str) -> float:
    began = time.perf_counter()
    await _shown(port, host)
    return (time.perf_counter() - began) * 1000


async def _shown(port: int, host: str) -> bytes:
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=_CLIENT, server_hostname=host)
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return found


def _rss_mib(pid: int | None) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
