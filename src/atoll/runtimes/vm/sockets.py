"""Sockets that a monitor made in a directory of its own."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path


async def open_socket(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a unix socket at `path`, which may be longer than an address can be. Raises OSError.

    The directory is the monitor's: a link in the socket's place is not followed, so that nobody is led to another's socket.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConnectionRefusedError(f"{path} is no socket")
        return await asyncio.open_unix_connection(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
