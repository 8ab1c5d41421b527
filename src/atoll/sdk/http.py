"""The transport over sockets: a small pool of persistent HTTP/1.1 connections, and WebSockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from atoll.model.errors import DeadlineExceeded, OutcomeUnknown, TooLarge, Unavailable
from atoll.model.membership import API_HEADER, API_VERSION, Bundle, check_skew
from atoll.sdk import answers
from atoll.sdk.connection import Connection
from atoll.sdk.transport import (
    BODY_BYTES_MAX,
    CLOSE_S,
    CONNECT_S,
    LINE_BYTES_MAX,
    REQUEST_S,
    SILENCE_S,
    Address,
    Answer,
    Unreachable,
    addresses_of,
)
from atoll.sdk.trust import Tls, chosen, pins_of, unverified

if TYPE_CHECKING:
    from atoll.model.ports.control_plane import Channel

IDLE_MAX = 8
"""Idle connections that are kept."""


class HttpTransport:
    """Calls the API at `address` with `token`. Safe for many tasks of one event loop."""

    def __init__(
        self,
        address: str | Address,
        token: str | None = None,
        *,
        agent: str = "atoll",
        tls: Tls | None = None,
        connect_s: float = CONNECT_S,
        api_version: int = API_VERSION,
    ) -> None:
        self.address = Address.parse(address) if isinstance(address, str) else address
        self._token = token
        self._idle: list[Connection] = []
        self._tls = (tls or Tls()) if self.address.scheme == "https" else None
        self._connect_s = connect_s
        self._version = api_version
        fixed = [f"Host: {self.address.authority}", f"User-Agent: {agent}", "Accept: application/json"]
        fixed.append(f"{API_HEADER}: {api_version}")
        if token:
            fixed.append(f"Authorization: Bearer {token}")
        self._fixed = "".join(f"{line}\r\n" for line in fixed)

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float = REQUEST_S
    ) -> Answer:
        """Return the answer, whatever its status.

        Raises Unavailable: nothing was changed. OutcomeUnknown: a write was sent and its answer did not come; repeat it only
        under an idempotency key. DeadlineExceeded: as OutcomeUnknown, but for a read.
        """
        sent = False
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    connection, fresh = await self._take()
                    sent = True
                    connection.send(self._head(method, path, headers, body), body)
                    try:
                        return await self._answer(connection)
                    except Unavailable:
                        # The server may close a kept connection just as it is used. Writes carry an idempotency key, or are safe
                        # to repeat (the control-plane port), so that one more try is right even if it had read the request.
                        if fresh or connection.began:
                            raise
        except TimeoutError:
            message = f"{self.address} gave no answer within {timeout_s:.0f} s"
            raise (OutcomeUnknown(message) if sent and method != "GET" else DeadlineExceeded(message)) from None
        except Unreachable:
            raise
        except Unavailable as error:
            if sent and method != "GET":
                raise OutcomeUnknown(f"{self.address}: {error}") from None
            raise

    @asynccontextmanager
    async def lines(self, path: str, *, silence_s: float = SILENCE_S) -> AsyncIterator[LineStream]:
        """GET a stream of lines. Raises the error that the server answers with."""
        connection, _ = await self._take(fresh=True)
        try:
            connection.send(self._head("GET", path, None, b""), b"")
            try:
                async with asyncio.timeout(REQUEST_S):
                    await connection.head()
                    self._check_version(connection.headers)
                    if connection.status >= 400:
                        raise answers.from_answer(connection.status, await _body(connection))
            except TimeoutError:
                raise Unavailable(f"{self.address} gave no answer within {REQUEST_S:.0f} s") from None
            yield LineStream(connection, silence_s)
        finally:
            connection.close()

    async def channel(self, path: str, *, acts: bool = False, close_s: float = CLOSE_S) -> Channel:
        """See `transport.Transport`."""
        from atoll.sdk.websocket import dial  # takes 35 ms to import, and most commands need none

        context = await self._context()
        reached = await self._reach() if self._connect_s < CONNECT_S else None
        return await dial(
            self.address, self._token, path, tls=context, api_version=self._version, reached=reached, acts=acts, close_s=close_s
        )

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @property
    def _generation(self) -> int:
        return self._tls.generation if self._tls is not None else 0

    async def _context(self) -> ssl.SSLContext | None:
        return await self._tls.context(self._fetch_bundle) if self._tls is not None else None

    async def _fetch_bundle(self, context: ssl.SSLContext) -> str:
        """Return the server's bundle, over a connection that nothing is trusted of: the caller checks it against its pins."""
        connection = await self._connect(context)
        try:
            connection.send(
                f"GET {self.address.base}/v1/identity/bundle HTTP/1.1\r\nHost: {self.address.authority}\r\n\r\n".encode(), b""
            )
            async with asyncio.timeout(REQUEST_S):
                await connection.head()
                answer = Answer(connection.status, connection.headers, await _body(connection))
        except TimeoutError:
            raise Unavailable(f"{self.address} gave no answer within {REQUEST_S:.0f} s") from None
        finally:
            connection.close()
        return answers.read(answer, Bundle).bundle

    async def _take(self, *, fresh: bool = False) -> tuple[Connection, bool]:
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.usable and connection.generation == self._generation:
                return connection, False
            connection.close()
        return await self._connect(await self._context()), True

    async def _connect(self, context: ssl.SSLContext | None) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                if self.address.socket:
                    _, connection = await loop.create_unix_connection(Connection, self.address.socket)
                else:
                    _, connection = await loop.create_connection(Connection, self.address.host, self.address.port, ssl=context)
        except TimeoutError:
            waited = f"no connection within {self._connect_s:.0f} s"
            raise Unreachable(f"{self.address} does not answer ({waited})", mend=_MEND) from None
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(f"{self.address} is not trusted: {error.verify_message}", mend=_TRUST_MEND) from None
        except ssl.SSLError as error:
            raise Unreachable(f"{self.address} does not speak TLS as expected: {error.reason or error}", mend=_MEND) from None
        except OSError as error:
            raise Unreachable(f"{self.address} does not answer: {_words(error)}", mend=_MEND) from None
        connection.generation = self._generation
        return connection

    async def _reach(self) -> socket.socket | None:
        """Return a connected socket: to open a stream may take an agent some seconds, to see that nobody is there may not."""
        if self.address.socket:
            return None
        loop = asyncio.get_running_loop()
        reached: socket.socket | None = None
        try:
            async with asyncio.timeout(self._connect_s):
                found = await self._look_up()
                reached = socket.socket(found[0][0], found[0][1])
                reached.setblocking(False)
                await loop.sock_connect(reached, found[0][4])
        except (TimeoutError, OSError) as error:
            if reached is not None:
                reached.close()
            words = _words(error) if isinstance(error, OSError) else f"no connection within {self._connect_s:.0f} s"
            raise Unreachable(f"{self.address} does not answer: {words}", mend=_MEND) from None
        return reached

    async def _look_up(self) -> list[tuple[Any, ...]]:
        """Return where the server's name leads; what is a number is known without a thread that looks it up. Raises OSError."""
        host, port = self.address.host, self.address.port
        try:
            return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
        except socket.gaierror:
            return list(await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM))

    async def _answer(self, connection: Connection) -> Answer:
        try:
            await connection.head()
            body = await _body(connection)
        except BaseException:
            connection.close()
            raise
        answer = Answer(connection.status, connection.headers, body)
        if connection.ended and len(self._idle) < IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.close()
        self._check_version(answer.headers)
        return answer

    def _check_version(self, headers: Mapping[str, str]) -> None:
        check_skew(self._version, headers.get(API_HEADER), they=f"the server at {self.address}", we="this side")

    def _head(self, method: str, path: str, headers: Mapping[str, str] | None, body: bytes) -> bytes:
        lines = [f"{method} {self.address.base}{path} HTTP/1.1\r\n{self._fixed}"]
        if headers:
            lines.extend(f"{name}: {value}\r\n" for name, value in headers.items())
        if body:
            lines.append(f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n")
        elif method not in ("GET", "HEAD"):
            lines.append("Content-Length: 0\r\n")
        lines.append("\r\n")
        return "".join(lines).encode("latin-1")


async def pinned(addresses: str, ca: str | None) -> str | None:
    """Return the authority (PEM) that `ca` (as for `Tls`) means at the first server that answers; None for the system's.

    Raises Unauthenticated: no server has what is pinned; Unavailable.
    """
    if ca is None or not (pins := pins_of(ca)):
        return ca
    error: Unavailable | None = None
    for address in addresses_of(addresses):
        try:
            return "".join(chosen(await HttpTransport(address)._fetch_bundle(unverified()), pins))
        except Unavailable as unavailable:
            error = unavailable
    assert error is not None  # noqa: S101 (there is at least one address)
    raise error


_TRUST_MEND = "name the cell's authority with --ca or ATOLL_CA, a PEM file or its sha256 fingerprint"
_MEND = "start it with `atoll up`, or name another with --api or ATOLL_API"


def _words(error: OSError) -> str:
    match error:
        case ConnectionRefusedError():
            return "connection refused"
        case FileNotFoundError():
            return "no such socket"
        case PermissionError():
            return "not allowed to open the socket"
        case _:
            return error.strerror or str(error)


async def _body(connection: Connection) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := await connection.read():
        size += len(chunk)
        if size > BODY_BYTES_MAX:
            raise TooLarge(f"the answer is over {BODY_BYTES_MAX} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


class LineStream:
    """See `transport.Lines`."""

    def __init__(self, connection: Connection, silence_s: float) -> None:
        self._connection = connection
        self._silence_s = silence_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts: list[bytes] = []
        size = 0
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    chunk = await self._connection.read()
            except TimeoutError:
                raise Unavailable(f"the stream was silent for {self._silence_s:.0f} s") from None
            if not chunk:
                raise Unavailable("the server ended the stream")
            *whole, rest = chunk.split(b"\n")
            for line in whole:
                parts.append(line)
                joined = b"".join(parts)
                parts.clear()
                size = 0
                if joined:
                    yield joined
            parts.append(rest)
            size += len(rest)
            if size > LINE_BYTES_MAX:
                raise TooLarge(f"a line of the stream is over {LINE_BYTES_MAX} bytes")
