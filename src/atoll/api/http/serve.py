"""The HTTP server: uvicorn with httptools, bounded against what strangers send, and ended from within."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import structlog
import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets import http11

from atoll.api.http.answers import SLOW_READER_S
from atoll.api.http.calls import SHOWN
from atoll.api.http.tls import ListenerTls, shown_by
from atoll.api.http.turns import Turns
from atoll.api.service import Service
from atoll.api.service.signing import Shown
from atoll.model.errors import Unavailable
from atoll.model.membership import API_HEADER
from atoll.model.streams import MESSAGE_BYTES_MAX

HEADER_BYTES_MAX = 65_536
"""Of one request, with its path."""
HEADER_S = 15.0
"""How long a new connection has to send its first request's headers, and one that begins another request."""
PAUSED_S = 600.0
"""How long a WebSocket's reader may take nothing."""
KEEP_ALIVE_S = 75
PING_S = 20.0
HERE_S = 4.0
"""How often a peer of which nothing is read is told that this end is there; ours call one gone after 10 s (`sdk/websocket.py`)."""
AGENTS = "/v1/nodes/"
"""Where agents' streams are."""
IN_VAIN = 2
"""A kernel that let so many packets in a row go without an answer is gone."""
CLIENTS = "/v1/projects/"
"""Where the streams of clients are; those of agents and servers are elsewhere."""
GRACE_S = 5
"""How long calls that run may take to end when the server stops."""
BACKLOG = 1_024
CONNECTIONS_MAX = 65_536
"""Beyond it, a call is answered with 503. An agent holds three: its assignments, its tunnel, its calls."""
FILES_SPARED = 256
"""Of the files that this process may open, so many are for other things than connections."""

# Its own default is 8 KiB, over which a handshake would hang: a command to run in an instance may be longer.
http11.MAX_LINE_LENGTH = HEADER_BYTES_MAX

log = structlog.get_logger()


class _Impatient:
    """Part of a protocol: a peer that takes nothing of what waits for it is hung up on, whatever is still unsent."""

    patience_s = SLOW_READER_S
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _stuck: asyncio.TimerHandle | None = None

    def have_the_kernel_watch(self) -> None:
        """Over TLS a whole piece may lie in the layer below, which tells nobody that it is stuck; the kernel knows.

        See tcp(7), TCP_USER_TIMEOUT: it counts while the peer's window is closed, too.
        """
        line = self.transport.get_extra_info("socket")
        if self.transport.get_extra_info("ssl_object") is None or line is None or line.family == socket.AF_UNIX:
            return
        with socket.socket(fileno=os.dup(line.fileno())) as own:
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.patience_s * 1000))

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._stuck = self.loop.call_later(self.patience_s, self._hang_up)

    def resume_writing(self) -> None:
        self._moves()
        super().resume_writing()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        self._moves()
        super().connection_lost(exc)  # type: ignore[misc]

    def _moves(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _hang_up(self) -> None:
        self._stuck = None
        log.info("a peer that takes nothing was cut off", after_s=self.patience_s)
        self.transport.abort()


class StreamProtocol(_Impatient, WebSocketsSansIOProtocol):
    """uvicorn's WebSockets; someone who pauses the output of a command is given longer. Only a peer that is silent is pinged: an
    agent pings by itself, and of thousands of tunnels nothing else is heard.

    An answer to a ping that does not come says nothing while it may lie unread, here or there."""

    patience_s = PAUSED_S
    agent_close_s = 10.0
    """How long an agent may leave unread that its stream has ended: until then it does not know that its client has gone."""
    here_s = HERE_S
    _shown: Shown | None = None
    _heard_at = float("-inf")
    _telling: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._shown = shown_by(transport)
        self.have_the_kernel_watch()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        super().data_received(data)
        if self.read_paused and self._telling is None:
            self._telling = self.loop.call_later(self.here_s, self._tell)

    async def receive(self) -> Any:
        message = await super().receive()
        self._heard_at = self.loop.time()  # what was said while nothing was read comes only now
        return message

    def _tell(self) -> None:
        """A peer of which nothing is read gets no answer to its pings: tell it unasked that this end is there (RFC 6455, 5.5.3)."""
        self._telling = None
        if not self.read_paused or not self.handshake_complete or self.close_sent or self.transport.is_closing():
            return
        if self._stuck is None:
            self.conn.send_pong(b"")
            self.transport.write(b"".join(self.conn.data_to_send()))
        self._telling = self.loop.call_later(self.here_s, self._tell)

    def send_keepalive_ping(self) -> None:
        left_s = self._heard_at + (self.ping_interval or 0.0) - self.loop.time()
        if left_s > 0:
            self.ping_timer = self.loop.call_later(left_s, self.send_keepalive_ping)
        else:
            super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        excused = self.read_paused or self._stuck is not None or self._heard_at > self.ping_sent_at or self._pauses()
        if excused and not self.transport.is_closing():
            self.pong_timer = self.pending_ping_payload = None
            self.schedule_ping()
        else:
            super().keepalive_timeout()

    def _pauses(self) -> bool:
        """Whether a client is silent whose kernel is not: it stands still (`less` holds up what it prints, say), and is given time.

        An agent or another server never stands still for so long. See tcp(7), TCP_INFO: how often was sent or asked again in vain.
        """
        line = self.transport.get_extra_info("socket")
        if line is None or line.family == socket.AF_UNIX or self.transport.is_closing():
            return False
        if not self.scope["path"].startswith(CLIENTS) or self.loop.time() - self._heard_at > self.patience_s:
            return False
        with socket.socket(fileno=os.dup(line.fileno())) as own:
            _, _, sent, asked = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)
        return max(sent, asked) < IN_VAIN

    def stop_keepalive(self) -> None:
        super().stop_keepalive()
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None

    async def run_asgi(self) -> None:
        if self._shown is not None:
            cast(Any, self.scope)["extensions"][SHOWN] = self._shown
        # Closing sooner could cut what a client that pauses has not taken yet; what an agent has not taken is of no use any more.
        self.close_timeout = self.agent_close_s if self.scope["path"].startswith(AGENTS) else self.patience_s
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            # A refusal is an end of the handshake, too; uvicorn would log it as a fault of the application.
            self.handshake_complete = True


