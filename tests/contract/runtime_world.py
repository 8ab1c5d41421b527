"""Where the runtime contract runs: the same programs on the fake runtime and in real containers made of busybox."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from atoll.model.errors import Unsupported
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits, Runtime
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.cloud_hypervisor import CloudHypervisorRuntime
from atoll.runtimes.crun import CrunRuntime
from atoll.runtimes.firecracker import FirecrackerRuntime
from atoll.runtimes.gvisor import GvisorRuntime
from atoll.runtimes.lxc import LxcRuntime
from atoll.runtimes.oci_runtime import OciRuntime
from atoll.runtimes.qemu import QemuRuntime
from atoll.runtimes.runc import RuncRuntime

BUSYBOX = Path("/bin/busybox")
LIMITS = Limits(cpu_milli=1000, memory_bytes=64 << 20, disk_bytes=64 << 20, pids=64)

_SCRIPTS = {
    "exit": 'sleep "${2:-0}"; exit "$1"',
    "stubborn": "trap '' TERM; while :; do sleep 0.05; done",
    "graceful": "trap 'exit 0' TERM; while :; do sleep 0.05; done",
    "run": "while :; do sleep 1000; done",
}
_APPLETS = (
    "sh cat sleep echo true false id ls ping stty dd head mount umount mkdir touch rm chmod kill test seq wc grep nc ln stat env"
    " ip od tr cut date"
)


def make_layer(directory: Path) -> Path:
    """Return a layer with busybox and the programs that the fake runtime knows too."""
    layer = directory / "layer"
    for name in ("bin", "etc", "tmp", "data", "srv"):
        (layer / name).mkdir(parents=True)
    (layer / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, layer / "bin/busybox")
    for applet in _APPLETS.split():
        (layer / "bin" / applet).symlink_to("busybox")
    for name, script in _SCRIPTS.items():
        program = layer / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    (layer / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\napp:x:1234:1235:App:/srv:/bin/sh\n")
    (layer / "etc/group").write_text("root:x:0:\napp:x:1235:\nextra:x:2000:app,other\n")
    (layer / "srv/owned").write_text("app's\n")
    os.chown(layer / "srv/owned", 1234, 1235)
    return layer


class World:
    """One node: `make` gives a runtime on it, any number of times, as agents come and go.

    Where real containers run, `cgroup` is this world's own, so that test runs side by side do not meet.
    """

    def __init__(self, directory: Path, make: Callable[[], Runtime], layers: tuple[Path, ...] = (), *, cgroup: str = "") -> None:
        self.directory = directory
        self.make = make
        self.cgroup = cgroup
        self.real = bool(cgroup)
        self.attended = False
        """Whether its boxes are sandboxes, into which commands go by an usher where the runtime has one."""
        self.settle_s = 0.5 if any(name in cgroup for name in ("gvisor", *MACHINES)) else 0.1 if cgroup else 0
        """How long a script takes to its first lines."""
        self.alone = contextlib.ExitStack()
        """What it alone may use, as long as it lasts."""
        self.many = 3 if any(name in cgroup for name in MACHINES) else 10
        """How many instances side by side are many here."""
        self.runtime = make()
        self._image = Image(reference="test", digest="sha256:0", config=ImageConfig(), layers=layers)
        self._readers: dict[Path, int] = {}

    def box(self, id: str, /, *argv: str, **changes: Any) -> Box:
        """Return a box whose output FIFOs are open for `output`."""
        fifos = []
        for name in ("stdout", "stderr"):
            path = self.directory / f"{id}.{name}"
            os.mkfifo(path)
            self._readers[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            fifos.append(path)
        fields: dict[str, Any] = {
            "id": id,
            "directory": self.directory / "instances" / id,
            "image": self._image,
            "argv": argv,
            "env": (("GREETING", "hello"),),
            "workdir": "/",
            "user": "",
            "hostname": f"host-{id}",
            "limits": LIMITS,
            "stdout": fifos[0],
            "stderr": fifos[1],
            "attended": self.attended,
        }
        return Box(**(fields | changes))

    def output(self, id: str, stream: str = "stdout") -> str:
        """Return what the instance has written since the last call."""
        parts = []
        while True:
            try:
                part = os.read(self._readers[self.directory / f"{id}.{stream}"], 1 << 16)
            except BlockingIOError:
                part = b""
            if not part:
                return b"".join(parts).decode()
            parts.append(part)

    async def output_until(self, id: str, text: str, deadline_s: float = 10.0) -> str:
        seen, deadline = "", time.monotonic() + deadline_s
        while text not in seen:
            assert time.monotonic() < deadline, f"{text!r} did not come, only {seen!r}"
            await asyncio.sleep(0.01)
            seen += self.output(id)
        return seen

    async def launch(self, id: str, /, *argv: str, **changes: Any) -> int:
        await self.runtime.create(self.box(id, *argv, **changes))
        return (await self.runtime.start(id)).pid

    async def run(self, id: str, /, *argv: str, **changes: Any) -> tuple[int, str, str]:
        """Run to the end; return the exit status, stdout and stderr."""
        await self.launch(id, *argv, **changes)
        end = await asyncio.wait_for(self.runtime.wait(id), 20)
        return end.code, self.output(id), self.output(id, "stderr")

    async def shell(self, id: str, script: str, **options: Any) -> tuple[int, str]:
        """Run a script beside the instance; return its exit status and all that it wrote."""
        execution = await self.runtime.exec(id, ["sh", "-c", script], **options)
        try:
            parts = []
            while (part := await asyncio.wait_for(execution.read(), 20)) is not None:
                parts.append(part[1])
            return await asyncio.wait_for(execution.wait(), 20), b"".join(parts).decode()
        finally:
            await execution.close()

    async def reopen(self) -> Runtime:
        """Put a new agent's runtime in the place of the old one."""
        await self.runtime.close()
        self.runtime = self.make()
        return self.runtime

    async def close(self) -> None:
        with self.alone:
            await self.runtime.close()
            self.runtime = self.make()
            for found in await self.runtime.recover():
                await self.runtime.delete(found.id)
            await self.runtime.close()
            for fd in self._readers.values():
                os.close(fd)
            with contextlib.suppress(ChildProcessError):  # shims that this process started for a runtime that it closed
                while os.waitpid(-1, os.WNOHANG)[0]:  # noqa: ASYNC222 - it does not wait
                    pass
        if self.cgroup:
            assert [path for path in Cgroups.detect().group(self.cgroup).directories if path.exists()] == []


