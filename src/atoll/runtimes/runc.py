"""The runc runtime: containers with Docker's isolation, user namespaces, and a parent that outlives the agent."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from pathlib import Path

from atoll.model.errors import Unsupported
from atoll.model.spec import RuntimeName
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.native import shim_path
from atoll.runtimes.oci_runtime import OciRuntime
from atoll.runtimes.seccomp import capabilities_here

VERSION_MIN = (1, 1)
_VERSION_S_MAX = 10.0
_NEEDED_CAPABILITIES = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


class RuncRuntime(OciRuntime):
    """Runs instances with runc, 1.1 or newer, as root. `cgroup` is the parent of all instances' control groups."""

    name = RuntimeName.RUNC

    def __init__(self, directory: Path, *, binary: str = "runc", cgroup: str = "/atoll", userns: bool | None = None) -> None:
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns)

    async def probe(self) -> str:
        return await asyncio.to_thread(probe_runc, self._binary)


def probe_runc(binary: str = "runc") -> str:
    """Return runc's version if this machine can run instances with it. Raises Unsupported. Blocking."""
    if os.geteuid() != 0:
        raise Unsupported("containers need root", mend="run the agent as root")
    held = capabilities_here()
    missing = [name for name, bit in _NEEDED_CAPABILITIES.items() if not held >> bit & 1]
    if missing:
        raise Unsupported(f"missing capability {', '.join(missing)}", mend="run the agent with the full capabilities of root")
    shim_path()
    for program, package in ((binary, "runc"), ("mkfs.ext4", "e2fsprogs")):
        if shutil.which(program) is None:
            raise Unsupported(f"{program} is not installed", mend=f"apt-get install {package}")
    if not Path("/dev/loop-control").exists():
        raise Unsupported("no loop devices", mend="modprobe loop")
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        raise Unsupported("no overlay file system", mend="modprobe overlay")
    Cgroups.detect()
    return _version(binary)


def _version(binary: str) -> str:
    try:
        result = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=_VERSION_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"{binary} does not run: {error}", mend="apt-get install --reinstall runc") from None
    match = re.search(r"version (\d+)\.(\d+)\S*", result.stdout)
    if match is None:
        raise Unsupported(f"{binary} does not say its version", mend="apt-get install --reinstall runc")
    if (int(match[1]), int(match[2])) < VERSION_MIN:
        raise Unsupported(f"{binary} {match[0]} is too old", mend="install runc 1.1 or newer")
    return match[0].removeprefix("version ")
