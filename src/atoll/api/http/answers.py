"""Answers as they go out: JSON, errors, streams of lines. They are ASGI applications, which cost less than response objects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import structlog
from litestar.types import Receive, Scope, Send

from atoll.model import codec
from atoll.model.errors import AtollError, Unauthenticated
from atoll.model.streams import ErrorBody
from atoll.model.views import ErrorAnswer

SLOW_READER_S = 30.0
"""A reader of a stream that takes nothing for so long is cut off; it resumes where it was."""
JSON = (b"content-type", b"application/json")
LINES = (b"content-type", b"application/x-ndjson")
NO_STORE = (b"cache-control", b"no-store")

Header = tuple[bytes, bytes]

log = structlog.get_logger()


class Answer:
    """A whole answer."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, body: bytes, status: int = 200, headers: Sequence[Header] = (JSON,)) -> None:
        self.body = body
        self.status = status
        self.headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        body = b"" if scope.get("method") == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body, "more_body": False})


class Lines:
    """A stream of lines of JSON that goes on until either side ends it. What goes wrong later is its last line, as an error."""

    __slots__ = ("ended", "patience_s", "source")

    def __init__(self, source: AsyncIterator[bytes], *, patience_s: float = SLOW_READER_S) -> None:
        self.source = source
        self.patience_s = patience_s
        self.ended: asyncio.Future[AtollError] | None = None
        """Its result, once there is one, is the stream's last line."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [LINES, NO_STORE]})
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            waits: set[asyncio.Future[Any]] = {sending, leaving} | ({self.ended} if self.ended is not None else set())
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self.ended is not None and self.ended.done() and not sending.done() and not leaving.done():
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                await self._last(send, self.ended.result())
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            close = getattr(self.source, "aclose", None)
            if close is not None:
                await close()

    async def _send(self, send: Send) -> None:
        try:
            # A silent stream must show that it is there before its first line.
            await self._piece(send, b"")
            try:
                async for piece in self.source:
                    await self._piece(send, piece)
            except AtollError as error:
                await self._last(send, error)
                return
            await self._piece(send, b"", more=False)
        except TimeoutError:
            log.info("a slow reader of a stream was cut off", after_s=self.patience_s)

    async def _last(self, send: Send, error: AtollError) -> None:
        await self._piece(send, codec.encode(error_body(error)) + b"\n")
        await self._piece(send, b"", more=False)

    async def _piece(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self.patience_s):
            await send({"type": "http.response.body", "body": data, "more_body": more})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_body(error: AtollError) -> ErrorAnswer:
    """Return an error as every answer and every stream carries it."""
    return ErrorAnswer(ErrorBody.of(error))


def error_answer(error: AtollError, status: int | None = None, headers: Sequence[Header] = ()) -> Answer:
    extra = [(b"www-authenticate", b'Bearer realm="atoll"')] if isinstance(error, Unauthenticated) else []
    return Answer(codec.encode(error_body(error)), status or error.status, (JSON, NO_STORE, *extra, *headers))


def record_answer(record: Any, status: int = 200) -> Answer:
    """Return a record as JSON; its revision, if it has one, is the ETag."""
    revision = getattr(record, "revision", None)
    if isinstance(revision, int) and not hasattr(record, "items"):
        return Answer(codec.encode(record), status, (JSON, (b"etag", b'"%d"' % revision)))
    return Answer(codec.encode(record), status)
