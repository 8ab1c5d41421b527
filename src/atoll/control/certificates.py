"""The leader's part of certificates: has those signed that are not handed in, renews them, and says when one ends.

Each hostname's status is written under the term's fence, every step of an order among it, so that the next leader goes on
where this one was killed: the order, the key that it is for, and what ingresses answer are in the record.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import deque
from collections.abc import AsyncIterator

import structlog
from msgspec.structs import replace

from atoll.control.certificate_statuses import DAY_S, Statuses, ahead, left_of, same, warning_at
from atoll.control.leader import Term
from atoll.control.orders import AcmeFailed, Authority, fulfil, new_key, request_for
from atoll.control.signers import Signers
from atoll.control.wishes import Wish, wishes_of
from atoll.control.writer import Writer
from atoll.model import keys
from atoll.model.chains import check_chain
from atoll.model.errors import AtollError, Compacted, Conflict, Fenced, Invalid
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Store
from atoll.model.records import App, Severity
from atoll.model.records.certificate import AcmeSettings, Certificate, CertificatePhase, CertificateSource, CertificateStatus
from atoll.store.cache import Delta, Deltas, State

KINDS: dict[str, type] = {
    keys.CERTIFICATES: Certificate,
    keys.CERTIFICATE_STATUSES: CertificateStatus,
    keys.ACME_SETTINGS: AcmeSettings,
}
"""What the `State` must hold, beside those of `world`."""
AT_ONCE = 8
"""Hostnames that are worked on side by side."""
RENEW_AT = 2 / 3
JITTER = 0.05
"""Of the life: so far from `RENEW_AT` on either side, that certificates made together are not renewed together."""
RESTART_S = 5.0
PAUSE_MAX_S = 600.0
"""So long at most one hostname's `rateLimited` holds all others': most limits are of that name, and each waits for its own."""
TOKEN_CHARS_MAX = 256

log = structlog.get_logger()


class CertificateLoop:
    """One term of looking after certificates. `run` never returns by itself."""

    def __init__(self, store: Store, state: State, clock: Clock, chance: random.Random, term: Term, signers: Signers) -> None:
        self._state = state
        self._clock = clock
        self._chance = chance
        self._statuses = Statuses(state, Writer(store, term), clock, chance)
        self._signers = signers
        self._pace = signers.pace
        self._changed = asyncio.Event()
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._queue: deque[Wish] = deque()
        """What was due when all was looked at last, and has not begun."""
        self._authority: tuple[int, Authority] | None = None
        """The settings' revision, and what they lead to."""
        self._paused_until = 0.0
        """The authority wants no new order before."""

    async def run(self) -> None:
        """Raises Fenced when another leads; whatever else goes wrong is logged and tried again."""
        # Asked for before the first look, so that no change falls in between.
        changes = self._state.changes()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(changes), name="certificates: follow")
                while True:
                    try:
                        wait_s = await self._look(tasks)
                    except Fenced:
                        raise
                    except Exception:  # the outer edge: certificates must not end the leader's other work
                        log.exception("certificates could not be looked at", retry_s=RESTART_S)
                        wait_s = RESTART_S
                    await self._wait(wait_s)
        finally:
            self._busy.clear()

    async def _follow(self, changes: AsyncIterator[Deltas]) -> None:
        while True:
            try:
                # Without a deadline: a quiet cell has no changes.
                async for deltas in changes:
                    if any(_concerns(delta) for delta in deltas.deltas):
                        self._changed.set()
            except Compacted:
                changes = self._state.changes()
                self._changed.set()

    async def _wait(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(min(max(0.0, wait_s), self._pace.look_s)):
                await self._changed.wait()
        except TimeoutError:
            return
        await asyncio.sleep(self._pace.gather_s)
        self._changed.clear()

    async def _look(self, tasks: asyncio.TaskGroup) -> float:
        """Begin what is due, and return in how many seconds to look again."""
        now, wishes = self._clock.now(), wishes_of(self._state)
        for host, held in list(self._state.records(CertificateStatus).items()):
            if host in self._busy or host in self._state.broken(Certificate):
                continue
            left = left_of(held.record, wishes.get(host), now)
            if left != held.record and not await self._statuses.leave(host, held, left):
                self._changed.set()
        times = {host: self._due(wish, now) for host, wish in wishes.items() if host not in self._busy}
        self._queue = deque(wishes[host] for host in sorted(times, key=lambda host: (times[host], host)) if times[host] <= now)
        self._begin(tasks)
        return min((at for at in times.values() if at > now), default=math.inf) - now

    def _begin(self, tasks: asyncio.TaskGroup) -> None:
        """Begin as much of what is due as is worked on side by side; the next as soon as one has ended."""
        while self._queue and len(self._busy) < AT_ONCE:
            wish = self._queue.popleft()
            task = tasks.create_task(self._serve(wish), name=f"certificate {wish.host}")
            self._busy[wish.host] = task
            task.add_done_callback(lambda task, host=wish.host: self._ended(tasks, host, task))  # type: ignore[misc]

    def _ended(self, tasks: asyncio.TaskGroup, host: str, task: asyncio.Task[None]) -> None:
        self._busy.pop(host, None)
        if task.cancelled() or task.exception() is not None:
            return
        with contextlib.suppress(RuntimeError):  # the term is ending, and nothing may begin in it any more
            self._begin(tasks)
        if not self._queue:
            self._changed.set()

    def _due(self, wish: Wish, now: float) -> float:
        """Return when something is to be done for a hostname."""
        held = self._state.get(CertificateStatus, wish.host)
        status = held.record if held is not None and held.record.project == wish.project else None
        known = status is not None and same(status, wish)
        if wish.source is CertificateSource.FILE:
            added = self._state.get(Certificate, wish.host)
            warned_at = status.warned_at if status is not None and known and not ahead(status, now) else 0.0
            return warning_at(added.record.not_after, warned_at) if added else math.inf
        at = 0.0
        if status is None or ahead(status, now):
            pass
        elif known and status.phase is CertificatePhase.VALID:
            at = status.renew_at
        elif status.phase is CertificatePhase.FAILED if known else wish.source is CertificateSource.ACME and status.attempts:
            at, settings = status.retry_at, self._state.get(AcmeSettings, "cell")
            if wish.source is CertificateSource.ACME and settings is not None and settings.record.updated_at > status.updated_at:
                at = min(at, settings.record.updated_at)  # not before that: who wrote it may have a clock that is ahead
        if wish.source is CertificateSource.ACME:
            at = max(at, self._paused_until)
        return at

    async def _serve(self, wish: Wish) -> None:
        if self._due(wish, self._clock.now()) > self._clock.now():
            return  # it was done, or put off, since it was found due
        try:
            match wish.source:
                case CertificateSource.FILE:
                    await self._warn(wish)
                case CertificateSource.OWN:
                    await self._sign(wish)
                case CertificateSource.ACME:
                    await self._order(wish)
        except Fenced:
            raise
        except Conflict as error:
            log.info("a certificate's record has changed; it is looked at again", host=wish.host, cause=error.message)
        except AtollError as error:
            await self._fail_safely(wish, error)
        except Exception as error:  # the outer edge: one hostname's fault stays its own
            log.exception("a certificate could not be had", host=wish.host)
            await self._fail_safely(wish, AtollError(f"a fault in the server: {type(error).__name__}"))

    async def _fail_safely(self, wish: Wish, error: AtollError) -> None:
        """As `_fail`; where the store cannot be written either, nothing is known of it, and it is tried again soon."""
        try:
            await self._fail(wish, error)
        except Fenced:
            raise
        except AtollError as unwritten:
            log.warning("what became of a certificate could not be written", host=wish.host, cause=unwritten.message)
            await asyncio.sleep(RESTART_S)

    async def _sign(self, wish: Wish) -> None:
        chain, key = await self._signers.own(wish.host)
        await self._valid(wish, chain, key)

    async def _order(self, wish: Wish) -> None:
        if wish.host.startswith("*."):
            raise Invalid("ACME over HTTP proves no wildcard", mend="add a certificate from files")
        authority, directory = self._connected()
        status = self._statuses.of(wish)
        order = None
        if status.order and status.order_at == directory:  # no other authority knows it
            try:
                order = await authority.look(status.order)
            except AcmeFailed as error:
                if not error.kind:
                    raise
                log.info("an order is not known any more", host=wish.host, cause=error.message)
        if order is None or order.state == "invalid":
            order = await authority.begin(wish.host)
            sealed = self._signers.seal.seal(new_key(), _next(wish.host))
            status = replace(status, phase=CertificatePhase.ORDERING, next_sealed=sealed, challenges={})
            status = replace(status, order=order.url, order_at=directory)
            await self._statuses.write(wish, status)
        key = self._signers.seal.open(status.next_sealed, _next(wish.host))

        async def show(answers: dict[str, str]) -> None:
            if any(len(token) > TOKEN_CHARS_MAX or not _plain(token) for token in answers):
                raise AcmeFailed("the authority's token is none")
            now = replace(self._statuses.of(wish), phase=CertificatePhase.ORDERING, challenges=answers)
            await self._statuses.write(wish, now)
            if self._signers.answered is not None:
                await self._signers.answered(wish.host, answers)

        chain = await fulfil(authority, order, request_for(wish.host, key), self._pace, show)
        await self._valid(wish, chain, key)

    def _connected(self) -> tuple[Authority, str]:
        """Return the authority, and its directory."""
        settings = self._state.get(AcmeSettings, "cell")
        if settings is None:
            raise Invalid("no ACME authority is chosen for this cell", mend="atoll certificates acme --directory URL")
        if self._authority is None or self._authority[0] != settings.revision:
            self._authority = (settings.revision, self._signers.connect(settings.record))
            self._paused_until = 0.0
        return self._authority[1], settings.record.directory

    async def _valid(self, wish: Wish, chain: str, key: bytes) -> None:
        """Check what was signed, seal its key and have ingresses show it."""
        now = self._clock.now()
        checked = check_chain(wish.host, chain, key.decode(), now)
        described = checked.described
        life_s = described.not_after - described.not_before
        before = self._statuses.of(wish)
        # What ACME refused is not made good by another source.
        waits = wish.source is not CertificateSource.ACME and before.retry_at > now
        renew_at = described.not_before + life_s * (RENEW_AT + JITTER * (2 * self._chance.random() - 1))
        status = CertificateStatus(
            host=wish.host,
            project=wish.project,
            source=wish.source,
            app=wish.app,
            phase=CertificatePhase.VALID,
            chain=checked.chain,
            sealed=self._signers.seal.seal(checked.key.encode(), keys.certificate_status(wish.host)),
            not_after=described.not_after,
            renew_at=max(renew_at, now),
            attempts=before.attempts if waits else 0,
            retry_at=before.retry_at if waits else 0.0,
            updated_at=now,
        )
        message = f"a certificate for {wish.host} was signed by {described.issuer}"
        await self._statuses.write(wish, status, self._statuses.event(wish, "certificate-issued", message, Severity.INFO))
        log.info("a certificate was signed", host=wish.host, source=wish.source.value, issuer=described.issuer)

    async def _fail(self, wish: Wish, error: AtollError) -> None:
        """Write what went wrong; the next try comes later and later, and not before the authority wants it."""
        now = self._clock.now()
        status = self._statuses.of(wish)
        attempts = status.attempts + 1
        wait_s = min(self._pace.retry_max_s, self._pace.retry_min_s * 2 ** min(attempts - 1, 20)) * self._chance.uniform(0.8, 1.2)
        kind = error.kind if isinstance(error, AcmeFailed) else ""
        if isinstance(error, AcmeFailed):
            wait_s = max(wait_s, min(error.retry_after_s, 7 * DAY_S))
            if kind == "rateLimited":
                self._paused_until = max(self._paused_until, now + min(error.retry_after_s or wait_s, PAUSE_MAX_S))
        over = bool(kind) or isinstance(error, Invalid)
        words = error.message + (f"; {error.mend}" if error.mend else "")
        failed = replace(
            status,
            phase=CertificatePhase.FAILED,
            attempts=attempts,
            retry_at=now + wait_s,
            error=words[:1_000],
            # An order that is refused is over; one that only takes its time, or whose authority is away, goes on.
            order="" if over else status.order,
            order_at="" if over else status.order_at,
            challenges={} if over else status.challenges,
            next_sealed=b"" if over else status.next_sealed,
        )
        message = f"no certificate for {wish.host}: {failed.error}; next try in {wait_s:.0f} s"
        log.warning("a certificate could not be had", host=wish.host, cause=failed.error, retry_in_s=round(wait_s))
        await self._statuses.write(wish, failed, self._statuses.event(wish, "certificate-failed", message, Severity.WARNING))

    async def _warn(self, wish: Wish) -> None:
        """Say that a certificate from files ends soon: nobody else renews it."""
        added = self._state.get(Certificate, wish.host)
        if added is None:
            return
        now, ends = self._clock.now(), added.record.not_after
        days = max(0, math.ceil((ends - now) / DAY_S))
        words = f"ends in {days} days" if ends > now else "has expired"
        event = self._statuses.event(
            wish, "certificate-ends", f"the certificate of {wish.host} {words}; add a newer one", Severity.WARNING
        )
        status = self._statuses.of(wish)
        await self._statuses.write(wish, replace(status, phase=CertificatePhase.VALID, not_after=ends, warned_at=now), event)


def _next(host: str) -> str:
    """Return what the key of an order is sealed for."""
    return keys.certificate_status(host) + "/next"


def _plain(token: str) -> bool:
    return token.isascii() and token.replace("-", "").replace("_", "").isalnum()


def _concerns(delta: Delta) -> bool:
    if delta.kind in (Certificate, CertificateStatus, AcmeSettings):
        return True
    return delta.kind is App and any(
        held is not None and held.record.spec.ingress is not None and held.record.spec.ingress.certificate is not None
        for held in (delta.old, delta.new)
    )
