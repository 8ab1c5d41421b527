"""How each hostname's certificate stands, as the leader writes it: under its fence, and only over what it has read."""

from __future__ import annotations

import asyncio
import math
import random

import structlog
from msgspec.structs import replace

from atoll.control.wishes import Wish
from atoll.control.writer import Unit, Writer
from atoll.model import codec, keys
from atoll.model.chains import EARLY_S
from atoll.model.errors import Conflict
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import Event, Severity, event_id, new_suffix
from atoll.model.records.certificate import CertificatePhase, CertificateSource, CertificateStatus
from atoll.store.cache import Held, State

DAY_S = 86_400.0
WARN_DAYS = (14, 3, 0)
"""An event says that a certificate from files ends: so many days before, and when it has ended."""
REACH_S = 5.0
"""The longest wait for the cache to show what was written; what is decided from an older one is refused by the store."""

log = structlog.get_logger()


class Statuses:
    """Reads and writes `CertificateStatus`, one hostname at a time. Writes raise Fenced when another leads."""

    def __init__(self, state: State, writer: Writer, clock: Clock, chance: random.Random) -> None:
        self._state = state
        self._writer = writer
        self._clock = clock
        self._chance = chance

    def of(self, wish: Wish) -> CertificateStatus:
        """Return how it stands with this wish; what is shown for another one, from before, goes on until there is better."""
        held = self._state.get(CertificateStatus, wish.host)
        if held is not None and same(held.record, wish):
            return replace(held.record, app=wish.app)
        status = CertificateStatus(host=wish.host, project=wish.project, source=wish.source, app=wish.app, updated_at=0.0)
        if held is not None and held.record.project == wish.project:
            before = held.record
            status = replace(status, chain=before.chain, sealed=before.sealed, not_after=before.not_after)
            # Another source in between is no way around the wait after a failure.
            if not ahead(before, self._clock.now()):
                status = replace(status, attempts=before.attempts, retry_at=before.retry_at)
        return status

    async def write(self, wish: Wish, status: CertificateStatus, *events: Event) -> None:
        """Write how it stands, and tell. Raises Conflict: the record was changed meanwhile."""
        held, key = self._state.get(CertificateStatus, wish.host), keys.certificate_status(wish.host)
        compare = absent(key) if held is None else unchanged(key, held.revision)
        status = replace(status, updated_at=self._clock.now())
        await self._commit(Unit(wish.host, (compare,), (Put(key, codec.encode(status)), *(_put(event) for event in events))))

    async def leave(self, host: str, held: Held[CertificateStatus], left: CertificateStatus | None) -> bool:
        """Have no more than `left` of a record, and return whether it was still as it was read."""
        key = keys.certificate_status(host)
        op = Delete(key) if left is None else Put(key, codec.encode(left))
        try:
            await self._commit(Unit(host, (unchanged(key, held.revision),), (op,)))
        except Conflict:
            return False
        return True

    def event(self, wish: Wish, code: str, message: str, severity: Severity) -> Event:
        now = self._clock.now()
        return Event(
            id=event_id(now, new_suffix(self._chance.choice, 8)),
            at=now,
            project=wish.project,
            subject=f"certificate/{wish.host}",
            code=code,
            message=message,
            severity=severity,
            data={"app": wish.app} if wish.app else {},
        )

    async def _commit(self, unit: Unit) -> None:
        outcome = await self._writer.commit([unit])
        if outcome.conflicts or outcome.refused:
            raise Conflict(f"the record of {unit.source} was not written")
        try:
            async with asyncio.timeout(REACH_S):
                await self._state.reach(outcome.revision)
        except TimeoutError:
            log.warning("the cache does not follow the store", behind=outcome.revision)


def same(status: CertificateStatus, wish: Wish) -> bool:
    """Whether a status is about this wish, or about what was there before."""
    return (status.project, status.source) == (wish.project, wish.source)


def ahead(status: CertificateStatus, now: float) -> bool:
    """Whether a status is from before the date was set back: none of its times says anything."""
    return status.updated_at > now + EARLY_S


def stale(status: CertificateStatus, wish: Wish | None) -> bool:
    """Whether a status is of no use any more: nobody wants the hostname, another project does, or its chain is handed in."""
    return (
        wish is None or status.project != wish.project or (status.source != wish.source and wish.source is CertificateSource.FILE)
    )


def left_of(status: CertificateStatus, wish: Wish | None, now: float) -> CertificateStatus | None:
    """Return what is to stand of a status that nobody works on; None for nothing.

    Of one that is of no use the wait after a failure is left, until it is over: who removes a hostname and adds it again waits as
    long as who leaves it. Another project, which has the hostname now, does not wait for it.
    """
    if wish is not None and not stale(status, wish):
        return replace(status, app=wish.app) if wish.app and not status.app else status
    if (
        status.attempts == 0
        or status.retry_at <= now
        or ahead(status, now)
        or (wish is not None and wish.project != status.project)
    ):
        return None
    # As of ACME, whatever it was of: the cell's own root makes nobody wait.
    rest = replace(status, source=CertificateSource.ACME, phase=CertificatePhase.FAILED, app="", challenges={}, renew_at=0.0)
    return replace(rest, chain="", sealed=b"", not_after=0.0, warned_at=0.0)


def warning_at(not_after: float, warned_at: float) -> float:
    """Return when to say next that a certificate ends; infinite once all has been said."""
    for days in WARN_DAYS:
        at = not_after - days * DAY_S
        if at > warned_at:
            return at
    return math.inf


def _put(event: Event) -> Put:
    return Put(keys.event(event.project, event.id), codec.encode(event))
