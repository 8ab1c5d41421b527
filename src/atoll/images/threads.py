"""Blocking work beside the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(call: Callable[[], T], *, stop: threading.Event | None = None) -> T:
    """As `asyncio.to_thread`, but a cancelled caller sets `stop` and waits until the thread has let go of its files."""
    future = asyncio.get_running_loop().run_in_executor(None, functools.partial(contextvars.copy_context().run, call))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if stop is not None:
            stop.set()
        # no deadline: the work is bounded, and its descriptors must not be closed under it
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()
        raise
