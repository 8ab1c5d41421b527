"""Instances of one small program in a runtime, each with what it was granted of a device; and the same program outside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from atoll.devices.node import NodeDevices
from atoll.model.devices import GpuDevice, GpuGrant
from atoll.model.ports.devices import Edits
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits
from atoll.model.spec import Gpu
from atoll.runtimes.oci_runtime import OciRuntime

PROGRAM = Path(__file__).with_name("cuda_check.c")
LIMITS = Limits(cpu_milli=8000, memory_bytes=4 << 30, disk_bytes=256 << 20, pids=512)


def cgroup() -> str:
    return f"/atoll-bench-{uuid.uuid4().hex[:8]}"


def compiled(directory: Path) -> Path:
    program = directory / "cuda_check"
    subprocess.run(["gcc", "-O2", "-o", str(program), str(PROGRAM), "-ldl"], check=True)
    return program


def image_of(directory: Path, program: Path) -> Image:
    """Make a root of the program and the C library that it, and the driver's library, are linked with."""
    layer = directory / "layer"
    for name in ("tmp", "etc", "proc", "sys", "dev"):
        (layer / name).mkdir(parents=True)
    shutil.copy(program, layer / "cuda_check")
    linked = re.findall(r"(/\S+)", subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout)
    libraries = {Path(path) for path in linked if Path(path) != program}
    libc = next(path for path in libraries if path.name.startswith("libc.so"))
    libraries |= {libc.with_name(name) for name in ("libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libgcc_s.so.1")}
    for path in libraries:
        if path.exists():
            target = layer / path.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return Image(reference="bench", digest="sha256:0", config=ImageConfig(), layers=(layer,))


class Tenants:
    """Instances of the measured program in one runtime, each with what it was granted of one device."""

    def __init__(self, runtime: OciRuntime, devices: NodeDevices, device: GpuDevice, image: Image, directory: Path) -> None:
        self.runtime = runtime
        self.device = device
        self._devices = devices
        self._image = image
        self._directory = directory / f"{runtime.name}-instances"
        self._directory.mkdir(parents=True, exist_ok=True)

    async def open(self) -> None:
        await self.runtime.probe()  # type: ignore[attr-defined]
        await self.runtime.recover()

    async def close(self) -> None:
        await self.runtime.close()

    async def run(
        self,
        *arguments: str,
        grant: GpuGrant | None = None,
        gpu: Gpu | None = None,
        none: bool = False,
        without: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Run one instance to its end and return what it printed, with `began_ns`, when it was asked for.

        `without` names variables of its devices that it takes out of its environment, as any tenant can.
        """
        id = f"b{uuid.uuid4().hex[:8]}"
        pipes = {name: self._directory / f"{id}.{name}" for name in ("out", "err")}
        for path in pipes.values():
            os.mkfifo(path)
        out, err = (os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in pipes.values())
        wanted = grant or GpuGrant(device=self.device.id, memory_bytes=self.device.memory_bytes)
        began_ns = time.time_ns()
        try:
            edits = Edits()
            if not none:
                edits = (await self._devices.claim(id, [wanted], gpu or Gpu(), self.runtime.name)).edits
                edits = msgspec.structs.replace(edits, env=tuple(pair for pair in edits.env if pair[0] not in without))
            await self.runtime.create(self._box(id, arguments, edits, pipes))
            await self.runtime.start(id)
            await self.runtime.wait(id)
            words = _read(out)
            return {**answer_of(words or _read(err)), "began_ns": began_ns}
        finally:
            await self.runtime.delete(id)
            await self._devices.release(id)
            for fd in (out, err):
                os.close(fd)

    def _box(self, id: str, arguments: Sequence[str], edits: Edits, pipes: dict[str, Path]) -> Box:
        return Box(
            id=id,
            directory=self._directory / id,
            image=self._image,
            argv=("/cuda_check", *arguments),
            env=(),
            workdir="/",
            user="",
            hostname=id,
            limits=LIMITS,
            devices=edits,
            stdout=pipes["out"],
            stderr=pipes["err"],
        )


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


def answer_of(words: bytes) -> dict[str, Any]:
    lines = words.decode(errors="replace").strip().splitlines()
    try:
        answer: dict[str, Any] = msgspec.json.decode(lines[-1])
    except (IndexError, msgspec.DecodeError):
        raise RuntimeError(f"the measured program said {words[-300:]!r}") from None
    if "error" in answer:
        raise RuntimeError(f"the measured program failed: {answer['error']}")
    return answer


def alone(program: Path, *arguments: str) -> dict[str, Any]:
    began_ns = time.time_ns()
    answer = subprocess.run([str(program), *arguments], capture_output=True, timeout=120, check=False)
    return {**answer_of(answer.stdout or answer.stderr), "began_ns": began_ns}
