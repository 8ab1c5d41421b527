"""Requests for apps that sleep wait here: each connection is held until an instance serves, and then spliced to it.

Envoy is told of a unix socket of ours as the app's only endpoint while it has no other. The activator knows nothing of what is
said on a connection, so bodies of any size, gRPC and WebSockets wake an app like anything else; only when an app does not wake in
time it answers itself. As soon as an instance serves, Envoy is told of it instead, and only what came before goes on through here.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog
from msgspec import Struct

from atoll.ingress.admin import Requests, short
from atoll.ingress.datagrams import Datagrams
from atoll.ingress.doors import AGAIN_FIRST_S, AGAIN_MAX_S, Doors
from atoll.ingress.hangups import Hangups
from atoll.ingress.refusals import refuse
from atoll.ingress.resources import Target
from atoll.ingress.sleepers import WAKE, serving, socket_of, wake_s
from atoll.ingress.table import RoutingTable
from atoll.model.records import Endpoint, Routing

CONNECTIONS_MAX = 8_192
"""Held and spliced at a time; what is more is answered with 503."""
APP_SHARE = 8
"""One app has at most this part of them: what woke it may stay spliced for as long as it likes."""
BACKLOG = 4_096
CHUNK_BYTES = 64 << 10
CONNECT_S = 2.0
VAIN_S = 1.0
"""Envoy's own tries (`clusters.RETRY_MAX_MS` apart) follow a wait in vain within that."""

log = structlog.get_logger()


class Splice(Struct, frozen=True):
    app: str
    address: str


class Counts(Protocol):
    """`EnvoyAdmin`, as far as splices are added to what it counts."""

    async def requests(self, clusters: tuple[str, ...]) -> dict[str, Requests]: ...


