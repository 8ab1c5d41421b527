"""What a server needs to be one of several: the cell's key, an id of its own, its certificate, and the way to the others."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from pathlib import Path

import structlog

from atoll import __version__
from atoll.api.http.tls import ListenerTls
from atoll.api.service import Service
from atoll.api.service.servers import Dial
from atoll.api.service.signing import Subject, key_pem, new_key
from atoll.entry.config import Config, split_address
from atoll.model.errors import AtollError, Corrupt, Invalid
from atoll.model.membership import DATA_VERSION, Authority, Server
from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import Channel
from atoll.model.records import new_suffix
from atoll.model.tls import trusting
from atoll.model.units import Seconds
from atoll.sdk.private_file import write_private
from atoll.sdk.transport import Address
from atoll.sdk.websocket import dial

SERVER_KIND = "server"
ID_CHARS = 8
LOOK_S = 60.0
"""The longest wait between two looks at the clock, which may jump, and at who signs."""
RETRY_S = 5.0
RENEW_AT = 2 / 3

log = structlog.get_logger()


def server_id(config: Config) -> str:
    """Return this server's own id, made the first time: no two servers may share one, also not on one machine."""
    path = config.server_data / "id"
    if not path.exists():
        write_private(path, f"{config.node_name}-{new_suffix(length=ID_CHARS)}\n".encode())
    id = path.read_text().strip()
    if not id or len(id) > 60 or not id.replace("-", "").isalnum() or not id.isascii():
        raise Corrupt(f"{path} holds no server id", mend="remove it; the server makes another")
    return id


def server_record(config: Config, id: str) -> Server:
    return Server(id=id, urls=(config.advertised,), version=__version__, data=DATA_VERSION, started_at=time.time())


def certificate_life_s(config: Config) -> float:
    """Raises Invalid."""
    try:
        life_s = float(Seconds.parse(config.certificate_life))
    except ValueError as error:
        raise Invalid(f"--certificate-life: {error}", field="certificate-life") from None
    if not 3.0 <= life_s <= 366 * 86_400.0:
        raise Invalid("--certificate-life: from 3 s to 366 days", field="certificate-life")
    return life_s


def peer_dial(ca_file: Path) -> Dial:
    """Return how this server reaches another: over TLS known by the cell's authorities in the file, or plainly."""

    async def reach(url: str, path: str, token: str) -> Channel:
        address = Address.parse(url)
        context = trusting(ca_file) if address.scheme == "https" else None
        return await dial(address, token, path, tls=context)

    return reach


class ServerCertificate:
    """The certificate of this server: signed by the cell's authority, whose key every server can open; its key is in memory only.

    `file` gets the authorities that are trusted, for the processes of this machine and for the way to other servers.
    """

    def __init__(self, config: Config, service: Service, id: str, clock: Clock) -> None:
        self._config = config
        self._service = service
        self._id = id
        self._clock = clock
        self._bundle = ""
        self._authority = ""
        self._made_at = 0.0
        self._renew_at = 0.0
        self.tls = ListenerTls()

    async def begin(self) -> None:
        """Get the first certificate. Raises Corrupt (the cell's key is another), Unavailable (the store, the disk)."""
        await self._renew()

    async def run(self) -> None:
        """Renew before it ends, and follow the authorities, for ever."""
        state = self._service.context.state
        while True:
            try:
                async with asyncio.timeout(max(0.1, min(LOOK_S, self._renew_at - self._clock.now()))):
                    async for batch in state.changes():
                        if any(delta.kind is Authority for delta in batch.deltas):
                            break
            except TimeoutError:
                pass
            except AtollError:
                await asyncio.sleep(RETRY_S)
            try:
                await self._renew()
            except AtollError as error:
                log.warning("the server's certificate could not be renewed", cause=error.message)
                await asyncio.sleep(RETRY_S)

    async def _renew(self) -> None:
        authorities = self._service.authorities
        signer = await authorities.ensure()
        bundle = authorities.bundle()
        now = self._clock.now()
        # One from before the date was set back may begin when nobody is there yet.
        if signer.id == self._authority and bundle == self._bundle and self._made_at <= now < self._renew_at:
            return
        key = new_key()
        subject = Subject(kind=SERVER_KIND, name=self._id, enrolment=self._id, hosts=hosts_of(self._config))
        signed = await authorities.sign(subject, key.public_key())
        self.tls.use(signed.certificate, key_pem(key), bundle)
        if bundle != self._bundle:
            write_private(self._config.ca_file, bundle.encode())
        log.info("the server has a certificate", authority=signer.id, hosts=subject.hosts)
        self._bundle, self._authority, self._made_at = bundle, signer.id, now
        self._renew_at = now + RENEW_AT * (signed.expires_at - now)


def hosts_of(config: Config) -> tuple[str, ...]:
    """Return the names and addresses that clients which know nothing of the cell (curl, a browser) may dial."""
    found = [
        "localhost",
        "127.0.0.1",
        "::1",
        split_address(config.listens, field="--listen")[0],
        Address.parse(config.advertised).host,
    ]
    found += [socket.gethostname(), socket.getfqdn()]
    return tuple(dict.fromkeys(host for host in found if _nameable(host)))


def _nameable(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return bool(host) and host.isascii() and len(host) <= 253 and not host.startswith(".") and ".." not in host
