"""How a call is made: repeated while it is cut, read page by page, and each write acting once."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

from atoll.model import codec
from atoll.model.errors import OutcomeUnknown, Unavailable
from atoll.model.views import (
    PAGE_LIMIT_MAX,
    Page,
)
from atoll.sdk import answers
from atoll.sdk.transport import Answer, Transport, Unreachable, path

TRIES_MAX = 3
RETRY_DELAY_S = 0.1
"""Before the second try; doubled for each one after."""

T = TypeVar("T")


class Calls:
    """What every part of the client calls by."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def _get(self, kind: type[T], where: str) -> T:
        return answers.read(await self._repeat(lambda: self._transport.request("GET", where)), kind)

    async def _all(self, kind: type[T], *segments: str, **query: str | None) -> list[T]:
        """Return all items of a list, page by page."""
        items: list[T] = []
        after: str | None = None
        while True:
            where = path(*segments, **query, limit=PAGE_LIMIT_MAX, after=after)
            page: Page[T] = await self._get(Page[kind], where)  # type: ignore[valid-type]
            items.extend(page.items)
            if page.next is None:
                return items
            after = page.next

    async def _write(
        self, kind: type[T], method: str, where: str, record: object | None = None, *, if_revision: int | None = None
    ) -> T:
        return answers.read(await self._send(method, where, record, if_revision), kind)

    async def _delete(self, where: str) -> None:
        answers.check(await self._send("DELETE", where))

    async def _send(self, method: str, where: str, record: object | None = None, if_revision: int | None = None) -> Answer:
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        if if_revision is not None:
            headers["If-Match"] = f'"{if_revision}"'
        body = b"" if record is None else codec.encode(record)
        return await self._repeat(lambda: self._transport.request(method, where, headers=headers, body=body))

    async def _repeat(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Make a call up to `TRIES_MAX` times while it is cut, refused for now, or of unknown outcome. Only for what acts once."""
        delay = RETRY_DELAY_S
        for _ in range(TRIES_MAX - 1):
            try:
                answer = await call()
                if answer.status not in (502, 503) and not _unknown(answer):
                    return answer
            except Unreachable:
                raise
            except (Unavailable, OutcomeUnknown):
                pass
            await asyncio.sleep(delay)
            delay *= 2
        return await call()


def _unknown(answer: Answer) -> bool:
    """Whether the server itself does not know if it acted: its store broke, say."""
    return answer.status == OutcomeUnknown.status and isinstance(answers.from_answer(answer.status, answer.body), OutcomeUnknown)
