"""Resetting a device: the driver's own tool does it, for NVML has no call for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Mapping
from pathlib import Path

from atoll.devices.libraries import BINARY_DIRECTORIES
from atoll.model.errors import AtollError, Conflict, Unavailable, Unsupported

TOOL = "nvidia-smi"
WORDS_MAX = 400
"""Characters of the tool's own words in an error."""
_SAID_MAX = 64 << 10
_IN_USE = ("in use", "being used")
_CANNOT = ("not supported", "primary gpu")
_DONE = "successfully"


async def reset(device: str, environment: Mapping[str, str], *, root: Path, deadline_s: float) -> None:
    """Have a device reset, which nobody may have open. Safe to repeat.

    Raises Conflict (something has it open), Unsupported (no tool, or not this device), Unavailable (refused in the tool's words,
    or not done within `deadline_s`).
    """
    tool = next((path for place in BINARY_DIRECTORIES if os.access(path := root / place / TOOL, os.X_OK)), None)
    if tool is None:
        raise Unsupported(f"there is no {TOOL} on this node, which alone can reset a GPU", mend="install the driver's programs")
    try:
        process = await asyncio.create_subprocess_exec(
            tool, "--gpu-reset", "-i", device, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment
        )
    except OSError as error:
        raise Unavailable(f"{tool} could not be run: {error}") from None
    try:
        async with asyncio.timeout(deadline_s):
            words = await _read(process)
            status = await process.wait()
    except TimeoutError:
        raise Unavailable(
            f"{device} was not reset within {deadline_s:g} s", mend="see the kernel's log; restart the node if it stays so"
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # not waited for: it may hang in the driver
    if status != 0 or _DONE not in words.casefold():
        raise _refusal(device, words, status)


async def _read(process: asyncio.subprocess.Process) -> str:
    said = b""
    while process.stdout is not None and (more := await process.stdout.read(4096)):
        said = (said + more)[-_SAID_MAX:]
    return " ".join(said.decode(errors="replace").split())


def _refusal(device: str, words: str, status: int) -> AtollError:
    said = words[:WORDS_MAX] or f"{TOOL} ended with status {status} and said nothing"
    text = f"{device} was not reset: {said}"
    if any(each in words.casefold() for each in _IN_USE):
        return Conflict(text, mend="end what has it open (fuser /dev/nvidia* on the node)")
    if any(each in words.casefold() for each in _CANNOT):
        return Unsupported(text, mend="restart the node")
    return Unavailable(text, mend="see the kernel's log; restart the node if it stays so")
