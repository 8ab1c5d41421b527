"""Mount system calls by ctypes: no process is started for a mount.

Errors are OSError with the path; callers say what they mean. Numbers are those of the kernel's generic system call table,
which x86-64 and arm64 share for every call that is made here.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432
_OPENAT2, _MOUNT_SETATTR = 437, 442
_AT_FDCWD = -100
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FSCONFIG_CMD_CREATE = 6

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME, MS_BIND = 1, 2, 4, 8, 1024, 4096
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_IDMAP = 0x00100000
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10


def _check(result: int, what: str | os.PathLike[str]) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(what))
    return result


def mount(source: str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    _check(_libc.mount(source.encode(), bytes(target), kind.encode(), ctypes.c_ulong(flags), data.encode() or None), target)


def unmount(target: Path, flags: int = 0) -> None:
    """umount2(2). What is not mounted is no error, so that a repeat is safe."""
    try:
        _check(_libc.umount2(bytes(target), flags), target)
    except (FileNotFoundError, OSError) as error:
        if error.errno not in {2, 22}:  # ENOENT, EINVAL: not a mount point
            raise


def clone_tree(source: Path, *, recursive: bool = False) -> int:
    """Return a descriptor of a detached copy of the mount at `source`; closing it ends the copy unless it was attached."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return _check(_libc.syscall(_OPEN_TREE, _AT_FDCWD, bytes(source), flags), source)


def set_attributes(tree: int, attributes: int, *, userns: int | None = None) -> None:
    """mount_setattr(2) on a detached mount; with `userns` it becomes an idmapped mount.

    Raises OSError with EINVAL where the file system has no idmapped mounts.
    """
    if userns is not None:
        attributes |= MOUNT_ATTR_IDMAP
    argument = struct.pack("QQQQ", attributes, 0, 0, userns or 0)
    buffer = ctypes.create_string_buffer(argument, len(argument))
    _check(_libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, buffer, ctypes.c_size_t(len(argument))), "mount_setattr")


def attach(tree: int, target: Path) -> None:
    """Put a detached mount in place, and close its descriptor whatever happens."""
    try:
        _check(_libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, bytes(target), _MOVE_MOUNT_F_EMPTY_PATH), target)
    finally:
        os.close(tree)


def bind(
    source: Path,
    target: Path,
    *,
    userns: int | None = None,
    read_only: bool = False,
    recursive: bool = False,
    attributes: int = 0,
) -> None:
    """Show `source` at `target`, with ids shifted by `userns` where given, and `attributes` (MOUNT_ATTR_…) put on it."""
    tree = clone_tree(source, recursive=recursive)
    try:
        attributes |= MOUNT_ATTR_RDONLY if read_only else 0
        if attributes or userns is not None:
            set_attributes(tree, attributes, userns=userns)
    except OSError:
        os.close(tree)
        raise
    attach(tree, target)


def new_filesystem(kind: str, attributes: int) -> int:
    """Return a descriptor of a new, detached mount of a file system that needs no source, such as `sysfs`."""
    context = _check(_libc.syscall(_FSOPEN, kind.encode(), 1), kind)
    try:
        _check(_libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), kind)
        return _check(_libc.syscall(_FSMOUNT, context, 1, attributes), kind)
    finally:
        os.close(context)


def open_beneath(root: int, path: str, flags: int) -> int:
    """Open `path` as if the directory `root` were `/`: no symbolic link leads out of it, none of /proc's is followed."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    buffer = ctypes.create_string_buffer(how, len(how))
    return _check(_libc.syscall(_OPENAT2, root, path.encode(), buffer, ctypes.c_size_t(len(how))), path)


def mounts_below(directory: Path) -> Iterator[Path]:
    """Yield the mount points at and below `directory`, the deepest and newest first."""
    prefix = str(directory)
    points = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        point = line.split(" ")[4].replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
        if point == prefix or point.startswith(prefix + "/"):
            points.append(Path(point))
    yield from reversed(points)


@contextmanager
def descriptor(fd: int) -> Iterator[int]:
    """Close `fd` on the way out."""
    try:
        yield fd
    finally:
        os.close(fd)
