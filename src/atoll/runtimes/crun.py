"""The crun runtime: the same containers as runc's, started by a smaller program."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

from atoll.model.errors import Unsupported
from atoll.model.spec import RuntimeName
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.native import shim_path
from atoll.runtimes.oci_box import OciBoxes
from atoll.runtimes.oci_probe import check_machine, once_per_boot, run_once, version_of
from atoll.runtimes.oci_runtime import OciRuntime

VERSION_MIN = (1, 8)


class CrunRuntime(OciRuntime):
    """Runs instances with crun, 1.8 or newer, as root."""

    name = RuntimeName.CRUN
    slots = range(2048, 2560)

    def __init__(self, directory: Path, *, binary: str = "crun", cgroup: str = "/atoll", userns: bool | None = None) -> None:
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns)

    @functools.cached_property
    def _prefix(self) -> list[str]:
        return hide_unified(Cgroups.mounted())

    async def probe(self) -> str:
        return await asyncio.to_thread(self._probe)

    def _probe(self) -> str:
        check_machine((self._binary, "crun"))
        return once_per_boot(self._directory, self._binary, self._try)

    def _try(self) -> str:
        version = version_of(self._binary, package="crun", oldest=VERSION_MIN)
        why = run_once(lambda state, log: [*self._prefix, *self.command(state, log)], self._cgroup)
        if why:
            raise Unsupported(f"crun runs nothing on this machine: {why}", mend="use runc, or a newer crun")
        return version

    def tool(self, boxes: OciBoxes, log_path: Path) -> list[str]:
        return [*self._prefix, *super().tool(boxes, log_path)]


def hide_unified(cgroups: Cgroups) -> list[str]:
    """Return what goes before crun's command so that it finds the control groups that it can use.

    With version 1 and a version 2 beside it, crun refuses limits as soon as one controller sits on version 2, needed or not.
    It is then shown version 1 alone, which has every controller that our limits use.
    """
    if cgroups.pure or cgroups.v2 is None:
        return []
    return [str(shim_path()), "private", f"-{cgroups.v2}", "--"]
