"""One request to the registry, with its body as it comes; and a blob as it goes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from litestar.types import Receive, Scope, Send
from msgspec import Struct

from atoll.api.http.answers import SLOW_READER_S, Header
from atoll.api.registry.registry import Registry
from atoll.api.service import Caller
from atoll.model.errors import TooLarge, Unavailable


class Asked(Struct, frozen=True):
    """One request to the registry."""

    scope: Any
    receive: Receive
    caller: Caller
    repository: str
    rest: tuple[str, ...]
    """Of the path, what the route's pattern caught."""
    query: dict[str, str]

    def header(self, name: bytes) -> str:
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name), "")

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body. Raises Unavailable when the client goes away in the middle."""
        while True:
            message: Any = await self.receive()
            if message["type"] != "http.request":
                raise Unavailable("the client went away")
            if body := message.get("body", b""):
                yield body
            if not message.get("more_body", False):
                return

    async def body(self, bytes_max: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in self.chunks():
            size += len(part)
            if size > bytes_max:
                raise TooLarge(f"the body is over {bytes_max} bytes")
            parts.append(part)
        return b"".join(parts)


class BlobAnswer:
    """A blob, or a part of it, from disk."""

    def __init__(self, registry: Registry, digest: str, start: int, count: int, status: int, headers: list[Header]) -> None:
        self._registry = registry
        self._part = (digest, start, count)
        self._status = status
        self._headers = [*headers, (b"content-length", b"%d" % count)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self._status, "headers": self._headers})
        if scope.get("method") != "HEAD":
            async for data in self._registry.blobs.read(*self._part):
                async with asyncio.timeout(SLOW_READER_S):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
