"""Which array library computes: cupy where there is a GPU that it can use, else numpy. Both have the same functions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Device:
    xp: Any
    """The library: `numpy` or `cupy`."""
    gpu: str
    """The GPU's name; empty for none."""

    def to_host(self, array: Any) -> np.ndarray:
        """Return the array as numpy's, waiting for what computes it."""
        return np.asarray(array.get() if self.gpu else array)

    def memory_used_bytes(self) -> int:
        """Return what the GPU's memory holds, of all processes that share it; 0 without one."""
        if not self.gpu:
            return 0
        free, total = self.xp.cuda.runtime.memGetInfo()
        return int(total - free)


CPU = Device(np, "")


def find_device(wanted: str | None = None) -> Device:
    """Return the device for `wanted` (`cpu`, `gpu`, or `auto`; by default what DEVICE says): `auto` takes a GPU if there is one.

    Raises RuntimeError for `gpu` where there is none.
    """
    wanted = wanted or os.environ.get("DEVICE", "auto")
    if wanted not in ("cpu", "gpu", "auto"):
        raise RuntimeError(f"DEVICE is cpu, gpu or auto, not {wanted!r}")
    why = "it was not asked for"
    if wanted != "cpu":
        try:
            import cupy
        except (ImportError, OSError) as error:
            why = f"cupy cannot be imported: {error}"
        else:
            try:
                properties = cupy.cuda.runtime.getDeviceProperties(0)
                return Device(cupy, properties["name"].decode())
            except Exception as error:  # noqa: BLE001 - of many kinds, depending on what of a driver is there
                why = f"cupy finds none: {error}"
    if wanted == "gpu":
        raise RuntimeError(f"no GPU: {why}")
    return CPU
