"""What an instance with its own user namespace cannot do for itself in a network namespace that the node made.

Such a namespace belongs to the node's user namespace: from inside, sysfs cannot be mounted for it, low ports cannot be bound
and ping is refused. So the node mounts sysfs from within it, and opens ports and ping as Docker does.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

from atoll.model.errors import RuntimeFailed
from atoll.runtimes.mounts import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    attach,
    descriptor,
    new_filesystem,
)

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_ATTRIBUTES = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
_SYSCTLS = {"ip_unprivileged_port_start": "0", "ping_group_range": "0 2147483647"}


def mount_sysfs(netns: Path, point: Path) -> None:
    """Mount at `point` the sysfs that shows the devices of `netns`, and open its low ports and ping. Blocking.

    Raises RuntimeFailed, naming the namespace.
    """
    failure: list[OSError] = []

    def inside() -> None:
        try:
            with descriptor(os.open(netns, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                if _libc.setns(fd, _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(netns))
            attach(new_filesystem("sysfs", _ATTRIBUTES), point)
            for name, value in _SYSCTLS.items():
                Path("/proc/sys/net/ipv4", name).write_text(value)
        except OSError as error:
            failure.append(error)

    # A thread of its own, which ends there: it can never come back into the pool in the wrong namespace.
    thread = threading.Thread(target=inside, name="sysfs")
    thread.start()
    thread.join()
    if failure:
        raise RuntimeFailed(f"cannot prepare the network namespace {netns}: {failure[0]}")
