"""Gives a benchmark's own processes precedence, so that figures of a busy machine are about Atoll and not about its neighbours.

By `nice`, and where the kernel groups by sessions (`sched_autogroup_enabled`, see sched(7)) by each session's. It needs root, and
helps against processors that are busy, not against a disk.
"""

from __future__ import annotations

import argparse
import atexit
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NICE = -19
_OWN = Path("/proc/self/autogroup")
_sessions: list[str] = []
"""What this one's had before."""
_refused: set[str] = set()
"""Processes that were not raised, by their number."""


def offer(parser: argparse.ArgumentParser) -> None:
    """Add the option `--precedence`."""
    parser.add_argument("--precedence", action="store_true", help="all its processes before what else runs here; needs root")


def take(marks: Sequence[str] = ()) -> None:
    """Raise this process, and all whose command line or control group has one of `marks` in it; its own session until it ends.

    What it starts from now on inherits it, where that stays in its session. What is refused is in `told`.
    """
    if not _sessions:
        _sessions.append(_OWN.read_text().rpartition(" ")[2].strip() if _OWN.exists() else "0")
        atexit.register(_give_back)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (int(entry.name) == os.getpid() or _has(entry, marks)):
            try:
                for thread in (entry / "task").iterdir():  # each has its own
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), NICE)
                with suppress(OSError):
                    (entry / "autogroup").write_text(str(NICE))
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended
            except PermissionError:
                _refused.add(entry.name)


def told() -> str:
    """Return what a report says, at the end of a run, of the precedence that its processes had."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice > NICE:
        return f"no precedence: it was asked for and not granted (nice {nice}); it needs root"
    session = ", by session, too" if _OWN.exists() and _OWN.read_text().split()[-1] == str(NICE) else ""
    others = f"; not so {len(_refused)} of its processes, to which it was not granted" if _refused else ""
    return f"at a precedence before all else that ran (nice {nice}{session}{others})"


def _give_back() -> None:
    """A shell that this was started from shares its session."""
    with suppress(OSError):
        _OWN.write_text(_sessions[0])


def _has(entry: Path, marks: Sequence[str]) -> bool:
    with suppress(OSError):
        text = (entry / "cmdline").read_bytes() + (entry / "cgroup").read_bytes()
        return any(mark.encode() in text for mark in marks)
    return False
