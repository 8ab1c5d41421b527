"""Copying files out of and into a guest. Its init reads and writes them (`native/guest/files.c`); tar is made and read here.

What a guest says of its files is the tenant's: names, sizes and their number are checked before they get into an archive.
"""

from __future__ import annotations

import asyncio
import os
import struct
import tarfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from atoll.model.copying import COPY_BYTES_MAX, DEPTH_MAX, ENTRIES_MAX, PART_BYTES, Sink, Source, parts_of, top_of
from atoll.model.errors import DeadlineExceeded, Invalid, RuntimeFailed, TooLarge
from atoll.runtimes.vm.execution import GuestExecution

T = TypeVar("T")
IDLE_S_MAX = 60.0
"""How long a guest is waited for, all in all, for every PART_BYTES that it says: who hardly moves keeps a thread no longer than
that from hearing that the other end of the copy has left."""
NAME_BYTES_MAX = 4096
_RECORD = struct.Struct("<c3xIIIQQHH")
_WORDS_BYTES_MAX = 8 << 10

Start = Callable[[str, str], Awaitable[GuestExecution]]
"""Starts init's copying, `out` or `in`, of a path."""


class GuestFiles:
    """See `model.copying.Copier`. Made in the event loop `loop`, used in a thread."""

    def __init__(self, start: Start, loop: asyncio.AbstractEventLoop, *, idle_s: float = IDLE_S_MAX) -> None:
        self._start = start
        self._loop = loop
        self._idle_s = idle_s

    def pack(self, path: str, sink: Sink) -> None:
        execution = self._wait(_started(self._start, "out", path))
        try:
            incoming = self._incoming(execution)
            with tarfile.open(mode="w|", fileobj=sink, format=tarfile.PAX_FORMAT, bufsize=PART_BYTES) as archive:  # type: ignore[call-overload]
                _pack(archive, incoming, top_of(path))
                self._finish(execution, incoming.words, path)
        finally:
            self._wait(execution.close())

    def unpack(self, path: str, source: Source) -> None:
        execution = self._wait(_started(self._start, "in", path))
        try:
            self._unpack(execution, source)
            self._wait(execution.close_stdin())
            incoming = self._incoming(execution)
            if incoming.read(1):
                raise _broken()
            self._finish(execution, incoming.words, path)
        except tarfile.TarError as error:
            raise Invalid(f"not a tar stream: {error}") from None
        finally:
            self._wait(execution.close())

    def _unpack(self, execution: GuestExecution, source: Source) -> None:
        with tarfile.open(mode="r|", fileobj=source, bufsize=PART_BYTES) as archive:  # type: ignore[call-overload]
            total = entries = 0
            for member in archive:
                entries, total = entries + 1, total + member.size
                if entries > ENTRIES_MAX or total > COPY_BYTES_MAX:
                    raise TooLarge(f"more than is copied at once: {ENTRIES_MAX} files, {COPY_BYTES_MAX >> 30} GiB")
                record = _record(member)
                if record is None:
                    continue  # the directory itself
                self._wait(execution.write(record))
                content = archive.extractfile(member) if member.isreg() else None
                while content is not None and (data := content.read(PART_BYTES)):
                    self._wait(execution.write(data))
                if execution.ended:
                    return  # it says why

    def _finish(self, execution: GuestExecution, words: bytes, path: str) -> None:
        """Raises OSError for what the guest's file system said."""
        status = self._wait(execution.wait())
        if status == 0 and not words:
            return
        number, _, place = words.decode(errors="replace").partition(" ")
        if number.isdecimal() and len(number) < 5:
            raise OSError(int(number), os.strerror(int(number)), place or path)
        raise RuntimeFailed(f"{path}: the guest broke off the copy (status {status})")

    def _incoming(self, execution: GuestExecution) -> _Incoming:
        return _Incoming(lambda within_s: self._wait(execution.read(), within_s), self._idle_s)

    def _wait(self, work: Coroutine[Any, Any, T], within_s: float | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self._idle_s if within_s is None else within_s)
        except TimeoutError:
            future.cancel()
            raise DeadlineExceeded(f"the guest hardly moved for {self._idle_s:g} s while it copied") from None


async def _started(start: Start, way: str, path: str) -> GuestExecution:
    return await start(way, path)


