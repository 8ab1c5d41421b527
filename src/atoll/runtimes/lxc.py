"""The LXC runtime: the same containers as runc's, made by LXC, which needs no daemon and no image format of its own.

LXC makes the surroundings: namespaces, ids, root and mounts, control groups and devices, capabilities. Its monitor, which would
stay as the parent of every instance, with some 5 MiB each, is ended when all is made: the shim is the parent here as everywhere,
so that any later agent hears of an end, and with which status. Commands beside an instance are started by the shim too
(`native/inside.c`), because lxc-attach asks the monitor.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from atoll.model.errors import AtollError, RuntimeFailed, Unsupported
from atoll.model.spec import RuntimeName
from atoll.runtimes.entering import Entering
from atoll.runtimes.exec_tool import ExecTool
from atoll.runtimes.lxc_boxes import CONFIG, PROCESS, LxcBoxes
from atoll.runtimes.native import shim_path
from atoll.runtimes.oci import CAPABILITIES
from atoll.runtimes.oci_box import OciBoxes
from atoll.runtimes.oci_container import LOG_BYTES_MAX, Container
from atoll.runtimes.oci_probe import check_machine, once_per_boot, version_of
from atoll.runtimes.oci_runtime import TOOL_LOG, OciRuntime
from atoll.runtimes.seccomp_program import filter_program
from atoll.runtimes.trial import run_once

VERSION_MIN = (4, 0)
PROBE_S_MAX = 20.0
_LXC_LOG = "lxc.log"
_INSIDE = "/proc/self/fd/4"
"""The shim, as LXC hands it on to the instance's first process."""
_ERROR = re.compile(r"^\S+ \S+ \S+ ERROR\s+\S+ - \S+?:\w+:\d+ - (.*)$", re.MULTILINE)
_TOO_LITTLE = ("Sync wake failure", "Cannot allocate memory")
"""What LXC says when its child was killed or refused memory."""
_TIGHT_BYTES = 4 << 20
"""With less, memory is the likely cause of whatever LXC says."""


class LxcRuntime(OciRuntime):
    """Runs instances with LXC, 4.0 or newer, as root."""

    name = RuntimeName.LXC
    slots = range(3072, 3584)
    boxes_kind: type[OciBoxes] = LxcBoxes
    places_mounts = False

    def __init__(self, directory: Path, *, binary: str = "lxc-start", cgroup: str = "/atoll", userns: bool | None = None) -> None:
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns)

    async def probe(self) -> str:
        await asyncio.to_thread(check_machine, (self._binary, "lxc"))
        await asyncio.to_thread(filter_program, frozenset(CAPABILITIES))
        return await asyncio.to_thread(once_per_boot, self._directory, self._binary, self._try)

    def _try(self) -> str:
        version = version_of(self._binary, package="lxc", oldest=VERSION_MIN)
        with tempfile.TemporaryDirectory(prefix="atoll-probe-") as directory:
            place = Path(directory)
            tried = type(self)(place / "runtime", binary=self._binary, cgroup=self._cgroup, userns=self._userns)
            why = asyncio.run(run_once(tried, place, PROBE_S_MAX))
        if why:
            raise Unsupported(f"LXC runs nothing on this machine: {why}", mend="use runc, or a newer LXC")
        return version

    def run_command(self, boxes: OciBoxes, container: Container, extra: Sequence[str]) -> list[str]:
        files, id = container.files, container.record.id
        directory = files.directory
        (directory / _LXC_LOG).unlink(missing_ok=True)
        shim = [str(shim_path()), "lxc", str(files.pid), str(directory / PROCESS), str(directory / TOOL_LOG), "--"]
        return [*shim, *self.lxc_start(boxes, directory, id), _INSIDE, "inside"]

    def lxc_start(self, boxes: OciBoxes, directory: Path, id: str, *, daemon: bool = False) -> list[str]:
        """Return LXC's own command for the box in `directory`, up to the program that it is to run.

        As a `daemon` it ends once that program runs, and leaves a monitor behind.
        """
        log = ["--quiet", "--logfile", str(directory / _LXC_LOG), "--logpriority", "ERROR"]
        name = ["--name", id, "--lxcpath", str(boxes.root(id).parent.parent), "--rcfile", str(directory / CONFIG)]
        return [self._binary_path(), "--daemon" if daemon else "--foreground", *name, *log, "--"]

    def _binary_path(self) -> str:
        self._path = self._path or shutil.which(self._binary)
        if self._path is None:
            raise Unsupported(f"{self._binary} is not installed", mend="apt-get install lxc")
        return self._path

    def _settle(self, container: Container) -> None:
        super()._settle(container)
        if isinstance(self._made, LxcBoxes):
            with contextlib.suppress(AtollError):  # `delete` tries again
                self._made.remove_monitor(container.record.id)

    def exec_tool(self, boxes: OciBoxes, container: Container) -> ExecTool:
        return Entering(container)

    def failure(self, container: Container, command: str) -> RuntimeFailed:
        told = super().failure(container, command)
        words = _lxc_words(container.files.directory / _LXC_LOG)
        # Where LXC has noticed, it has taken the control group away, and with it the kernel's word on why its child was killed.
        limit = container.record.limits.memory_bytes
        tight = limit < _TIGHT_BYTES or any(sign in words for sign in _TOO_LITTLE) or container.group.oom_kills() > 0
        mend = f"raise the memory limit ({limit >> 10} KiB), if that is why" if tight else told.mend
        return RuntimeFailed(f"cannot run {command!r}: LXC says: {words}" if words else str(told), mend=mend)


def _lxc_words(path: Path) -> str:
    """Return the first error that LXC logged, which is nearest to the cause."""
    try:
        with path.open(errors="replace") as file:
            found = _ERROR.search(file.read(LOG_BYTES_MAX))
    except FileNotFoundError:
        return ""
    return found[1].strip() if found else ""
