"""What the API removes by itself: routes that no app wants, tokens and reservations long over. Several servers may do it.

And what each server forgets of its own: the heartbeats of nodes that were removed.
"""

from __future__ import annotations

import asyncio

import structlog

from atoll.api.service import claims
from atoll.api.service.context import Context
from atoll.api.service.heartbeats import Heartbeats
from atoll.api.service.join_tokens import JoinTokens
from atoll.model import keys
from atoll.model.errors import AtollError
from atoll.model.ports.store import Delete, unchanged
from atoll.model.records import Node, Token
from atoll.model.reservation import Reservation

INTERVAL_S = 30.0
ORPHANS_EVERY = 10
"""Sweeps between looks at all routes."""
DELETES_MAX = 1_000
"""Records that one transaction removes."""
TOKEN_KEEP_S = 86_400.0
"""How long an expired token is still told apart from an unknown one."""

log = structlog.get_logger()


class Housekeeping:
    def __init__(self, context: Context, join_tokens: JoinTokens, heartbeats: Heartbeats) -> None:
        self._context = context
        self._join_tokens = join_tokens
        self._heartbeats = heartbeats
        self._sweeps = 0

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.sweep()
            except AtollError as error:
                log.warning("housekeeping failed; trying again", cause=error.message, retry_s=INTERVAL_S)
            except Exception:
                # The outer edge: tidying must go on tomorrow, whatever one record did today.
                log.exception("housekeeping failed; trying again", retry_s=INTERVAL_S)

    async def sweep(self) -> None:
        store, state = self._context.store, self._context.state
        self._heartbeats.forget_removed(state.records(Node).keys() | state.broken(Node))
        if self._sweeps % ORPHANS_EVERY == 0:
            for key, revision in claims.orphans(self._context)[:DELETES_MAX]:
                # One at a time: an app may take one of them up right now, and then only that one stays.
                await store.txn((unchanged(key, revision),), (Delete(key),))
        self._sweeps += 1
        horizon = self._context.clock.now() - TOKEN_KEEP_S
        tokens = [held.record for held in self._context.state.records(Token).values()]
        expired = [token for token in tokens if token.expires_at is not None and token.expires_at < horizon]
        if stale := self._join_tokens.stale():
            await store.txn((), [Delete(key) for key in stale[:DELETES_MAX]])
        if expired:
            await store.txn((), [Delete(keys.token(token.digest)) for token in expired[:DELETES_MAX]])
        for name, held in self._context.state.records(Reservation).items():
            if held.record.spec.end < horizon:
                key = keys.reservation(name)
                await store.txn((unchanged(key, held.revision),), (Delete(key),))
