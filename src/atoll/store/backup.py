"""Backups: a store's whole state in one file, versioned, compressed and checksummed.

b"atoll-store-backup 1\\n", then zstd over frames: 4 bytes of length (big-endian), then msgpack of Head, of each Lease, of each
KeyValue in key order, and of End, which has the SHA-256 over all frames before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, cast

import msgspec
import zstandard
from msgspec import Struct

from atoll.model.errors import AtollError, Conflict, Corrupt, Invalid, NotFound, Unavailable, Unsupported
from atoll.model.ports.store import KEY_BYTES_MAX, VALUE_BYTES_MAX, KeyValue, LeaseId, Revision
from atoll.store.snapshot import Counting, Digest, Snapshot
from atoll.store.transaction import check_key

FORMAT = b"atoll-store-backup "
VERSION = 1
VERSION_BYTES_MAX = 8
FRAME_BYTES_MAX = VALUE_BYTES_MAX + KEY_BYTES_MAX + 1_024
LEASES_MAX = 1_000_000
WINDOW_BYTES_MAX = 8 << 20
"""Of zstd: what reading a backup takes in memory, however it was made."""
LEVEL = 3
TRAILER_BYTES = 65
READ_BYTES = 1 << 20
_LENGTH = 4


class Head(Struct, frozen=True, tag="head"):
    revision: int
    leases: int
    made_at: float
    """Seconds since the epoch."""


class LeaseFrame(Struct, frozen=True, tag="lease"):
    id: int
    ttl_s: float


class ItemFrame(Struct, frozen=True, tag="item"):
    item: KeyValue


class End(Struct, frozen=True, tag="end"):
    items: int


_encode = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(Head).decode
_decode_lease = msgspec.msgpack.Decoder(LeaseFrame).decode
_decode_rest = msgspec.msgpack.Decoder(ItemFrame | End).decode


async def write_backup(snapshot: Snapshot, path: Path, *, now: float) -> Digest:
    """Write `snapshot` into the new file `path` (mode 0600), whole or not at all, and return what it holds.

    Raises Conflict: the file exists. Unavailable: it cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    if path.exists():
        raise Conflict(f"{path} exists", mend="choose another name; a backup replaces no file")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                digest = await _write(snapshot, file, now)
                file.flush()
                os.fsync(file.fileno())
            # Unlike a rename, a link replaces nothing that has come meanwhile.
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except FileExistsError:
        raise Conflict(f"{path} exists", mend="choose another name; a backup replaces no file") from None
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror}") from None
    return digest


async def _write(snapshot: Snapshot, file: IO[bytes], now: float) -> Digest:
    counting = Counting()
    hashing = _Hashing(file)
    hashing.write(FORMAT + b"%d\n" % VERSION)
    with zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).stream_writer(
        cast(IO[bytes], hashing), closefd=False
    ) as packed:

        def frame(record: Struct) -> None:
            data = _encode(record)
            packed.write(len(data).to_bytes(_LENGTH, "big") + data)

        leases = dict(snapshot.leases)
        frame(Head(snapshot.revision, len(leases), now))
        for id, ttl_s in leases.items():
            frame(LeaseFrame(id, ttl_s))
        async for item in snapshot.items():
            counting.add(item)
            frame(ItemFrame(item))
        digest = counting.digest()
        frame(End(digest.items))
    file.write(hashing.trailer())
    return digest


