"""Whether those whose streams are open may still have them: who is revoked, withdrawn or expired is cut off, at every server."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator

import structlog

from atoll.api.service.access import Caller
from atoll.api.service.membership import Membership
from atoll.model.errors import AtollError, Compacted, Unavailable
from atoll.model.membership import Authority, Identity
from atoll.model.records import Token
from atoll.store.cache import State

RETRY_S = 1.0
LOOK_S = 30.0
"""So often all are looked at: what ends by its time alone changes no record."""

log = structlog.get_logger()


class Standing:
    """Holds an entry for every open stream; what bounds the connections bounds it. All are looked at every `look_s`."""

    def __init__(self, state: State, membership: Membership, look_s: float = LOOK_S) -> None:
        self._look_s = look_s
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
        """Cut off who may not go on, by what changes and by time, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._look_by_time())

    async def _look_by_time(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            self._look(list(self._open))

    async def _follow(self) -> None:
        while True:
            try:
                self._look(list(self._open))
                async for batch in self._state.changes():
                    for delta in batch.deltas:
                        if delta.kind is Authority:
                            self._look(list(self._open))
                        elif delta.old is not None and delta.kind in (Identity, Token):
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
