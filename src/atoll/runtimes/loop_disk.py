"""Sparse ext4 disks on loop devices: a hard bound on what an instance can write, made without starting a process.

One `mkfs.ext4` per size gives a template; a disk is a copy of the template's few written blocks. A disk lives no longer
than its instance, so it has no journal: after a crash of the machine it is thrown away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from atoll.model.errors import Exhausted, RuntimeFailed
from atoll.runtimes.mounts import MNT_DETACH, MS_NOATIME, MS_NODEV, MS_NOSUID, descriptor, mount, unmount

DISK_BYTES_MIN = 4 << 20
TEMPLATES_MAX = 8
_ATTACH_TRIES_MAX = 64
_FICLONE = 0x40049409
_libc = ctypes.CDLL(None, use_errno=True)
_MKFS_S_MAX = 60.0
_BUSY_S_MAX = 1.0
_LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C0A, 0x4C82
_AUTOCLEAR, _DIRECT_IO = 4, 16
_OPTIONS = "noinit_itable,discard,errors=remount-ro"


class Template:
    """The written blocks of an empty file system of one size."""

    def __init__(self, size_bytes: int, directory: Path) -> None:
        self.size_bytes = size_bytes
        path = directory / f"template-{size_bytes}-{os.getpid()}-{threading.get_ident()}"
        try:
            _format(path, size_bytes)
            with path.open("rb") as file:
                self.blocks = [
                    (start, os.pread(file.fileno(), end - start, start)) for start, end in extents(file.fileno(), size_bytes)
                ]
        finally:
            path.unlink(missing_ok=True)

    def copy(self, path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with descriptor(fd):
            os.ftruncate(fd, self.size_bytes)
            for start, data in self.blocks:
                os.pwrite(fd, data, start)


def _format(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    command = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-O", "^has_journal,^resize_inode,sparse_super2"]
    command += ["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", str(path)]
    try:
        result = subprocess.run(command, capture_output=True, timeout=_MKFS_S_MAX, check=False)
    except FileNotFoundError:
        raise RuntimeFailed("mkfs.ext4 is not installed", mend="apt-get install e2fsprogs") from None
    except subprocess.TimeoutExpired:
        raise RuntimeFailed(f"mkfs.ext4 did not finish within {_MKFS_S_MAX:.0f} s") from None
    if result.returncode != 0:
        raise RuntimeFailed(f"mkfs.ext4 failed: {result.stderr.decode(errors='replace').strip()}")


def extents(fd: int, size_bytes: int) -> list[tuple[int, int]]:
    """Return where the file has data, as (start, end)."""
    found = []
    end = 0
    while end < size_bytes:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, end))
    return found


def copy_written(source: Path, target: Path) -> None:
    """Copy a file's written blocks into a new one of the same size: shared where the file system can, else one by one.

    Raises OSError, for a source that is no file too: that may be what a monitor which was taken over has made of its disk.
    """
    with open_file(source) as given:
        with descriptor(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)) as made:
            with contextlib.suppress(OSError):
                fcntl.ioctl(made, _FICLONE, given)
                return
            fill(given, made)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[int]:
    """Give a descriptor to read a file with that another may have put something else in the place of: it is never waited for.

    Raises OSError for a link, a pipe, and whatever else is no file.
    """
    with descriptor(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        yield fd


def fill(source: int, target: int) -> None:
    """Copy the written blocks of one open file into another that is empty. Raises OSError."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in extents(source, size):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(target, source, start, end - start)
            if sent == 0:
                raise OSError(errno.EIO, "the file became shorter")
            start += sent


class LoopDisks:
    """Makes, mounts and removes disks; `directory` holds the images. Blocking: call it from a thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._templates: dict[int, Template] = {}
        self._lock = threading.Lock()

    def make(self, name: str, size_bytes: int, source: Path | None = None) -> Path:
        """Return the mount point of a new disk of at least `size_bytes`: empty, or with what is in the image `source` of that size.

        Raises Exhausted or RuntimeFailed.
        """
        size_bytes = max(DISK_BYTES_MIN, -(-size_bytes // 4096) * 4096)
        image, point = self.directory / f"{name}.img", self.directory / name
        try:
            if source is None:
                self._template(size_bytes).copy(image)
            else:
                copy_written(source, image)
            point.mkdir()
            with descriptor(_attach(image)) as device:
                number = os.minor(os.fstat(device).st_rdev)
                mount(f"/dev/loop{number}", point, "ext4", MS_NOATIME | MS_NODEV | MS_NOSUID, _OPTIONS)
        except OSError as error:
            self.remove(name)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise Exhausted("the node's disk is full", mend=f"free space below {self.directory}") from None
            raise RuntimeFailed(f"cannot make a disk of {size_bytes} bytes: {error}") from None
        return point

    def write_down(self, name: str, target: Path) -> None:
        """Copy a disk that nobody writes to at the moment into the new file `target`. Raises OSError."""
        with descriptor(os.open(self.directory / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            if _libc.syncfs(fd) != 0:
                raise OSError(ctypes.get_errno(), "the disk cannot be written out")
        copy_written(self.directory / f"{name}.img", target)

    def remove(self, name: str) -> None:
        """Unmount and delete; safe to repeat."""
        point = self.directory / name
        deadline = time.monotonic() + _BUSY_S_MAX
        while True:
            try:
                unmount(point)
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() > deadline:
                    unmount(point, MNT_DETACH)
                    break
                time.sleep(0.01)
        (self.directory / f"{name}.img").unlink(missing_ok=True)
        if point.exists():
            point.rmdir()

    def names(self) -> list[str]:
        """Return the disks that are on this machine, mounted or not."""
        return sorted(
            {path.name.removesuffix(".img") for path in self.directory.iterdir() if not path.name.startswith("template-")}
        )

    def _template(self, size_bytes: int) -> Template:
        with self._lock:
            template = self._templates.pop(size_bytes, None) or Template(size_bytes, self.directory)
            while len(self._templates) >= TEMPLATES_MAX:
                del self._templates[next(iter(self._templates))]
            self._templates[size_bytes] = template
            return template


def _attach(image: Path) -> int:
    """Return an open loop device over `image`; it frees itself when the last user is gone."""
    with descriptor(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control:
        with descriptor(os.open(image, os.O_RDWR | os.O_CLOEXEC)) as backing:
            for _ in range(_ATTACH_TRIES_MAX):
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                device = _open_loop(number)
                info = struct.pack("QQQQQIIII", 0, 0, 0, 0, 0, 0, 0, 0, _AUTOCLEAR | _DIRECT_IO) + bytes(232 - 56)
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, struct.pack("II", backing, 4096) + info + bytes(64))
                except OSError as error:
                    os.close(device)
                    if error.errno != errno.EBUSY:  # another took it between the two calls
                        raise
                else:
                    return device
    raise OSError(errno.EBUSY, "no free loop device")


def _open_loop(number: int) -> int:
    path = f"/dev/loop{number}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # no devtmpfs or udev makes the node here
        os.mknod(path, 0o660 | 0o060000, os.makedev(7, number))
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
