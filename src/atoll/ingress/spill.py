"""Requests go on to the next site when the nearest has too many under way for each of its instances, and come back later."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from urllib.parse import quote

import structlog
from msgspec import Struct

from atoll.ingress.admin import FILTERED_CLUSTERS_MAX, Admin
from atoll.ingress.loads import counted
from atoll.ingress.table import RoutingTable
from atoll.model.errors import AtollError
from atoll.model.ports.clock import Clock

LOOK_S = 0.5
BACK_SHARE = 0.7
"""Requests come back when those that are nearer would have no more than this of what is too much."""
BACK_S = 10.0
"""For so long that must have been so."""

log = structlog.get_logger()


class Spread(Struct, frozen=True):
    """How many of the nearest levels of sites get an app's requests alike, and since when fewer have been enough."""

    levels: int = 1
    enough_since: float | None = None


def decide_spread(spread: Spread, active: int, serving: tuple[int, ...], most: int, now: float) -> Spread:
    """Return how far an app's requests go, with `active` under way and `serving` instances at each level, the nearest first.

    One more level at once when there are more than `most` for each instance; one less when that has been enough for a while.
    """
    levels = max(1, min(spread.levels, len(serving)))
    if active > most * sum(serving[:levels]):
        return Spread(min(levels + 1, max(1, len(serving))))
    if levels == 1 or active > most * BACK_SHARE * sum(serving[: levels - 1]):
        return Spread(levels)
    since = spread.enough_since if spread.enough_since is not None and spread.levels == levels else now
    return Spread(levels - 1) if now - since >= BACK_S else Spread(levels, since)


class Spill:
    """Looks at those apps of `table` alone that say how much is too much and are at several sites; `changed` publishes."""

    def __init__(self, table: RoutingTable, admin: Admin, *, clock: Clock, changed: Callable[[], None]) -> None:
        self._table = table
        self._admin = admin
        self._clock = clock
        self._changed = changed
        self._spreads: dict[str, Spread] = {}

    async def run(self) -> None:
        """Never returns. What fails is tried again: Envoy may be restarting."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except AtollError as error:
                log.info("ingress.spill-unknown", message=str(error))

    async def look(self) -> None:
        """Decide for every app by what is under way now. Raises Unavailable."""
        watched = self._table.spilling()
        for gone in self._spreads.keys() - watched.keys():
            del self._spreads[gone]
        if not watched:
            return
        clusters = {cluster: key for key in watched for cluster in self._table.clusters_of(key)}
        names = "[^.]*" if len(clusters) > FILTERED_CLUSTERS_MAX else "(" + "|".join(map(re.escape, clusters)) + ")"
        wanted = quote(rf"^cluster\.{names}\.upstream_rq_(active|pending_active)$", safe="")
        active, _ = counted(await self._admin.get(f"/stats?usedonly&filter={wanted}"), clusters)
        now = self._clock.monotonic()
        for key, most in watched.items():
            before = self._spreads.get(key, Spread())
            after = decide_spread(before, active.get(key, 0), self._table.serving_by_level(key), most, now)
            self._spreads[key] = after
            if after.levels != before.levels:
                log.info("ingress.spill", app=key, levels=after.levels, active=active.get(key, 0))
            self._table.widen(key, after.levels)
        self._changed()
