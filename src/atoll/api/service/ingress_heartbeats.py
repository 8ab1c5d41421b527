"""Signs of life of ingresses: who asks where, in memory only; and how far sites are from each other, written rarely."""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec.structs import replace

from atoll.api.service.context import Context, Draft
from atoll.api.service.events import bounded
from atoll.model import codec, keys
from atoll.model.errors import Forbidden, Invalid, NotFound, TooLarge
from atoll.model.ports.control_plane import Peer, Peers
from atoll.model.ports.store import Op, Put, absent, unchanged
from atoll.model.records import App, Event, Ingress, IngressHeartbeat, Node, RoundTrips, Severity, Site, event_id
from atoll.scheduling.geography import Geography
from atoll.store.cache import Held

KEEP_S = 3_600.0
"""For so long an ingress that says nothing counts as it did last: whoever asks there still does."""
ALIVE_S = 35.0
"""An ingress that was heard of so lately is there: it says something every 10 s."""
APPS_MAX = 10_000
SITES_MAX = 2_000
RATE_MAX = 1e9
ROUND_TRIP_MS_MAX = 10_000.0
WRITE_S = 60.0
"""Between two writes of one ingress's round trips."""
GEOGRAPHY_S = 60.0
"""How long what is known of the sites' distances is not looked at anew."""
PROBLEMS_MAX = 100
WORDS_MAX = 1_000
EVENTS_PER_BEAT_MAX = 20
CHANGED = 0.15
CHANGED_MS = 1.0
"""A round trip has changed when it differs by this share and by so much."""


