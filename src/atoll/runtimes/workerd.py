"""The workerd runtime: JavaScript and WebAssembly modules in V8, one process for each instance, each in a jail of its own.

A V8 isolate alone is no boundary between tenants, and workerd bounds neither memory nor time. So each instance is a process in
what runc makes of a container, and less: no capability, no program beside it, nothing to write but its state. Those of one project
that ask for it share a process: `workerd_shared.py`.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from atoll.model.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported
from atoll.model.ports.runtime import Box, Execution, Feature, Found, Mount, Started
from atoll.model.records import Exit, Usage
from atoll.model.spec import RuntimeName
from atoll.runtimes.oci import Bundle
from atoll.runtimes.oci_box import OciBoxes, write_private
from atoll.runtimes.oci_container import Container
from atoll.runtimes.oci_probe import once_per_boot
from atoll.runtimes.oci_runtime import OciRuntime
from atoll.runtimes.runc import probe_runc
from atoll.runtimes.seccomp import profile
from atoll.runtimes.workerd_config import (
    CONFIG,
    SERVICES,
    WORKERS,
    configuration,
    experimental,
    variables,
)
from atoll.runtimes.workerd_modules import list_modules, read_rules
from atoll.runtimes.workerd_root import PROGRAM, USER, find_workerd, forget_layers, make_layer
from atoll.runtimes.workerd_shared import SharedWorkers
from atoll.runtimes.workerd_sharing import APART_S

VERSION_MIN = "2026-11-01"
"""Its KV is workerd's own, which earlier ones do not have."""
VERSION_S_MAX = 10.0
_KEPT_MOUNTS = ("/proc", "/dev", "/etc/", f"/{CONFIG}", SERVICES, f"{WORKERS}/", "/state")
_MEND = "run `make setup`, which installs it where npm is, or put another into PATH"


class WorkerdBoxes(OciBoxes):
    """All processes of workerd on this node: an OCI bundle each, with workerd's configuration in it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.configurations: dict[str, str] = {}
        """Of those that several workers share."""

    def _write(self, box: Box, bundle: Bundle, config: dict[str, Any]) -> None:
        if box.worker is not None:
            modules, rules = list_modules(bundle.root), read_rules(bundle.root, box.worker.worker)
            text = configuration(box.worker, modules, memory_bytes=box.limits.memory_bytes, files=rules)
        else:
            text = self.configurations[box.id]
        file = self._shown(box) / CONFIG
        write_private(file, text.encode(errors="surrogateescape"), 0o644)
        mount = {"destination": f"/{CONFIG}", "type": "bind", "source": str(file)}
        config["mounts"] = [entry for entry in config["mounts"] if _kept(entry["destination"])]
        config["mounts"].append({**mount, "options": ["bind", "nosuid", "noexec", "nodev", "ro"]})
        config["process"]["capabilities"] = {}
        config["linux"]["seccomp"] = profile(frozenset())
        if box.worker is not None:
            super()._write(box, bundle, config)
        else:
            # What puts on its filter itself closes all that it was given.
            write_private(box.directory / "config.json", msgspec.json.encode(config))


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
        apart_s: float = APART_S,
    ) -> None:
        """`apart_s`: how long a worker runs apart from the others of its project after a process of theirs has failed."""
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns)
        self._workerd = workerd
        self._shared = SharedWorkers(self, directory / "shared", services, apart_s=apart_s)
        self._handed: dict[str, Sequence[int]] = {}
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
        if box.worker.worker.shared:
            if box.id in self._containers:
                raise Conflict(f"instance {box.id} exists already", mend="delete it first")
            await self._shared.create(box)
            return
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

        if id not in self._shared:
            await self._find(id)
        require(self.name, Feature.EXEC)
        raise AssertionError("workerd has no exec")

    async def begin_process(self, box: Box, configuration: str, handed: Sequence[int]) -> Started:
        """Make and start a process that workers share, for `workerd_process`."""
        boxes, layer = await self._boxes(), await self._base()
        if not isinstance(boxes, WorkerdBoxes):
            raise AssertionError("`boxes_kind` says what they are")
        image = structs.replace(box.image, layers=(layer,))
        boxes.configurations[box.id], self._handed[box.id] = configuration, handed
        try:
            await super().create(structs.replace(box, image=image, user=f"{USER}:{USER}", read_only_root=True))
            return await super().start(box.id)
        except BaseException:
            await asyncio.shield(super().delete(box.id))
            raise
        finally:
            del boxes.configurations[box.id], self._handed[box.id]

    def inherited(self, id: str) -> Sequence[int]:
        return self._handed.get(id, ())

    def run_command(self, boxes: OciBoxes, container: Container, extra: Sequence[str]) -> list[str]:
        command = super().run_command(boxes, container, extra)
        if not (handed := self.inherited(container.record.id)):
            return command
        # They are behind 3, which must be there too, and is the shim's own.
        at = command.index("--detach")
        command[at:at] = ["--preserve-fds", str(1 + len(handed))]
        return ["/bin/sh", "-c", 'exec "$@" 3</dev/null', "sh", *command]

    async def start(self, id: str) -> Started:
        return await (self._shared.start(id) if id in self._shared else super().start(id))

    async def wait(self, id: str) -> Exit:
        return await (self._shared.wait(id) if id in self._shared else super().wait(id))

    async def signal(self, id: str, name: str) -> None:
        await (self._shared.signal(id, name) if id in self._shared else super().signal(id, name))

    async def kill(self, id: str) -> None:
        await (self._shared.kill(id) if id in self._shared else super().kill(id))

    async def usage(self, id: str) -> Usage:
        return await (self._shared.usage(id) if id in self._shared else super().usage(id))

    async def root(self, id: str) -> int:
        return await (self._shared.root(id) if id in self._shared else super().root(id))

    async def delete(self, id: str) -> None:
        await (self._shared.delete(id) if id in self._shared else super().delete(id))

    async def parent(self, id: str) -> int:
        _, container = await self._find(id)
        if container.shim is None:
            raise NotFound(f"instance {id} does not run")
        return container.shim.pid

    async def cpu_us(self, id: str) -> int:
        _, container = await self._find(id)
        return await self._in_thread(container.group.cpu_us)

    async def _find(self, id: str) -> tuple[OciBoxes, Container]:
        """Raises Unsupported for a worker that shares its process: what would be done to it alone, it has not alone."""
        if id in self._shared:
            raise Unsupported(
                f"instance {id} shares its process with other workers, and cannot be stopped in its tracks alone",
                mend="leave worker.shared out",
                field="worker.shared",
            )
        return await super()._find(id)

    async def close(self) -> None:
        await self._shared.close()
        await super().close()

    async def recover(self) -> Sequence[Found]:
        found = await super().recover()
        if not found:  # nothing stands on the layer of an earlier version
            async with self._layering:
                if self._layer is None:
                    await self._in_thread(forget_layers, self._directory / "layers")
        return await self._shared.recover(found)

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


def _kept(destination: str) -> bool:
    """Whether workerd needs the mount; /sys, message queues, terminals and shared memory it does not."""
    return any(destination == path.rstrip("/") or (path.endswith("/") and destination.startswith(path)) for path in _KEPT_MOUNTS)
