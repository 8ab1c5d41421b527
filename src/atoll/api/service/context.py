"""What every part of the service shares: the store, the cache of its records, the clock, and how a write is made."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar

import structlog
from msgspec import Struct, structs

from atoll.api.service.sealing import Sealer
from atoll.model import codec, keys
from atoll.model.errors import AtollError, Conflict, Invalid, NotFound, Retry, StaleRevision, Unavailable
from atoll.model.fabric import Fabric, FabricIpv6, FabricNode, FabricPaths
from atoll.model.maintenance import Maintenance
from atoll.model.membership import Authority, Identity, JoinToken, Server
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Compare, LeaseId, Op, Put, Revision, Store, absent
from atoll.model.records import (
    App,
    AppStatus,
    Brake,
    BrakeRelease,
    Drained,
    Event,
    Ingress,
    Instance,
    Job,
    JobStatus,
    Node,
    NodeLiveness,
    NodePolicy,
    Prefetch,
    Project,
    Release,
    RequestRecord,
    RoundTrips,
    RouteClaim,
    RouteHost,
    Secret,
    Site,
    Status,
    Token,
)
from atoll.model.records.certificate import AcmeSettings, Certificate, CertificateRoot, CertificateStatus
from atoll.model.reservation import Reservation
from atoll.model.streams import ErrorBody
from atoll.store.cache import Held, State

T = TypeVar("T")

KINDS: dict[str, type] = {
    keys.PROJECTS: Project,
    keys.APPS: App,
    keys.APP_STATUSES: AppStatus,
    keys.RELEASES: Release,
    keys.JOBS: Job,
    keys.JOB_STATUSES: JobStatus,
    keys.INSTANCES: Instance,
    keys.STATUSES: Status,
    keys.NODES: Node,
    keys.SITES: Site,
    keys.ROUND_TRIPS: RoundTrips,
    keys.NODE_POLICIES: NodePolicy,
    keys.NODE_LIVENESS: NodeLiveness,
    keys.MAINTENANCES: Maintenance,
    keys.RESERVATIONS: Reservation,
    keys.PREFETCHES: Prefetch,
    keys.BRAKES: Brake,
    keys.BRAKE_RELEASES: BrakeRelease,
    keys.TOKENS: Token,
    keys.SECRETS: Secret,
    keys.EVENTS: Event,
    keys.DRAINED: Drained,
    keys.INGRESSES: Ingress,
    keys.ROUTES: RouteClaim,
    keys.ROUTE_HOSTS: RouteHost,
    keys.FABRICS: Fabric,
    keys.FABRIC_IPV6S: FabricIpv6,
    keys.FABRIC_NODES: FabricNode,
    keys.FABRIC_PATHS: FabricPaths,
    keys.AUTHORITIES: Authority,
    keys.JOIN_TOKENS: JoinToken,
    keys.IDENTITIES: Identity,
    keys.SERVERS: Server,
    keys.CERTIFICATES: Certificate,
    keys.CERTIFICATE_STATUSES: CertificateStatus,
    keys.CERTIFICATE_ROOTS: CertificateRoot,
    keys.ACME_SETTINGS: AcmeSettings,
}
"""What the `State` that a `Service` is given must hold."""

TRIES_MAX = 8
"""Attempts of one write when others change the same records at the same time."""
REACH_S = 5.0
"""The longest wait until this server's cache shows a write that was made; the write stands all the same."""
REQUEST_KEEP_S = 3_600.0
"""How long at least the answer to a request key is kept."""
REQUEST_LEASE_S = 60.0
"""The keys of so long a time share one lease of the store, which removes them."""

GOOD, BAD, FAULTY = 200, 400, 500
"""Statuses of HTTP: of what was done, and from which on something is refused, and something is wrong here."""

log = structlog.get_logger()


class RequestKey(Struct, frozen=True, kw_only=True):
    """A write's idempotency key: whose, which, and the keyed digest of what it asked for."""

    caller: str
    key: str
    fingerprint: str