class IngressHeartbeats:
    """The latest word of every ingress; how many ingresses there are bounds it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._latest: dict[str, IngressHeartbeat] = {}
        self._heard: dict[str, float] = {}
        self._geography: Geography | None = None
        self._geography_at = 0.0

    async def note(self, heartbeat: IngressHeartbeat) -> Peers:
        """Take a heartbeat, and return the ingresses of other sites, for round trips to be measured to. Safe to repeat.

        Raises NotFound for an ingress that has not registered, Forbidden for another site's figures, Invalid, TooLarge.
        """
        held = self._context.state.get(Ingress, heartbeat.ingress)
        if held is None:
            raise NotFound(f"no ingress '{heartbeat.ingress[:60]}'", mend="register it first")
        if held.record.site != heartbeat.site:
            raise Forbidden(f"ingress '{heartbeat.ingress}' is at site '{held.record.site}', not '{heartbeat.site[:60]}'")
        _check(heartbeat)
        now = self._context.clock.monotonic()
        before = self._latest.get(heartbeat.ingress)
        self._latest[heartbeat.ingress] = heartbeat
        self._heard[heartbeat.ingress] = now
        for silent in [name for name, at in self._heard.items() if now - at > KEEP_S]:
            del self._heard[silent], self._latest[silent]
        if heartbeat.round_trips_ms:
            await self._write(heartbeat)
        await self._tell(before.problems if before is not None else {}, heartbeat)
        return self._peers(heartbeat.site)

    def all(self) -> Mapping[str, IngressHeartbeat]:
        """Return a live view: ingress → its latest word."""
        return self._latest

    def silent_s(self, ingress: str) -> float | None:
        """Return how long ago an ingress was heard of; None for one that this server has not heard for an hour, or never."""
        at = self._heard.get(ingress)
        return None if at is None else max(0.0, self._context.clock.monotonic() - at)

    def refused(self, project: str, app: str) -> dict[str, str]:
        """Return ingress → what it leaves out of an app's routing, in words; of those that this server hears of."""
        key, horizon = f"{project}/{app}", self._context.clock.monotonic() - ALIVE_S
        found = {name: beat.problems.get(key) for name, beat in self._latest.items() if self._heard[name] >= horizon}
        return {name: words for name, words in sorted(found.items()) if words is not None}

    def _peers(self, site: str) -> Peers:
        records = [held.record for _, held in sorted(self._context.state.records(Ingress).items())]
        found = [Peer(one.site, one.address, one.http_port) for one in records if one.address and one.site != site]
        return Peers(tuple(found[:SITES_MAX]), self._round_trips(site))

    def _round_trips(self, site: str) -> dict[str, float]:
        """Return how far the sites are from this one that have nodes or a record."""
        state, now = self._context.state, self._context.clock.monotonic()
        if self._geography is None or now - self._geography_at > GEOGRAPHY_S:
            sites = (held.record for held in state.records(Site).values())
            self._geography = Geography(sites, (held.record for held in state.records(RoundTrips).values()))
            self._geography_at = now
        others = sorted({*self._geography.sites, *(held.record.site for held in state.records(Node).values())} - {site})[:SITES_MAX]
        if not others:
            return {}
        ms = self._geography.round_trips_ms([site], others)[0]
        return {other: round(float(one), 3) for other, one in zip(others, ms, strict=True) if one < ROUND_TRIP_MS_MAX}

    async def _tell(self, before: dict[str, str], heartbeat: IngressHeartbeat) -> None:
        """Write an event for what the ingress could not route of an app, once for each reason."""
        fresh = {app: words for app, words in heartbeat.problems.items() if before.get(app) != words}
        ops: list[Op] = []
        now = self._context.clock.now()
        if abs(now - heartbeat.at) < WRITE_S:
            now = heartbeat.at  # the same for every server that hears it: one event, not one of each
        for key, words in sorted(fresh.items())[:EVENTS_PER_BEAT_MAX]:
            if self._context.state.get(App, key) is None:
                continue
            project, _, app = key.partition("/")
            event = Event(
                id=event_id(int(now), f"{app}-route-refused"),
                at=now,
                project=project,
                subject=f"app/{app}",
                code="route-refused",
                message=f"ingress '{heartbeat.ingress}' leaves out a part of its routing: {words}",
                severity=Severity.ERROR,
                data={"ingress": heartbeat.ingress},
            )
            ops.append(Put(keys.event(project, event.id), codec.encode(bounded(event))))
        if ops:
            await self._context.write(type(None), lambda: Draft(ops=ops, answer=lambda _: None))

    async def _write(self, heartbeat: IngressHeartbeat) -> None:
        """Write the round trips where they have changed and the last write is some time ago."""
        if not self._due(self._context.state.get(RoundTrips, heartbeat.ingress), heartbeat):
            return
        key = keys.round_trips(heartbeat.ingress)

        def build() -> Draft[None]:
            held = self._context.state.get(RoundTrips, heartbeat.ingress)
            if not self._due(held, heartbeat):
                return Draft(answer=lambda _: None)
            now = self._context.clock.now()
            if held is None:
                record = RoundTrips(ingress=heartbeat.ingress, site=heartbeat.site, ms=dict(heartbeat.round_trips_ms), at=now)
            else:
                # A site that does not answer now is where it was.
                before = held.record.ms if held.record.site == heartbeat.site else {}
                known = {one.record.site for one in self._context.state.records(Ingress).values()}
                kept = {site: ms for site, ms in before.items() if site in known}
                record = replace(held.record, site=heartbeat.site, ms={**kept, **heartbeat.round_trips_ms}, at=now)
            return Draft(
                compare=[absent(key) if held is None else unchanged(key, held.revision)],
                ops=[Put(key, codec.encode(record))],
                answer=lambda _: None,
            )

        await self._context.write(type(None), build)

    def _due(self, held: Held[RoundTrips] | None, heartbeat: IngressHeartbeat) -> bool:
        if held is None or held.record.site != heartbeat.site:
            return True
        # The wall clock may have been set back.
        if 0 <= self._context.clock.now() - held.record.at < WRITE_S:
            return False
        return any(_differs(held.record.ms.get(site), ms) for site, ms in heartbeat.round_trips_ms.items())


def _differs(before: float | None, now: float) -> bool:
    return before is None or abs(now - before) > max(CHANGED_MS, CHANGED * before)


def _check(heartbeat: IngressHeartbeat) -> None:
    if len(heartbeat.problems) > PROBLEMS_MAX or any(len(words) > WORDS_MAX for words in heartbeat.problems.values()):
        raise TooLarge(f"problems: at most {PROBLEMS_MAX}, each of {WORDS_MAX} characters", field="problems")
    if len(heartbeat.requests) > APPS_MAX:
        raise TooLarge(f"requests: {len(heartbeat.requests)} apps; at most {APPS_MAX}", field="requests")
    if len(heartbeat.round_trips_ms) > SITES_MAX:
        raise TooLarge(f"round_trips_ms: {len(heartbeat.round_trips_ms)} sites; at most {SITES_MAX}", field="round_trips_ms")
    if not all(math.isfinite(rate) and 0 <= rate <= RATE_MAX for rate in heartbeat.requests.values()):
        raise Invalid(f"requests: a rate is a number from 0 to {RATE_MAX:g}", field="requests")
    if not all(0 < ms <= ROUND_TRIP_MS_MAX for ms in heartbeat.round_trips_ms.values()):
        raise Invalid(f"round_trips_ms: above 0 and at most {ROUND_TRIP_MS_MAX:g}", field="round_trips_ms")
