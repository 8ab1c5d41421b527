"""Envoy's admin interface, which listens on a unix socket only."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import httptools
from msgspec import Struct

from atoll.model.errors import Unavailable

TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 256 << 20
"""`/clusters` of 10,000 apps has some 50 MB."""


FILTERED_CLUSTERS_MAX = 20
"""Envoy is asked for more than so many clusters by asking for all."""
_COUNTED = ("rq_active", "rq_pending_active", "rq_total")


class Admin(Protocol):
    """`EnvoyAdmin`, as far as those who only read need it."""

    async def get(self, path: str) -> bytes: ...


class Requests(Struct, frozen=True):
    """`active` are under way or waiting for a connection; `total` has ever been sent."""

    active: int
    total: int


class _Answer:
    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


class EnvoyAdmin:
    """Calls to the admin interface at `socket`."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def get(self, path: str) -> bytes:
        """Raises Unavailable when Envoy does not answer with 200 within `TIMEOUT_S`."""
        return await self._call("GET", path)

    async def post(self, path: str) -> bytes:
        """Raises Unavailable when Envoy does not answer with 200; it may have done what it was told."""
        return await self._call("POST", path)

    async def requests(self, clusters: tuple[str, ...]) -> dict[str, Requests]:
        """Return what goes on at each host of `clusters`, by `ADDRESS:PORT`, over all of them."""
        path = "/clusters"
        if len(clusters) <= FILTERED_CLUSTERS_MAX:
            path += "?filter=" + quote("^(" + "|".join(re.escape(cluster) for cluster in clusters) + ")$", safe="")
        wanted = set(clusters)
        counts: dict[str, Counter[str]] = {}
        for line in (await self.get(path)).decode(errors="replace").splitlines():
            parts = line.split("::")
            if len(parts) == 4 and parts[0] in wanted and parts[2] in _COUNTED:
                counts.setdefault(parts[1], Counter())[parts[2]] += int(parts[3])
        return {
            host: Requests(active=each["rq_active"] + each["rq_pending_active"], total=each["rq_total"])
            for host, each in counts.items()
        }

    async def _call(self, method: str, path: str) -> bytes:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._exchange(method, path)
        except (OSError, TimeoutError, httptools.HttpParserError) as error:
            raise Unavailable(f"Envoy's admin interface does not answer {path}: {error or 'timeout'}") from None

    async def _exchange(self, method: str, path: str) -> bytes:
        with short(self._socket) as socket:
            reader, writer = await asyncio.open_unix_connection(str(socket))
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
            answer = _Answer()
            parser = httptools.HttpResponseParser(answer)
            while not answer.complete:
                data = await reader.read(1 << 16)
                if not data or len(answer.body) > ANSWER_BYTES_MAX:
                    raise Unavailable(f"Envoy's admin interface broke off its answer to {path}")
                parser.feed_data(data)
            if parser.get_status_code() != 200:
                raise Unavailable(f"Envoy's admin interface answers {path} with {parser.get_status_code()}")
            return bytes(answer.body)
        finally:
            writer.close()


@contextmanager
def short(socket: Path) -> Iterator[Path]:
    """Yield another name for `socket` that fits into the 107 bytes which the kernel allows for a unix socket's path."""
    directory = os.open(socket.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{directory}") / socket.name
    finally:
        os.close(directory)