class _Incoming:
    """A guest's stdout by numbers of bytes; what it says on stderr is kept. `read` gives its next words within so many seconds."""

    def __init__(self, read: Callable[[float], tuple[int, bytes] | None], idle_s: float) -> None:
        self._read = read
        self._idle_s = self._left_s = idle_s
        self._came_bytes = 0
        self._rest = b""
        self.words = b""

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none at the end. Raises DeadlineExceeded, and RuntimeFailed for a stderr without end."""
        while not self._rest:
            part = self._next()
            if part is None:
                return b""
            if part[0] == 2:
                self.words += part[1]
                if len(self.words) > _WORDS_BYTES_MAX:
                    raise _broken()
            else:
                self._rest = part[1]
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _next(self) -> tuple[int, bytes] | None:
        began = time.monotonic()
        part = self._read(self._left_s)
        self._left_s = max(0.0, self._left_s - (time.monotonic() - began))
        self._came_bytes += len(part[1]) if part else 0
        if self._came_bytes >= PART_BYTES:
            self._came_bytes, self._left_s = 0, self._idle_s
        return part

    def exactly(self, size: int) -> bytes:
        """Return `size` bytes, or fewer where the end comes before."""
        parts: list[bytes] = []
        while size and (part := self.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class _Content:
    """What tarfile reads of one file: the archive stays whole where the guest breaks off, and the copy then fails."""

    def __init__(self, incoming: _Incoming) -> None:
        self._incoming = incoming

    def read(self, size: int) -> bytes:
        data = self._incoming.exactly(size)
        return data + bytes(size - len(data))


def _pack(archive: tarfile.TarFile, incoming: _Incoming, top: str) -> None:
    total = entries = 0
    while head := incoming.exactly(_RECORD.size):
        if len(head) < _RECORD.size:
            raise _broken()
        kind, mode, uid, gid, changed, size, name_bytes, link_bytes = _RECORD.unpack(head)
        if not 0 < name_bytes <= NAME_BYTES_MAX or link_bytes > NAME_BYTES_MAX:
            raise _broken()
        name, link = (os.fsdecode(incoming.exactly(count)) for count in (name_bytes, link_bytes))
        entries, total = entries + 1, total + size
        if entries > ENTRIES_MAX or total > COPY_BYTES_MAX or name.count("/") > DEPTH_MAX:
            raise TooLarge(f"more than is copied at once: {ENTRIES_MAX} files, {COPY_BYTES_MAX >> 30} GiB, {DEPTH_MAX} deep")
        _check_name(name, top, first=entries == 1)
        info = tarfile.TarInfo(name)
        info.mode, info.uid, info.gid, info.mtime = mode & 0o7777, uid, gid, min(changed, 1 << 40)
        match kind:
            case b"f":
                info.size = size
                archive.addfile(info, _Content(incoming))  # type: ignore[arg-type]
            case b"d" if not size:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            case b"l" if not size and "\0" not in link:
                info.type, info.linkname = tarfile.SYMTYPE, link
                archive.addfile(info)
            case _:
                raise _broken()


def _check_name(name: str, top: str, *, first: bool) -> None:
    """A guest's names begin with what was asked for, and lead nowhere else."""
    parts = name.split("/")
    if name == top if first else (parts[0] == top and len(parts) > 1 and not {"", ".", ".."} & set(parts[1:]) and "\0" not in name):
        return
    raise _broken()


def _broken() -> RuntimeFailed:
    return RuntimeFailed("the guest answered a copy with what is none", mend="run tar in it by exec")


def _record(member: tarfile.TarInfo) -> bytes | None:
    """Return what init is told of a member; None for the directory itself."""
    parts = parts_of(member.name)
    if not parts:
        return None
    link = ""
    if member.isdir():
        kind = b"d"
    elif member.isreg():
        kind = b"f"
    elif member.issym():
        kind, link = b"l", member.linkname
    elif member.islnk():
        kind, link = b"h", "/".join(parts_of(member.linkname))
        if not link:
            raise Invalid(f"{member.name}: a link to nothing")
    else:
        raise Invalid(f"{member.name}: only files, directories and links are copied")
    name, target = os.fsencode("/".join(parts)), os.fsencode(link)
    if max(len(name), len(target)) >= NAME_BYTES_MAX:
        raise Invalid(f"{member.name[:100]}…: a name of more than {NAME_BYTES_MAX} bytes")
    size = member.size if kind == b"f" else 0
    changed = max(0, int(member.mtime))
    ids = (max(0, member.uid) & 0xFFFFFFFF, max(0, member.gid) & 0xFFFFFFFF)
    return _RECORD.pack(kind, member.mode & 0o7777, *ids, changed, size, len(name), len(target)) + name + target
