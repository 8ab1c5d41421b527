"""A draining endpoint gets no new request; when its last one has ended, the control plane hears of it."""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog
from msgspec import Struct

from atoll.ingress.admin import Requests
from atoll.ingress.resources import Kind, Name
from atoll.ingress.table import RoutingTable
from atoll.model.errors import AtollError, DeadlineExceeded
from atoll.model.ports.clock import Clock

SETTLE_S = 0.1
"""Envoy confirms endpoints from its main thread; its workers follow within a millisecond unless starved. An endpoint has
drained when it had no active and no new request for so long after that."""
POLL_S = 0.02
POLL_MAX_S = 0.25
"""While requests are active, as a WebSocket may be for minutes."""
APPLIED_TIMEOUT_S = 0.5
"""All others wait so long for what Envoy does not confirm, as of a cluster that it has refused; it is asked again every time."""
RETRY_S = 0.5
INSTANCES_PER_REPORT = 1_000
"""As many as the control plane takes at once."""

log = structlog.get_logger()


class Applied(Protocol):
    """`AdsServer`, as far as draining needs it."""

    async def applied(self, name: Name, version: str, *, timeout_s: float) -> None: ...


class Counts(Protocol):
    """`EnvoyAdmin`, as far as draining needs it."""

    async def requests(self, clusters: tuple[str, ...]) -> dict[str, Requests]: ...


class Report(Protocol):
    async def drained(self, ingress: str, instances: list[str]) -> None: ...


class _Watched(Struct):
    """`total` requests were counted when the endpoint was last seen with a new one, at `since`."""

    total: int
    since: float


class Drainer:
    """Watches what drains in `table`; call `changed` after each change of it that has been published."""

    def __init__(self, table: RoutingTable, ads: Applied, admin: Counts, report: Report, *, ingress: str, clock: Clock) -> None:
        self._table = table
        self._ads = ads
        self._admin = admin
        self._report = report
        self._ingress = ingress
        self._clock = clock
        self._wake = asyncio.Event()
        self._confirmed: set[str] = set()
        """Instances whose draining Envoy has confirmed."""
        self._late: set[str] = set()
        """Instances whose draining Envoy has not confirmed in time."""
        self._watched: dict[str, _Watched] = {}
        self._reported: set[str] = set()

    def changed(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Never returns. What fails is tried again: Envoy may be restarting, or the control plane away."""
        poll_s = POLL_S
        while True:
            self._wake.clear()
            draining = {endpoint.instance: (key, endpoint.address) for key, endpoint in self._table.draining()}
            self._forget(set(draining))
            pending = {id: place for id, place in draining.items() if id not in self._reported}
            if not pending:
                poll_s = POLL_S
                await self._wake.wait()
                continue
            try:
                done = await self._look(pending)
                for at in range(0, len(done), INSTANCES_PER_REPORT):
                    part = done[at : at + INSTANCES_PER_REPORT]
                    await self._report.drained(self._ingress, part)
                    self._reported.update(part)
                    log.info("ingress.drained", instances=part)
                if done:
                    continue
            except AtollError as error:
                log.warning("ingress.drain-waits", instances=sorted(pending), message=str(error))
                poll_s = RETRY_S
            await self._sleep(poll_s)
            poll_s = min(poll_s * 1.3, POLL_MAX_S)

    def _forget(self, draining: set[str]) -> None:
        self._reported &= draining
        self._confirmed &= draining
        self._late &= draining
        for id in self._watched.keys() - draining:
            del self._watched[id]

    async def _look(self, pending: dict[str, tuple[str, str]]) -> list[str]:
        """Return the instances that have drained by now."""
        clusters = {key: self._table.clusters_of(key) for key in {key for key, _ in pending.values()}}
        unconfirmed = {id: clusters[key] for id, (key, _) in pending.items() if id not in self._confirmed}
        asked = sorted({name for names in unconfirmed.values() for name in names})
        applied = dict(zip(asked, await asyncio.gather(*map(self._applied, asked)), strict=True))
        late = {id for id, names in unconfirmed.items() if not all(applied[name] for name in names)}
        self._confirmed |= unconfirmed.keys() - late
        if news := late - self._late:
            log.warning("ingress.drain-not-confirmed", instances=sorted(news))
            self._late |= news
        counts = await self._admin.requests(tuple(sorted({name for names in clusters.values() for name in names})))
        now = self._clock.monotonic()
        return [id for id, (_, address) in pending.items() if id in self._confirmed and self._quiet(id, address, counts, now)]

    async def _applied(self, cluster: str) -> bool:
        """Whether Envoy has the cluster's endpoints as they are."""
        newest = self._table.resources[Kind.ENDPOINTS].get(cluster)
        try:
            if newest is not None:
                await self._ads.applied((Kind.ENDPOINTS, cluster), newest.version, timeout_s=APPLIED_TIMEOUT_S)
        except DeadlineExceeded:
            return False
        return True

    def _quiet(self, id: str, address: str, counts: dict[str, Requests], now: float) -> bool:
        own = [each for host, each in counts.items() if host.rpartition(":")[0].strip("[]") == address]
        active, total = sum(each.active for each in own), sum(each.total for each in own)
        watched = self._watched.get(id)
        if watched is None or active or watched.total != total:
            self._watched[id] = _Watched(total, now)
            return False
        return now - watched.since >= SETTLE_S

    async def _sleep(self, duration_s: float) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), duration_s)
        except TimeoutError:
            return
