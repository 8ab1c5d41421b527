"""One leader at a time: a key under a lease, and a fence that every write of the leader carries.

The lease makes a new leader possible; only the fence makes an old one harmless, however late its last write arrives. So the lease
may be ended early by one who sees the leader's process die: were that wrong, the old leader would lose its term, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from msgspec import Struct

from atoll.model import keys
from atoll.model.errors import AtollError, Fenced, NotFound
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Compare, KeyValue, LeaseId, Put, Store, Target, absent

LEASE_S = 5.0
"""How long a leader that died holds up the next."""
KEEP_EVERY_S = LEASE_S / 3
POLL_S = 0.5
"""How often one who waits looks whether the leader is gone."""
ERROR_PAUSE_S = 1.0

log = structlog.get_logger()


class Term(Struct, frozen=True):
    """One time of leading. `fence` holds as long as nobody else leads: its token is the key's create revision."""

    fence: Compare
    lease: LeaseId


Affirm = Callable[[float], None]
"""`(until)`: until then, on the monotonic clock, nobody else can lead. It may be called by another thread."""
Keep = Callable[[LeaseId, float, Affirm], Awaitable[None]]
"""`(lease, until, affirm)`: keep it alive, and return when it may have expired; at first that is `until`."""
Ended = Callable[[str], Awaitable[None]]
"""`(identity)`: returns when the process of that server has ended; not at all where that cannot be known. It raises nothing."""


async def lead(
    store: Store,
    clock: Clock,
    identity: str,
    work: Callable[[Term], Awaitable[None]],
    affirm: Affirm = lambda until: None,
    ended: Ended | None = None,
    keep: Keep | None = None,
) -> None:
    """Run `work` whenever this server leads, for ever; it is cancelled when the lease is lost.

    `identity` names this server across its restarts: an earlier run's lease is taken over at once, so no two servers may share
    one. `affirm` is told until when, on the monotonic clock, nobody else can lead. When `work` ends or raises, leadership is given
    up and sought again. With `ended`, a leader whose process has died is replaced at once; else when its lease has run out.
    `keep` keeps the lease alive; without one this event loop does, which loses it when it stands still for as long.
    """
    while True:
        pause_s = ERROR_PAUSE_S
        try:
            pause_s = await _try(store, clock, identity, work, affirm, ended, keep)
        except* AtollError as group:
            log.warning("leading was interrupted", server=identity, causes=[str(error) for error in group.exceptions])
        except* Exception:  # the outer edge: a server that waits to lead must not end for one loop's fault
            log.exception("the leader's loops failed and start again", server=identity)
        await asyncio.sleep(pause_s)


async def _try(
    store: Store,
    clock: Clock,
    identity: str,
    work: Callable[[Term], Awaitable[None]],
    affirm: Affirm,
    ended: Ended | None,
    keep: Keep | None,
) -> float:
    """Lead if nobody else does; return how long to wait before the next try."""
    if ended is not None:
        await _wait_for_end(store, identity, ended)
    acquired = await _acquire(store, clock, identity)
    if acquired is None:
        return POLL_S
    term, until = acquired
    affirm(until)
    log.info("leading", server=identity, fence=term.fence.expected)
    keeping = keep(term.lease, until, affirm) if keep is not None else _keep_alive(store, clock, term.lease, until, affirm)
    try:
        await _serve(work(term), keeping)
    finally:
        await _give_up(store, term)
    log.info("not leading any more", server=identity)
    # Also after an orderly end: whatever ended the term must not make a hot loop.
    return ERROR_PAUSE_S


async def _wait_for_end(store: Store, identity: str, ended: Ended) -> None:
    """Return when nobody else leads: at the end of another's term, which is ended here when its process is dead.

    Returns early, with nothing ended, where `ended` fails.
    """
    held = await store.get(keys.LEADER)
    if held is None or held.value == identity.encode():
        return
    leader = held.value.decode(errors="replace")
    dying = asyncio.ensure_future(ended(leader))
    try:
        while not dying.done():
            await asyncio.wait({dying}, timeout=POLL_S)
            if not dying.done() and not await _leads(store, held):
                return
        if dying.cancelled() or dying.exception() is not None:
            cause = "cancelled" if dying.cancelled() else repr(dying.exception())
            log.warning("whether the leader's process lives cannot be told; its lease decides", leader=leader, cause=cause)
            return
        log.warning("the leader's process has ended", leader=leader, server=identity)
        # This term's lease and no other's: where somebody leads meanwhile, he goes on.
        await store.lease_revoke(held.lease)
    finally:
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)


async def _leads(store: Store, held: KeyValue) -> bool:
    """Whether that term goes on, as far as can be seen."""
    try:
        now = await store.get(keys.LEADER)
    except AtollError as error:
        log.info("the store does not say who leads", cause=error.message)
        return True
    return now is not None and now.create_revision == held.create_revision


async def _acquire(store: Store, clock: Clock, identity: str) -> tuple[Term, float] | None:
    """Return the term that has begun, and until when its lease surely lasts; None where another leads."""
    held = await store.get(keys.LEADER)
    if held is not None:
        if held.value != identity.encode():
            return None
        # It was us, before a restart. The key goes with its lease, so that ours gets a new create revision.
        await store.lease_revoke(held.lease)
    until = clock.monotonic() + LEASE_S
    lease = await store.lease_grant(LEASE_S)
    result = await store.txn([absent(keys.LEADER)], [Put(keys.LEADER, identity.encode(), lease.id)])
    if not result.succeeded:
        await store.lease_revoke(lease.id)
        return None
    return Term(Compare(keys.LEADER, Target.CREATE, int(result.revision)), lease.id), until


async def _serve(work: Awaitable[None], keep: Awaitable[None]) -> None:
    working, keeping = asyncio.ensure_future(work), asyncio.ensure_future(keep)
    try:
        # Without a deadline: leading lasts until the lease is lost or the work ends.
        await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, keeping):
            task.cancel()
        await asyncio.gather(working, keeping, return_exceptions=True)


async def _keep_alive(store: Store, clock: Clock, lease: LeaseId, until: float, affirm: Affirm) -> None:
    """Return when the lease may have expired."""
    while True:
        await asyncio.sleep(KEEP_EVERY_S)
        asked = clock.monotonic()
        try:
            async with asyncio.timeout(max(0.01, until - asked)):
                await store.lease_keep_alive(lease)
            until = asked + LEASE_S
            affirm(until)
        except NotFound:
            log.warning("the lease has expired")
            return
        except (AtollError, TimeoutError) as error:
            log.warning("the lease could not be kept alive", cause=str(error) or "timeout")
            if clock.monotonic() >= until:
                return


async def _give_up(store: Store, term: Term) -> None:
    """End the term so that another can begin at once; where that fails the lease runs out by itself."""
    try:
        async with asyncio.timeout(ERROR_PAUSE_S):
            await store.lease_revoke(term.lease)
    except (AtollError, TimeoutError) as error:
        log.info("the lease was left to run out", cause=str(error) or "timeout")


async def check(store: Store, term: Term) -> None:
    """Raise Fenced if someone else leads, or nobody."""
    held = await store.get(keys.LEADER)
    if held is None or int(held.create_revision) != term.fence.expected:
        raise Fenced("another server leads")
