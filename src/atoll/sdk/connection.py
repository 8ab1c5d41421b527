"""One HTTP/1.1 connection: a request goes out, its answer comes back in parts, with back-pressure.

httpx does the same in ten times the memory and three times the time, and takes longer to import than most commands run.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import cast

import httptools

from atoll.model.errors import Unauthenticated, Unavailable

_REFUSED_MEND = "is this machine's clock right? Else let it join anew: atoll join-token create"
BUFFER_BYTES_MAX = 256 << 10
"""What is read ahead of the consumer before the socket is paused."""


class Connection(asyncio.Protocol):
    """Made by `loop.create_connection`; serves one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._paused = False
        self._wake: asyncio.Future[None] | None = None
        self._lost: Exception | None = None
        self._closed = False
        self.generation = 0
        """Which certificate it was made with (`Tls.generation`)."""
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._headers_done = False
        self._done = False
        self._reusable = False
        self.began = False
        """Whether a byte of the answer has come."""

    @property
    def usable(self) -> bool:
        """Whether another request may be sent on it."""
        return not self._closed and self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes) -> None:
        """Begin a request. The caller reads its answer to the end before the next, or closes."""
        if self._transport is None:
            raise Unavailable("not connected")
        self._reset()
        self._transport.write(head + body if body else head)

    async def head(self) -> None:
        """Wait until `status` and `headers` are there. Raises Unavailable when the connection breaks first."""
        while not self._headers_done:
            await self._wait()

    async def read(self) -> bytes:
        """Return the next part of the body, `b""` at its end. Raises Unavailable when the connection breaks first."""
        while not self._chunks:
            if self._done:
                return b""
            await self._wait()
        chunk = self._chunks.popleft()
        self._buffered_bytes -= len(chunk)
        if self._paused and self._buffered_bytes < BUFFER_BYTES_MAX // 2 and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return chunk

    @property
    def ended(self) -> bool:
        """Whether the answer has been read whole and the connection can serve another request."""
        return self._done and not self._chunks and self._reusable and self.usable

    def close(self) -> None:
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._lost is not None:
            if isinstance(self._lost, ssl.SSLError) and "ALERT" in (self._lost.reason or ""):
                said = (self._lost.reason or "").partition("ALERT_")[2].replace("_", " ").lower()
                raise Unauthenticated(f"the server refused our certificate: {said}", mend=_REFUSED_MEND)
            raise Unavailable(f"the connection broke: {self._lost}")
        self._wake = asyncio.get_running_loop().create_future()
        try:
            await self._wake
        finally:
            self._wake = None

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # TCP, TLS and unix sockets are all of this kind

    def data_received(self, data: bytes) -> None:
        self.began = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._lost = ConnectionError(f"not an HTTP answer: {error}")
            self.close()
        if self._buffered_bytes > BUFFER_BYTES_MAX and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._notify()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._closed = True
        if self._headers_done and not self._done and "content-length" not in self.headers and not self._chunked:
            self._done = True  # an HTTP/1.0 body ends with its connection
        self._lost = self._lost or error or ConnectionError("closed by the server")
        self._notify()

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._headers_done = self.status >= 200  # 1xx is followed by the real one

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._buffered_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._headers_done:
            self._done = True
            self._reusable = self._parser.should_keep_alive()
        else:
            self.headers = {}

    @property
    def _chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "")
