"""Control groups, v1, hybrid and v2: the one place that knows how they differ.

Kernel documentation: admin-guide/cgroup-v1, admin-guide/cgroup-v2.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from atoll.model.errors import RuntimeFailed, Unsupported
from atoll.model.ports.runtime import Limits

CPU_PERIOD_US = 100_000
CPU_QUOTA_US_MIN = 1_000
_WAIT_S = 0.002
FREEZE_S_MAX = 5.0
EMPTY_S_MAX = 5.0


class Cgroups:
    """The machine's hierarchies. `v1` maps a controller to its mount; `v2` is the unified mount, `pure` if it controls all."""

    def __init__(self, *, v1: dict[str, Path], v2: Path | None) -> None:
        self.v1 = v1
        self.v2 = v2
        self.pure = v2 is not None and not v1

    @classmethod
    def detect(cls, mountinfo: Path = Path("/proc/self/mountinfo")) -> Cgroups:
        """Read what is mounted. Raises Unsupported where that is too little."""
        found = cls.mounted(mountinfo)
        missing = found.missing()
        if missing:
            raise Unsupported(
                f"no cgroup controller {', '.join(missing)}",
                mend="mount cgroup2 at /sys/fs/cgroup, or add it to the kernel's command line",
            )
        return found

    @classmethod
    def mounted(cls, mountinfo: Path = Path("/proc/self/mountinfo")) -> Cgroups:
        """Read what is mounted, be it enough or not."""
        v1: dict[str, Path] = {}
        v2: Path | None = None
        for line in mountinfo.read_text(errors="surrogateescape").splitlines():
            fields, _, tail = line.partition(" - ")
            kind, _, options = tail.split(" ", 2)
            point = Path(fields.split(" ")[4])
            if kind == "cgroup2" and v2 is None:
                v2 = point
            elif kind == "cgroup":
                for option in options.split(","):
                    if option not in {"rw", "ro", "xattr", "clone_children"} and not option.startswith("release_agent="):
                        v1.setdefault(option.removeprefix("name="), point)
        return cls(v1=v1, v2=v2)

    def missing(self) -> list[str]:
        """Return the controllers that limits need and that this machine lacks."""
        if self.pure:
            assert self.v2 is not None  # noqa: S101 - `pure` says so
            there = set(_read(self.v2 / "cgroup.controllers").split())
            return [name for name in ("cpu", "memory", "pids") if name not in there]
        return [name for name in ("cpu", "cpuacct", "memory", "pids", "freezer") if name not in self.v1]

    @property
    def version(self) -> str:
        return "v2" if self.pure else "hybrid" if self.v2 else "v1"

    @property
    def counts_swap(self) -> bool:
        if self.pure:
            return True
        return (self.v1["memory"] / "memory.memsw.limit_in_bytes").exists()

    def group(self, path: str) -> Group:
        """Return the group at `path` (`/atoll/ID`); it need not exist."""
        relative = path.lstrip("/")
        v1 = {name: point / relative for name, point in self.v1.items()}
        return Group(v1, self.v2 / relative if self.v2 else None, pure=self.pure)

    def resources(self, limits: Limits) -> dict[str, Any]:
        """Return `limits` in the form of an OCI configuration's `linux.resources`."""
        memory: dict[str, Any] = {"limit": limits.memory_bytes}
        if self.counts_swap:
            memory["swap"] = limits.memory_bytes
        return {
            "devices": [{"allow": False, "access": "rwm"}],
            "memory": memory,
            "cpu": {
                "shares": min(262_144, max(2, limits.cpu_milli * 1024 // 1000)),
                "quota": cpu_quota_us(limits),
                "period": CPU_PERIOD_US,
            },
            "pids": {"limit": limits.pids},
        }


def cpu_quota_us(limits: Limits) -> int:
    """Return the processor time that an instance may use in each `CPU_PERIOD_US`."""
    return max(CPU_QUOTA_US_MIN, limits.cpu_milli * CPU_PERIOD_US // 1000)


class Group:
    """One instance's control group, in every hierarchy. Blocking; all calls bear a group that is gone."""

    def __init__(self, v1: dict[str, Path], v2: Path | None, *, pure: bool) -> None:
        self._v1 = v1
        self._v2 = v2
        self._pure = pure

    @property
    def directories(self) -> list[Path]:
        """Every directory of the group, whether it exists or not."""
        return list(dict.fromkeys([*self._v1.values(), *([self._v2] if self._v2 else [])]))

    def cpu_us(self) -> int:
        """Return the processor time used so far, in µs."""
        if self._pure:
            return self._flat("cpu.stat").get("usage_usec", 0)
        return _number(self._v1["cpuacct"] / "cpuacct.usage") // 1000

    def memory_bytes(self) -> int:
        """Return the memory in use without what the kernel would give back at once (inactive page cache)."""
        if self._pure:
            used, cache = _number(self._file("memory.current")), self._flat("memory.stat").get("inactive_file", 0)
        else:
            memory = self._v1["memory"]
            used = _number(memory / "memory.usage_in_bytes")
            cache = _flat(memory / "memory.stat").get("total_inactive_file", 0)
        return max(0, used - cache)

    def pids(self) -> int:
        return _number(self._file("pids.current"))

    def settle(self, limits: Limits) -> None:
        """Put the limits in force that were loosened for the start. Safe to repeat."""
        quota_us = cpu_quota_us(limits)
        with contextlib.suppress(FileNotFoundError):  # a process that ended at once may have left nothing
            self._file("pids.max").write_text(str(limits.pids))
            if self._pure:
                self._file("cpu.max").write_text(f"{quota_us} {CPU_PERIOD_US}")
            else:
                (self._v1["cpu"] / "cpu.cfs_quota_us").write_text(str(quota_us))

    def make(self, limits: Limits) -> None:
        """Make the group with `limits` in force, for what no OCI tool starts. Safe to repeat. Raises OSError."""
        quota = f"{cpu_quota_us(limits)}"
        if self._pure:
            assert self._v2 is not None  # noqa: S101 - `pure` says so
            self._v2.mkdir(parents=True, exist_ok=True)
            for path in _from_root(self._v2.parent):
                (path / "cgroup.subtree_control").write_text("+cpu +memory +pids")
            settings: dict[str, int | str] = {"memory.max": limits.memory_bytes, "memory.swap.max": 0, "pids.max": limits.pids}
            settings |= {"cpu.max": f"{quota} {CPU_PERIOD_US}", "cpu.weight": min(10_000, max(1, limits.cpu_milli // 10))}
        else:
            for name in ("cpu", "cpuacct", "memory", "pids", "freezer"):
                self._v1[name].mkdir(parents=True, exist_ok=True)
            settings = {"memory.limit_in_bytes": limits.memory_bytes, "memory.memsw.limit_in_bytes": limits.memory_bytes}
            settings |= {"pids.max": limits.pids, "cpu.shares": min(262_144, max(2, limits.cpu_milli * 1024 // 1000))}
            settings |= {"cpu.cfs_period_us": CPU_PERIOD_US, "cpu.cfs_quota_us": quota}
        for name, value in settings.items():
            if (path := self._file(name)).exists():  # not every kernel counts swap
                path.write_text(str(value))

    def oom_kills(self) -> int:
        """Return how many of its processes the kernel killed because of its memory limit."""
        if self._pure:
            return self._flat("memory.events").get("oom_kill", 0)
        return _flat(self._v1["memory"] / "memory.oom_control").get("oom_kill", 0)

    def processes(self) -> set[int]:
        found: set[int] = set()
        for directory in self.directories:
            found.update(int(line) for line in _read(directory / "cgroup.procs").split())
        return found

    def freeze(self) -> None:
        """Stop every process; returns when all stand. Raises RuntimeFailed after FREEZE_S_MAX; the group then runs on."""
        if self._pure:
            self._set(self._file("cgroup.freeze"), "1")
            done = self._wait(lambda: self._flat("cgroup.events").get("frozen") == 1)
        else:
            state = self._v1["freezer"] / "freezer.state"
            self._set(state, "FROZEN")
            done = self._wait(lambda: _read(state).strip() == "FROZEN")
        if not done:
            self.thaw()
            raise RuntimeFailed(f"the instance did not pause within {FREEZE_S_MAX:.0f} s")

    def thaw(self) -> None:
        if self._pure:
            self._set(self._file("cgroup.freeze"), "0")
        else:
            self._set(self._v1["freezer"] / "freezer.state", "THAWED")

    def kill(self) -> None:
        """End every process; returns when none is left or after EMPTY_S_MAX, when RuntimeFailed is raised."""
        deadline = time.monotonic() + EMPTY_S_MAX
        while left := self.processes():
            if self._pure and self._v2 and (self._v2 / "cgroup.kill").exists():
                self._set(self._v2 / "cgroup.kill", "1")
            else:
                self.thaw()  # v1: a frozen process takes no signal, not even this one
                self._kill_each(left)
            if time.monotonic() > deadline:
                raise RuntimeFailed(f"{len(left)} processes of the instance do not end", mend="they may wait for a disk that hangs")
            time.sleep(_WAIT_S)

    def _kill_each(self, pids: set[int]) -> None:
        """Kill by descriptor, and only what is still in the group: a pid may have gone to a stranger since it was read."""
        with ExitStack() as stack:
            held = {}
            for pid in pids:
                with suppress(ProcessLookupError):
                    held[pid] = os.pidfd_open(pid)
                    stack.callback(os.close, held[pid])
            for pid in held.keys() & self.processes():
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(held[pid], signal.SIGKILL)

    def remove(self) -> None:
        """Remove the group from every hierarchy, once `kill` has emptied it. Safe to repeat. Raises RuntimeFailed."""
        deadline = time.monotonic() + EMPTY_S_MAX
        for directory in self.directories:
            while True:
                try:
                    _remove_tree(directory)
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise RuntimeFailed(f"cannot remove the control group: {error}") from None
                    # A tool that was killed in the middle of a start may have moved its child in here after `kill` looked.
                    self._kill_each(self.processes())
                    time.sleep(_WAIT_S)

    def _file(self, name: str) -> Path:
        if self._pure:
            assert self._v2 is not None  # noqa: S101 - `pure` says so
            return self._v2 / name
        return self._v1[name.partition(".")[0]] / name

    def _flat(self, name: str) -> dict[str, int]:
        return _flat(self._file(name)) if not self._pure or self._v2 is None else _flat(self._v2 / name)

    @staticmethod
    def _set(path: Path, value: str) -> None:
        try:
            path.write_text(value)
        except FileNotFoundError:
            return

    @staticmethod
    def _wait(reached: Any) -> bool:
        deadline = time.monotonic() + FREEZE_S_MAX
        while not reached():
            if time.monotonic() > deadline:
                return False
            time.sleep(_WAIT_S)
        return True


def _from_root(directory: Path) -> list[Path]:
    """Return the groups from the hierarchy's root down to `directory`."""
    found = [directory]
    while (found[0].parent / "cgroup.procs").exists():
        found.insert(0, found[0].parent)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENODEV}:
            return ""
        raise


def _number(path: Path) -> int:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else 0


def _flat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _remove_tree(directory: Path) -> None:
    if not directory.is_dir():
        return
    for child in directory.iterdir():
        if child.is_dir():
            _remove_tree(child)
    directory.rmdir()
