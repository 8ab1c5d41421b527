"""The tree of a layer before any content has come: every entry with owner, mode and time, and files of the right size, empty.

It is made from the same headers, by the same code, as the layer when it is unpacked, so that nothing can be shown early that
would not be there later.
"""

from __future__ import annotations

import bisect
import itertools
import os
import stat
import tarfile
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from msgspec import Struct

from atoll.images.chunks import Table
from atoll.images.entries import Entries
from atoll.images.stream import HEADER_BYTES_MAX, TarStream
from atoll.images.unpack import ENTRIES_MAX
from atoll.model.errors import ImageError

_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)


class ShownEntry(Struct, frozen=True, array_like=True):
    """One entry of the tree, by its place in the list of all of them; the first is the tree's own directory."""

    parent: int
    name: str
    """Undecodable bytes as surrogates would not be JSON: an image that has such names is fetched whole."""
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    links: int
    target: str = ""
    """Of a symbolic link."""
    offset: int = 0
    """Where in the tar a file's content begins."""


def make_skeleton(table: Table, target: Path) -> list[ShownEntry]:
    """Make the tree at `target`, which is not there yet, and return its entries. Blocks; call it in a thread.

    Raises ImageError for what is damaged or cannot be shown before it is here, OSError.
    """
    target.mkdir()
    target.chmod(0o755)
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        layer = _Skeleton(root, _Headers(table))
        try:
            layer.run()
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError) as error:
            raise ImageError(f"the layer's headers are damaged: {error}"[:300]) from None
        known = dict(table.content)
        return list(_entries(target, layer.offsets, known))
    finally:
        os.close(root)


class _Headers:
    """The part of TarStream that reading entries needs, over a tar whose content is absent: zeros stand in its place."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._position = 0
        starts = [offset for offset, _ in table.content]
        self._starts = starts
        # How many bytes of content lie before the end of each: what to take off an offset in the tar for one in the rest.
        self._before = [0, *itertools.accumulate(size for _, size in table.content)]

    def begin_header(self) -> None: ...

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 0 or not 0 <= offset <= self._table.plain_bytes:
            raise ImageError("the layer is damaged: a tar header points out of it")
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER_BYTES_MAX:
            raise ImageError(f"the layer is damaged: a tar header of more than {HEADER_BYTES_MAX} bytes")
        parts = []
        while size > 0 and self._position < self._table.plain_bytes:
            part = self._piece(size)
            parts.append(part)
            self._position += len(part)
            size -= len(part)
        return b"".join(parts)

    def _piece(self, size: int) -> bytes:
        at = bisect.bisect_right(self._starts, self._position)
        if at:
            offset, length = self._table.content[at - 1]
            if self._position < offset + length:
                return bytes(min(size, offset + length - self._position))
        end = self._starts[at] if at < len(self._starts) else self._table.plain_bytes
        begin = self._position - self._before[at]
        return self._table.rest[begin : begin + min(size, end - self._position)]


class _Skeleton(Entries):
    """Makes files of the right size with nothing in them, and notes where each one's content is."""

    def __init__(self, root: int, headers: _Headers) -> None:
        super().__init__(root, cast(TarStream, headers), entries_max=ENTRIES_MAX, stop=threading.Event())
        self.offsets: dict[int, int] = {}
        """By inode."""

    def _file(self, parent: int, base: bytes, member: tarfile.TarInfo) -> None:
        if member.issparse():
            raise ImageError("a layer with sparse files cannot be shown before it is here")
        super()._file(parent, base, member)

    def _copy(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        if size:
            self.offsets[os.fstat(fd).st_ino] = self._stream.tell()


def _entries(root: Path, offsets: dict[int, int], content: dict[int, int]) -> Iterator[ShownEntry]:
    pending = deque([(0, "", os.fsencode(root))])
    count = 0
    while pending:
        parent, name, path = pending.popleft()
        found = os.lstat(path)
        if stat.S_IFMT(found.st_mode) not in _KINDS:
            raise ImageError("a layer with devices or pipes cannot be shown before it is here")
        offset, target = 0, ""
        if stat.S_ISLNK(found.st_mode):
            target = _text(os.readlink(path))  # noqa: PTH115 (names here are bytes)
        elif stat.S_ISREG(found.st_mode) and found.st_size:
            offset = offsets[found.st_ino]
            if content.get(offset) != found.st_size:
                raise ImageError("the layer is damaged: its headers and its table differ")
        elif stat.S_ISDIR(found.st_mode):
            pending += [(count, _text(child), path + b"/" + child) for child in sorted(os.listdir(path))]  # noqa: PTH208
        size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
        yield ShownEntry(
            parent, name, found.st_mode, found.st_uid, found.st_gid, size, found.st_mtime_ns, found.st_nlink, target, offset
        )
        count += 1


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise ImageError("a layer with names that are no UTF-8 cannot be shown before it is here") from None
