"""The store on etcd: what the contract says is what etcd does, so that little is added here but checks, bounds and deadlines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import grpc
import structlog
from aetcd import rpc

from atoll.model.errors import AtollError, Compacted, Conflict, Corrupt, Invalid, NotFound, Unavailable, Unsupported
from atoll.model.ports.store import (
    LINEARIZABLE,
    RANGE_LIMIT_MAX,
    TXN_OPS_MAX,
    Compare,
    Consistency,
    Delete,
    KeyValue,
    Lease,
    LeaseId,
    Op,
    Put,
    Range,
    Revision,
    TxnResult,
    WatchBatch,
)
from atoll.store.base import LEASE_TTL_MAX_S, LEASE_TTL_MIN_S
from atoll.store.etcd.address import EtcdAddress
from atoll.store.etcd.errors import FLAGS
from atoll.store.etcd.members import PROBE_KEY, RESERVED, AnswerTooLarge, Member, Members
from atoll.store.etcd.translate import bounds_of, item_of, request_of, result_of
from atoll.store.etcd.watch import follow
from atoll.store.transaction import Transaction, check_key, check_limit, check_prefix, check_transaction

HISTORY_REVISIONS_MAX = 100_000
"""Revisions that a watch can resume from. Every server sees to it; that one has compacted already is no error."""
COMPACT_EVERY_S = 30.0
COMPACT_REVISIONS_MIN = 1_000
"""A compaction forgets at least so many."""
PAGE_ITEMS = 2_000
"""Items that one message carries at most; halved where their values make it too large."""
LISTING_TRIES = 3
"""Of a listing whose revision was compacted before its last page was read."""
VERSION_MIN = (3, 4)
FILLING = RESERVED + b"filling"
"""Stands while a restore or a migration fills this etcd; its value says whose. No store is opened over it."""
ANSWERS_S = 2.0

log = structlog.get_logger()


class EtcdStore:
    """`Store` on etcd; make it with `open`. Any number of processes may have the same etcd open."""

    def __init__(self, members: Members, history_revisions_max: int) -> None:
        self.members = members
        self._history_revisions_max = history_revisions_max
        self._compacted = Revision(0)
        self._compacting = asyncio.create_task(self._run_compaction(), name="etcd compaction")

    @classmethod
    async def open(cls, address: EtcdAddress, *, history_revisions_max: int = HISTORY_REVISIONS_MAX, filling: bool = False) -> Self:
        """Return the store at `address`, after asking every member that answers whether it will do.

        Raises Unavailable: no member answers, or most of them are down. Unsupported: too old, or started without `FLAGS`.
        Unauthenticated, Forbidden: the user. Conflict: a restore into it was not finished (unless `filling`).
        """
        members = Members(address)
        try:
            await check_members(members)
            marker = await members.call(lambda m: m.kv.Range, rpc.RangeRequest(key=FILLING), repeat=True)
            if marker.kvs and not filling:
                raise Conflict(
                    f"{address} is being filled by a restore or a migration, or one was broken off",
                    mend="run that to its end first",
                )
            return cls(members, history_revisions_max)
        except BaseException:
            await members.close()
            raise

    async def close(self) -> None:
        """End the watches (with Unavailable). Safe to repeat."""
        self._compacting.cancel()
        await asyncio.gather(self._compacting, return_exceptions=True)
        await self.members.close()

    async def revision(self) -> Revision:
        answer = await self._read(rpc.RangeRequest(key=PROBE_KEY, count_only=True))
        return Revision(answer.header.revision)

    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None:
        check_key(key)
        answer = await self._read(rpc.RangeRequest(key=key.encode()), consistency)
        return item_of(answer.kvs[0]) if answer.kvs else None

    async def range(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = RANGE_LIMIT_MAX,
        at: Revision | None = None,
        consistency: Consistency = LINEARIZABLE,
    ) -> Range:
        """See `Store.range`."""
        check_prefix(prefix)
        check_prefix(after)
        check_limit(limit)
        if at is not None:
            return await self._range_at(prefix, after, limit, at, consistency)
        for _ in range(LISTING_TRIES - 1):
            try:
                return await self._pages(prefix, after, limit, Revision(0), consistency)
            except Compacted:
                log.info("a listing was overtaken by a compaction and starts again", prefix=prefix)
        return await self._pages(prefix, after, limit, Revision(0), consistency)

    async def _range_at(self, prefix: str, after: str, limit: int, at: Revision, consistency: Consistency) -> Range:
        if consistency is Consistency.SERIALIZABLE:
            try:
                await self._check_at(at, consistency)
                return await self._pages(prefix, after, limit, at, consistency)
            except Invalid:
                log.debug("the member that is asked has not come to a revision yet; the others are asked, too", revision=at)
        await self._check_at(at, LINEARIZABLE)
        return await self._pages(prefix, after, limit, at, LINEARIZABLE)

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision:
        check_transaction(Transaction((), (Put(key, value, lease),)))
        request = rpc.PutRequest(key=key.encode(), value=value, lease=lease)
        answer = await self.members.call(lambda m: m.kv.Put, request, repeat=False)
        return Revision(answer.header.revision)

    async def delete(self, key: str) -> Revision:
        check_key(key)
        answer = await self.members.call(lambda m: m.kv.DeleteRange, rpc.DeleteRangeRequest(key=key.encode()), repeat=False)
        return Revision(answer.header.revision)

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        """See `Store.txn`. TooLarge also for what etcd's own limits refuse; nothing was written then."""
        transaction = Transaction(compare, then, otherwise)
        check_transaction(transaction)
        writes = any(isinstance(op, (Put, Delete)) for op in (*then, *otherwise))
        return result_of(await self.members.call(lambda m: m.kv.Txn, request_of(transaction), repeat=not writes))

    def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        """See `Store.watch`. It goes on at another member when one is lost, at the revision that comes next."""
        return self._watch(prefix, start)

    async def _watch(self, prefix: str, start: Revision) -> AsyncIterator[WatchBatch]:
        check_prefix(prefix)
        async for batch in follow(self.members, prefix, start):
            yield batch

    async def lease_grant(self, ttl_s: float) -> Lease:
        """See `Store.lease_grant`. etcd counts whole seconds, and keeps a lease at least one and a half election timeouts."""
        if not LEASE_TTL_MIN_S <= ttl_s <= LEASE_TTL_MAX_S:
            raise Invalid(f"a lease lasts {LEASE_TTL_MIN_S:g} to {LEASE_TTL_MAX_S:g} s, not {ttl_s:g}", field="ttl_s")
        # May be repeated: a lease whose answer was lost holds no key and runs out.
        answer = await self.members.call(lambda m: m.lease.LeaseGrant, rpc.LeaseGrantRequest(TTL=math.ceil(ttl_s)), repeat=True)
        return Lease(LeaseId(answer.ID), float(answer.TTL))

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        """See `Store.lease_keep_alive`."""
        request = rpc.LeaseKeepAliveRequest(ID=lease)
        answer = await self.members.call(lambda m: _one_answer(m.lease.LeaseKeepAlive), request, repeat=True)
        if answer.TTL <= 0:
            raise NotFound(f"lease {lease} is not there; it has expired or was revoked")

    async def lease_revoke(self, lease: LeaseId) -> None:
        """See `Store.lease_revoke`."""
        try:
            await self.members.call(lambda m: m.lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease), repeat=True)
        except NotFound:
            return

    async def lease_ttl_s(self, lease: LeaseId) -> float | None:
        """Return the time that a lease was granted for; None if it is gone."""
        answer = await self.members.call(lambda m: m.lease.LeaseTimeToLive, rpc.LeaseTimeToLiveRequest(ID=lease), repeat=True)
        return float(answer.grantedTTL) if answer.TTL > 0 else None

    async def describe(self) -> tuple[str, ...]:
        """Return one line about each member: version, size, whether it leads; or why it does not answer."""

        async def ask(member: Member) -> str:
            try:
                status = await self.members.at(member, lambda m: m.maintenance.Status, rpc.StatusRequest(), ANSWERS_S)
            except AtollError as error:
                return error.message
            leads = ", leads" if status.leader == status.header.member_id else ""
            return f"{member.target}: etcd {status.version}, {status.dbSize >> 20} MiB, revision {status.header.revision}{leads}"

        return tuple(await asyncio.gather(*(ask(member) for member in self.members.all)))

    async def compact(self, revision: Revision) -> None:
        """See `Store.compact`."""
        if revision > (newest := await self.revision()):
            raise Invalid(f"revision {revision} is not there yet; the newest is {newest}")
        if revision <= 1:
            raise Compacted("there is nothing before revision 1")
        # At the revision before: etcd drops deletions of the revision that it is compacted at, and we keep all of ours.
        request = rpc.CompactionRequest(revision=revision - 1)
        await self.members.call(lambda m: m.kv.Compact, request, repeat=False)

    async def _read(self, request: Any, consistency: Consistency = LINEARIZABLE) -> Any:
        alone = request.serializable = consistency is Consistency.SERIALIZABLE
        return await self.members.call(lambda m: m.kv.Range, request, repeat=True, alone=alone)

    async def _check_at(self, at: Revision, consistency: Consistency) -> None:
        """Raise Compacted where `at` is not whole any more: the revision before it must still be there. Invalid: not there yet."""
        if at < 1:
            raise Compacted("etcd's first revision is 1")
        probe = rpc.RangeRequest(key=PROBE_KEY, revision=max(1, at - 1), count_only=True)
        if (newest := (await self._read(probe, consistency)).header.revision) < at:
            raise Invalid(f"revision {at} is not there yet; the newest is {newest}", field="at")

    async def _pages(self, prefix: str, after: str, limit: int, at: Revision, consistency: Consistency) -> Range:
        items: list[KeyValue] = []
        page = PAGE_ITEMS
        while True:
            begin, end = bounds_of(prefix, items[-1].key if items else after)
            request = rpc.RangeRequest(key=begin, range_end=end, limit=min(page, limit - len(items)), revision=at)
            try:
                answer = await self._read(request, consistency)
            except AnswerTooLarge:
                if page == 1:
                    raise Corrupt(f"a value under {prefix!r} is larger than a message may be") from None
                page = max(1, page // 2)
                continue
            # All further pages are of the first one's revision.
            at = at or Revision(answer.header.revision)
            items.extend(item_of(found) for found in answer.kvs)
            if not answer.more or len(items) >= limit:
                return Range(tuple(items), at, bool(answer.more))

    async def _run_compaction(self) -> None:
        """Keep the history to its bound, for ever."""
        while True:
            await asyncio.sleep(COMPACT_EVERY_S)
            try:
                await self.trim()
            except AtollError as error:
                log.warning("the history could not be trimmed; trying again", cause=error.message, retry_s=COMPACT_EVERY_S)

    async def trim(self) -> None:
        """Forget what is more than the history may hold. Safe to repeat; the store's own task calls it."""
        floor = Revision(await self.revision() - self._history_revisions_max)
        if floor - self._compacted < COMPACT_REVISIONS_MIN:
            return
        try:
            await self.compact(floor)
        except Compacted:
            log.debug("another server has compacted", revision=floor)
        self._compacted = floor


def _one_answer(call: Any) -> Any:
    """Make of a stream of questions and answers one question and its answer."""

    async def ask(request: Any, *, timeout: float, metadata: Any) -> Any:
        stream = call(timeout=timeout, metadata=metadata)
        try:
            await stream.write(request)
            answer = await stream.read()
            if answer is grpc.aio.EOF:
                raise Unavailable("etcd ended a call without an answer")
            return answer
        finally:
            stream.cancel()

    return ask


async def check_members(members: Members) -> None:
    """Raise Unavailable if no member answers; Unsupported for one that is too old or takes only small transactions."""
    answers = await asyncio.gather(*(_check_member(members, member) for member in members.all), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, Unavailable):
            raise answer
    if all(isinstance(answer, Unavailable) for answer in answers):
        raise answers[0] if isinstance(answers[0], BaseException) else Unavailable("no member of etcd answers")


async def _check_member(members: Members, member: Member) -> None:
    status = await members.at(member, lambda m: m.maintenance.Status, rpc.StatusRequest(), ANSWERS_S)
    version = tuple(int(part) for part in status.version.split(".")[:2] if part.isdigit())
    if version < VERSION_MIN:
        raise Unsupported(f"{member.target} is etcd {status.version}; 3.4 is the oldest that will do")
    # Never carried out, as nothing has a negative version; but a member counts before it looks.
    never = rpc.Compare(result=rpc.Compare.EQUAL, target=rpc.Compare.VERSION, key=PROBE_KEY, version=-1)
    read = rpc.RequestOp(request_range=rpc.RangeRequest(key=PROBE_KEY, serializable=True))
    try:
        request = rpc.TxnRequest(compare=[never], success=[read] * TXN_OPS_MAX)
        await members.at(member, lambda m: m.kv.Txn, request, ANSWERS_S)
    except AtollError as error:
        if error.code == "too-large":
            raise Unsupported(
                f"{member.target} takes only small transactions; {TXN_OPS_MAX} operations are needed",
                mend=f"start every member with {FLAGS}",
            ) from None
        raise
