"""What a client needs of the wire: calls, line streams and message channels. Over sockets in production, in memory in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol
from urllib.parse import quote, urlsplit

from msgspec import Struct

from atoll.model.errors import Invalid, Unavailable
from atoll.model.ports.control_plane import Channel

ADDRESS_DEFAULT = "http://127.0.0.1:7600"
CONNECT_S = 5.0
"""The longest wait for a connection."""
CLOSE_S = 2.0
"""The longest wait for the other end of a channel that is closed to say that it has heard."""
REQUEST_S = 30.0
"""The longest wait for a whole answer."""
SILENCE_S = 25.0
"""A stream that is silent for so long is broken: the server sends something at least every 10 s."""
LINE_BYTES_MAX = 128 << 20
"""The longest line of a stream: the first batch of an ingress with 10,000 apps has some tens of MiB."""
BODY_BYTES_MAX = 64 << 20
SERVERS_MAX = 32
"""Addresses of one cell's servers."""


class Address(Struct, frozen=True):
    """Where an API answers: `http://HOST:PORT`, `https://HOST`, or `unix:///path` (also a bare absolute path)."""

    scheme: str
    host: str
    port: int
    socket: str | None = None
    base: str = ""
    """A path before `/v1`, without its last slash."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raise Invalid for anything that is not an address."""
        if text.startswith("/"):
            return cls("unix", "localhost", 0, text)
        if "://" not in text:
            text = f"http://{text}"
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise Invalid(f"api: {text!r} is not an address: {error}", field="api", mend=_MEND) from None
        if parts.scheme == "unix" and parts.path:
            return cls("unix", "localhost", 0, parts.path)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise Invalid(f"api: {text!r} is not an address", field="api", mend=_MEND)
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), None, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port in (0, 80, 443) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"unix://{self.socket}" if self.socket else f"{self.scheme}://{self.authority}{self.base}"


def addresses_of(text: str) -> tuple[Address, ...]:
    """Return the addresses in a list with commas, in order. Raises Invalid."""
    found = tuple(dict.fromkeys(Address.parse(part.strip()) for part in text.split(",") if part.strip()))
    if not found:
        raise Invalid(f"api: {text!r} is not an address", field="api")
    if len(found) > SERVERS_MAX:
        raise Invalid(f"api: {len(found)} addresses; at most {SERVERS_MAX}", field="api")
    return found


_MEND = f"write it like {ADDRESS_DEFAULT} or unix:///run/atoll.sock"


class Unreachable(Unavailable):
    """Nothing listens at the address; nothing was sent."""


class Answer(Struct, frozen=True):
    """Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Lines(Protocol):
    """The lines of an answer that has no end. An answer other than 200 has its error raised when it is opened."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield each line without its newline. Raises Unavailable when the connection breaks or is silent for too long."""
        ...


class Transport(Protocol):
    """Every call may raise Unavailable (the server does not answer) or OutcomeUnknown (it may have acted)."""

    @property
    def address(self) -> Address:
        """Of the server in use."""
        ...

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float = REQUEST_S
    ) -> Answer:
        """Return the answer, whatever its status."""
        ...

    def lines(self, path: str, *, silence_s: float = SILENCE_S) -> AbstractAsyncContextManager[Lines]:
        """GET a stream of lines. Raises the error that the server answers with."""
        ...

    async def channel(self, path: str, *, acts: bool = False, close_s: float = CLOSE_S) -> Channel:
        """Open a WebSocket. Raises the error that the server answers with.

        With `acts`, to open it is to begin something: it is asked for once, and OutcomeUnknown is raised where that broke. Closing
        it waits for up to `close_s` until the other end has taken what was sent.
        """
        ...

    async def close(self) -> None: ...


def path(*segments: str, **query: str | int | None) -> str:
    """Return `/v1/…` with each segment and value quoted; a query value of None is left out."""
    text = "/v1/" + "/".join(quote(segment, safe="") for segment in segments)
    pairs = [f"{key}={quote(str(value), safe=',')}" for key, value in query.items() if value is not None]
    return f"{text}?{'&'.join(pairs)}" if pairs else text
