"""A message channel over a WebSocket (`model.streams` says what is in the messages)."""

from __future__ import annotations

import socket
import ssl
from typing import Any

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from atoll.model.errors import Unavailable
from atoll.model.membership import API_HEADER, API_VERSION
from atoll.model.streams import MESSAGE_BYTES_MAX
from atoll.sdk import answers
from atoll.sdk.transport import CONNECT_S, Address

QUEUE_MESSAGES_MAX = 16
"""Messages that are read ahead of the consumer; behind them TCP holds the sender back."""
PING_S = 10.0
"""A peer that does not answer a ping within this time is gone."""
CLOSE_S = 2.0


class WebSocketChannel:
    """See `ports.control_plane.Channel`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

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

    async def close(self) -> None:
        await self._socket.close()


async def dial(
    address: Address,
    token: str | None,
    path: str,
    *,
    tls: ssl.SSLContext | None = None,
    api_version: int = API_VERSION,
    reached: socket.socket | None = None,
) -> WebSocketChannel:
    """Open `path`, over `reached` where a connection is there already.

    Raises the error that the server answers with, or Unavailable.
    """
    headers = {API_HEADER: str(api_version)} | ({"Authorization": f"Bearer {token}"} if token else {})
    uri = f"{'wss' if address.scheme == 'https' else 'ws'}://{address.authority}{address.base}{path}"
    options: dict[str, Any] = {
        "additional_headers": headers,
        "user_agent_header": "atoll",
        "compression": None,  # what runs through is already compressed, or wants no delay
        "proxy": None,
        "open_timeout": CONNECT_S,
        "ping_interval": PING_S,
        "ping_timeout": PING_S,
        "close_timeout": CLOSE_S,
        "max_size": MESSAGE_BYTES_MAX,
        "max_queue": QUEUE_MESSAGES_MAX,
    }
    if address.scheme == "https":
        options["ssl"] = tls or ssl.create_default_context()
    if reached is not None:
        options["sock"] = reached
    dialled = unix_connect(address.socket, uri, **options) if address.socket else connect(uri, **options)
    try:
        return WebSocketChannel(await dialled)
    except ssl.SSLError as error:
        raise Unavailable(f"{address}: no TLS: {getattr(error, 'verify_message', '') or error.reason}") from None
    except InvalidStatus as error:
        raise answers.from_answer(error.response.status_code, bytes(error.response.body or b"")) from None
    except (InvalidHandshake, EOFError) as error:
        raise Unavailable(f"{address}: the stream could not be opened: {error}") from None
    except TimeoutError:
        raise Unavailable(f"{address} did not open the stream within {CONNECT_S:.0f} s") from None
    except OSError as error:
        raise Unavailable(f"{address} does not answer: {error.strerror or error}") from None
