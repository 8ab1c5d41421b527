"""What a failed call to etcd means: whether it may have been done, and our error for it."""

from __future__ import annotations

import enum

from grpc import StatusCode
from grpc.aio import AioRpcError

from atoll.model.errors import (
    AtollError,
    Compacted,
    Corrupt,
    Forbidden,
    Invalid,
    NotFound,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

FLAGS = "--max-txn-ops=4096 --max-request-bytes=10485760"
"""What every member must be started with, so that it takes the transactions that Atoll makes."""
GRANT = "grant our user's role everything: etcdctl role grant-permission ROLE readwrite '' --from-key"


class Fault(enum.Enum):
    """A failure that another try, perhaps at another member, may not meet."""

    REFUSED = "surely nothing was done"
    LOST = "it may have been done"
    TOKEN = "nothing was done: the token of our user is no longer good"  # noqa: S105
    ANSWER_TOO_LARGE = "done, but its answer is over what one message may hold"


def judge(error: AioRpcError) -> Fault | AtollError:
    """Return what `error` says. The words are those of etcd 3.4 to 3.6; unknown ones count as LOST."""
    words = (error.details() or "").removeprefix("etcdserver: ")
    match error.code():
        case StatusCode.UNAVAILABLE:
            # gRPC fails a call so before sending it; etcd's own check for a leader comes before everything else.
            sent_nothing = words.startswith(("failed to connect", "no leader", "not leader"))
            return Fault.REFUSED if sent_nothing else Fault.LOST
        case StatusCode.RESOURCE_EXHAUSTED:
            return _exhausted(words)
        case StatusCode.INVALID_ARGUMENT:
            return _invalid(words)
        case StatusCode.UNAUTHENTICATED:
            return Fault.TOKEN
        case StatusCode.PERMISSION_DENIED:
            return Forbidden(
                f"etcd: {words}",
                mend="grant our user's role everything: etcdctl role grant-permission ROLE readwrite '' --from-key",
            )
        case StatusCode.NOT_FOUND:
            return NotFound(f"etcd: {words}; the lease has expired or was revoked")
        case StatusCode.OUT_OF_RANGE:
            return Compacted(f"etcd: {words}") if "compacted" in words else Invalid(f"etcd: {words}")
        case StatusCode.FAILED_PRECONDITION if "authentication is not enabled" in words:
            return Unauthenticated(
                "this etcd knows no users, but one is given", mend="unset ATOLL_STORE_USER, or run etcdctl auth enable"
            )
        case StatusCode.DATA_LOSS:
            return Corrupt(f"etcd: {words}", mend="a member holds other data than the rest: replace it by a new one")
        case StatusCode.UNIMPLEMENTED:
            return Unsupported(f"this is no etcd 3.4 or newer: {words}")
        case _:
            return Fault.LOST


def _exhausted(words: str) -> Fault | AtollError:
    if "too many requests" in words:
        return Fault.REFUSED
    if "space exceeded" in words:
        return Unavailable(
            "etcd has no room left; nothing was written",
            mend="etcdctl defrag on each member, then etcdctl alarm disarm; or a larger --quota-backend-bytes",
        )
    if words.startswith("grpc: received message larger"):
        return _too_large(words)
    if "message larger than max" in words:
        return Fault.ANSWER_TOO_LARGE
    return Fault.LOST


def _invalid(words: str) -> Fault | AtollError:
    if "too many operations" in words or "request is too large" in words:
        return _too_large(words)
    if "revision of auth store is old" in words:
        return Fault.TOKEN
    if "authentication failed" in words or "user name" in words:
        return Unauthenticated(
            f"etcd: {words}", mend="set ATOLL_STORE_USER, and ATOLL_STORE_PASSWORD_FILE or ATOLL_STORE_PASSWORD, to a user of it"
        )
    return Invalid(f"etcd: {words}")


def _too_large(words: str) -> AtollError:
    return TooLarge(f"etcd refuses the size of a transaction: {words}", mend=f"start every member with {FLAGS}")
