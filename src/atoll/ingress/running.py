"""A process that is told from any other, whether it is a child of ours or not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from msgspec import Struct


class Running(Struct, frozen=True, kw_only=True):
    """A process that cannot be mistaken for another that got its number later."""

    pid: int
    started: int
    """Clock ticks since boot, from /proc/PID/stat."""
    digest: str
    """Of what it was started with."""


def started_at(pid: int) -> int | None:
    """Return when the process was started, in clock ticks since boot; None when it has ended, reaped or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def alive(running: Running) -> bool:
    return started_at(running.pid) == running.started


async def ended(running: Running) -> None:
    """Return when the process has ended; it need not be a child. Without a deadline: the caller sets one, or lives with it."""
    try:
        descriptor = os.pidfd_open(running.pid)
    except ProcessLookupError:
        return
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        # The number may have gone to another process before it was opened, but not any more since.
        if alive(running):
            await event.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
