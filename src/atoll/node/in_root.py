"""Opening names that a tenant chose, as if its root were the whole file system: openat2(2) with RESOLVE_IN_ROOT, Linux ≥ 5.6."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from atoll.model.errors import Invalid

_NR_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_STATFS_BYTES = 256
_KERNELS = {
    "proc": 0x9FA0,
    "sysfs": 0x62656572,
    "cgroup": 0x27E0EB,
    "cgroup2": 0x63677270,
    "debugfs": 0x64626720,
    "tracefs": 0x74726163,
    "securityfs": 0x73636673,
    "bpf": 0xCAFE4A11,
    "configfs": 0x62656570,
    "pstore": 0x6165676C,
    "efivarfs": 0xDE5E81E4,
    "selinuxfs": 0xF97CFF8C,
    "smackfs": 0x43415D53,
    "apparmorfs": 0x5A3C69F0,
    "binfmt_misc": 0x42494E4D,
    "fusectl": 0x65735543,
    "resctrl": 0x07655821,
    "nsfs": 0x6E736673,
}
"""File systems whose files are the kernel's answers (f_type of statfs(2), linux/magic.h)."""
_KERNEL_TYPES = frozenset(_KERNELS.values())


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_in_root(root: int, path: str, flags: int) -> int:
    """Return a descriptor of `path` with `root` (a directory's descriptor) as `/`; the caller closes it.

    Symbolic links and `..` never lead out, not even while the tenant renames what they pass. Raises OSError; Invalid for what
    lies on a file system of the kernel's.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    name = os.fsencode(path) or b"."
    while True:
        fd = int(_libc.syscall(_NR_OPENAT2, root, name, ctypes.byref(how), ctypes.sizeof(how)))
        if fd >= 0:
            if not is_kernels(fd):
                return fd
            os.close(fd)
            raise Invalid(f"{path} is on a file system of the kernel's, which is not copied", mend="read or write it by exec")
        error = ctypes.get_errno()
        if error not in (errno.EINTR, errno.EAGAIN):  # EAGAIN: a rename disturbed the resolution
            raise OSError(error, os.strerror(error), path)


def is_kernels(fd: int) -> bool:
    """Whether a descriptor is of a file system like /proc and /sys. Raises OSError."""
    about = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, about) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return ctypes.c_ulong.from_buffer(about).value & 0xFFFFFFFF in _KERNEL_TYPES


def open_directory(root: int, path: str) -> int:
    """Return a descriptor of the directory `path`, made with its parents where it is not there. Raises as `open_in_root`."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    try:
        return open_in_root(root, path, flags)
    except FileNotFoundError:
        above, _, name = path.rstrip("/").rpartition("/")
        if name in ("", ".", ".."):
            raise
    parent = open_directory(root, above or "/")
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        pass  # it was made meanwhile, or is a link that leads nowhere: then opening it says so
    finally:
        os.close(parent)
    return open_in_root(root, path, flags)


_SYS_CAPGET = {"x86_64": 125, "aarch64": 90}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522


@contextlib.contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """Make files as `uid` and `gid` of the node, in this thread only, with root's capabilities kept.

    A mount with shifted ids (a volume) takes no file of an owner that it has no id for, which the node's root is.
    setfsuid(2) takes the file capabilities out of the effective set; capset(2) puts them back.
    """
    before = _libc.setfsuid(-1), _libc.setfsgid(-1)
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    try:
        _restore_effective()
        yield
    finally:
        _libc.setfsuid(before[0])
        _libc.setfsgid(before[1])


def _restore_effective() -> None:
    machine = os.uname().machine
    if machine not in _SYS_CAPGET:
        return  # without the capabilities some copies are refused; none goes wrong
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    if _libc.syscall(_SYS_CAPGET[machine], header, data) != 0:
        return
    _, permitted_low, inheritable_low, _, permitted_high, inheritable_high = struct.unpack("6I", data.raw[:24])
    data.raw = struct.pack("6I", permitted_low, permitted_low, inheritable_low, permitted_high, permitted_high, inheritable_high)
    _libc.syscall(_SYS_CAPSET[machine], header, data)


class IdMap:
    """How ids in an instance and on the node belong together, as /proc/PID/uid_map says (user_namespaces(7))."""

    def __init__(self, text: str) -> None:
        rows = [tuple(int(field) for field in line.split()) for line in text.splitlines()]
        self._inside = sorted((inside, outside, count) for inside, outside, count in rows)
        self._outside = sorted((outside, inside, count) for inside, outside, count in rows)

    @classmethod
    def of(cls, pid: int, kind: str) -> IdMap:
        """`kind` is `uid` or `gid`. Raises OSError when the process is gone."""
        return cls(Path(f"/proc/{pid}/{kind}_map").read_text(encoding="ascii"))

    def to_node(self, id: int) -> int:
        """Return the node's id; that of the instance's root for one that the instance does not have."""
        found = _translate(self._inside, id)
        if found is None:
            found = _translate(self._inside, 0)
        return 0 if found is None else found

    def to_instance(self, id: int) -> int:
        found = _translate(self._outside, id)
        return 0 if found is None else found


def _translate(rows: list[tuple[int, int, int]], id: int) -> int | None:
    index = bisect_right(rows, id, key=lambda row: row[0]) - 1
    if index < 0:
        return None
    start, other, count = rows[index]
    return other + id - start if id < start + count else None
