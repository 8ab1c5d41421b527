"""Moves of a process into a control group, told of early: the first one waits for a quiet point of every processor, some 10 ms.

The kernel (`cgroup_threadgroup_rwsem`) then goes without that wait for moves that follow at once. So one that moves nothing is made
while a tool that is going to move its command still reads its files.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from atoll.runtimes.cgroup import Cgroups

_OURSELVES = b"0"


def foretell(cgroups: Cgroups, own: Path = Path("/proc/self/cgroup")) -> None:
    """Move this process to where it is, in one hierarchy. Blocking, for some 10 ms. Never raises OSError: it only saves time."""
    with suppress(OSError):
        procs = own_procs(cgroups, own.read_text())
        if procs is None or str(os.getpid()) not in procs.read_text().split():
            return  # it would be moved
        fd = os.open(procs, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, _OURSELVES)
        finally:
            os.close(fd)


def own_procs(cgroups: Cgroups, groups: str) -> Path | None:
    """Return the file of the processes in this one's group, by the lines of /proc/self/cgroup; None where it cannot be told."""
    for line in groups.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        mount = cgroups.v1.get(names.split(",")[0]) if names else cgroups.v2 if cgroups.pure else None
        if mount is not None and ".." not in Path(path).parts:
            return mount / path.lstrip("/") / "cgroup.procs"
    return None
