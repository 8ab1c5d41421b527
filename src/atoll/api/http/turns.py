"""Calls of agents take turns, so that people and the leader's own work come between them, however many agents there are.

When a server dies, thousands of agents come to another at one moment, with five calls each. Taken as they come all would be begun
before any is done, and whoever asked for something else would wait for all of them. Nothing is refused, and nothing takes longer
together: a turn of the event loop only begins few of them. Where turns take long for other reasons (beats that wait, say) they get
half of each, so that they are not held up by what they must not hold up.

For a moment after the leader's death (`hold`) only one begins in a turn: first another is to lead, and its first plan to be made.
"""

from __future__ import annotations

import asyncio
from collections import deque

from litestar.types import ASGIApp, Receive, Scope, Send

PER_TURN, PER_TURN_MAX = 8, 128
"""Calls of agents that are begun in one turn of the event loop, at least and at most."""
CALL_S = 0.5e-3
"""What one of them takes of the loop, or a little more."""
HOLD_S = 1.0
"""How long after a leader's death agents' calls are held back."""
_CALLS = frozenset({"heartbeat", "beats", "assignments", "statuses", "tunnel"})
"""What agents ask for by themselves. What they do for somebody who waits (streams, secrets) is not held up."""


class Turns:
    """An ASGI application around another. Those that wait are as many as there are connections at most."""

    def __init__(self, app: ASGIApp, least: int = PER_TURN, most: int = PER_TURN_MAX) -> None:
        self._app = app
        self._least, self._most = least, most
        self._allowed = least
        self._began_at = 0.0
        """When this turn of the loop began."""
        self._begun = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._armed = False
        self._held_until = float("-inf")

    def hold(self, for_s: float = HOLD_S) -> None:
        """Begin only one in each turn for so long: something else matters more."""
        self._held_until = asyncio.get_running_loop().time() + for_s
        self._allowed = 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if of_agent(str(scope.get("method", "")), str(scope.get("path", ""))):
            await self.turn()
        await self._app(scope, receive, send)

    async def turn(self) -> None:
        """Return when one more may begin."""
        loop = asyncio.get_running_loop()
        if not self._armed:
            self._armed, self._began_at = True, loop.time()
            self._allowed = self._least if self._began_at >= self._held_until else 1
            loop.call_soon(self._next)
        if self._begun < self._allowed and not self._waiting:
            self._begun += 1
            return
        mine = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _next(self) -> None:
        """A turn is over; of the next as many may begin as took half of this one."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._allowed = min(self._most, max(self._least, int((now - self._began_at) / (2 * CALL_S))))
        if now < self._held_until:
            self._allowed = 1
        self._began_at, self._begun = now, 0
        while self._waiting and self._begun < self._allowed:
            mine = self._waiting.popleft()
            if not mine.done():  # the connection may be gone
                mine.set_result(None)
                self._begun += 1
        self._armed = bool(self._waiting or self._begun)
        if self._armed:
            loop.call_soon(self._next)


def of_agent(method: str, path: str) -> bool:
    """Whether a call is one that agents make by themselves."""
    if not path.startswith("/v1/nodes/"):
        return False
    place, _, call = path[len("/v1/nodes/") :].partition("/")
    return bool(place) and (call in _CALLS if call else method == "PUT")
