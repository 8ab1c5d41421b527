"""The driver's own programs: found where drivers put them, run without a shell, and given up when they take too long."""

from __future__ import annotations

import asyncio
import contextlib
import os
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Mapping, Sequence
from pathlib import Path

from atoll.devices.libraries import BINARY_DIRECTORIES

_SAID_MAX = 64 << 10


def find(root: Path, name: str) -> Path | None:
    return next((path for place in BINARY_DIRECTORIES if os.access(path := root / place / name, os.X_OK)), None)


async def run(command: Sequence[str | Path], environment: Mapping[str, str], deadline_s: float) -> tuple[int, str]:
    """Return a program's status, and what it said (the end of it). Raises OSError, and TimeoutError when it was given up."""
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment)
    try:
        async with asyncio.timeout(deadline_s):
            words = await _read(process)
            return await process.wait(), words
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # not waited for: it may hang in the driver


async def _read(process: asyncio.subprocess.Process) -> str:
    said = b""
    while process.stdout is not None and (more := await process.stdout.read(4096)):
        said = (said + more)[-_SAID_MAX:]
    return " ".join(said.decode(errors="replace").split())
