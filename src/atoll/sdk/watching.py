"""A watch that outlives its connection: it goes on from the last revision, and when that is gone, from the state as it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from atoll.model import codec
from atoll.model.errors import Compacted, DeadlineExceeded, Exhausted, Invalid, OutcomeUnknown, Unavailable
from atoll.model.streams import ErrorBody
from atoll.model.views import ErrorAnswer, WatchLine
from atoll.sdk import answers
from atoll.sdk.transport import Transport, path

RETRY_S = 0.2
RETRY_MAX_S = 1.0
GIVE_UP_S = 60.0
"""How long a watch tries to come back before it raises what keeps it away."""


class _Followed:
    """What a consumer of the stream has been told, so that a fresh state can be turned into the changes it missed."""

    def __init__(self, start: int | None) -> None:
        self.next = start
        self.listing: bool = start is None
        self.relisting = False
        self._known: set[tuple[str, str]] = set()
        self._seen: set[tuple[str, str]] = set()

    def begin_again(self) -> None:
        self.next, self.listing, self.relisting = None, True, True
        self._seen = set()

    def take(self, line: WatchLine) -> list[WatchLine]:
        """Return what the consumer is to be told of `line`."""
        told: list[WatchLine] = []
        if line.kind is None:
            if self.relisting:
                told = [WatchLine(revision=line.revision, kind=kind, key=key) for kind, key in sorted(self._known - self._seen)]
                self._known = self._seen
            self.listing = self.relisting = False
        elif line.key is not None:
            identity = (line.kind, line.key)
            if line.record is None:
                self._known.discard(identity)
            else:
                self._known.add(identity)
            if self.listing:
                self._seen.add(identity)
        if not self.listing:
            # Every change of a revision is sent before the next revision or bookmark begins; resume behind whole ones only.
            self.next = max(self.next or 0, line.revision + 1 if line.kind is None else line.revision)
        return [*told, line]


async def watch(
    transport: Transport,
    kinds: Sequence[str],
    *,
    project: str | None = None,
    start: int | None = None,
    bookmarks: bool = False,
    give_up_s: float = GIVE_UP_S,
) -> AsyncIterator[WatchLine]:
    """Yield the state and a bookmark, then every change; see `Client.watch`. A change may come twice around a broken connection.

    Raises Compacted only when `start` itself is too old; Unavailable when the API was away for `give_up_s`.
    """
    followed = _Followed(start)
    away_since: float | None = None
    delay = RETRY_S
    loop = asyncio.get_running_loop()
    first = True
    while True:
        where = path("watch", kinds=",".join(kinds), project=project, **({"from": followed.next} if followed.next else {}))
        try:
            async with transport.lines(where) as lines:
                async for raw in lines:
                    line = _read(raw)
                    first, away_since, delay = False, None, RETRY_S
                    for told in followed.take(line):
                        if told.kind is not None or bookmarks:
                            yield told
        except Compacted:
            if first and start is not None:
                raise
            followed.begin_again()
        except (Unavailable, DeadlineExceeded, Exhausted, OutcomeUnknown):
            if first:
                raise  # it never worked: say so at once
            if followed.listing:
                followed.begin_again()
            now = loop.time()
            away_since = away_since if away_since is not None else now
            if now - away_since > give_up_s:
                raise
        await asyncio.sleep(delay)
        delay = min(delay * 2, RETRY_MAX_S)


def _read(raw: bytes) -> WatchLine:
    try:
        return codec.decode(raw, WatchLine)
    except Invalid:
        error: ErrorBody = codec.decode(raw, ErrorAnswer).error
        raise answers.from_body(error) from None
