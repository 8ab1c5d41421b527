"""What Envoy counts of each release, told to the control plane: requests, those answered with 5xx, how long they took."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import quote

import msgspec
import structlog
from msgspec import Struct

from atoll.ingress.admin import FILTERED_CLUSTERS_MAX, Admin
from atoll.ingress.bootstrap import COUNTED, ZONE
from atoll.ingress.table import RoutingTable
from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.traffic import BOUNDS_MS, CLASSES, Counts, ReleaseTraffic, TrafficReport

POLL_S = 1.0
"""How often apps are looked at of which several releases serve: a rollout is decided by these numbers."""
POLL_ALL_S = 15.0
"""How often all are: with 10,000 apps Envoy's answer has some 15 MB."""
RELEASES_PER_REPORT = 5_000

Key = tuple[str, str]
"""Cluster, zone."""
log = structlog.get_logger()


class Report(Protocol):
    async def traffic(self, report: TrafficReport) -> None: ...


class Meter:
    """Counts from when it was made: what Envoy had counted for an ingress before this one is not told again."""

    def __init__(self, table: RoutingTable, admin: Admin, report: Report, *, ingress: str, clock: Clock) -> None:
        self._table = table
        self._admin = admin
        self._report = report
        self._ingress = ingress
        self._clock = clock
        self._started = clock.now()
        self._before: dict[Key, Counts] | None = None
        """As Envoy last said; None before the first look."""
        self._releases: dict[Key, int] = {}
        self._totals: dict[tuple[str, str, int], Counts] = {}
        self._unsaid: dict[tuple[str, str, int], None] = {}
        self._all_at = 0.0
        self._known: tuple[int, list[str]] | None = None
        """Of which state of the table the releases are known, and what was busy then."""

    async def run(self) -> None:
        """Never returns. What fails is tried again: Envoy may be restarting, or the control plane away."""
        while True:
            try:
                await self.look()
                await self.tell()
            except AtollError as error:
                log.info("ingress.traffic-not-told", message=str(error), retry_in_s=POLL_S)
            await asyncio.sleep(POLL_S)

    async def look(self) -> None:
        """Take over what Envoy has counted, of all apps now and then, else of those of which several releases serve."""
        busy = self._know_releases()
        now = self._clock.monotonic()
        everything = self._before is None or now >= self._all_at or len(busy) > FILTERED_CLUSTERS_MAX
        if not everything and not busy:
            return
        found = counts_in(await self._admin.get(_path(None if everything else busy)))
        if everything:
            self._all_at = now + POLL_ALL_S
        if self._before is None:
            self._before = found
            return
        for key, counts in found.items():
            release = self._releases.get(key)
            if release is None:
                continue  # its routing comes soon, and what was counted until then with it
            fresh = counts.since(self._before.get(key, Counts()))
            self._before[key] = counts
            if fresh.requests or any(fresh.classes):
                project, app, *_ = key[0].split("/")
                place = (project, app, release)
                self._totals[place] = self._totals.get(place, Counts()) + fresh
                self._unsaid[place] = None

    def _know_releases(self) -> list[str]:
        """Note which zone means which release now, and return the clusters of which several serve. Of an app that has gone, and
        of a release that has given its zone to a later one, nothing is kept."""
        if self._known is not None and self._known[0] == self._table.changes:
            return self._known[1]
        busy: list[str] = []
        clusters: set[str] = set()
        for cluster, zones, several in self._table.releases():
            clusters.add(cluster)
            self._releases.update({(cluster, zone): release for zone, release in zones.items()})
            if several:
                busy.append(cluster)
        for key in [key for key in self._releases if key[0] not in clusters]:
            del self._releases[key]
            if self._before is not None:
                self._before.pop(key, None)
        alive = {tuple(cluster.split("/")[:2]) for cluster in clusters}
        used = {(*cluster.split("/")[:2], release) for (cluster, _), release in self._releases.items()}
        for place in [place for place in self._totals if place[:2] not in alive or place not in used]:
            del self._totals[place]
            self._unsaid.pop(place, None)
        self._known = (self._table.changes, busy)
        return busy

    async def tell(self) -> None:
        """Report what has changed. Raises what the control plane does; then it is told again."""
        while self._unsaid:
            places = list(self._unsaid)[:RELEASES_PER_REPORT]
            releases = tuple(
                ReleaseTraffic(project=project, app=app, release=release, counts=self._totals[project, app, release])
                for project, app, release in places
            )
            await self._report.traffic(TrafficReport(ingress=self._ingress, started=self._started, releases=releases))
            for place in places:
                del self._unsaid[place]


def _path(clusters: Sequence[str] | None) -> str:
    names = "[^.]*" if clusters is None else "(" + "|".join(re.escape(name) for name in clusters) + ")"
    wanted = rf"^cluster\.{names}\.zone\.{ZONE}\.[^.]*\.{COUNTED}$"
    return f"/stats?usedonly&format=json&histogram_buckets=disjoint&filter={quote(wanted, safe='')}"


class _Bucket(Struct):
    upper_bound: float
    cumulative: int
    """Since Envoy was started, within this bucket."""


class _Histogram(Struct):
    name: str
    buckets: tuple[_Bucket, ...] = ()


class _Stat(Struct):
    name: str = ""
    value: int = 0
    histograms: tuple[_Histogram, ...] = ()


class _Stats(Struct):
    stats: tuple[_Stat, ...] = ()


def counts_in(answer: bytes) -> dict[Key, Counts]:
    """Return what an answer to `/stats` says, by cluster and zone. Raises Unavailable when it is not what Envoy should say."""
    try:
        stats = msgspec.json.decode(answer, type=_Stats).stats
    except msgspec.MsgspecError as error:
        raise Unavailable(f"Envoy's statistics do not read: {error}") from None
    requests: dict[Key, int] = {}
    errors: dict[Key, int] = {}
    classes: dict[Key, tuple[int, ...]] = {}
    for stat in stats:
        for histogram in stat.histograms:
            key, _ = _split(histogram.name)
            classes[key] = _classes(histogram.buckets)
        if stat.name:
            key, what = _split(stat.name)
            (errors if what.endswith("5xx") else requests)[key] = stat.value
    return {key: Counts(requests.get(key, 0), errors.get(key, 0), classes.get(key, ())) for key in {*requests, *classes}}


def _split(name: str) -> tuple[Key, str]:
    """`cluster.CLUSTER.zone.here.ZONE.WHAT`: no name that a cluster is made of has a dot."""
    _, cluster, _, _, zone, what = name.split(".", 5)
    return (cluster, zone), what


def _classes(buckets: Sequence[_Bucket]) -> tuple[int, ...]:
    found = [0] * CLASSES
    for bucket in buckets:
        index = next((i for i, bound in enumerate(BOUNDS_MS) if bucket.upper_bound <= bound), CLASSES - 1)
        found[index] += bucket.cumulative
    return tuple(found)