class _Hashing:
    """What zstd writes to."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def trailer(self) -> bytes:
        return self._hash.hexdigest().encode() + b"\n"


class _Bounded:
    """What zstd reads from: a file without its last bytes."""

    def __init__(self, file: IO[bytes], left: int) -> None:
        self._file = file
        self._left = left

    def read(self, count: int) -> bytes:
        data = self._file.read(max(0, min(count, self._left)))
        self._left -= len(data)
        return data


class BackupSnapshot:
    """A backup as a snapshot; make it with `open`, which reads all of it first."""

    def __init__(self, path: Path, head: Head, leases: dict[LeaseId, float], digest: Digest) -> None:
        self._path = path
        self.head = head
        self.revision = Revision(head.revision)
        self.leases = leases
        self.digest = digest

    @classmethod
    def open(cls, path: Path) -> BackupSnapshot:
        """Check all of `path` and return it. Raises Corrupt, Unsupported (a newer format, or no backup), NotFound, Unavailable."""
        counting = Counting()
        with _reading(path, checked=False) as reader:
            head, leases = reader.begin()
            for item in reader.items(head, leases):
                counting.add(item)
        return cls(path, head, leases, counting.digest())

    async def items(self) -> AsyncIterator[KeyValue]:
        """See `Snapshot.items`. Raises Corrupt if the file is not any more what was checked."""
        counting = Counting()
        with _reading(self._path) as reader:
            head, leases = reader.begin()
            for item in reader.items(head, leases):
                counting.add(item)
                yield item
        if counting.digest() != self.digest:
            raise Corrupt(f"the backup {self._path} has changed while it was read")


@contextlib.contextmanager
def _reading(path: Path, *, checked: bool = True) -> Iterator[_Reader]:
    try:
        with path.open("rb") as file:
            _check_format(path, file.readline(len(FORMAT) + VERSION_BYTES_MAX))
            begin = file.tell()
            length = os.fstat(file.fileno()).st_size - TRAILER_BYTES
            if not checked:
                _check_sum(path, file, length)
                file.seek(begin)
            unpacking = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
            packed = cast(IO[bytes], _Bounded(file, length - begin))
            yield _Reader(path, unpacking.stream_reader(packed, read_across_frames=True, closefd=False))
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from None
    except (zstandard.ZstdError, msgspec.MsgspecError, Invalid) as error:
        raise _corrupt(path, str(error)) from None


def _check_sum(path: Path, file: IO[bytes], length: int) -> None:
    file.seek(0)
    hashing = hashlib.sha256()
    while length > 0 and (part := file.read(min(length, READ_BYTES))):
        hashing.update(part)
        length -= len(part)
    if length or file.read() != hashing.hexdigest().encode() + b"\n":
        raise _corrupt(path, "its checksum does not agree")


def _check_format(path: Path, line: bytes) -> None:
    if not line.startswith(FORMAT):
        raise Unsupported(f"{path} is no backup of a store")
    version = line.removeprefix(FORMAT).removesuffix(b"\n")
    if not version.isdigit() or not line.endswith(b"\n"):
        raise _corrupt(path, "its first line is damaged")
    if int(version) != VERSION:
        raise Unsupported(f"{path} has format {int(version)}; this Atoll reads {VERSION}", mend="use the Atoll that made it")


class _Reader:
    def __init__(self, path: Path, file: zstandard.ZstdDecompressionReader) -> None:
        self._path = path
        self._file = file

    def begin(self) -> tuple[Head, dict[LeaseId, float]]:
        head = _decode_head(self._frame())
        if not 0 <= head.leases <= LEASES_MAX:
            raise _corrupt(self._path, f"it says that it has {head.leases} leases")
        leases = [_decode_lease(self._frame()) for _ in range(head.leases)]
        return head, {LeaseId(lease.id): lease.ttl_s for lease in leases}

    def items(self, head: Head, leases: dict[LeaseId, float]) -> Iterator[KeyValue]:
        last = b""
        count = 0
        while True:
            frame = _decode_rest(self._frame())
            if isinstance(frame, End):
                break
            key = frame.item.key.encode()
            check_key(frame.item.key)
            if key <= last or len(frame.item.value) > VALUE_BYTES_MAX or (frame.item.lease and frame.item.lease not in leases):
                raise _corrupt(self._path, f"the item after {last[:80]!r} cannot be")
            if not 0 < frame.item.create_revision <= frame.item.mod_revision <= head.revision:
                raise _corrupt(self._path, f"the revisions of {frame.item.key[:80]!r} cannot be")
            last = key
            count += 1
            yield frame.item
        if frame.items != count:
            raise _corrupt(self._path, f"it has {count} items instead of {frame.items}")
        if self._file.read(1):
            raise _corrupt(self._path, "something follows its end")

    def _frame(self) -> bytes:
        size = int.from_bytes(self._exactly(_LENGTH), "big")
        if size > FRAME_BYTES_MAX:
            raise _corrupt(self._path, f"a record of {size} bytes cannot be")
        return self._exactly(size)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._file.read(count - len(data))
            if not part:
                raise _corrupt(self._path, "it ends too early")
            data += part
        return data


def _corrupt(path: Path, cause: str) -> AtollError:
    return Corrupt(f"the backup {path} is damaged: {cause}", mend="nothing was changed; take another backup")


def sync_directory(path: Path) -> None:
    """See that names made or replaced in a directory survive loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
