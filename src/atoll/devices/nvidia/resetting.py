"""Resetting a device: the driver's own tool does it, for NVML has no call for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from atoll.devices.nvidia import tools
from atoll.model.errors import AtollError, Conflict, Unavailable, Unsupported

TOOL = "nvidia-smi"
WORDS_MAX = 400
"""Characters of the tool's own words in an error."""
_IN_USE = ("in use", "being used")
_CANNOT = ("not supported", "primary gpu")
_DONE = "successfully"


async def reset(device: str, environment: Mapping[str, str], *, root: Path, deadline_s: float) -> None:
    """Have a device reset, which nobody may have open. Safe to repeat.

    Raises Conflict (something has it open), Unsupported (no tool, or not this device), Unavailable (refused in the tool's words,
    or not done within `deadline_s`).
    """
    tool = tools.find(root, TOOL)
    if tool is None:
        raise Unsupported(f"there is no {TOOL} on this node, which alone can reset a GPU", mend="install the driver's programs")
    try:
        status, words = await tools.run([tool, "--gpu-reset", "-i", device], environment, deadline_s)
    except TimeoutError:
        raise Unavailable(
            f"{device} was not reset within {deadline_s:g} s", mend="see the kernel's log; restart the node if it stays so"
        ) from None
    except OSError as error:
        raise Unavailable(f"{tool} could not be run: {error}") from None
    if status != 0 or _DONE not in words.casefold():
        raise _refusal(device, words, status)


def _refusal(device: str, words: str, status: int) -> AtollError:
    said = words[:WORDS_MAX] or f"{TOOL} ended with status {status} and said nothing"
    text = f"{device} was not reset: {said}"
    if any(each in words.casefold() for each in _IN_USE):
        return Conflict(text, mend="end what has it open (fuser /dev/nvidia* on the node)")
    if any(each in words.casefold() for each in _CANNOT):
        return Unsupported(text, mend="restart the node")
    return Unavailable(text, mend="see the kernel's log; restart the node if it stays so")
