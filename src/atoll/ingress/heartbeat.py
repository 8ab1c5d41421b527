"""An ingress's sign of life: the rate of requests of each app here, and the round trips to other sites."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol
from urllib.parse import quote

import structlog

from atoll.ingress.admin import Admin
from atoll.ingress.probe import Prober
from atoll.ingress.rates import Rates
from atoll.model.errors import AtollError, NotFound
from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import Peer, Peers
from atoll.model.records import IngressHeartbeat

BEAT_S = 10.0
SOON_S = 0.5
"""How long after something new to tell the next beat comes, however often that is."""
PROBE_S = 60.0
COUNTERS = r"^cluster\.[^.]*\.upstream_(rq_total|cx_none_healthy)$"
"""Requests that were sent to an instance, and those for which there was none."""
_LINE = re.compile(r"cluster\.(?P<app>[^./]+/[^./]+)/[^.]*\.upstream_(?:rq_total|cx_none_healthy): (?P<count>[0-9]+)")

log = structlog.get_logger()


class Report(Protocol):
    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers: ...


def _nothing() -> dict[str, str]:
    return {}


def _nobody(sites: Mapping[str, float]) -> None:
    """Nobody wants to know how far sites are."""


class Heart:
    """Beats every `BEAT_S`, and sooner when asked to; the answer names the peers that are measured every `PROBE_S`.

    `problems` is asked for what is told of apps that are not routed whole; `moved` hears after each beat how far other sites are.
    """

    def __init__(
        self,
        admin: Admin,
        report: Report,
        prober: Prober,
        *,
        ingress: str,
        site: str,
        clock: Clock,
        problems: Callable[[], dict[str, str]] = _nothing,
        moved: Callable[[Mapping[str, float]], None] = _nobody,
        register: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._register = register
        self._problems = problems
        self._moved = moved
        self._admin = admin
        self._report = report
        self._prober = prober
        self._ingress = ingress
        self._site = site
        self._clock = clock
        self._rates = Rates()
        self._news = asyncio.Event()
        self._peers: tuple[Peer, ...] = ()
        self._probed_at = float("-inf")

    async def run(self) -> None:
        """Never returns. What fails is tried again: Envoy may be restarting, or the control plane away."""
        while True:
            self._news.clear()
            await self.beat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._news.wait()
                    await asyncio.sleep(SOON_S)

    def tell_soon(self) -> None:
        """Have the next beat come soon: there is something new among `problems`, and whoever deployed waits to hear of it."""
        self._news.set()

    async def beat(self) -> None:
        """Count, measure where it is time, and tell."""
        try:
            answer = await self._admin.get(f"/stats?usedonly&filter={quote(COUNTERS, safe='')}")
            self._rates.add(app_requests(answer.decode(errors="replace")), self._clock.monotonic())
            if self._peers and self._clock.monotonic() - self._probed_at >= PROBE_S:
                self._probed_at = self._clock.monotonic()
                await self._prober.measure(self._peers)
            told = IngressHeartbeat(
                ingress=self._ingress,
                site=self._site,
                at=self._clock.now(),
                requests=self._rates.per_s(),
                round_trips_ms=dict(self._prober.round_trips_ms),
                problems=self._problems(),
            )
            peers = await self._report.ingress_heartbeat(told)
            self._peers = peers.peers
            self._moved({**peers.sites, **self._prober.round_trips_ms})
        except NotFound as error:
            # It was forgotten while it was silent.
            log.warning("ingress.forgotten", message=str(error))
            await self._again()
        except AtollError as error:
            log.info("ingress.heartbeat-not-told", message=str(error), retry_in_s=BEAT_S)

    async def _again(self) -> None:
        try:
            if self._register is not None:
                await self._register()
        except AtollError as error:
            log.warning("ingress.not-registered", message=str(error), retry_in_s=BEAT_S)


def app_requests(stats: str) -> dict[str, int]:
    """Return `PROJECT/APP` → requests since Envoy's start, from its statistics as text."""
    found: dict[str, int] = {}
    for match in _LINE.finditer(stats):
        found[match["app"]] = found.get(match["app"], 0) + int(match["count"])
    return found
