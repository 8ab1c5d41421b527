"""How many requests are under way for each app that scales by them, and how many came: sampled at Envoy, told every 2 s.

Envoy has a gauge of what is under way and no sum of it over time, so the gauge is looked at every second, and what it says counts
until the next look. What is told only grows, so that a report that is lost costs nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import quote

import structlog

from atoll.ingress.admin import FILTERED_CLUSTERS_MAX, Admin
from atoll.ingress.table import RoutingTable
from atoll.model.errors import AtollError
from atoll.model.ports.clock import Clock
from atoll.model.traffic import AppLoad, DemandReport

SAMPLE_S = 1.0
SAMPLES_PER_REPORT = 2
GAP_MAX_S = 10.0
"""What was under way counts no longer than this, however late the next look is."""
TELL_S = 3.0
APPS_PER_REPORT = 5_000
COUNTERS = ("upstream_rq_active", "upstream_rq_pending_active", "upstream_rq_total")

log = structlog.get_logger()


class Report(Protocol):
    async def demand(self, report: DemandReport) -> None: ...


class Sums:
    """Samples in, sums out. Pure."""

    def __init__(self) -> None:
        self._at = 0.0
        self._active: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._requests: dict[str, int] = {}
        self._request_s: dict[str, float] = {}

    def add(self, apps: set[str], active: Mapping[str, int], totals: Mapping[str, int], now: float) -> None:
        """Take over a sample of `apps` at `now` (monotonic seconds): what is under way, and what was ever sent, which begins anew
        with Envoy. Others are forgotten."""
        passed = min(GAP_MAX_S, max(0.0, now - self._at))
        for app in apps:
            if app in self._request_s:
                # The mean of both ends: what begins and ends between two looks is not seen, nor is it seen for too long.
                self._request_s[app] += passed * (self._active.get(app, 0) + active.get(app, 0)) / 2
                total, before = totals.get(app, 0), self._totals.get(app, 0)
                self._requests[app] += total - before if total >= before else total
            else:
                self._request_s[app], self._requests[app] = 0.0, 0
        for gone in self._request_s.keys() - apps:
            del self._request_s[gone], self._requests[gone]
        self._at = now
        self._active = {app: active[app] for app in apps if app in active}
        self._totals = {app: totals[app] for app in apps if app in totals}

    def loads(self) -> tuple[AppLoad, ...]:
        """Return what there was to do for each app since it was first looked at."""
        return tuple(AppLoad(app, self._requests[app], round(spent, 6)) for app, spent in sorted(self._request_s.items()))


class Loads:
    """Tells of every app whose spec scales by `concurrency` or `rps`; asks Envoy nothing while there is none."""

    def __init__(self, table: RoutingTable, admin: Admin, report: Report, *, ingress: str, clock: Clock) -> None:
        self._table = table
        self._admin = admin
        self._report = report
        self._ingress = ingress
        self._clock = clock
        self._started = clock.now()
        self._began = clock.monotonic()
        self._sums = Sums()

    async def run(self) -> None:
        """Never returns. What fails is tried again: Envoy may be restarting, or the control plane away."""
        while True:
            for _ in range(SAMPLES_PER_REPORT):
                await asyncio.sleep(SAMPLE_S)
                await self.look()
            await self.tell()

    async def look(self) -> None:
        """Take a sample; where Envoy does not answer there is none."""
        clusters = {cluster: key for key in self._table.counted() for cluster in self._table.clusters_of(key)}
        try:
            active, totals = await self._sample(clusters) if clusters else ({}, {})
        except AtollError as error:
            log.info("ingress.loads-unknown", message=str(error))
            return
        self._sums.add(set(clusters.values()), active, totals, self._clock.monotonic())

    async def tell(self) -> None:
        """Report all sums. What is not taken is told with the next."""
        loads = self._sums.loads()
        uptime_s = self._clock.monotonic() - self._began
        for at in range(0, len(loads), APPS_PER_REPORT):
            part = loads[at : at + APPS_PER_REPORT]
            try:
                async with asyncio.timeout(TELL_S):
                    await self._report.demand(
                        DemandReport(ingress=self._ingress, started=self._started, uptime_s=uptime_s, loads=part)
                    )
            except (AtollError, TimeoutError) as error:
                log.info("ingress.loads-not-told", message=str(error) or "timeout")
                return

    async def _sample(self, clusters: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
        names = "[^.]*" if len(clusters) > FILTERED_CLUSTERS_MAX else "(" + "|".join(map(re.escape, clusters)) + ")"
        wanted = quote(rf"^cluster\.{names}\.({'|'.join(COUNTERS)})$", safe="")
        return counted(await self._admin.get(f"/stats?usedonly&filter={wanted}"), clusters)


def counted(answer: bytes, clusters: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return app → what is under way or waits for a connection, and app → what was ever sent; a line is
    `cluster.NAME.upstream_rq_total: 5`. `clusters` is cluster → app."""
    active: dict[str, int] = {}
    totals: dict[str, int] = {}
    for line in answer.decode(errors="replace").splitlines():
        name, _, value = line.partition(": ")
        parts = name.split(".")
        app = clusters.get(parts[1]) if len(parts) == 3 and parts[2] in COUNTERS and value.isdigit() else None
        if app is not None:
            into = totals if parts[2] == "upstream_rq_total" else active
            into[app] = into.get(app, 0) + int(value)
    return active, totals
