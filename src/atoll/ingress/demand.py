"""Which apps that sleep have something to do here: at once when a request begins to wait, and every 2 s those that are at work."""

from __future__ import annotations

import asyncio
import re
from typing import Protocol
from urllib.parse import quote

import structlog

from atoll.ingress.activator import Activator
from atoll.ingress.admin import FILTERED_CLUSTERS_MAX, Admin
from atoll.ingress.table import RoutingTable
from atoll.model.errors import AtollError
from atoll.model.traffic import DEMAND_APPS_MAX, DemandReport

POLL_S = 2.0
AGAIN_S = 1.0
"""While a request waits, its app is asked for so often: a server may have died, and another come to lead."""
TELL_S = 3.0

log = structlog.get_logger()


class Report(Protocol):
    """The control plane, as far as demand needs it."""

    async def demand(self, report: DemandReport) -> None: ...


class Demand:
    """What is unsaid stays so until the control plane has taken it."""

    def __init__(self, table: RoutingTable, admin: Admin, report: Report, *, ingress: str) -> None:
        self._table = table
        self._admin = admin
        self._report = report
        self._ingress = ingress
        self._wanted: dict[str, None] = {}
        """Apps that a request has begun to wait for, and that nobody was told of."""
        self._woken = asyncio.Event()
        self._unsaid: dict[str, None] = {}
        """Apps that had something to do since the last complete report."""
        self._totals: dict[str, int] = {}

    def wake(self, app: str) -> None:
        """Have `app` woken now."""
        self._wanted[app] = None
        self._woken.set()

    async def run(self, activator: Activator) -> None:
        """Never returns. What fails is tried again: Envoy may be restarting, or the control plane away."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._wake(activator))
            tasks.create_task(self._tell(activator))

    async def _wake(self, activator: Activator) -> None:
        while True:
            try:
                async with asyncio.timeout(AGAIN_S if activator.waiting else None):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            apps = dict.fromkeys([*self._wanted, *sorted(activator.waiting)])
            self._wanted.clear()
            for part in _parts(list(apps)):
                await self._say(DemandReport(ingress=self._ingress, apps=part))

    async def _tell(self, activator: Activator) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if not self._table.sleepers():
                self._totals.clear()
                continue
            try:
                self._unsaid.update(dict.fromkeys([*sorted(activator.busy), *await self.look()]))
            except AtollError as error:
                log.info("ingress.demand-unknown", message=str(error))
                continue  # without a complete report nothing is put to sleep
            parts = _parts(list(self._unsaid)) or [()]
            said = [await self._say(DemandReport(ingress=self._ingress, apps=part)) for part in parts[:-1]]
            if all(said) and await self._say(DemandReport(ingress=self._ingress, apps=parts[-1], complete=True)):
                self._unsaid.clear()

    async def look(self) -> list[str]:
        """Return the apps that have a request under way, or had a new one or a datagram since the last look. Raises Unavailable."""
        owners = {target.cluster: f"{target.project}/{target.app}" for target in self._table.sleepers()}
        clusters = [cluster for cluster, app in owners.items() if self._table.endpoints_of(app)]
        if not clusters:
            self._totals.clear()
            return []
        names = "[^.]*" if len(clusters) > FILTERED_CLUSTERS_MAX else "(" + "|".join(re.escape(name) for name in clusters) + ")"
        wanted = quote(rf"^cluster\.{names}\.(upstream_rq_(active|total)|udp\.sess_(rx|tx)_datagrams)$", safe="")
        active, totals = _counts(await self._admin.get(f"/stats?usedonly&filter={wanted}"))
        found = {owners[name] for name in clusters if active.get(name) or totals.get(name, 0) != self._totals.get(name, 0)}
        self._totals = {name: totals[name] for name in clusters if name in totals}
        return sorted(found)

    async def _say(self, report: DemandReport) -> bool:
        try:
            async with asyncio.timeout(TELL_S):
                await self._report.demand(report)
        except (AtollError, TimeoutError) as error:
            log.warning("ingress.demand-not-told", apps=report.apps[:10], message=str(error) or "timeout")
            return False
        return True


def _parts(apps: list[str]) -> list[tuple[str, ...]]:
    return [tuple(apps[at : at + DEMAND_APPS_MAX]) for at in range(0, len(apps), DEMAND_APPS_MAX)]


def _counts(answer: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """Return what is under way at each cluster and what was ever sent to it, or as datagrams came from it; a line is
    `cluster.NAME.upstream_rq_total: 5`, or `cluster.NAME.udp.sess_tx_datagrams: 5`."""
    active: dict[str, int] = {}
    totals: dict[str, int] = {}
    for line in answer.decode(errors="replace").splitlines():
        name, _, value = line.partition(": ")
        parts = name.split(".")
        if len(parts) in (3, 4) and value.isdigit():
            counts = active if parts[-1].endswith("_active") else totals
            counts[parts[1]] = counts.get(parts[1], 0) + int(value)
    return active, totals
