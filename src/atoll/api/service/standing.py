"""Whether those whose streams are open may still have them: who is revoked or withdrawn is cut off, at every server."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator

import structlog

from atoll.api.service.access import Caller
from atoll.api.service.membership import Membership
from atoll.model.errors import AtollError, Compacted, Unavailable
from atoll.model.membership import Identity
from atoll.model.records import Token
from atoll.store.cache import State

RETRY_S = 1.0

log = structlog.get_logger()


class Standing:
    """Holds an entry for every open stream; what bounds the connections bounds it."""

    def __init__(self, state: State, membership: Membership) -> None:
        self._state = state
        self._membership = membership
        self._open: dict[str, list[tuple[Caller, asyncio.Future[AtollError]]]] = defaultdict(list)

    @contextlib.contextmanager
    def watched(self, caller: Caller) -> Iterator[asyncio.Future[AtollError]]:
        """Yield what has a result, the reason, once `caller` may not go on."""
        ended: asyncio.Future[AtollError] = asyncio.get_running_loop().create_future()
        entry = (caller, ended)
        self._open[caller.id].append(entry)
        if (reason := self._membership.still(caller)) is not None:  # it may have happened since he was admitted
            ended.set_result(reason)
        try:
            yield ended
        finally:
            self._open[caller.id].remove(entry)
            if not self._open[caller.id]:
                del self._open[caller.id]

    async def run(self) -> None:
        """Follow what changes about who may, for ever."""
        while True:
            try:
                self._look(list(self._open))
                async for batch in self._state.changes():
                    for delta in batch.deltas:
                        if delta.old is not None and delta.kind in (Identity, Token):
                            self._look(self._concerned(delta.old.record))
            except Compacted:
                continue  # the cache had to list again: look at all, then follow on
            except Unavailable:
                await asyncio.sleep(RETRY_S)

    def _concerned(self, record: Identity | Token) -> list[str]:
        """Return the ids of callers that a changed record may be about."""
        if isinstance(record, Token):
            return [record.id]
        return [id for id, entries in self._open.items() if entries[0][0].subject == record.name]

    def _look(self, ids: list[str]) -> None:
        for id in ids:
            for caller, ended in self._open.get(id, ()):
                if not ended.done() and (reason := self._membership.still(caller)) is not None:
                    log.warning("a stream was cut off", who=caller.name or caller.id, cause=reason.message)
                    ended.set_result(reason)
