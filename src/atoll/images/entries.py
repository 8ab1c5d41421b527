"""A layer's entries become files below one directory, in overlayfs' own form; every path goes through descriptors.

White-outs (`.wh.NAME`) become character devices 0/0, opaque marks (`.wh..wh..opq`) the attribute
`trusted.overlay.opaque`, as the kernel's overlayfs document has them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tarfile
import threading
from collections.abc import Callable

from atoll.images.beneath import make_directories, open_beneath
from atoll.images.kept import KEPT_BYTES_MAX, Kept
from atoll.images.stream import OUTPUT_CHUNK_BYTES, TarStream
from atoll.model.errors import ImageError

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
OPAQUE_ATTRIBUTE = "trusted.overlay.opaque"
XATTR_PREFIX = "SCHILY.xattr."
XATTRS_KEPT = ("user.", "security.capability")
"""Others are dropped: `trusted.overlay.*` would be an order to overlayfs, not data."""
SIZE_BYTES_MAX = 1 << 50
DEPTH_MAX = 256
"""Directories that a name may lie in: removing what is deeper takes more of Python's stack than it has."""
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Stopped(Exception):
    """The caller no longer wants the layer."""


class Entries:
    """One layer while it is being unpacked. Every path goes through descriptors below the root."""

    def __init__(
        self, root: int, stream: TarStream, *, entries_max: int, stop: threading.Event, kept_bytes_max: int = KEPT_BYTES_MAX
    ) -> None:
        self._root = root
        self._stream = stream
        self._entries_max = entries_max
        self._stop = stop
        self._kept = Kept(kept_bytes_max)
        self._times: dict[bytes, int] = {}
        self._parent_path: bytes | None = None
        self._parent_fd = -1
        self.implied: set[bytes] = set()

    def run(self) -> None:
        try:
            # TarStream offers the part of a file object that reading in order needs
            with tarfile.open(fileobj=self._stream, mode="r:", errors="surrogateescape", encoding="utf-8") as tar:  # type: ignore[call-overload]
                for count in range(self._entries_max + 1):
                    if self._stop.is_set():
                        raise Stopped
                    self._stream.begin_header()
                    member = tar.next()
                    if member is None:
                        break
                    tar.members.clear()  # tarfile would keep them all
                    if count == self._entries_max:
                        raise ImageError(f"the layer has more than {self._entries_max} entries")
                    self._entry(member)
            self._set_times()
        finally:
            self._leave()

    def _entry(self, member: tarfile.TarInfo) -> None:
        name = os.fsencode(member.name)
        parts = _split(name)
        if not parts:
            if member.isdir():
                self._describe(self._root, member)
                self._times[b""] = _nanoseconds(member)
            return
        parent = self._enter(parts[:-1])
        base = parts[-1]
        if base.startswith(WHITEOUT):
            self._whiteout(parent, base)
            return
        path = b"/".join(parts)
        self.implied.discard(path)
        if member.isdir():
            self._directory(parent, base, path, member)
        elif member.isreg():
            self._file(parent, base, member)
        else:
            self._other(parent, base, member)

    def _enter(self, parts: list[bytes]) -> int:
        """Return a descriptor of the directory; it stays open until the next one is asked for."""
        path = b"/".join(parts)
        if path != self._parent_path:
            self._leave()
            try:
                self._parent_fd, made = make_directories(self._root, parts)
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.ELOOP, errno.ENOTDIR):
                    raise ImageError(f"the layer is hostile or damaged: {show(path)} leads out of it, or is no directory") from None
                raise
            self._parent_path = path
            for directory in made:
                self._kept.add(directory)
            self.implied.update(made)
        return self._parent_fd

    def _leave(self) -> None:
        if self._parent_path is not None:
            os.close(self._parent_fd)
            self._parent_path = None

    def _file(self, parent: int, base: bytes, member: tarfile.TarInfo) -> None:
        fd = self._make(parent, base, lambda: os.open(base, _NEW_FILE, 0o600, dir_fd=parent))
        try:
            if member.issparse():
                self._sparse(fd, member)
            else:
                self._stream.seek(member.offset_data)
                self._copy(fd, member.size)
            self._describe(fd, member)
            os.utime(fd, ns=(_nanoseconds(member),) * 2)
        finally:
            os.close(fd)

    def _copy(self, fd: int, size: int) -> None:
        while size > 0:
            if self._stop.is_set():
                raise Stopped
            data = self._stream.take(min(size, OUTPUT_CHUNK_BYTES))
            if not data:
                raise ImageError("the layer is damaged: the tar ends inside a file")
            size -= len(data)
            while data:
                data = data[os.write(fd, data) :]

    def _sparse(self, fd: int, member: tarfile.TarInfo) -> None:
        if not 0 <= member.size <= SIZE_BYTES_MAX:
            raise ImageError("the layer is damaged: a sparse file has an absurd size")
        self._stream.seek(member.offset_data)
        os.ftruncate(fd, member.size)
        chunks: list[tuple[int, int]] = getattr(member, "sparse", None) or []
        for offset, size in chunks:
            if offset < 0 or size < 0 or offset + size > member.size:
                raise ImageError("the layer is damaged: a sparse file's map is wrong")
            os.lseek(fd, offset, os.SEEK_SET)
            self._copy(fd, size)

    def _directory(self, parent: int, base: bytes, path: bytes, member: tarfile.TarInfo) -> None:
        hidden = False
        try:
            os.mkdir(base, 0o700, dir_fd=parent)
        except FileExistsError:
            found = os.stat(base, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                hidden = _is_whiteout(found)
                self._remove(parent, base)
                os.mkdir(base, 0o700, dir_fd=parent)
        fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            if hidden:
                os.setxattr(fd, OPAQUE_ATTRIBUTE, b"y")
            self._describe(fd, member)
        finally:
            os.close(fd)
        if path not in self._times:
            self._kept.add(path)
        self._times[path] = _nanoseconds(member)

    def _other(self, parent: int, base: bytes, member: tarfile.TarInfo) -> None:
        """Make a link, device or pipe; what tar knows beside these (sockets, volume labels) means nothing in an image."""
        if member.issym():
            self._make(parent, base, lambda: os.symlink(os.fsencode(member.linkname), base, dir_fd=parent))
        elif member.islnk():
            self._hardlink(parent, base, member)
            return
        elif member.isdev():
            mode = {tarfile.FIFOTYPE: stat.S_IFIFO, tarfile.CHRTYPE: stat.S_IFCHR}.get(member.type, stat.S_IFBLK)
            device = 0 if member.isfifo() else os.makedev(member.devmajor, member.devminor)
            self._make(parent, base, lambda: os.mknod(base, mode | 0o600, device, dir_fd=parent))
        else:
            return
        os.chown(base, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        if not member.issym():
            os.chmod(base, member.mode & 0o7777, dir_fd=parent)
        os.utime(base, ns=(_nanoseconds(member),) * 2, dir_fd=parent, follow_symlinks=False)

    def _hardlink(self, parent: int, base: bytes, member: tarfile.TarInfo) -> None:
        parts = _split(os.fsencode(member.linkname))
        if not parts:
            raise ImageError(f"the layer is damaged: {show(base)} is a hard link to nothing")
        try:
            source = open_beneath(self._root, b"/".join(parts[:-1]), os.O_PATH | os.O_DIRECTORY)
        except OSError:
            raise ImageError(f"the layer is damaged: no {member.linkname!r} to link to"[:300]) from None
        try:
            found = os.stat(parts[-1], dir_fd=source, follow_symlinks=False)
            here = os.fstat(parent)
            if stat.S_ISDIR(found.st_mode):
                raise ImageError(f"the layer is damaged: {member.linkname!r} is a directory and cannot be linked to"[:300])
            if parts[-1] == base and os.fstat(source).st_ino == here.st_ino:
                return
            self._make(
                parent,
                base,
                lambda: os.link(parts[-1], base, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False),
            )
        except FileNotFoundError:
            raise ImageError(f"the layer is damaged: no {member.linkname!r} to link to"[:300]) from None
        finally:
            os.close(source)

    def _whiteout(self, parent: int, base: bytes) -> None:
        if base == OPAQUE:
            os.setxattr(parent, OPAQUE_ATTRIBUTE, b"y")
            return
        name = base[len(WHITEOUT) :]
        if name.startswith(WHITEOUT):  # AUFS' own notes
            return
        if name in (b"", b".", b".."):
            raise ImageError(f"the layer is hostile: a white-out of {show(name)}")
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent)
        except FileExistsError:
            # A white-out hides what is below; what this layer itself brings stays.
            with contextlib.suppress(NotADirectoryError, OSError):
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                try:
                    os.setxattr(fd, OPAQUE_ATTRIBUTE, b"y")
                finally:
                    os.close(fd)

    def _make(self, parent: int, base: bytes, make: Callable[[], int | None]) -> int:
        """Make an entry, in place of an earlier one of this name."""
        try:
            return make() or 0
        except FileExistsError:
            self._remove(parent, base)
            return make() or 0

    def _remove(self, parent: int, base: bytes) -> None:
        try:
            os.unlink(base, dir_fd=parent)
        except IsADirectoryError:
            shutil.rmtree(base, dir_fd=parent)

    def _describe(self, fd: int, member: tarfile.TarInfo) -> None:
        """Set owner, then mode, then attributes: chown clears set-uid bits and capabilities."""
        os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, member.mode & 0o7777)
        for name, value in kept_xattrs(member).items():
            try:
                os.setxattr(fd, name, value.encode("utf-8", "surrogateescape"))
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise

    def _set_times(self) -> None:
        """Set directories' times when nothing is written to them any more."""
        for path, when in self._times.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                fd = open_beneath(self._root, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    os.utime(fd, ns=(when, when))
                finally:
                    os.close(fd)


def kept_xattrs(member: tarfile.TarInfo) -> dict[str, str]:
    """Return the extended attributes of an entry that an image may set."""
    names = {key: key.removeprefix(XATTR_PREFIX) for key in member.pax_headers}
    return {name: member.pax_headers[key] for key, name in names.items() if name != key and name.startswith(XATTRS_KEPT)}


def _split(name: bytes) -> list[bytes]:
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts or (name.startswith(b"/") and parts):
        raise ImageError(f"the layer is hostile: the name {show(name)} leads out of it")
    if len(parts) > DEPTH_MAX:
        raise ImageError(f"the layer is hostile: the name {show(name)} is {len(parts)} deep; at most {DEPTH_MAX} are taken")
    return parts


def _is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _nanoseconds(member: tarfile.TarInfo) -> int:
    """Return the entry's time as the file system can hold it, 1901 to 2446 on ext4."""
    return int(min(max(float(member.mtime), 0.0), 15e9) * 1e9)


def show(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, (bytes, str)) else str(name)
    return repr(text[:120])
