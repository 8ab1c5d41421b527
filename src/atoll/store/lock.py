"""One process at a time on one piece of data."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from atoll.model.errors import Conflict, Unavailable

_HOLDER_BYTES_MAX = 32


class FileLock:
    """An exclusive lock that the kernel gives back when the process ends, however it ends.

    The file holds the process id of its holder and stays when the lock is given back, because removing it would let two
    processes lock two files of one name.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path, *, what: str) -> FileLock:
        """Return the lock on `path`, which guards `what` (in words). Does not wait.

        Raises Conflict, naming the process that holds it; Unavailable if the file cannot be made.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unavailable(path, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, _HOLDER_BYTES_MAX, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise Conflict(
                f"{what} is in use by process {holder} (lock {path})",
                mend=f"stop process {holder}, or use another data directory",
            ) from None
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(descriptor)
            raise unavailable(path, error) from None
        return cls(path, descriptor)

    def release(self) -> None:
        """Give the lock back. Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def unavailable(path: Path, error: OSError) -> Unavailable:
    """Return the operating system's refusal as ours, with the mend where it is known."""
    owner, room = f"run as the user that owns {path.parent}, or as root", f"make room on the disk of {path.parent}"
    mends = {
        errno.EACCES: owner,
        errno.EPERM: owner,
        errno.ENOENT: f"make the directory {path.parent}",
        errno.ENOSPC: room,
        errno.EDQUOT: room,
    }
    return Unavailable(f"cannot use {path}: {error.strerror}", mend=mends.get(error.errno or 0))
