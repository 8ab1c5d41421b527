"""A message channel over a WebSocket (`model.streams` says what is in the messages)."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.frames import DATA_OPCODES
from websockets.protocol import State

from atoll.model.errors import OutcomeUnknown, Unavailable
from atoll.model.membership import API_HEADER, API_VERSION
from atoll.model.streams import MESSAGE_BYTES_MAX
from atoll.sdk import answers
from atoll.sdk.transport import CLOSE_S, CONNECT_S, Address, Unreachable

QUEUE_MESSAGES_MAX = 16
"""Messages that are read ahead of the consumer; behind them TCP holds the sender back."""
PING_S = 10.0
"""A peer of which nothing is heard for so long after a ping is gone."""


class _Connection(ClientConnection):
    """Pings however its reader stands, and judges the peer by whatever is heard of it.

    While the reader pauses nothing is heard, and the peer is not judged; while the peer's pauses, its pings and pongs come unasked
    (`api/http/serve.py`). The library's own way is to end a stream for a pong that lies unread.
    """

    _heard = True
    _deaf = False

    @property
    def asked(self) -> bool:
        """Whether the handshake may have reached the server."""
        return self.request is not None

    def data_received(self, data: bytes) -> None:
        self._heard = True
        super().data_received(data)

    def process_event(self, event: Any) -> None:
        if not self._deaf or getattr(event, "opcode", None) not in DATA_OPCODES:
            super().process_event(event)

    def deafen(self) -> None:
        """Nobody receives any more: read on, for behind the messages that are dropped is the peer's end."""
        self._deaf = True
        if self.recv_messages.paused:
            self.recv_messages.paused = False
            self.transport.resume_reading()

    async def keepalive(self) -> None:
        assert self.ping_interval is not None  # noqa: S101 (`dial` gives one)
        paused = False
        while True:
            await asyncio.sleep(self.ping_interval)
            if not (self._heard or paused or self.recv_messages.paused):
                self.set_connection_exc(TimeoutError(f"nothing was heard for {self.ping_interval:g} s"))
                self.transport.abort()
                return
            paused, self._heard = self.recv_messages.paused, False
            if self.protocol.state is State.OPEN and not self.paused:  # behind what waits to be sent, a ping says nothing
                self.protocol.send_ping(b"")
                self.send_data()


class WebSocketChannel:
    """See `ports.control_plane.Channel`."""

    def __init__(self, socket: _Connection, close_s: float) -> None:
        self._socket = socket
        self._close_s = close_s

    async def send(self, message: bytes) -> None:
        """Raises Unavailable when the other end is gone."""
        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise Unavailable(f"the stream broke: {error}") from None

    async def receive(self) -> bytes | None:
        """Return the next message; None when the other end has closed. Raises Unavailable when the connection breaks."""
        try:
            message = await self._socket.recv()
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code in (1000, 1001, 1005):
                return None
            if error.rcvd is not None and error.rcvd.reason:
                raise Unavailable(f"the stream was closed: {error.rcvd.reason}") from None
            raise Unavailable("the stream broke") from None
        return message.encode() if isinstance(message, str) else message

    async def gone(self) -> None:
        await self._socket.wait_closed()

    async def close(self) -> None:
        """Wait until the other end has taken what was sent; in a task that is being cancelled, for `CLOSE_S` at most."""
        task = asyncio.current_task()
        self._socket.deafen()
        try:
            async with asyncio.timeout(CLOSE_S if task is not None and task.cancelling() else self._close_s):
                await self._socket.close()
        except TimeoutError:
            self._socket.transport.abort()


async def dial(
    address: Address,
    token: str | None,
    path: str,
    *,
    tls: ssl.SSLContext | None = None,
    api_version: int = API_VERSION,
    reached: socket.socket | None = None,
    acts: bool = False,
    close_s: float = CLOSE_S,
    ping_s: float = PING_S,
) -> WebSocketChannel:
    """Open `path`, over `reached` where a connection is there already; `acts` and `close_s` as in `transport.Transport.channel`.

    Raises the error that the server answers with; Unreachable: it was not asked; Unavailable, or with `acts` OutcomeUnknown: it may
    have been.
    """
    headers = {API_HEADER: str(api_version)} | ({"Authorization": f"Bearer {token}"} if token else {})
    uri = f"{'wss' if address.scheme == 'https' else 'ws'}://{address.authority}{address.base}{path}"
    made: list[_Connection] = []

    def make(*arguments: Any, **options: Any) -> _Connection:
        made.append(_Connection(*arguments, **options))
        return made[-1]

    options: dict[str, Any] = {
        "additional_headers": headers,
        "user_agent_header": "atoll",
        "compression": None,  # what runs through is already compressed, or wants no delay
        "proxy": None,
        "open_timeout": CONNECT_S,
        "ping_interval": ping_s,
        "close_timeout": None,  # the channel has its own
        "max_size": MESSAGE_BYTES_MAX,
        "max_queue": QUEUE_MESSAGES_MAX,
        "create_connection": make,
    }
    if address.scheme == "https":
        options["ssl"] = tls or ssl.create_default_context()
    if reached is not None:
        options["sock"] = reached
    dialled = unix_connect(address.socket, uri, **options) if address.socket else connect(uri, **options)
    try:
        await dialled
        return WebSocketChannel(made[-1], close_s)
    except InvalidStatus as error:
        raise answers.from_answer(error.response.status_code, bytes(error.response.body or b"")) from None
    except (InvalidHandshake, EOFError, OSError) as error:
        what = f"{address}{_why(error)}"
    if not any(connection.asked for connection in made):
        raise Unreachable(what)
    raise OutcomeUnknown(f"{what}; it may have been begun") if acts else Unavailable(what)


def _why(error: Exception) -> str:
    match error:
        case ssl.SSLError():
            return f": no TLS: {getattr(error, 'verify_message', '') or error.reason}"
        case TimeoutError():
            return f" did not open the stream within {CONNECT_S:.0f} s"
        case OSError():
            return f" does not answer: {error.strerror or error}"
        case _:
            return f": the stream could not be opened: {error}"
