"""Gives a benchmark's own processes precedence, so that figures of a busy machine are about Atoll and not about its neighbours.

By `nice`, and where the kernel groups by sessions (`sched_autogroup_enabled`, see sched(7)) by each session's. It needs root, and
helps against processors that are busy, not against a disk.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NICE = -19
_OWN = Path("/proc/self/autogroup")
_sessions: list[str] = []
"""What this one's had before."""


def take(marks: Sequence[str]) -> None:
    """Raise this process, and all whose command line or control group has one of `marks` in it; its own session until it ends."""
    if not _sessions:
        _sessions.append(_OWN.read_text().rpartition(" ")[2].strip() if _OWN.exists() else "0")
        atexit.register(_give_back)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (int(entry.name) == os.getpid() or _has(entry, marks)):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(entry.name), NICE)
                (entry / "autogroup").write_text(str(NICE))


def told() -> str:
    """Return what a report says of the precedence that this process has, for its notes."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice > NICE:
        return f"no precedence: it was asked for and not granted (nice {nice}); it needs root"
    session = ", by session, too" if _OWN.exists() and _OWN.read_text().split()[-1] == str(NICE) else ""
    return f"at a precedence before all else that ran (nice {nice}{session})"


def _give_back() -> None:
    """A shell that this was started from shares its session."""
    with suppress(OSError):
        _OWN.write_text(_sessions[0])


def _has(entry: Path, marks: Sequence[str]) -> bool:
    with suppress(OSError):
        text = (entry / "cmdline").read_bytes() + (entry / "cgroup").read_bytes()
        return any(mark.encode() in text for mark in marks)
    return False
