"""One running box of an OCI runtime, as this agent knows it: its parent, its first process, its end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from atoll.model.errors import CommandNotFound, RuntimeFailed
from atoll.model.records import Exit, Usage
from atoll.runtimes.box_record import BoxRecord
from atoll.runtimes.cgroup import Group
from atoll.runtimes.shim import Ending, ShimFiles
from atoll.runtimes.signals import signal_name

if TYPE_CHECKING:
    from atoll.runtimes.usher import Attendance

LOG_BYTES_MAX = 64 << 10
UNKNOWN_CODE = 255
"""The exit status where someone killed the shim, and nobody can know it."""
_NOT_FOUND = ("executable file not found", "no such file or directory")
_OF_DIRECTORY = ("chdir", "cwd", "working directory")
"""Words of a tool that could not enter the working directory: the command itself may be there."""

log = structlog.get_logger()


class Container:
    """The files in the box's directory are the truth; this holds what is open."""

    def __init__(self, record: BoxRecord, group: Group) -> None:
        self.record = record
        self.group = group
        self.files = ShimFiles(record.directory)
        self.shim: Ending | None = None
        self.first: Ending | None = None
        self.exit: Exit | None = None
        self.attendance: Attendance | None = None
        """Who starts commands in it, from the first one on."""
        self.paused = False
        """It was made to stand still, as far as this agent knows."""
        self._cpu_us = 0
        self._cpu_at = time.monotonic()

    @property
    def started(self) -> bool:
        return self.shim is not None or self.exit is not None

    @property
    def running(self) -> bool:
        return self.shim is not None and self.exit is None and not self.shim.over()

    def watch(self, shim: Ending | None, first: int) -> None:
        """Watch the processes that `start` has just started, or an earlier agent."""
        self.shim, self.first = shim, ending_of(first)
        if self.first is not None and self.files.read_exit() is not None:
            # The shim records an end before the pid is free: without a record it was still the instance's when we opened it.
            self.first.close()
            self.first = None

    async def ended(self) -> None:
        """Return when the process has ended and its exit is recorded, however long that takes."""
        if self.shim is None:
            return
        await self.shim.event.wait()
        if self.first is not None and self.files.read_exit() is None:
            log.warning("shim.lost", instance=self.record.id)
            await self.first.event.wait()

    def read_exit(self) -> Exit:
        """Return how it ended; call it after `ended`, and before the group is removed. Blocking."""
        found = self.files.read_exit()
        if found is None:
            return Exit(code=UNKNOWN_CODE, at=time.time())
        status, at = found
        killed_for_memory = self.group.oom_kills() > 0
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return Exit(code=128 + number, at=at, signal=signal_name(number), oom=number == 9 and killed_for_memory)
        code = os.waitstatus_to_exitcode(status)
        return Exit(code=code, at=at, oom=code == 137 and killed_for_memory)

    def usage(self, disk: Path) -> Usage:
        """Blocking."""
        now, used_us = time.monotonic(), self.group.cpu_us()
        span_us = max(1.0, (now - self._cpu_at) * 1e6)
        cpu_milli = max(0, round((used_us - self._cpu_us) * 1000 / span_us))
        self._cpu_us, self._cpu_at = used_us, now
        return Usage(
            instance=self.record.id,
            cpu_milli=cpu_milli,
            memory_bytes=self.group.memory_bytes(),
            pids=self.group.pids(),
            disk_bytes=used_bytes(disk),
        )

    def close(self) -> None:
        if self.attendance is not None:
            self.attendance.close()
        for ending in (self.shim, self.first):
            if ending is not None:
                ending.close()
        self.shim = self.first = None


def used_bytes(disk: Path) -> int:
    """Return how much of a mounted disk is in use; 0 where there is none. Blocking."""
    try:
        space = os.statvfs(disk)
    except FileNotFoundError:
        return 0
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def ending_of(pid: int | None) -> Ending | None:
    """Return a watch on `pid`; None when it is gone already."""
    if pid is None:
        return None
    try:
        return Ending(pid)
    except ProcessLookupError:
        return None


def failure(log_path: Path, command: str) -> RuntimeFailed:
    """Return what the runtime's tool logged last as an error that names the command."""
    words = _last_error(log_path) or "the runtime's tool failed without a word"
    return cannot_run(command, words)


def cannot_run(command: str, words: str) -> RuntimeFailed:
    """Return why a command did not start, in a runtime's or the kernel's own `words`: CommandNotFound where they say that."""
    message, lower = f"cannot run {command!r}: {words}", words.lower()
    if any(sign in lower for sign in _NOT_FOUND):
        if any(sign in lower for sign in _OF_DIRECTORY):
            return RuntimeFailed(message, mend="is the working directory in the image?")
        return CommandNotFound(message, mend=f"is {command!r} in the image, and its interpreter too?")
    mend = "raise the memory limit" if "OOM" in words or "memory limit" in words else None
    return RuntimeFailed(message, mend=mend)


def _last_error(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES_MAX))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in {"error", "fatal"}:
            return str(entry.get("msg", ""))
    return ""