class BoundedProtocol(_Impatient, HttpToolsProtocol):
    """uvicorn's protocol with a bound on headers and on the time until they are there."""

    header_s = HEADER_S
    _header_bytes = 0
    _too_long = False
    _deadline: asyncio.TimerHandle | None = None
    _shown: Shown | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._shown = shown_by(transport)
        self.have_the_kernel_watch()
        self._deadline = self.loop.call_later(self.header_s, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Whatever it is: blank lines before a request begin none, and end uvicorn's wait for one.
        if self._deadline is None and self.cycle is not None and self.cycle.response_complete:
            self._deadline = self.loop.call_later(self.header_s, self._late)
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._shown is not None:
            cast(Any, self.scope)["extensions"] = {SHOWN: self._shown}

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_time()
        self._header_bytes = 0
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES_MAX:
            # httptools reports what a callback raises as a parse error, which is answered with 400 and ends the connection.
            self._too_long = True
            raise ValueError(f"headers over {HEADER_BYTES_MAX} bytes")

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(f"the path and headers are over {HEADER_BYTES_MAX} bytes" if self._too_long else msg)

    def _in_time(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()


class ApiServer(uvicorn.Server):
    """A uvicorn server that waits for an event instead of ticking, leaves signals alone, and ends its streams when it stops."""

    def __init__(
        self,
        app: Litestar,
        service: Service,
        protocol: type[BoundedProtocol] = BoundedProtocol,
        tls: ListenerTls | None = None,
    ) -> None:
        self.turns = Turns(cast(Any, app))
        config = uvicorn.Config(
            cast(Any, self.turns),
            http=protocol,
            ws=StreamProtocol,
            ws_max_size=MESSAGE_BYTES_MAX,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
            backlog=BACKLOG,
            limit_concurrency=connections_max(),
            headers=[(API_HEADER, str(service.api_version))],
            ssl_context_factory=(lambda *_: tls.context) if tls is not None else None,
        )
        super().__init__(config)
        self._service = service
        self._stop = asyncio.Event()

    async def main_loop(self) -> None:
        # uvicorn sets them at each of its ticks, of which there are none here.
        self.server_state.default_headers = self.config.encoded_headers
        await self._stop.wait()

    def stop(self) -> None:
        """Begin a graceful end: streams end, calls that run are finished, then `serve` returns."""
        self.should_exit = True
        self._stop.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to whoever runs this server."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.close()
        await super().shutdown(sockets)


def connections_max() -> int:
    """Return how many connections this process can hold at a time: as many as the machine lets it open files, within a bound.

    It raises the soft limit to the hard one. A server that meets the limit by itself cannot even accept, and refuse.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_MAX + FILES_SPARED
    files = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    else:
        files = max(files, min(soft, wanted) if soft != resource.RLIM_INFINITY else wanted)
    return max(1, min(CONNECTIONS_MAX, files - FILES_SPARED))


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any that is free. Raises Unavailable naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        mend = "stop what uses it (ss -ltnp shows it), or choose another with --api"
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror}", mend=mend) from None
    listener.setblocking(False)
    return listener


@contextlib.asynccontextmanager
async def serving(
    app: Litestar,
    service: Service,
    listener: socket.socket,
    protocol: type[BoundedProtocol] = BoundedProtocol,
    *,
    tls: ListenerTls | None = None,
) -> AsyncIterator[ApiServer]:
    """Serve `app` on `listener` until the context ends, then end gracefully; that closes `service`, too."""
    server = ApiServer(app, service, protocol, tls)
    task = asyncio.create_task(server.serve([listener]), name="api server")
    try:
        yield server
    finally:
        server.stop()
        await task
