"""File operations that cannot leave a directory, whatever names and symbolic links they meet: openat2(2), Linux ≥ 5.6."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_NR_OPENAT2 = 437
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: bytes, flags: int) -> int:
    """Return a descriptor of `path` below the directory `root`; the caller closes it.

    Symbolic links are followed only while they stay below `root`; one that is absolute or leads out raises OSError
    (EXDEV), as does `..` that would.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV)
    while True:
        fd = int(_libc.syscall(_NR_OPENAT2, root, path or b".", ctypes.byref(how), ctypes.sizeof(how)))
        if fd >= 0:
            return fd
        error = ctypes.get_errno()
        if error not in (4, 11):  # EINTR; EAGAIN says that a rename elsewhere disturbed the resolution
            raise OSError(error, os.strerror(error), os.fsdecode(path))


def make_directories(root: int, parts: Iterable[bytes]) -> tuple[int, list[bytes]]:
    """Return a descriptor of the directory that `parts` name below `root`, and the paths that had to be made for it."""
    made: list[bytes] = []
    path = b""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    for part in parts:
        path = path + b"/" + part if path else part
        try:
            child = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            try:
                os.mkdir(part, 0o755, dir_fd=fd)
                made.append(path)
                child = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
                os.fchmod(child, 0o755)  # whatever the umask is
            except OSError:
                os.close(fd)
                raise
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
        fd = child
    return fd, made


def sync_filesystem(fd: int) -> None:
    """Write everything of the file system that `fd` lies on to its disk: syncfs(2)."""
    if _libc.syncfs(fd) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
