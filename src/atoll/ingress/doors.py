"""Which instances of apps that wake take connections already, before anybody has said that they are ready.

An app without a health check is ready when it takes a connection, and where it will be is told before it runs (`Routing.starting`):
whoever waits for it can knock there by himself, some ms before the control plane could say so. One task knocks at each instance for
all who wait, so that one that is not reached delays no other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from atoll.ingress.sleepers import serving
from atoll.ingress.table import RoutingTable
from atoll.model.records import Endpoint

KNOCK_S = 0.5
"""The longest wait for one connection."""
AGAIN_FIRST_S, AGAIN_MAX_S = 0.002, 0.05
KNOCKS_SOON = 100
"""So often it is knocked every AGAIN_FIRST_S, for as long as most starts take; then less and less often."""


class Doors:
    """`opened` is called with an app (`project/name`) of which an instance takes connections now."""

    def __init__(self, table: RoutingTable, opened: Callable[[str], None]) -> None:
        self._table = table
        self._opened = opened
        self._wanted: dict[str, int] = {}
        """App → the port that somebody waits for."""
        self._knocking: dict[tuple[str, str], asyncio.Task[None]] = {}
        """By app and address."""
        self._open: dict[str, str] = {}
        """App → the address of an instance that takes connections."""

    def open(self, app: str) -> list[Endpoint]:
        """Return the app's instances that nobody has said are ready, and that take connections."""
        return [each for each in self._starting(app) if each.address == self._open.get(app)]

    def want(self, app: str, port: int) -> None:
        """Somebody waits for the app at `port`."""
        self._wanted[app] = port
        self.look(app)

    def unwanted(self, app: str) -> None:
        """Nobody waits for the app any more."""
        self._wanted.pop(app, None)
        if not self.open(app):
            self._open.pop(app, None)

    def shut(self, app: str, address: str) -> None:
        """An instance that took connections does not."""
        if self._open.get(app) == address:
            del self._open[app]

    def look(self, app: str) -> None:
        """Begin to knock where somebody waits and an instance starts; call it when either may be so."""
        for endpoint in self._starting(app) if app in self._wanted else ():
            if (door := (app, endpoint.address)) not in self._knocking:
                self._knocking[door] = asyncio.ensure_future(self._knock(*door, self._wanted[app]))

    def stop(self) -> None:
        for task in self._knocking.values():
            task.cancel()

    def _starting(self, app: str) -> list[Endpoint]:
        return serving(self._table.starting_of(app))

    async def _knock(self, app: str, address: str, port: int) -> None:
        tries, pause_s = 0, AGAIN_FIRST_S
        try:
            while app in self._wanted and any(endpoint.address == address for endpoint in self._starting(app)):
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(KNOCK_S):
                        _, writer = await asyncio.open_connection(address, port)
                    writer.transport.abort()
                    self._open[app] = address
                    self._leave(app, address)
                    self._opened(app)
                    return
                await asyncio.sleep(pause_s)
                tries += 1
                pause_s = pause_s if tries < KNOCKS_SOON else min(2 * pause_s, AGAIN_MAX_S)
        finally:
            if self._knocking.get((app, address)) is asyncio.current_task():
                del self._knocking[app, address]

    def _leave(self, app: str, address: str) -> None:
        """Knock at none of the app's other doors any more."""
        for door in [door for door in self._knocking if door[0] == app and door[1] != address]:
            self._knocking.pop(door).cancel()
