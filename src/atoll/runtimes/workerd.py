"""The workerd runtime: JavaScript and WebAssembly modules in V8, one process for each instance, each in a jail of its own.

A V8 isolate alone is no boundary between tenants, and workerd bounds neither memory nor time. So each instance is a process in
what runc makes of a container, and less: no capability, no program beside it, nothing to write but its state.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from atoll.model.errors import ImageError, Invalid, Unavailable, Unsupported
from atoll.model.ports.runtime import Box, Execution, Feature, Found, Mount
from atoll.model.spec import RuntimeName
from atoll.model.worker import MODULES
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.oci import Bundle
from atoll.runtimes.oci_box import OciBoxes, open_root, write_private
from atoll.runtimes.oci_probe import once_per_boot
from atoll.runtimes.oci_runtime import OciRuntime
from atoll.runtimes.runc import probe_runc
from atoll.runtimes.seccomp import profile
from atoll.runtimes.workerd_config import (
    CONFIG,
    MODULES_MAX,
    SERVICES,
    Module,
    configuration,
    experimental,
    variables,
)
from atoll.runtimes.workerd_root import PROGRAM, USER, find_workerd, forget_layers, make_layer

FILES_MAX = 20 * MODULES_MAX
"""Files below `MODULES` that are looked at."""
VERSION_MIN = "2026-11-01"
"""Its KV is workerd's own, which earlier ones do not have."""
VERSION_S_MAX = 10.0
_KEPT_MOUNTS = ("/proc", "/dev", "/etc/", f"/{CONFIG}", SERVICES, "/state")
_MEND = "run `make setup`, which installs it where npm is, or put another into PATH"


class WorkerdBoxes(OciBoxes):
    """All workers of this node: an OCI bundle each, with workerd's configuration in it."""

    def _write(self, box: Box, bundle: Bundle, config: dict[str, Any]) -> None:
        if box.worker is None:
            raise AssertionError("`create` refuses a box that is no worker")
        modules = list_modules(bundle.root)
        text = configuration(box.worker, modules, memory_bytes=box.limits.memory_bytes)
        file = self._shown(box) / CONFIG
        write_private(file, text.encode(errors="surrogateescape"), 0o644)
        mount = {"destination": f"/{CONFIG}", "type": "bind", "source": str(file)}
        config["mounts"] = [entry for entry in config["mounts"] if _kept(entry["destination"])]
        config["mounts"].append({**mount, "options": ["bind", "nosuid", "noexec", "nodev", "ro"]})
        config["process"]["capabilities"] = {}
        config["linux"]["seccomp"] = profile(frozenset())
        super()._write(box, bundle, config)


class WorkerdRuntime(OciRuntime):
    """Runs workers with workerd inside what runc makes, as root.

    `services` is the directory of the ingress's socket for service bindings; without it there are none.
    """

    name = RuntimeName.WORKERD
    features = frozenset({Feature.PAUSE, Feature.FILES})
    slots = range(3584, 4096)
    boxes_kind = WorkerdBoxes

    def __init__(
        self,
        directory: Path,
        *,
        binary: str = "runc",
        workerd: str = "workerd",
        cgroup: str = "/atoll",
        userns: bool | None = None,
        services: Path | None = None,
    ) -> None:
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns)
        self._workerd = workerd
        self._services = services
        self._layer: Path | None = None
        self._layering = asyncio.Lock()

    async def probe(self) -> str:
        return await asyncio.to_thread(self._probe)

    def _probe(self) -> str:
        probe_runc(self._binary)
        program = find_workerd(self._workerd)
        return once_per_boot(self._directory, str(program), lambda: version_of(program))

    async def create(self, box: Box) -> None:
        if box.worker is None:
            raise Invalid(
                "worker: missing; workerd runs JavaScript modules, not an image's program",
                field="worker",
                mend="add a [worker] table, or use another isolation",
            )
        mounts = box.mounts
        if box.worker.worker.services:
            if self._services is None or not self._services.is_dir():
                raise Unavailable(
                    "worker.services: this node has no ingress, which bindings to other apps go through",
                    mend="run `atoll ingress` beside the agent, with the same --data",
                )
            mounts = (*mounts, Mount(self._services, SERVICES, read_only=True))
        layer = await self._base()
        options = ["--experimental"] if experimental(box.worker) else []
        await super().create(
            structs.replace(
                box,
                image=structs.replace(box.image, layers=(*box.image.layers, layer)),
                argv=(PROGRAM, "serve", *options, f"/{CONFIG}"),
                env=variables(box.worker, box.env),
                workdir="/",
                user=f"{USER}:{USER}",
                mounts=mounts,
                read_only_root=True,
            )
        )

    async def exec(self, id: str, argv: Sequence[str], **options: Any) -> Execution:
        """Raises Unsupported: there is no program beside workerd, and none can be started."""
        from atoll.runtimes.offer import require  # it lists this class

        await self._find(id)
        require(self.name, Feature.EXEC)
        raise AssertionError("workerd has no exec")

    async def recover(self) -> Sequence[Found]:
        found = await super().recover()
        if not found:  # nothing stands on the layer of an earlier version
            async with self._layering:
                if self._layer is None:
                    await self._in_thread(forget_layers, self._directory / "layers")
        return found

    async def _base(self) -> Path:
        async with self._layering:
            if self._layer is None:
                self._layer = await self._in_thread(lambda: make_layer(find_workerd(self._workerd), self._directory / "layers"))
            return self._layer


def version_of(program: Path) -> str:
    """Return workerd's version, which is a day. Raises Unsupported for one that does not run here, or is too old. Blocking."""
    try:
        done = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=VERSION_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"{program.name} does not run: {error}", mend=_MEND) from None
    found = re.search(r"workerd (\d{4}-\d{2}-\d{2})", done.stdout)
    if found is None:
        raise Unsupported(f"{program} does not run, or is no workerd: {done.stderr.strip()[:200]}", mend=_MEND)
    if found[1] < VERSION_MIN:
        raise Unsupported(f"workerd of {found[1]} is too old", mend=f"install that of {VERSION_MIN} or newer")
    return found[1]


def list_modules(root: Path) -> list[Module]:
    """Return the files below `MODULES` of an instance's root, of every kind. Links are no modules, and none is followed. Blocking.

    Raises ImageError for an image with too many files.
    """
    found: list[Module] = []
    with descriptor(open_root(root)) as fd:
        # It is there, and a directory: the layer of workerd has it too, above whatever the image has under that name.
        top = os.open(MODULES[1:], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        with descriptor(top):
            for where, _, names, place in os.fwalk(".", dir_fd=top, follow_symlinks=False):
                for name in names:
                    status = os.stat(name, dir_fd=place, follow_symlinks=False)
                    path = os.path.normpath(f"{where}/{name}")
                    if stat.S_ISREG(status.st_mode) and path.isprintable():
                        found.append(Module(path, status.st_size))
                    if len(found) > FILES_MAX:
                        raise ImageError(f"the worker has more than {FILES_MAX} files", mend="leave out what it does not import")
    return found


def _kept(destination: str) -> bool:
    """Whether workerd needs the mount; /sys, message queues, terminals and shared memory it does not."""
    return any(destination == path.rstrip("/") or (path.endswith("/") and destination.startswith(path)) for path in _KEPT_MOUNTS)
