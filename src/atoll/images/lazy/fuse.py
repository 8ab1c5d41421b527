"""The part of the kernel's FUSE protocol (include/uapi/linux/fuse.h, 7.36 and later) that a tree which never changes needs.

Nothing is kept about open files, and a node's number says which image and which entry it is, so that a process which takes over
the descriptor answers as its predecessor would have. Bytes only: who reads and writes the descriptor is in `serve.py`.
"""

from __future__ import annotations

import enum
import errno
import stat
import struct

from msgspec import Struct

from atoll.images.lazy.skeleton import ShownEntry

READ_BYTES_MAX = 1 << 20
REQUEST_BYTES_MAX = READ_BYTES_MAX + 4096
"""The kernel refuses to give requests to a buffer that could not hold the largest write that was agreed on."""
ROOT = 1
FOREVER_S = 86_400
BLOCK_BYTES = 512
_NUMBER_SHIFT = 32

_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_OUT = struct.Struct("<QII")
_READ_IN = struct.Struct("<QQIIQII")
_DIRENT = struct.Struct("<QQII")
_STATFS = struct.Struct("<QQQQQIIII24x")
_NOTIFY_RESEND = 7
RESENT = 1 << 63
"""In a request's number: it was given to a predecessor before."""

_ASYNC_READ, _PARALLEL_DIROPS, _MAX_PAGES, _CACHE_SYMLINKS = 1 << 0, 1 << 18, 1 << 22, 1 << 23
_EXPLICIT_INVAL_DATA, _INIT_EXT = 1 << 25, 1 << 30
_HAS_RESEND, _ALLOW_IDMAP = 1 << 7, 1 << 8  # bits 39 and 40, in the second word
_FLAGS = _ASYNC_READ | _PARALLEL_DIROPS | _MAX_PAGES | _CACHE_SYMLINKS | _EXPLICIT_INVAL_DATA | _INIT_EXT


class Op(enum.IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    READ = 15
    STATFS = 17
    INIT = 26
    READDIR = 28
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


UNANSWERED = (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT)


class Request(Struct, frozen=True):
    op: int
    unique: int
    node: int
    body: bytes


class Read(Struct, frozen=True):
    offset: int
    size: int


def parse_request(data: bytes) -> Request:
    length, op, unique, node, _uid, _gid, _pid, _extra, _ = _IN_HEADER.unpack_from(data)
    return Request(op, unique, node, data[_IN_HEADER.size : length])


def parse_read(body: bytes) -> Read:
    """Of READ and READDIR."""
    _, offset, size, *_ = _READ_IN.unpack_from(body)
    return Read(offset, min(size, READ_BYTES_MAX))


def header(unique: int, size: int = 0, error: int = 0) -> bytes:
    """Return the header of an answer with `size` bytes behind it."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + size, -error, unique)


def resend() -> bytes:
    """Ask the kernel to give again what it gave to a predecessor that has not answered (Linux 6.9 and later)."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, _NOTIFY_RESEND, 0)


def init_answer(body: bytes) -> bytes:
    """Raises OSError where the kernel cannot do what is needed: idmapped mounts, and requests given again."""
    major, minor, readahead, flags = _INIT_IN.unpack_from(body)
    flags2 = struct.unpack_from("<I", body, _INIT_IN.size)[0] if flags & _INIT_EXT and len(body) >= _INIT_IN.size + 4 else 0
    if major != 7 or not flags2 & _HAS_RESEND or not flags2 & _ALLOW_IDMAP:
        raise OSError(errno.EPROTO, "the kernel's FUSE has no idmapped mounts (Linux 6.12)")
    pages = READ_BYTES_MAX // 4096
    return _INIT_OUT.pack(
        7, minor, max(readahead, READ_BYTES_MAX), flags & _FLAGS, 64, 48, READ_BYTES_MAX, 1, pages, 0, _HAS_RESEND | _ALLOW_IDMAP
    )


def node_of(number: int, entry: int) -> int:
    return (number << _NUMBER_SHIFT) + entry + 1


def entry_of(node: int) -> tuple[int, int]:
    """Return an image's number and the place of the entry in it."""
    return node >> _NUMBER_SHIFT, (node & ((1 << _NUMBER_SHIFT) - 1)) - 1


def attributes(node: int, shown: ShownEntry) -> bytes:
    s, ns = divmod(shown.mtime_ns, 10**9)
    blocks = -(-shown.size // BLOCK_BYTES)
    links, ids = shown.links, (shown.uid, shown.gid)
    return _ATTR.pack(node, shown.size, blocks, s, s, s, ns, ns, ns, shown.mode, links, *ids, 0, READ_BYTES_MAX, 0)


ROOT_ENTRY = ShownEntry(0, "", stat.S_IFDIR | 0o755, 0, 0, 0, 0, 2)


def attributes_answer(node: int, shown: ShownEntry) -> bytes:
    return _ATTR_OUT.pack(FOREVER_S, 0, 0) + attributes(node, shown)


def entry_answer(node: int, shown: ShownEntry, *, valid_s: int = FOREVER_S) -> bytes:
    return _ENTRY.pack(node, 0, valid_s, FOREVER_S, 0, 0) + attributes(node, shown)


def directory_answer(entries: list[tuple[int, str, int]], read: Read) -> bytes:
    """Return as many of (node, name, mode) as fit, from the one on that the kernel asks for."""
    out = bytearray()
    for at in range(read.offset, len(entries)):
        node, name, mode = entries[at]
        encoded = name.encode()
        item = _DIRENT.pack(node, at + 1, len(encoded), stat.S_IFMT(mode) >> 12) + encoded
        item += bytes(-len(item) % 8)
        if len(out) + len(item) > read.size:
            break
        out += item
    return bytes(out)


def statfs_answer(size_bytes: int, files: int) -> bytes:
    return _STATFS.pack(size_bytes // 4096, 0, 0, files, 0, 4096, 255, 4096, 0)
