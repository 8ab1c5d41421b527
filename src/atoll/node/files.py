"""Copying files out of and into an instance's root as a tar stream; runs in a thread, since disks block.

Names are the tenant's: they are resolved in its root only, links are copied as links, devices and pipes not at all, nor what
lies on a file system of the kernel's: it answers whoever asks by his rights, and here the node's root would ask.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import tarfile
import time

from atoll.model.copying import COPY_BYTES_MAX, DEPTH_MAX, ENTRIES_MAX, PART_BYTES, Sink, Source, parts_of, top_of
from atoll.model.errors import AtollError, Exhausted, Invalid, NotFound, RuntimeFailed, TooLarge
from atoll.node.in_root import IdMap, acting_as, is_kernels, open_directory, open_in_root

LEFTOVER_S = 300.0
"""A file without its name yet that nobody has written to for so long is of a copy that was killed: none rests so long."""
_TEMPORARY = ".atoll-copy-"
_TEMPORARIES = re.compile(r"\.atoll-copy-[0-9a-f]{8}")


class Ids:
    """The owners of files, inside and outside."""

    def __init__(self, users: IdMap, groups: IdMap) -> None:
        self.users, self.groups = users, groups

    def to_node(self, uid: int, gid: int) -> tuple[int, int]:
        return self.users.to_node(uid), self.groups.to_node(gid)


def error_in_words(error: OSError, path: str) -> AtollError:
    """Return what an error of the file system means to the one who copies."""
    words = f"{path}: {os.strerror(error.errno or 0).lower()}"
    match error.errno:
        case errno.ENOENT:
            return NotFound(f"no such file or directory: {path}")
        case errno.ENOSPC | errno.EDQUOT:
            return Exhausted(words, mend="free some space in the instance, or raise resources.disk")
        case errno.ENOTDIR | errno.EISDIR | errno.ELOOP | errno.EROFS | errno.ENAMETOOLONG | errno.EEXIST | errno.EINVAL:
            return Invalid(words)
        case _:
            return RuntimeFailed(words)


def pack_files(root: int, path: str, ids: Ids, sink: Sink) -> None:
    """Write `path` (a link there is followed) and all below it as a tar stream whose only top name is its last part.

    Raises NotFound, Invalid, TooLarge, RuntimeFailed.
    """
    name = top_of(path)
    try:
        with tarfile.open(mode="w|", fileobj=sink, format=tarfile.PAX_FORMAT, bufsize=PART_BYTES) as archive:  # type: ignore[call-overload]
            top = open_in_root(root, path, os.O_PATH)
            try:
                _Packer(archive, ids).add(top, name, 0)
            finally:
                os.close(top)
    except OSError as error:
        raise error_in_words(error, path) from None


class _Packer:
    def __init__(self, archive: tarfile.TarFile, ids: Ids) -> None:
        self._archive, self._ids = archive, ids
        self._bytes = self._entries = 0

    def add(self, fd: int, name: str, depth: int) -> None:
        """`fd` is an O_PATH descriptor, so that what was looked at is what is read."""
        about = os.fstat(fd)
        info = tarfile.TarInfo(name)
        info.mode, info.mtime = stat.S_IMODE(about.st_mode), about.st_mtime
        info.uid, info.gid = self._ids.users.to_instance(about.st_uid), self._ids.groups.to_instance(about.st_gid)
        self._entries += 1
        self._bytes += about.st_size if stat.S_ISREG(about.st_mode) else 0
        if self._entries > ENTRIES_MAX or self._bytes > COPY_BYTES_MAX or depth > DEPTH_MAX:
            raise TooLarge(f"more than is copied at once: {ENTRIES_MAX} files, {COPY_BYTES_MAX >> 30} GiB, {DEPTH_MAX} deep")
        if stat.S_ISREG(about.st_mode) and not is_kernels(fd):
            info.size = about.st_size
            with open(f"/proc/self/fd/{fd}", "rb") as file:
                self._archive.addfile(info, _Exactly(file))  # type: ignore[arg-type]
        elif stat.S_ISDIR(about.st_mode):
            info.type = tarfile.DIRTYPE
            self._archive.addfile(info)
            if not is_kernels(fd):  # of a copy of `/`, /proc and /sys are empty
                self._add_children(fd, name, depth)
        elif stat.S_ISLNK(about.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=fd)
            self._archive.addfile(info)

    def _add_children(self, fd: int, name: str, depth: int) -> None:
        directory = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for child in sorted(os.listdir(directory)):  # noqa: PTH208 - by descriptor
                try:
                    below = os.open(child, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                except FileNotFoundError:
                    continue  # removed meanwhile
                try:
                    self.add(below, f"{name}/{child}", depth + 1)
                finally:
                    os.close(below)
        finally:
            os.close(directory)


class _Exactly:
    """A file that changes while it is read must not break the archive: what it lacks is filled with zeros."""

    def __init__(self, file: Source) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        return data + bytes(size - len(data))


def unpack_files(root: int, path: str, ids: Ids, source: Source) -> None:
    """Unpack a tar stream into the directory `path`, which is made if need be. A file is replaced when its new content is whole.

    Raises Invalid for what is not a tar stream, leads out of `path`, or is neither file, directory nor link; TooLarge;
    Exhausted; RuntimeFailed. What was unpacked before stays.
    """
    try:
        with acting_as(*ids.to_node(0, 0)):
            _unpack_all(root, path, ids, source)
    except tarfile.TarError as error:
        raise Invalid(f"not a tar stream: {error}") from None
    except OSError as error:
        raise error_in_words(error, error.filename if isinstance(error.filename, str) else path) from None


def _unpack_all(root: int, path: str, ids: Ids, source: Source) -> None:
    top = open_directory(root, path)
    try:
        _remove_leftovers(top, ".")
    finally:
        os.close(top)
    with tarfile.open(mode="r|", fileobj=source, bufsize=PART_BYTES) as archive:  # type: ignore[call-overload]
        total = entries = 0
        for member in archive:
            entries, total = entries + 1, total + member.size
            if entries > ENTRIES_MAX or total > COPY_BYTES_MAX:
                raise TooLarge(f"more than is copied at once: {ENTRIES_MAX} files, {COPY_BYTES_MAX >> 30} GiB")
            _unpack(root, path, archive, member, ids)


def _unpack(root: int, path: str, archive: tarfile.TarFile, member: tarfile.TarInfo, ids: Ids) -> None:
    parts = parts_of(member.name)
    owner = ids.to_node(member.uid, member.gid)
    if not parts:
        return  # the directory itself
    parent = open_directory(root, "/".join((path.rstrip("/"), *parts[:-1])) or "/")
    try:
        if member.isdir():
            _make_directory(parent, parts[-1], member, owner)
            return
        temporary = _TEMPORARY + secrets.token_hex(4)
        if member.isreg():
            made = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        elif member.issym():
            os.symlink(member.linkname, temporary, dir_fd=parent)
        elif member.islnk():
            _link(root, path, parent, member, temporary)
        else:
            raise Invalid(f"{member.name}: only files, directories and links are copied")
        try:
            if member.isreg():
                _write(made, archive, member, owner)
            elif member.issym():
                os.chown(temporary, *owner, dir_fd=parent, follow_symlinks=False)
            os.rename(temporary, parts[-1], src_dir_fd=parent, dst_dir_fd=parent)
        finally:
            _remove(parent, temporary)  # also where rename(2) did nothing, as both are links to one file
    finally:
        os.close(parent)


def _make_directory(parent: int, name: str, member: tarfile.TarInfo, owner: tuple[int, int]) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent).st_mode):
            raise
        _remove_leftovers(parent, name)
        return  # it keeps its owner and mode
    os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.fchmod(fd, member.mode & 0o7777)
    finally:
        os.close(fd)


def _write(fd: int, archive: tarfile.TarFile, member: tarfile.TarInfo, owner: tuple[int, int]) -> None:
    with os.fdopen(fd, "wb") as file:
        content = archive.extractfile(member)
        while content is not None and (data := content.read(PART_BYTES)):
            file.write(data)
        file.flush()
        os.fchown(fd, *owner)
        os.fchmod(fd, member.mode & 0o7777)
        os.utime(fd, (member.mtime, member.mtime))


def _link(root: int, path: str, parent: int, member: tarfile.TarInfo, name: str) -> None:
    target = parts_of(member.linkname)
    if not target:
        raise Invalid(f"{member.name}: a link to nothing")
    beside = open_directory(root, "/".join((path.rstrip("/"), *target[:-1])) or "/")
    try:
        os.link(target[-1], name, src_dir_fd=beside, dst_dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(beside)


def _remove_leftovers(parent: int, name: str) -> None:
    """Remove what copies that were killed left in the directory `name`, unless that is a link."""
    with contextlib.suppress(OSError):
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            for child in os.listdir(directory):  # noqa: PTH208 - by descriptor
                if _TEMPORARIES.fullmatch(child):
                    changed = os.stat(child, dir_fd=directory, follow_symlinks=False).st_ctime
                    if time.time() - changed > LEFTOVER_S:
                        os.unlink(child, dir_fd=directory)
        finally:
            os.close(directory)


def _remove(parent: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)
