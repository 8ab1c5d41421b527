"""What the machine has, and what is in use on it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from atoll.model.records import Capacity
from atoll.network.listening import taken_ports

CPU_RESERVE_MILLI = 100
"""Kept for the system and Atoll itself, in thousandths of a core."""
MEMORY_RESERVE = 0.05
MEMORY_RESERVE_BYTES_MIN = 256 << 20
DISK_RESERVE = 0.10
UNLIMITED = 1 << 62


class LinuxMachine:
    """Implements `tools.Machine` from /proc, for the machine or the cgroup namespace that the agent sees."""

    def __init__(self, data: Path, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> None:
        self._data = data
        self._proc = proc
        self._cgroup = cgroup
        self._busy: tuple[float, float] | None = None

    def capacity(self) -> Capacity:
        cpu_milli = min(len(os.sched_getaffinity(0)) * 1000, self._cpu_limit_milli())
        total = min(self._memory()["MemTotal"], self._memory_limit_bytes())
        reserve = max(MEMORY_RESERVE_BYTES_MIN, int(total * MEMORY_RESERVE))
        return Capacity(
            cpu_milli=max(0, cpu_milli - CPU_RESERVE_MILLI),
            memory_bytes=max(0, total - reserve),
            disk_bytes=int(self._disk().total * (1 - DISK_RESERVE)),
        )

    def sample(self) -> tuple[int, int]:
        memory = self._memory()
        used = memory["MemTotal"] - memory["MemAvailable"]
        now, busy = time.monotonic(), self._busy_s()
        before, self._busy = self._busy, (now, busy)
        if before is None or now <= before[0]:
            return 0, used
        return max(0, round((busy - before[1]) / (now - before[0]) * 1000)), used

    def disk_used(self) -> float:
        disk = self._disk()
        # As df(1) does: what the file system sets aside for its own use is neither used nor free.
        return disk.used / (disk.used + disk.free) if disk.used else 0.0

    def ports_taken(self) -> tuple[str, ...]:
        return taken_ports()

    def groups(self, pid: int) -> Sequence[str]:
        try:
            lines = (self._proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return ()
        # Each line is `number:controllers:/path` (cgroups(7)); of v1 there is one per hierarchy.
        paths = [line.split(":", 2)[-1] for line in lines]
        return tuple(dict.fromkeys(name for path in paths for name in path.split("/") if name))

    def _memory_limit_bytes(self) -> int:
        """The limit of the control group that is the root of what the agent sees (v2, v1), as in a container or a slice."""
        for name in ("memory.max", "memory/memory.limit_in_bytes"):
            limit = _words(self._cgroup / name)[:1]
            if limit and limit[0].isdecimal():
                return int(limit[0])
        return UNLIMITED

    def _cpu_limit_milli(self) -> int:
        quota = _words(self._cgroup / "cpu.max") or [
            *_words(self._cgroup / "cpu/cpu.cfs_quota_us"),
            *_words(self._cgroup / "cpu/cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0].isdecimal() and int(quota[1]) > 0:
            return int(quota[0]) * 1000 // int(quota[1])
        return UNLIMITED

    def _disk(self) -> shutil._ntuple_diskusage:
        place = self._data
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place)

    def _busy_s(self) -> float:
        """Seconds of processor time since boot that were not idle or waiting for a disk (proc(5))."""
        with open(self._proc / "stat", "rb") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    def _memory(self) -> dict[str, int]:
        """Bytes by name."""
        memory: dict[str, int] = {}
        with open(self._proc / "meminfo", encoding="ascii") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in ("MemTotal", "MemAvailable"):
                    memory[name] = int(rest.split()[0]) << 10
        return memory


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def architecture() -> str:
    """Return the machine's architecture in the words of OCI images."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}.get(machine, machine)
