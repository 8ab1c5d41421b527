"""The runc runtime: containers with Docker's isolation, user namespaces, and a parent that outlives the agent."""

from __future__ import annotations

import asyncio
from pathlib import Path

from atoll.model.spec import RuntimeName
from atoll.runtimes.oci_probe import check_machine, version_of
from atoll.runtimes.oci_runtime import OciRuntime

VERSION_MIN = (1, 1)


class RuncRuntime(OciRuntime):
    """Runs instances with runc, 1.1 or newer, as root. `cgroup` is the parent of all instances' control groups."""

    name = RuntimeName.RUNC
    slots = range(2048)

    def __init__(self, directory: Path, *, binary: str = "runc", cgroup: str = "/atoll", userns: bool | None = None) -> None:
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns)

    async def probe(self) -> str:
        return await asyncio.to_thread(probe_runc, self._binary)


def probe_runc(binary: str = "runc") -> str:
    """Return runc's version if this machine can run instances with it. Raises Unsupported. Blocking."""
    check_machine((binary, "runc"))
    return version_of(binary, package="runc", oldest=VERSION_MIN)
