"""Waiting for a descriptor on the event loop."""

from __future__ import annotations

import asyncio


async def ready(fd: int, *, writing: bool = False) -> None:
    """Return when `fd` can be read (or written) without blocking. One waiter per descriptor and direction."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    add(fd, event.set)
    try:
        await event.wait()  # the caller sets the deadline
    finally:
        remove(fd)
