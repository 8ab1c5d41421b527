"""Stores with a bug in them, as a server may see them: what planted bugs of the store's users are made of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from msgspec.structs import replace

from atoll.model import codec, keys
from atoll.model.devices import GpuGrant
from atoll.model.ports.store import (
    LINEARIZABLE,
    RANGE_LIMIT_MAX,
    Compare,
    Consistency,
    KeyValue,
    Lease,
    LeaseId,
    Op,
    Put,
    Range,
    Revision,
    Store,
    Target,
    TxnResult,
    WatchBatch,
)
from atoll.model.records import App, Instance, Release


class Through:
    """A server's store; a subclass changes what is written, or what it is compared with. Implements `Store`."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        return ops

    def weaken(self, compare: Sequence[Compare], then: Sequence[Op]) -> Sequence[Compare]:
        return compare

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        return await self.store.txn(self.weaken(compare, then), self.change(then), otherwise)

    async def revision(self) -> Revision:
        return await self.store.revision()

    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None:
        return await self.store.get(key, consistency=consistency)

    async def range(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = RANGE_LIMIT_MAX,
        at: Revision | None = None,
        consistency: Consistency = LINEARIZABLE,
    ) -> Range:
        return await self.store.range(prefix, after=after, limit=limit, at=at, consistency=consistency)

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision:
        return await self.store.put(key, value, lease=lease)

    async def delete(self, key: str) -> Revision:
        return await self.store.delete(key)

    def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        return self.store.watch(prefix, start=start)

    async def lease_grant(self, ttl_s: float) -> Lease:
        return await self.store.lease_grant(ttl_s)

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        await self.store.lease_keep_alive(lease)

    async def lease_revoke(self, lease: LeaseId) -> None:
        await self.store.lease_revoke(lease)

    async def compact(self, revision: Revision) -> None:
        await self.store.compact(revision)

    async def close(self) -> None: ...


class Unfenced(Through):
    """Writes for a leader whether it still leads or not."""

    def weaken(self, compare: Sequence[Compare], then: Sequence[Op]) -> Sequence[Compare]:
        if any(op.key == keys.LEADER for op in then):
            return compare
        return [one for one in compare if one.key != keys.LEADER]


class Unchecked(Through):
    """Writes whatever has changed since it was read."""

    def weaken(self, compare: Sequence[Compare], then: Sequence[Op]) -> Sequence[Compare]:
        return [one for one in compare if one.target is not Target.MOD]


class Forgetful(Through):
    """Acknowledges some changes of apps without writing them."""

    count = 0

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        if any(op.key.startswith(keys.APPS) for op in ops if isinstance(op, Put)):
            self.count += 1
            if self.count % 4 == 0:
                return [op for op in ops if not op.key.startswith(keys.APPS)]
        return ops


class Repeating(Through):
    """Keeps no answers to request keys, so that a request that comes again is done again."""

    def weaken(self, compare: Sequence[Compare], then: Sequence[Op]) -> Sequence[Compare]:
        return [one for one in compare if not one.key.startswith(keys.REQUESTS)]

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        return [op for op in ops if not op.key.startswith(keys.REQUESTS)]


class Hasty(Through):
    """Tells instances to stop where they should drain."""

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        return [_replaced(op, b'"desired":"drain"', b'"desired":"stop"') for op in ops]


class Wavering(Through):
    """Tells instances that have drained to run again instead of to stop."""

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        drained = [isinstance(op, Put) and b'"drain_until"' in op.value for op in ops]
        return [_replaced(op, b'"desired":"stop",', b"") if was else op for op, was in zip(ops, drained, strict=True)]


def _replaced(op: Op, old: bytes, new: bytes) -> Op:
    if isinstance(op, Put) and op.key.startswith(keys.INSTANCES):
        return Put(op.key, op.value.replace(old, new), op.lease)
    return op


class Mutating(Through):
    """Changes a release when its app is written without a new one."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._releases: dict[str, Release] = {}

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        releases = [codec.decode(op.value, Release) for op in ops if isinstance(op, Put) and op.key.startswith(keys.RELEASES)]
        self._releases.update({f"{each.project}/{each.app}/{each.number}": each for each in releases})
        if releases:
            return ops
        more: list[Op] = []
        for op in ops:
            if isinstance(op, Put) and op.key.startswith(keys.APPS):
                app = codec.decode(op.value, App)
                release = self._releases.get(f"{app.project}/{app.name}/{app.release}")
                if release is not None:
                    spec = replace(release.spec, env={**release.spec.env, "PLANTED": "1"})
                    key = keys.release(app.project, app.name, app.release)
                    more.append(Put(key, codec.encode(replace(release, spec=spec))))
        return [*ops, *more]


class Generous(Through):
    """Grants every device of a node to whoever comes: the first that it ever gave."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.first: dict[str, GpuGrant] = {}

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        return [self._give(op) if isinstance(op, Put) and op.key.startswith(keys.INSTANCES) else op for op in ops]

    def _give(self, op: Put) -> Put:
        instance = codec.decode(op.value, Instance)
        if not instance.gpus or instance.node is None:
            return op
        grant = self.first.setdefault(instance.node, instance.gpus[0])
        return Put(op.key, codec.encode(replace(instance, gpus=(grant,))), op.lease)