class Activator:
    """Holds connections for the apps of `table` that wake; `wake` is called with an app (`project/name`) that one waits for."""

    def __init__(
        self, table: RoutingTable, directory: Path, *, wake: Callable[[str], None], connections_max: int = CONNECTIONS_MAX
    ) -> None:
        self._table = table
        self._connections_max = connections_max
        self._open: Counter[str] = Counter()
        """App → its connections that are held or spliced."""
        self._directory = directory / WAKE
        self._wake = wake
        self.datagrams = Datagrams(table, wake=wake)
        """What wakes apps by UDP."""
        self._followed: set[Target] | None = None
        self._servers: dict[Target, asyncio.Task[asyncio.Server]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        """One for each connection."""
        self._waiting: Counter[str] = Counter()
        self._woken: dict[str, asyncio.Event] = {}
        self._vain: dict[str, float] = {}
        """App that is spoken to by TLS → when somebody last waited for it in vain (seconds of the loop)."""
        self._hangups = Hangups()
        self._doors = Doors(table, self._let_in)
        self._splices: Counter[Splice] = Counter()
        self._spliced: Counter[str] = Counter()
        """Address → connections that were ever spliced to it, of those that have any."""
        self.held = 0
        """Connections that were ever taken."""

    @property
    def waiting(self) -> set[str]:
        """Apps that somebody waits for."""
        return set(self._waiting) | self.datagrams.waiting

    @property
    def busy(self) -> set[str]:
        """Apps that a connection waits for, or is spliced to."""
        return self.waiting | {splice.app for splice in self._splices}

    def start(self) -> None:
        """Make the directory of the sockets anew: what an earlier process left there is nobody's."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for left in self._directory.iterdir():
            left.unlink()
        self._hangups.start()

    def changed(self) -> None:
        """Follow a change of the table, before Envoy is told of it: a socket that Envoy knows must be there."""
        sleepers = self._table.sleepers()
        if sleepers is not self._followed:
            self._followed = sleepers
            wanted = {target for target in sleepers if target.raw != "udp"}
            for target in self._servers.keys() - wanted:
                self._close(target)
            for target in wanted - self._servers.keys():
                self._listen(target)
        for app in list(self._woken):
            if self._gone(app) or serving(self._table.endpoints_of(app)):
                self._let_in(app)
            else:
                self._doors.look(app)
        for app in [app for app in self._vain if self._gone(app) or serving(self._table.endpoints_of(app))]:
            del self._vain[app]
        self.datagrams.changed()

    def stop(self) -> None:
        """Break off what waits and what is spliced: Envoy has ended, or will find the sockets gone."""
        for target in list(self._servers):
            self._close(target)
        for task in self._tasks:
            task.cancel()
        self._doors.stop()
        self._hangups.stop()
        self.datagrams.stop()

    async def requests(self, clusters: tuple[str, ...], admin: Counts) -> dict[str, Requests]:
        """Return what `admin` does, and beside it what is spliced to each address, which Envoy does not see."""
        found = await admin.requests(clusters)
        active: Counter[str] = Counter()
        for splice, count in self._splices.items():
            active[splice.address] += count
        for address, total in self._spliced.items():
            found[f"{address}:splice"] = Requests(active=active[address], total=total)
        for address in [address for address in self._spliced if not active[address] and not self._table.knows(address)]:
            del self._spliced[address]
        return found

    def _let_in(self, app: str) -> None:
        if (woken := self._woken.pop(app, None)) is not None:
            woken.set()

    def _gone(self, app: str) -> bool:
        return self._table.routing_of(app) is None

    def _listen(self, target: Target) -> None:
        path = self._directory / Path(socket_of(target)).name
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with short(path) as name:
                listener.bind(str(name))
            path.chmod(0o600)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            log.error("ingress.no-activator", app=f"{target.project}/{target.app}", message=str(error))
            return

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # A transport holds its reader weakly, so that a task which only waits for bytes would be garbage with it.
            task = asyncio.ensure_future(self._serve(target, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        made = asyncio.start_unix_server(serve, sock=listener, limit=CHUNK_BYTES)
        self._servers[target] = asyncio.get_running_loop().create_task(made, name=f"activator {target.cluster}")

    def _close(self, target: Target) -> None:
        task = self._servers.pop(target)
        task.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().close())
        (self._directory / Path(socket_of(target)).name).unlink(missing_ok=True)

    async def _serve(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from its first byte to its last; the edge of its part of the process."""
        app = f"{target.project}/{target.app}"
        self.held += 1
        full = self._full(app)
        self._open[app] += not full
        try:
            if full:
                if not target.raw:
                    await refuse(reader, writer, 503, "unavailable", full, http2=target.http2)
                return
            routing = self._table.routing_of(app)
            limit_s = wake_s(routing) if routing is not None else 0.0
            secret = routing is not None and _speaks_tls(routing, target)
            if secret and self._in_vain(app):
                return
            try:
                async with asyncio.timeout(limit_s), self._hangups.ending(writer):
                    splice, theirs = await self._reach(app, target)
            except TimeoutError:
                log.warning("ingress.not-woken", app=app, waited_s=limit_s)
                text = f"app '{app}' slept, and no instance of it was ready within {limit_s:g} s"
                if secret:
                    self._vain[app] = asyncio.get_running_loop().time()
                elif not target.raw:
                    await refuse(reader, writer, 504, "deadline-exceeded", text, http2=target.http2)
                return
            try:
                await _splice((reader, writer), theirs)
            finally:
                theirs[1].transport.abort()
                self._end(splice)
        except OSError:
            writer.transport.abort()  # either side has gone, and the other is told by being cut off
        finally:
            self._open[app] -= not full
            if not self._open[app]:
                del self._open[app]
            writer.close()

    def _in_vain(self, app: str) -> bool:
        """Whether this is Envoy's next try after a wait in vain: as it cannot be answered in words, it would wait all over."""
        return asyncio.get_running_loop().time() - self._vain.get(app, -VAIN_S) < VAIN_S

    def _full(self, app: str) -> str:
        """Return why there is no room for another connection of the app; empty where there is."""
        if self._open.total() >= self._connections_max:
            return f"{self._connections_max} connections wait for apps to wake here"
        share = self._connections_max // APP_SHARE
        full = self._open[app] >= share
        return f"{share} connections wait here for app '{app}' to wake, or have woken it" if full else ""

    async def _reach(self, app: str, target: Target) -> tuple[Splice, tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Return a connection to an instance, however long that takes. Nothing was sent yet, so another try is always safe."""
        again_s = AGAIN_FIRST_S
        while True:
            endpoint = await self._endpoint(app, target.port)
            splice = Splice(app, endpoint.address)
            # Counted before the first wait: an instance that drains must not be stopped in between.
            self._splices[splice] += 1
            self._spliced[endpoint.address] += 1
            try:
                async with asyncio.timeout(CONNECT_S):
                    return splice, await asyncio.open_connection(endpoint.address, target.port, limit=CHUNK_BYTES)
            except (OSError, TimeoutError):
                self._end(splice)
                self._doors.shut(app, endpoint.address)
            except BaseException:
                self._end(splice)
                raise
            await asyncio.sleep(again_s)
            again_s = min(2 * again_s, AGAIN_MAX_S)

    async def _endpoint(self, app: str, port: int) -> Endpoint:
        self._waiting[app] += 1
        try:
            while not (found := serving(self._table.endpoints_of(app)) or self._doors.open(app)):
                self._wake(app)
                self._doors.want(app, port)
                await self._woken.setdefault(app, asyncio.Event()).wait()
                if self._gone(app):
                    raise ConnectionError(f"app '{app}' is gone")
            return random.choice(found)
        finally:
            self._waiting[app] -= 1
            if not self._waiting[app]:
                del self._waiting[app]
                self._doors.unwanted(app)

    def _end(self, splice: Splice) -> None:
        self._splices[splice] -= 1
        if not self._splices[splice]:
            del self._splices[splice]


def _speaks_tls(routing: Routing, target: Target) -> bool:
    rules = routing.spec.ingress
    return not target.raw and rules is not None and rules.instance_tls is not None


async def _splice(
    ours: tuple[asyncio.StreamReader, asyncio.StreamWriter], theirs: tuple[asyncio.StreamReader, asyncio.StreamWriter]
) -> None:
    """Carry bytes both ways until both sides have ended; Envoy bounds how long nothing may move. Raises OSError when one breaks."""
    both = [asyncio.ensure_future(_carry(ours[0], theirs[1])), asyncio.ensure_future(_carry(theirs[0], ours[1]))]
    try:
        await asyncio.gather(*both)
    finally:
        for each in both:
            each.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK_BYTES):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof() and not sink.is_closing():
        sink.write_eof()
