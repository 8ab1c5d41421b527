"""Turns at something of which there are few: so many in all, and of one owner fewer, so that nobody takes them all."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from atoll.model.errors import Exhausted


class Turns:
    """Who waits is served in order, but for those whose owner has as many as it may."""

    def __init__(self, all_max: int, owner_max: int) -> None:
        self._all_max, self._owner_max = all_max, owner_max
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @contextlib.asynccontextmanager
    async def take(self, owner: str, what: str, *, within_s: float) -> AsyncIterator[None]:
        """Hold a turn. Raises Exhausted, with `what` in its words, where none comes within this time."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((owner, turn))
        try:
            self._serve()
            await asyncio.wait([turn], timeout=within_s)
            if not turn.done():
                raise Exhausted(self._refusal(owner, what), mend="try again when one has ended")
            yield
        finally:
            if turn.done():
                self._held[owner] -= 1
            else:
                self._waiting.remove((owner, turn))
            self._serve()

    def _serve(self) -> None:
        for owner, turn in list(self._waiting):
            if self._held.total() < self._all_max and self._held[owner] < self._owner_max:
                self._waiting.remove((owner, turn))
                self._held[owner] += 1
                turn.set_result(None)
        self._held += Counter()  # forgets those that hold none

    def _refusal(self, owner: str, what: str) -> str:
        if self._held[owner] >= self._owner_max:
            return f"project {owner!r} has {self._owner_max} {what} under way on this node, as many as it may"
        return f"this node has {self._all_max} {what} under way, as many as it may"