class SharingQemu(QemuRuntime):
    """Every world of a test run has the same kernel and tools, which take half a second to unpack."""

    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__(directory, cache=Path(tempfile.gettempdir()) / f"atoll-test-vm-{os.getuid()}", **options)


REAL: dict[str, type[OciRuntime]] = {"runc": RuncRuntime, "crun": CrunRuntime, "lxc": LxcRuntime, "gvisor": GvisorRuntime}


class SharingFirecracker(FirecrackerRuntime):
    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__(directory, cache=Path(tempfile.gettempdir()) / f"atoll-test-firecracker-{os.getuid()}", **options)


class SharingCloudHypervisor(CloudHypervisorRuntime):
    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__(directory, cache=Path(tempfile.gettempdir()) / f"atoll-test-cloud-hypervisor-{os.getuid()}", **options)


MACHINES: dict[str, type[OciRuntime]] = {
    "qemu": SharingQemu,
    "firecracker": SharingFirecracker,
    "cloud-hypervisor": SharingCloudHypervisor,
}
"""Each start is the boot of a machine: test_runtime_isolation.py's counterpart for them, test_runtime_vm.py, makes few."""
EVERY = REAL | MACHINES


@functools.cache
def why_not(name: str) -> str:
    """Return why this machine cannot run the runtime, or nothing. It is probed once in a test run."""
    if not BUSYBOX.exists():
        return "needs busybox-static"
    with tempfile.TemporaryDirectory() as directory:
        runtime = EVERY[name](Path(directory), cgroup=f"/atoll-test-{uuid.uuid4().hex[:8]}")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a loop of its own: this one may be running
            try:
                pool.submit(asyncio.run, runtime.probe()).result()
            except Unsupported as error:
                return f"{name}: {error}; {error.mend}"
    return ""


class _OneProcess:
    """Held by any number of worlds of one process at a time; another process waits."""

    def __init__(self, name: str) -> None:
        self._path = Path(tempfile.gettempdir(), name)
        self._held: list[IO[str]] = []

    def __enter__(self) -> None:
        file = self._path.open("w")
        if not self._held:
            fcntl.flock(file, fcntl.LOCK_EX)
        self._held.append(file)

    def __exit__(self, *_: object) -> None:
        last = self._held.pop()
        last.close()


_GVISOR = _OneProcess("atoll-tests-gvisor.lock")
"""runsc names its control socket after the instance, once for a whole network namespace, and tests call their instances alike."""


def real_world(name: str, directory: Path, layer: Path, cgroup: str = "") -> World:
    """Return a world of real instances, on `cgroup` where another process has it already. Skips where there can be none."""
    if why := why_not(name):
        pytest.skip(why)
    known = bool(cgroup)
    cgroup = cgroup or f"/atoll-test-{name}-{uuid.uuid4().hex[:8]}"
    world = World(directory, lambda: EVERY[name](directory / "runtime", cgroup=cgroup), (layer,), cgroup=cgroup)
    if name == "gvisor" and not known:
        world.alone.enter_context(_GVISOR)
    return world
