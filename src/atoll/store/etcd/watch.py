"""Watches on etcd that go on at another member where the last one ended: gapless, in order, each change once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog
from aetcd import rpc
from grpc.aio import AioRpcError

from atoll.model.errors import AtollError, Compacted, Forbidden, Unavailable
from atoll.model.ports.store import Change, Revision, WatchBatch
from atoll.store.etcd.errors import GRANT, judge
from atoll.store.etcd.members import CALL_S, CONNECT_S, PROBE_KEY, PROBE_S, RETRY_MAX_S, RETRY_MIN_S, TRY_S, Member, Members
from atoll.store.etcd.translate import bounds_of, change_of

SILENCE_S = 1.0
"""A watch that hears nothing for so long asks its member for a sign of life: one that is stopped would stay silent for ever."""

log = structlog.get_logger()


async def follow(members: Members, prefix: str, start: Revision) -> AsyncIterator[WatchBatch]:
    """Yield as `Store.watch` does. Raises Unavailable when no member has served the watch for `CALL_S`, or the store is closed."""
    position = start
    served_at = time.monotonic()
    retry_s = RETRY_MIN_S
    while True:
        members.check_open()
        member = members.current
        stream = _Stream(members, member, prefix, position)
        try:
            await stream.open()
            served_at, retry_s = time.monotonic(), RETRY_MIN_S
            while True:
                for batch in await stream.read():
                    position = Revision(batch.revision + 1)
                    yield batch
                served_at = time.monotonic()
        except _Lost as lost:
            members.check_open()
            if time.monotonic() - served_at > CALL_S:
                raise Unavailable(f"no member of etcd serves a watch: {lost}") from None
            log.debug("a watch goes on elsewhere", member=member.target, cause=str(lost), revision=position)
            members.turn_from(member, str(lost))
        finally:
            await stream.close()
        await asyncio.sleep(retry_s)
        retry_s = min(2 * retry_s, RETRY_MAX_S)


class _Lost(Exception):
    """The stream ended; another one may take over at the revision that comes next."""


class _Stream:
    """One watch at one member, from `start` on."""

    def __init__(self, members: Members, member: Member, prefix: str, start: Revision) -> None:
        self._members = members
        self._member = member
        self._prefix = prefix
        self._start = start
        self._call: Any = None
        self._reading: asyncio.Future[Any] | None = None
        self._open_changes: list[Change] = []
        self._open_revision = Revision(0)

    async def open(self) -> None:
        if not await self._member.settled(CONNECT_S):
            raise _Lost(f"not connected within {CONNECT_S:g} s")
        begin, end = bounds_of(self._prefix)
        # From the revision before, whose events are left out: etcd may have dropped deletions of the very revision that it was
        # compacted at, so that only one above it is whole. Where that is too old, etcd says so.
        create = rpc.WatchCreateRequest(
            key=begin, range_end=end, start_revision=max(1, self._start - 1), prev_kv=True, fragment=True
        )
        try:
            async with asyncio.timeout(TRY_S):
                self._call = self._member.watch.Watch(metadata=await self._members.metadata())
                await self._call.write(rpc.WatchRequest(create_request=create))
        except TimeoutError:
            raise _Lost(f"no answer within {TRY_S:g} s") from None
        except asyncio.CancelledError:
            if not self._members.was_closed():
                raise
            raise _Lost("the store is closed") from None
        except (AioRpcError, asyncio.InvalidStateError) as error:
            self._refused(error)

    async def read(self) -> list[WatchBatch]:
        """Return the next whole revisions, perhaps none. Raises _Lost, Compacted, Forbidden."""
        answer = await self._next()
        if answer.canceled:
            if answer.compact_revision:
                raise Compacted(f"revision {self._start} is no longer held; etcd was compacted at {answer.compact_revision}")
            if "permission denied" in answer.cancel_reason:
                raise Forbidden(f"etcd: {answer.cancel_reason}", mend=GRANT)
            raise _Lost(answer.cancel_reason or "cancelled by the member")
        whole: list[WatchBatch] = []
        for event in answer.events:
            revision = Revision(event.kv.mod_revision)
            if revision < self._start:
                continue
            if revision != self._open_revision:
                self._finish(whole)
                self._open_revision = revision
            self._open_changes.append(change_of(event))
        if not answer.fragment:
            self._finish(whole)
        return whole

    async def close(self) -> None:
        """Safe to repeat."""
        if self._call is not None:
            self._call.cancel()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None

    def _finish(self, whole: list[WatchBatch]) -> None:
        if self._open_changes:
            whole.append(WatchBatch(tuple(self._open_changes), self._open_revision))
            self._open_changes = []

    async def _next(self) -> Any:
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        while not self._reading.done():
            await asyncio.wait({self._reading, self._members.ended}, timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if self._members.ended.done():
                raise _Lost("the store is closed")
            if not self._reading.done():
                await self._probe()
        reading, self._reading = self._reading, None
        if reading.cancelled():
            raise _Lost("the stream was cancelled")
        if (error := reading.exception()) is not None:
            self._refused(error)
        if reading.result() is grpc.aio.EOF:
            raise _Lost("the stream ended")
        return reading.result()

    async def _probe(self) -> None:
        """Ask for anything, from the member's own memory: whether it has a leader is answered by the stream itself."""
        try:
            request = rpc.RangeRequest(key=PROBE_KEY, serializable=True, count_only=True)
            await self._members.at(self._member, lambda member: member.kv.Range, request, PROBE_S)
        except Unavailable as error:
            raise _Lost(error.message) from None

    def _refused(self, error: BaseException) -> None:
        if isinstance(error, AioRpcError):
            verdict = judge(error)
            if isinstance(verdict, AtollError) and not isinstance(verdict, Unavailable):
                raise verdict
            raise _Lost(error.details() or str(error.code()))
        raise _Lost(repr(error))
