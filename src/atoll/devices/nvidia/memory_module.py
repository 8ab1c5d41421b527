"""The kernel's module for CUDA's memory (nvidia-uvm): after a restart of the machine nothing loads it, nor makes its device file,
until somebody asks for it, as NVIDIA's own container toolkit does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog

from atoll.devices.nvidia import tools

TOOL = "nvidia-modprobe"
FILE = "dev/nvidia-uvm"

log = structlog.get_logger()


async def load(environment: Mapping[str, str], *, root: Path, deadline_s: float) -> None:
    """Have the module loaded and its file made, where the file is missing and the driver's tool is there. Raises nothing: who needs
    the file and does not find it says so, with the mend."""
    tool = tools.find(root, TOOL)
    if tool is None or (root / FILE).exists():
        return
    try:
        status, words = await tools.run([tool, "-u", "-c=0"], environment, deadline_s)
    except OSError as error:
        status, words = -1, str(error) or "it took too long"
    if status != 0:
        log.warning("nvidia-uvm was not loaded", tool=str(tool), status=status, words=words)