class Draft(Struct, Generic[T], frozen=True, kw_only=True):
    """A write that has been decided but not made. Without `ops` there is nothing to write, and the answer holds already."""

    answer: Callable[[Revision], T]
    """The answer, given the revision of the write."""
    compare: Sequence[Compare] = ()
    ops: Sequence[Op] = ()


class ImageResolver(Protocol):
    """The cell's own registry, as far as releases need it."""

    def digest_of(self, repository: str, tag: str) -> str | None:
        """Return the digest that `tag` names now, None when there is no such image."""
        ...


class Context:
    """See the module. `entropy` gives bytes for tokens and nonces: the system's in production."""

    def __init__(
        self,
        store: Store,
        state: State,
        clock: Clock,
        random: random.Random,
        sealer: Sealer,
        domain: str,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.store = store
        self.state = state
        self.clock = clock
        self.random = random
        self.sealer = sealer
        self.domain = domain
        self.entropy = entropy
        self.images: ImageResolver | None = None
        self._lease: tuple[float, LeaseId] | None = None
        self._asking: asyncio.Future[Revision] | None = None

    async def write(self, kind: type[T], build: Callable[[], Draft[T]], request: RequestKey | None = None) -> T:
        """Make the write that `build` decides from the cache, and return its answer once the cache shows it.

        `build` is called again when something that it read has changed meanwhile; what it raises is raised, once this server is
        sure to have seen all that was written before (others may have answered the caller until now). A repeat under
        the same `request` gets the first answer, and what was refused for good stays refused: a try of it that is still on its way
        changes nothing. Raises Conflict: others changed it too often, or the key was used for something else. OutcomeUnknown:
        repeat with the same request key, or read first.
        """
        certain = False
        for _ in range(TRIES_MAX):
            if request is not None:
                kept = await self._kept(kind, request)
                if kept is not None:
                    return kept
            draft, seen = None, self.state.revision
            try:
                draft = build()
            except AtollError as error:
                if certain:
                    if await self._refuse(request, error):
                        raise
                    continue  # an earlier try has got through meanwhile
            if not certain and (draft is None or not draft.ops):
                # Refused, or done already: as far as this server has heard. Another may have written what it has not seen.
                certain = True
                await self.be_current()
                if self.state.revision != seen:
                    continue
            if draft is None:
                continue
            compare, ops = list(draft.compare), list(draft.ops)
            if request is not None:
                compare.append(absent(keys.request(request.caller, request.key)))
                ops.append(await self._keep(request, GOOD, codec.encode(draft.answer(Revision(0)))))
            if not ops:
                return draft.answer(Revision(0))
            try:
                result = await self.store.txn(compare, ops)
            except NotFound:
                if request is None:
                    raise
                # The lease under which request keys are kept has ended early, as after a long standstill. Another write may have
                # found that out just before this one.
                self._lease = None
                continue
            await self.reach(result.revision)
            if result.succeeded:
                return draft.answer(result.revision)
        raise Conflict("others change the same thing all the time; nothing was written", mend="try again")

    async def look(self, read: Callable[[], Awaitable[T]]) -> T:
        """Return what `read` finds in the cache. That there is nothing is said once this server is sure to have seen all that was
        written before: another may have made it. Raises Unavailable where it cannot be sure."""
        try:
            return await read()
        except NotFound:
            await self.be_current()
        return await read()

    async def be_current(self) -> None:
        """Make sure that the cache shows all that was written before this call. What was read of it before is to be read again.

        Raises Unavailable when it falls too far behind: nobody may be told what is only what this server has missed.
        """
        newest = await self._newest()
        await self.reach(newest)
        if self.state.revision < newest:
            raise Unavailable("this server has not heard of all that was written", mend="try again, or ask another server")

    async def _newest(self) -> Revision:
        """Return the store's newest revision, read after this call began. Whoever asks before that read begins shares it: when
        thousands of agents come at once, most of what they say is known, and one read serves all that came in one turn."""
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
            self._asking.add_done_callback(_noticed)
        return await asyncio.shield(self._asking)

    async def _ask(self) -> Revision:
        self._asking = None  # who asks from here on may have written after the read began
        return await self.store.revision()

    async def reach(self, revision: Revision) -> None:
        """Wait until the cache has seen `revision`, so that who wrote can read it here; give up after `REACH_S`."""
        if self.state.revision >= revision:
            return
        try:
            async with asyncio.timeout(REACH_S):
                await self.state.reach(revision)
        except TimeoutError:
            log.warning("the cache does not follow the store", behind=revision, revision=self.state.revision)

    async def _kept(self, kind: type[T], request: RequestKey) -> T | None:
        item = await self.store.get(keys.request(request.caller, request.key))
        if item is None:
            return None
        record = codec.decode(item.value, RequestRecord)
        if record.fingerprint != request.fingerprint:
            raise Conflict("this Idempotency-Key was used for a different request", mend="use a new key for each request")
        body = self.sealer.open(record.body, _sealed_as(request, record.status))
        if record.status >= BAD:
            raise codec.decode(body, ErrorBody).error()
        # Straight into its type: by way of plain data a map with whole numbers for keys would not come back.
        answer = codec.decode(body, kind)
        # The first try may have ended before the cache had seen it: who has this answer may build on it here.
        await self.reach(item.mod_revision)
        if isinstance(answer, Struct) and getattr(answer, "revision", None) == 0:
            answer = structs.replace(answer, revision=item.mod_revision)
        return answer

    async def _refuse(self, request: RequestKey | None, error: AtollError) -> bool:
        """Keep that a request was refused, where the same may not be asked again; False where one like it has got through."""
        if request is None or error.retry is not Retry.NEVER or not BAD <= error.status < FAULTY:
            return True
        try:
            kept = await self._keep(request, error.status, codec.encode(ErrorBody.of(error)))
            return (await self.store.txn([absent(kept.key)], [kept])).succeeded
        except NotFound:  # as in `write`
            self._lease = None
            return False

    async def _keep(self, request: RequestKey, status: int, answer: bytes) -> Put:
        """The answer is sealed, because that to a new token holds the token. Its revision is that of this very record."""
        key = keys.request(request.caller, request.key)
        record = RequestRecord(
            status=status,
            body=self.sealer.seal(answer, _sealed_as(request, status)),
            fingerprint=request.fingerprint,
            at=self.clock.now(),
        )
        return Put(key, codec.encode(record), await self._request_lease())

    async def _request_lease(self) -> LeaseId:
        now = self.clock.monotonic()
        if self._lease is None or now - self._lease[0] > REQUEST_LEASE_S:
            lease = await self.store.lease_grant(REQUEST_KEEP_S + REQUEST_LEASE_S)
            self._lease = (now, lease.id)
        return self._lease[1]


def _noticed(asked: asyncio.Future[Revision]) -> None:
    """Take note of a failure that nobody waits for any more."""
    if not asked.cancelled():
        asked.exception()


def check_match(held: Held[T] | None, if_match: int | None, what: str) -> None:
    """Raise StaleRevision if the caller saw another revision than the newest; `if_match` 0 means that it must not exist."""
    newest = held.revision if held is not None else 0
    if if_match is not None and if_match != newest:
        seen = f"is at revision {newest}" if newest else "does not exist"
        expected = f"revision {if_match}" if if_match else "that it does not exist"
        raise StaleRevision(f"{what} {seen}; the request expects {expected}", mend="read it again, then decide")


def revision_of(text: str) -> int:
    """Return the revision in an `If-Match` header. Raises Invalid."""
    digits = text.strip().removeprefix("W/").strip('"')
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 18:
        raise Invalid(f"If-Match: {text[:40]!r} is not a revision", field="If-Match", mend='send the ETag of an answer, e.g. "42"')
    return int(digits)


def _sealed_as(request: RequestKey, status: int) -> str:
    """A server from before refusals were kept cannot open one, and so does not take it for an answer."""
    key = keys.request(request.caller, request.key)
    return key if status < BAD else f"{key} refused"
