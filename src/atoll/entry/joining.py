"""How an agent or ingress reaches the servers: with this machine's token file, or with the certificate that it got by joining."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
from msgspec import Struct

from atoll.entry.config import Config
from atoll.entry.process import TOKEN_WAIT_S, Stop, read_token
from atoll.images.auth import Access
from atoll.model.errors import Invalid, Unauthenticated
from atoll.model.membership import MemberKind
from atoll.model.ports.clock import Clock, SystemClock, system_random
from atoll.model.ports.control_plane import ControlPlane
from atoll.model.records import CELL_PROJECT, Event, Severity, event_id
from atoll.sdk.control_plane import HttpControlPlane
from atoll.sdk.failover import transport_to
from atoll.sdk.membership import Credentials, keep_renewed
from atoll.sdk.private_file import write_private
from atoll.sdk.transport import Transport, addresses_of
from atoll.sdk.trust import Tls, read_ca

JOIN_VARIABLE = "ATOLL_JOIN"
"""The join token, so that it stands in no process's arguments for longer than it is needed."""
IDENTITY_DIRECTORY = "identity"
SERVERS = "servers"
"""The file in it with the URLs that were given last."""

log = structlog.get_logger()


class Reach(Struct, frozen=True, kw_only=True):
    """The way to the servers. `token` is empty where a certificate says who calls."""

    name: str
    servers: str
    token: str
    tls: Tls | None
    ca: str | Path | None = None
    credentials: Credentials | None = None

    def transport(self, agent: str) -> Transport:
        # Machines begin at different servers, so that a thousand agents are not all one server's.
        return transport_to(self.servers, self.token or None, agent=agent, tls=self.tls, first=system_random().randrange)

    def registry(self) -> Access:
        """Return how the cell's own registry, a part of the API, is reached."""
        url = self.servers.split(",")[0].strip()
        files = self.credentials
        if files is not None:
            return Access(url=url, ca=str(files.bundle), identity=str(files.file))
        ca = str(self.ca) if isinstance(self.ca, Path) else ""
        return Access(url=url, username="agent", password=self.token, ca=ca)

    def control_plane(self, *, node: str | None = None) -> HttpControlPlane:
        return HttpControlPlane(self.servers, self.token or None, node=node, transport=self.transport("atoll-agent"))


async def reach(config: Config, kind: MemberKind, data: Path, stop: Stop) -> Reach | None:
    """Return the way to the servers, after joining where a join token says so; None when told to stop first.

    A machine that has joined keeps to its certificate: the join token is then not looked at. Raises Invalid, Unauthenticated,
    Conflict, Unavailable: it could not join; Corrupt.
    """
    credentials = Credentials(data / IDENTITY_DIRECTORY)
    held = credentials.load()
    join = os.environ.pop(JOIN_VARIABLE, "").strip()
    if held is None and join:
        if not config.server:
            raise Invalid("--join: at which server?", field="server", mend="give --server https://HOST:7600")
        held = await credentials.join(config.server, join, config.node, system_random(), hostname=config.node_name)
        log.info("joined", name=held.name, kind=kind.value)
    if held is not None:
        if config.node and config.node != held.name:
            raise Invalid(
                f"--node: this machine joined as '{held.name}', not '{config.node}'",
                field="node",
                mend=f"leave it away, or remove {data / IDENTITY_DIRECTORY} and join anew",
            )
        before = _kept_servers(data)
        servers = config.server or before
        if not servers:
            raise Invalid("which servers?", field="server", mend="give --server https://HOST:7600")
        if servers != before:
            write_private(data / IDENTITY_DIRECTORY / SERVERS, f"{servers}\n".encode())
        return Reach(name=held.name, servers=servers, token="", tls=credentials.tls(), credentials=credentials)
    token = await read_token(data / "token", stop)
    if token is None:
        return None
    servers = config.server or config.url
    secure = any(address.scheme == "https" for address in addresses_of(servers))
    ca = await _authority(config, stop) if secure else None
    return Reach(name=config.node_name, servers=servers, token=token, tls=Tls(ca) if secure else None, ca=ca)


async def _authority(config: Config, stop: Stop) -> str | Path | None:
    """Return the authority of the servers: what was given, or what this machine's own server wrote."""
    if config.ca:
        return Path(config.ca) if Path(config.ca).is_file() else read_ca(config.ca)
    if config.server:
        return None
    for _ in range(int(TOKEN_WAIT_S / 0.05)):
        if stop.is_set() or config.ca_file.exists():
            break
        await asyncio.sleep(0.05)
    if not config.ca_file.exists():
        raise Unauthenticated(f"there is no authority in {config.ca_file}", mend="name one with --ca, or join with --join")
    return config.ca_file


def _kept_servers(data: Path) -> str:
    """Return the servers of the last start; empty where none are known."""
    file = data / IDENTITY_DIRECTORY / SERVERS
    return file.read_text().strip() if file.exists() else ""


@contextlib.asynccontextmanager
async def kept(found: Reach, kind: MemberKind, control: ControlPlane) -> AsyncIterator[None]:
    """Keep the machine's certificate renewed while the context lasts."""
    if found.credentials is None or found.tls is None:
        yield
        return
    clock: Clock = SystemClock()

    async def say(code: str, message: str, bad: bool) -> None:
        if kind is not MemberKind.NODE:
            return  # an ingress has no events; its log has it
        at = clock.now()
        id = event_id(at, f"{found.name}-{code}")
        severity = Severity.WARNING if bad else Severity.INFO
        subject = f"node/{found.name}"
        event = Event(
            id=id, at=at, project=CELL_PROJECT, subject=subject, code=code, message=message, severity=severity, node=found.name
        )
        await control.report(found.name, (), (event,))

    def anonymous() -> Transport:
        assert found.credentials is not None  # noqa: S101 (seen to above)
        return transport_to(found.servers, None, agent="atoll-agent", tls=Tls(found.credentials.bundle))

    renewing = asyncio.create_task(
        keep_renewed(found.credentials, anonymous, found.tls, clock, system_random(), say), name="certificate"
    )
    renewing.add_done_callback(_ended)
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the certificate is not renewed any more", cause=str(error))
