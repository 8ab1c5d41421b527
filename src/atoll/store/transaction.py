"""What a transaction means, apart from where the data lies: checks of its input, and its effect on a table."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from msgspec import Struct

from atoll.model.errors import Invalid, NotFound, TooLarge
from atoll.model.ports.store import (
    KEY_BYTES_MAX,
    RANGE_LIMIT_MAX,
    TXN_OPS_MAX,
    VALUE_BYTES_MAX,
    Change,
    Compare,
    Delete,
    Get,
    KeyValue,
    LeaseId,
    Op,
    Put,
    Revision,
    Target,
    TxnResult,
)

TXN_BYTES_MAX = 32 << 20
"""Values in one branch of a transaction, in bytes together."""


class Table(Protocol):
    """The newest state, as a transaction sees and changes it."""

    def get(self, key: str) -> KeyValue | None: ...

    def under(self, prefix: str) -> Sequence[KeyValue]: ...

    def leased(self, lease: LeaseId) -> Sequence[KeyValue]: ...

    def has_lease(self, lease: LeaseId) -> bool: ...

    def set(self, item: KeyValue) -> None: ...

    def remove(self, key: str) -> None: ...


class Transaction(Struct, frozen=True):
    compare: Sequence[Compare]
    then: Sequence[Op]
    otherwise: Sequence[Op] = ()


class Applied(Struct, frozen=True):
    result: TxnResult
    changes: tuple[Change, ...]


def check_key(key: str) -> None:
    """Raise Invalid for what cannot be a key."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise Invalid(f"the key {key!r} is not valid text") from None
    if not 0 < size <= KEY_BYTES_MAX or "\0" in key:
        raise Invalid(f"a key has 1 to {KEY_BYTES_MAX} bytes and no NUL; {key[:80]!r} has {size}")


def check_prefix(prefix: str) -> None:
    """Raise Invalid for what cannot be a prefix; the empty one means every key."""
    if prefix:
        check_key(prefix)


def check_limit(limit: int) -> None:
    if not 1 <= limit <= RANGE_LIMIT_MAX:
        raise Invalid(f"limit must lie between 1 and {RANGE_LIMIT_MAX}, got {limit}", field="limit")


def check_transaction(transaction: Transaction) -> None:
    """Raise Invalid or TooLarge for a transaction that breaks a rule whatever the data is."""
    for part in (transaction.compare, transaction.then, transaction.otherwise):
        if len(part) > TXN_OPS_MAX:
            raise TooLarge(f"a transaction has at most {TXN_OPS_MAX} operations, this one {len(part)}")
    for compare in transaction.compare:
        check_key(compare.key)
        if isinstance(compare.expected, bytes) != (compare.target is Target.VALUE):
            raise Invalid(f"comparing {compare.target.value} of {compare.key!r} with {type(compare.expected).__name__}")
    _check_branch(transaction.then)
    _check_branch(transaction.otherwise)


def _check_branch(ops: Sequence[Op]) -> None:
    total_bytes = 0
    keys: list[str] = []
    prefixes: list[str] = []
    for op in ops:
        match op:
            case Put():
                check_key(op.key)
                if len(op.value) > VALUE_BYTES_MAX:
                    raise TooLarge(f"the value of {op.key!r} has {len(op.value)} bytes; at most {VALUE_BYTES_MAX} are stored")
                total_bytes += len(op.value)
                keys.append(op.key)
            case Delete(prefix=True):
                check_prefix(op.key)
                prefixes.append(op.key)
            case Delete():
                check_key(op.key)
                keys.append(op.key)
            case Get():
                check_key(op.key)
    if total_bytes > TXN_BYTES_MAX:
        raise TooLarge(f"the values of a transaction have {total_bytes} bytes together; at most {TXN_BYTES_MAX} are taken")
    if len(keys) + len(prefixes) > 1:
        _check_written_once(sorted(keys), sorted(prefixes))


def _check_written_once(keys: list[str], prefixes: list[str]) -> None:
    for written in (keys, prefixes):
        for key, following in pairwise(written):
            if key == following or (written is prefixes and following.startswith(key)):
                raise Invalid(f"{following!r} is written twice in one transaction")
    for prefix in prefixes:
        first = bisect_left(keys, prefix)
        if first < len(keys) and keys[first].startswith(prefix):
            raise Invalid(f"{keys[first]!r} is written and also deleted by prefix in one transaction")


def apply(table: Table, transaction: Transaction, newest: Revision) -> Applied:
    """Do a checked transaction on `table`; what it writes gets revision `newest + 1`.

    Raises NotFound for a lease that is not there; then nothing has been written.
    """
    succeeded = all(_holds(table.get(compare.key), compare) for compare in transaction.compare)
    branch = transaction.then if succeeded else transaction.otherwise
    for op in branch:
        if isinstance(op, Put) and op.lease and not table.has_lease(op.lease):
            raise NotFound(f"lease {op.lease} is not there; it may have expired")
    revision = Revision(newest + 1)
    changes: list[Change] = []
    found: list[KeyValue | None] = []
    for op in branch:
        match op:
            case Put():
                changes.append(_put(table, op, revision))
            case Delete(prefix=True):
                changes.extend(remove_all(table, table.under(op.key)))
            case Delete():
                item = table.get(op.key)
                changes.extend(remove_all(table, [item] if item is not None else []))
            case Get():
                found.append(table.get(op.key))
    result = TxnResult(succeeded, revision if changes else newest, tuple(found))
    return Applied(result, tuple(changes))


def remove_all(table: Table, items: Sequence[KeyValue]) -> list[Change]:
    """Remove `items` and return the changes."""
    for item in items:
        table.remove(item.key)
    return [Change(item.key, None, item) for item in items]


def _holds(item: KeyValue | None, compare: Compare) -> bool:
    match compare.target:
        case Target.MOD:
            return (item.mod_revision if item else 0) == compare.expected
        case Target.CREATE:
            return (item.create_revision if item else 0) == compare.expected
        case Target.VERSION:
            return (item.version if item else 0) == compare.expected
        case Target.VALUE:
            return item is not None and item.value == compare.expected


def _put(table: Table, op: Put, revision: Revision) -> Change:
    previous = table.get(op.key)
    if previous is None:
        item = KeyValue(op.key, op.value, revision, revision, 1, op.lease)
    else:
        item = KeyValue(op.key, op.value, previous.create_revision, revision, previous.version + 1, op.lease)
    table.set(item)
    return Change(op.key, item, previous)


def size_bytes(changes: Sequence[Change]) -> int:
    """Return about how much memory a revision's changes hold; the constant stands for the objects around the values."""
    total = 0
    for change in changes:
        total += 256 + len(change.key)
        total += len(change.item.value) if change.item else 0
        total += len(change.previous.value) if change.previous else 0
    return total
