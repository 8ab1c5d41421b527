"""Messages of a live stream (exec, logs, files): one byte that says what it is, then the payload.

Exec: the client sends STDIN, STDIN_END, RESIZE, SIGNAL; the node sends STDOUT, STDERR and last EXIT, or ERROR.
Logs: the node sends LOG (a `LogLine` as JSON), then END, or ERROR.
Payloads: RESIZE a `Resize` as JSON; SIGNAL a name (`SIGINT`); EXIT the exit status in decimal; ERROR an `ErrorBody` as JSON.
Files: a tar stream in DATA messages, closed by END from the sending side; the receiver answers END, or ERROR.
Pausing, resuming, writing down an instance: the node sends DATA (a `Held` as JSON), or ERROR.
Listing the snapshots of a project on a node: the node sends DATA (`SnapshotView`s as JSON); removing one: END; or ERROR.
Reinstating a GPU: the node sends DATA (the `GpuDevice` as it then stands, as JSON), or ERROR.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from atoll.model.errors import BY_CODE, AtollError, Invalid

MESSAGE_BYTES_MAX = 1 << 17


class Kind(enum.IntEnum):
    STDIN = 0
    STDOUT = 1
    STDERR = 2
    STDIN_END = 3
    RESIZE = 4
    SIGNAL = 5
    EXIT = 6
    ERROR = 7
    LOG = 8
    DATA = 9
    END = 10


class ExecOptions(Struct, frozen=True, kw_only=True):
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    workdir: str | None = None
    user: str | None = None
    tty: bool = False
    rows: int = 24
    columns: int = 80


class NextCommand(Struct, frozen=True, kw_only=True):
    """What a client says first on a stream that it opened before it wanted a command. The answer is an empty message or ERROR; what
    follows is an exec stream."""

    instance: str
    options: ExecOptions


class LogOptions(Struct, frozen=True, kw_only=True):
    follow: bool = False
    tail: int | None = None
    """The last so many lines; None for all that is kept."""
    since: float | None = None


class FilesOptions(Struct, frozen=True, kw_only=True):
    path: str


class ReinstateOptions(Struct, frozen=True, kw_only=True):
    device: str
    reset: bool = False
    by: str = ""
    """Whose word it is."""


class SnapshotsOptions(Struct, frozen=True, kw_only=True):
    project: str
    digest: str = ""
    """Of the one to be removed."""


class SnapshotView(Struct, frozen=True, kw_only=True):
    """A snapshot as its users see it; it is on one node, where sandboxes can go on from it."""

    digest: str
    node: str
    runtime: str
    stored_bytes: int
    taken_at: float
    of: str = ""
    """The sandbox, app or job that it was taken of first."""
    used_at: float = 0.0
    """When something last went on from it, or it was taken again: the longest unused goes first."""


class Held(Struct, frozen=True, kw_only=True):
    """How an instance stands after it was paused, resumed or written down."""

    instance: str
    node: str
    paused: bool
    snapshot: SnapshotView | None = None


class Resize(Struct, frozen=True):
    rows: int
    columns: int


class ErrorBody(Struct, frozen=True, kw_only=True):
    """An error as every API answer and stream carries it."""

    code: str
    message: str
    mend: str | None = None
    field: str | None = None
    retry: str = "never"

    @classmethod
    def of(cls, error: AtollError) -> ErrorBody:
        return cls(code=error.code, message=error.message, mend=error.mend, field=error.field, retry=error.retry.value)

    def error(self) -> AtollError:
        """Return the error that this says; one of an unknown code is of the general class."""
        return BY_CODE.get(self.code, AtollError)(self.message, mend=self.mend, field=self.field)


class LogLine(Struct, frozen=True, kw_only=True):
    """One line of output; `partial` when it was longer than the bound and goes on in the next."""

    at: float
    stream: str
    """`stdout` or `stderr`."""
    text: str
    partial: bool = False


def pack(kind: Kind, payload: bytes = b"") -> bytes:
    return bytes((kind,)) + payload


def unpack(message: bytes) -> tuple[Kind, bytes]:
    """Raises Invalid for an empty, oversized or unknown message."""
    if not message or len(message) > MESSAGE_BYTES_MAX:
        raise Invalid(f"a stream message has 1 to {MESSAGE_BYTES_MAX} bytes, this one {len(message)}")
    try:
        return Kind(message[0]), message[1:]
    except ValueError:
        raise Invalid(f"unknown stream message kind {message[0]}") from None
