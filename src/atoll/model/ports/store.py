"""The revisioned store: etcd's semantics, because etcd is the engine of a cluster.

One revision counts all writes; every record knows the revision that made it and the one that last changed it.
Keys are text without NUL, at most `KEY_BYTES_MAX`; values are bytes, at most `VALUE_BYTES_MAX`.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from typing import NewType, Protocol

from msgspec import Struct

Revision = NewType("Revision", int)
LeaseId = NewType("LeaseId", int)

KEY_BYTES_MAX = 1_024
VALUE_BYTES_MAX = 1 << 20
TXN_OPS_MAX = 4_096
"""Operations in one transaction; an etcd cluster must be started with `--max-txn-ops` of at least this."""
RANGE_LIMIT_MAX = 10_000
"""Items in one answer to `range`; `more` says that there are others."""


class Consistency(enum.Enum):
    """What a read may miss."""

    LINEARIZABLE = "linearizable"
    """Nothing that was written when it was asked for; most members of a cluster must be heard for that."""
    SERIALIZABLE = "serializable"
    """The newest: it is the state of some moment, as one member knows it, and perhaps older than what was read before. That member
    answers alone, whether or not it hears the others. A store in one process has nothing older, and answers as ever."""


LINEARIZABLE = Consistency.LINEARIZABLE


class KeyValue(Struct, frozen=True):
    key: str
    value: bytes
    create_revision: Revision
    mod_revision: Revision
    version: int
    """Writes since creation; 1 at first."""
    lease: LeaseId = LeaseId(0)


class Range(Struct, frozen=True):
    """Items in key order, all as of `revision`."""

    items: tuple[KeyValue, ...]
    revision: Revision
    more: bool = False


class Target(enum.Enum):
    MOD = "mod"
    CREATE = "create"
    VERSION = "version"
    VALUE = "value"


class Compare(Struct, frozen=True):
    """Holds if the key's `target` equals `expected`; an absent key has revisions and version 0 and no value."""

    key: str
    target: Target
    expected: int | bytes


def absent(key: str) -> Compare:
    return Compare(key, Target.CREATE, 0)


def unchanged(key: str, mod_revision: int) -> Compare:
    return Compare(key, Target.MOD, mod_revision)


class Put(Struct, frozen=True):
    key: str
    value: bytes
    lease: LeaseId = LeaseId(0)


class Delete(Struct, frozen=True):
    """Deletes one key, or with `prefix` all keys that begin with it."""

    key: str
    prefix: bool = False


class Get(Struct, frozen=True):
    key: str


Op = Put | Delete | Get


class TxnResult(Struct, frozen=True):
    """`found` answers the `Get`s of the branch that ran, in their order."""

    succeeded: bool
    revision: Revision
    found: tuple[KeyValue | None, ...] = ()


class Change(Struct, frozen=True):
    """One key's change. A deletion has `item` None; `previous` is what was there before, where it is known."""

    key: str
    item: KeyValue | None
    previous: KeyValue | None = None


class WatchBatch(Struct, frozen=True):
    """All changes of one or more whole revisions, in order, up to and including `revision`."""

    changes: tuple[Change, ...]
    revision: Revision


class Lease(Struct, frozen=True):
    id: LeaseId
    ttl_s: float


class Store(Protocol):
    """Linearizable, durable: when a write has returned, it survives `kill -9` of any process and loss of power.

    Every call may raise Unavailable (nothing was written). Writes may raise OutcomeUnknown: read before trying again.
    """

    async def revision(self) -> Revision:
        """Return the newest revision."""
        ...

    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None: ...

    async def range(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = RANGE_LIMIT_MAX,
        at: Revision | None = None,
        consistency: Consistency = LINEARIZABLE,
    ) -> Range:
        """Return items whose key begins with `prefix` and sorts behind `after`, in key order.

        With `at`, as they were at that revision (to page through one snapshot), whatever the `consistency`. Raises Compacted if
        that is too old, Invalid if it is not there yet.
        """
        ...

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision: ...

    async def delete(self, key: str) -> Revision:
        """Delete `key` if it is there; the revision rises only then."""
        ...

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        """Do all of `then` at one revision if every comparison holds, else all of `otherwise`.

        A branch without writes leaves the revision as it is. No key may be written twice in one branch (Invalid).
        """
        ...

    def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        """Yield every change under `prefix` from revision `start` on: gapless, ordered, each once.

        Raises Compacted from the iterator when `start`, or what a slow reader has not read yet, is no longer held.
        Closing the iterator ends the watch.
        """
        ...

    async def lease_grant(self, ttl_s: float) -> Lease:
        """Return a lease whose keys are deleted when it is not kept alive for `ttl_s` (at least 1 s)."""
        ...

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        """Raises NotFound: the lease has expired, and its keys are gone."""
        ...

    async def lease_revoke(self, lease: LeaseId) -> None:
        """Delete the lease's keys now. A lease that is gone already is no error."""
        ...

    async def compact(self, revision: Revision) -> None:
        """Forget what was before `revision`. Raises Compacted if that happened already."""
        ...

    async def close(self) -> None: ...


class LeaseKeeper(Protocol):
    """Keeps leases of a store alive for a thread of its own. Every call blocks; made, used and closed in one thread."""

    def keep_alive(self, lease: LeaseId, wait_s: float) -> None:
        """Have the lease last for its whole time again, trying for `wait_s` at most. Safe to repeat.

        Raises NotFound: it has expired, and its keys are gone. Unavailable: the store does not answer.
        """
        ...

    def close(self) -> None: ...
