"""The contract's records as etcd's messages, and back."""

from __future__ import annotations

from typing import Any

from aetcd import rpc

from atoll.model.errors import Corrupt
from atoll.model.ports.store import Change, Compare, Delete, Get, KeyValue, LeaseId, Op, Put, Revision, Target, TxnResult
from atoll.store.transaction import Transaction

FIRST_KEY = b"\x01"
"""Before all keys of the contract, and behind those that the store keeps for itself."""
ALL = b"\0"
"""As the end of a range: every key from its beginning on."""
INT64_MAX = (1 << 63) - 1

_TARGETS = {
    Target.MOD: (rpc.Compare.MOD, "mod_revision"),
    Target.CREATE: (rpc.Compare.CREATE, "create_revision"),
    Target.VERSION: (rpc.Compare.VERSION, "version"),
    Target.VALUE: (rpc.Compare.VALUE, "value"),
}


def bounds_of(prefix: str, after: str = "") -> tuple[bytes, bytes]:
    """Return begin and end of the keys under `prefix` and behind `after`, as etcd takes them."""
    begin = prefix.encode() or FIRST_KEY
    end = ALL
    if prefix:
        # UTF-8 never uses the highest byte, so that the last one can always be raised.
        end = begin[:-1] + bytes([begin[-1] + 1])
    return (max(begin, after.encode() + b"\0") if after else begin), end


def item_of(found: Any) -> KeyValue:
    """Return etcd's record as ours. Raises Corrupt for a key that is no text: someone else writes to this etcd."""
    return KeyValue(
        key_of(found.key),
        found.value,
        Revision(found.create_revision),
        Revision(found.mod_revision),
        found.version,
        LeaseId(found.lease),
    )


def key_of(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise Corrupt(
            f"etcd holds the key {key[:80]!r}, which is not Atoll's", mend="a cell needs an etcd of its own; delete that key"
        ) from None


def change_of(event: Any) -> Change:
    previous = item_of(event.prev_kv) if event.HasField("prev_kv") else None
    if event.type == rpc.Event.DELETE:
        return Change(key_of(event.kv.key), None, previous)
    item = item_of(event.kv)
    return Change(item.key, item, previous)


def request_of(transaction: Transaction) -> Any:
    """Return a checked transaction as etcd's."""
    return rpc.TxnRequest(
        compare=[_compare(compare) for compare in transaction.compare],
        success=[_op(op) for op in transaction.then],
        failure=[_op(op) for op in transaction.otherwise],
    )


def result_of(answer: Any) -> TxnResult:
    found = tuple(
        item_of(part.response_range.kvs[0]) if part.response_range.kvs else None
        for part in answer.responses
        if part.WhichOneof("response") == "response_range"
    )
    return TxnResult(answer.succeeded, Revision(answer.header.revision), found)


def _compare(compare: Compare) -> Any:
    target, field = _TARGETS[compare.target]
    expected = compare.expected
    if isinstance(expected, int) and not 0 <= expected <= INT64_MAX:
        expected = -1  # what no record has
    return rpc.Compare(result=rpc.Compare.EQUAL, target=target, key=compare.key.encode(), **{field: expected})


def _op(op: Op) -> Any:
    match op:
        case Put(key, value, lease):
            return rpc.RequestOp(request_put=rpc.PutRequest(key=key.encode(), value=value, lease=lease))
        case Delete(key, prefix=True):
            begin, end = bounds_of(key)
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=begin, range_end=end))
        case Delete(key):
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key.encode()))
        case Get(key):
            return rpc.RequestOp(request_range=rpc.RangeRequest(key=key.encode()))
