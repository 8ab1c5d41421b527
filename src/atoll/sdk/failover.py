"""One transport over several servers: the one in use until it fails, then the next, at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from atoll.model.errors import DeadlineExceeded, OutcomeUnknown, Unavailable
from atoll.model.membership import API_VERSION
from atoll.sdk.http import HttpTransport
from atoll.sdk.transport import (
    CLOSE_S,
    CONNECT_S,
    REQUEST_S,
    SILENCE_S,
    Address,
    Answer,
    Lines,
    Transport,
    Unreachable,
    addresses_of,
)
from atoll.sdk.trust import Tls

if TYPE_CHECKING:
    from atoll.model.ports.control_plane import Channel

CONNECT_ONE_S = 1.0
"""The longest wait for a connection to one of several servers."""

T = TypeVar("T")
Choose = Callable[[int], int]
"""Returns the number of the server to begin with, below the number of servers."""


def transport_to(
    addresses: str,
    token: str | None,
    *,
    agent: str = "atoll",
    ca: str | None = None,
    tls: Tls | None = None,
    api_version: int = API_VERSION,
    first: Choose | None = None,
) -> Transport:
    """Return the way to one server, or to several (`A,B,C`). `ca` is as for `Tls`, in whose place a whole `tls` may be given."""
    found = addresses_of(addresses)
    if tls is None and any(address.scheme == "https" for address in found):
        tls = Tls(ca)
    connect_s = CONNECT_S if len(found) == 1 else CONNECT_ONE_S
    made = [HttpTransport(address, token, agent=agent, tls=tls, connect_s=connect_s, api_version=api_version) for address in found]
    return made[0] if len(made) == 1 else Failover(made, begin=first(len(made)) if first is not None else 0)


class Failover:
    """See `transport.Transport`. All calls use one server, so that who writes can read it back there."""

    def __init__(self, transports: Sequence[HttpTransport], *, begin: int = 0) -> None:
        self._transports = tuple(transports)
        self._at = begin % len(self._transports)

    @property
    def address(self) -> Address:
        """Of the server in use."""
        return self._transports[self._at].address

    @property
    def each(self) -> tuple[HttpTransport, ...]:
        """All of the servers, for what each must hear."""
        return self._transports

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float = REQUEST_S
    ) -> Answer:
        """As `HttpTransport.request`. What has reached a server is not sent to another here: the caller knows whether it may be."""
        error: Unavailable | None = None
        for _ in self._transports:
            at, transport = self._at, self._transports[self._at]
            try:
                answer = await transport.request(method, path, headers=headers, body=body, timeout_s=timeout_s)
            except Unreachable as unreachable:
                error = unreachable
                self._leave(at)
                continue
            except (Unavailable, OutcomeUnknown, DeadlineExceeded):
                self._leave(at)
                raise
            if answer.status in (502, 503):
                self._leave(at)  # it lives, but its store does not answer: the next try is another's
            return answer
        assert error is not None  # noqa: S101 (there is at least one transport)
        raise error

    @asynccontextmanager
    async def lines(self, path: str, *, silence_s: float = SILENCE_S) -> AsyncIterator[Lines]:
        """As `HttpTransport.lines`. A server is left when its stream breaks, or is Unavailable to who reads it."""
        async with AsyncExitStack() as stack:
            lines = await self._first(lambda one: stack.enter_async_context(one.lines(path, silence_s=silence_s)))
            at = self._at
            try:
                yield lines
            except Unavailable:
                self._leave(at)
                raise

    async def channel(self, path: str, *, acts: bool = False, close_s: float = CLOSE_S) -> Channel:
        return await self._first(lambda one: one.channel(path, acts=acts, close_s=close_s))

    async def close(self) -> None:
        await asyncio.gather(*(one.close() for one in self._transports))

    async def _first(self, begin: Callable[[HttpTransport], Awaitable[T]]) -> T:
        """Begin a stream at the server in use, or at the next that takes it; not where the last may have begun it."""
        error: Unavailable | None = None
        for _ in self._transports:
            at = self._at
            try:
                return await begin(self._transports[at])
            except Unavailable as unavailable:
                error = unavailable
                self._leave(at)
            except OutcomeUnknown:
                self._leave(at)
                raise
        assert error is not None  # noqa: S101 (as above)
        raise error

    def _leave(self, at: int) -> None:
        """Use the next server from now on, unless another call has gone on already."""
        if self._at == at:
            self._at = (at + 1) % len(self._transports)
