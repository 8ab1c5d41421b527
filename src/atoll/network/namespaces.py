"""Network namespaces, each kept alive by a bind mount at a path, as `ip netns` does it; also seen by `ip netns list`."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from atoll.model.errors import RuntimeFailed

DIRECTORY = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        mend = "run as root with CAP_SYS_ADMIN" if number == errno.EPERM else None
        raise RuntimeFailed(f"cannot {what}: {os.strerror(number)}", mend=mend)


def create(path: Path, setup: Callable[[], T]) -> T:
    """Make a namespace, run `setup` in it, keep it at `path`, and return what `setup` returned. Blocks.

    Raises RuntimeFailed, or what `setup` raises; then nothing is left.
    """

    def make() -> T:
        _check(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
        # The mount comes last: what is listed is complete, and what fails before it goes with this thread.
        result = setup()
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
        if _libc.mount(b"/proc/thread-self/ns/net", bytes(path), b"none", _MS_BIND, None) != 0:
            number = ctypes.get_errno()
            path.unlink(missing_ok=True)
            ctypes.set_errno(number)
            _check(-1, f"mount a namespace at {path}")
        return result

    return _on_own_thread(make)


def remove(path: Path) -> None:
    """Unmount and unlink; the kernel removes the namespace when no process is in it. Safe to repeat."""
    _libc.umount2(bytes(path), _MNT_DETACH)
    path.unlink(missing_ok=True)


def is_namespace(path: Path) -> bool:
    """Return whether a namespace, and not just the file for one, is at `path`."""
    try:
        return path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except OSError:
        return False


def run_inside(path: Path, work: Callable[[], T]) -> T:
    """Return what `work` returns in the namespace at `path`; raises what it raises. Blocks."""

    def enter() -> T:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(descriptor, _CLONE_NEWNET), f"enter {path}")
        finally:
            os.close(descriptor)
        return work()

    return _on_own_thread(enter)


def _on_own_thread(work: Callable[[], T]) -> T:
    """Run `work` on a thread that ends with it, so that no other work can ever find itself in its namespace."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, where it is raised
            errors.append(error)

    thread = threading.Thread(target=run, name="atoll-netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
