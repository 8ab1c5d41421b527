"""Sharing by MPS: NVIDIA's daemon that lets several programs run on one device at the same time, one daemon for each device.

The daemon outlives the agent and is adopted by the next one; it ends with the last instance that uses it. Each instance finds the
daemon's pipes at INSIDE, and its own limits in its environment (NVIDIA MPS documentation, "Environment Variables"). Clients and
daemon talk through shared memory too, so that those who share a device share a small /dev/shm, which is no one else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import structlog

from atoll.model.devices import MILLI, GpuDevice, GpuGrant
from atoll.model.errors import Unavailable, Unsupported
from atoll.model.ports.devices import Edits, FileMount

BINARY = "nvidia-cuda-mps-control"
BINARY_DIRECTORIES = ("/usr/bin", "/usr/local/nvidia/bin", "/run/nvidia/driver/usr/bin", "/usr/local/bin")
INSIDE = "/run/nvidia-mps"
"""Where an instance finds the pipes; not the daemon's usual place, so that only who is told uses it."""
COMMAND_S = 10.0
"""Deadline of one call of the tool."""
QUIT_S = 2
"""How long a daemon waits for its clients before it ends them."""
SHM_BYTES = 1 << 30
SOCKET_PATH_MAX = 107
_OUTPUT_MAX = 400
_IN_OWN_SHM = 'mount --bind "$1" /dev/shm && shift && exec "$@"'

log = structlog.get_logger()


class Mps(Protocol):
    """What a node needs of the sharing daemon. Every call is bounded."""

    def missing(self) -> str:
        """Return why this node cannot share so; nothing where it can."""
        ...

    async def start(self, device: GpuDevice) -> None:
        """See to it that the device's daemon runs. Safe to repeat. Raises Unavailable, Unsupported; nothing runs then."""
        ...

    def edits(self, device: GpuDevice, grant: GpuGrant) -> Edits:
        """Return what makes an instance a client of the device's daemon, held to its grant."""
        ...

    async def stop(self, device: str) -> None:
        """End the device's daemon. Safe to repeat; raises nothing."""
        ...

    async def keep(self, devices: Collection[str]) -> None:
        """Adopt the daemons of these devices, and end all others that a former agent left. Raises nothing."""
        ...


class NvidiaMps:
    """The real one. `directory` holds a directory for each device; `own_shm` gives the daemon a /dev/shm of its own (needs root).

    `binary` None: looked up in PATH and where drivers put it.
    """

    def __init__(self, directory: Path, *, binary: Path | None = None, own_shm: bool = True) -> None:
        self._directory = directory
        self._binary = binary or _find()
        self._own_shm = own_shm

    def missing(self) -> str:
        if self._binary is None or not os.access(self._binary, os.X_OK):
            return f"{BINARY} is not installed"
        return ""

    async def start(self, device: GpuDevice) -> None:
        if reason := self.missing():
            raise Unsupported(f"this node cannot share by MPS: {reason}", mend="install the driver's compute tools")
        place = self._place(device.id)
        if len(os.fsencode(place / "pipe" / "control_privileged")) > SOCKET_PATH_MAX:
            raise Unsupported(f"the path of the MPS daemon's pipes is too long: {place}", mend="use a shorter data directory")
        if await self._answers(device.id):
            return
        await self._make_place(device.id)
        words = ""
        # one server for clients of any user, where the driver can; else it serves one user at a time
        for options in (("-multiuser-server",), ()):
            status, words = await self._run([*self._wrapped(device.id), str(self._binary), "-d", *options], device.id)
            if status == 0 and await self._answers(device.id):
                log.info("mps daemon started", device=device.id, options=options)
                return
        await self.stop(device.id)
        raise Unavailable(f"the MPS daemon of {device.id} does not start: {words or 'it says nothing'}")

    def edits(self, device: GpuDevice, grant: GpuGrant) -> Edits:
        place = self._place(device.id)
        env = [
            ("CUDA_MPS_PIPE_DIRECTORY", INSIDE),
            ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(max(1, grant.milli * 100 // MILLI))),
        ]
        if grant.memory_bytes:
            # inside there is one device only, which is number 0 there
            env.append(("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", f"0={grant.memory_bytes >> 20}M"))
        mounts = [FileMount(str(place / "pipe"), INSIDE, ("rw", "nosuid", "nodev", "noexec", "rbind"))]
        if self._own_shm:
            mounts.append(FileMount(str(place / "shm"), "/dev/shm", ("rw", "nosuid", "nodev", "noexec", "rbind")))  # noqa: S108
        return Edits(mounts=tuple(mounts), env=tuple(env))

    async def stop(self, device: str) -> None:
        place = self._place(device)
        if not place.exists():
            return
        if self.missing() == "" and await self._answers(device):
            await self._say(device, f"quit -t {QUIT_S}\n")
        self._kill(device)
        if (place / "shm").is_mount():
            await self._run(["umount", "--lazy", str(place / "shm")], device)
        shutil.rmtree(place, ignore_errors=True)

    async def keep(self, devices: Collection[str]) -> None:
        try:
            found = [entry.name for entry in self._directory.iterdir() if entry.is_dir()]
        except OSError:
            return
        for device in found:
            if device not in devices:
                await self.stop(device)

    def _place(self, device: str) -> Path:
        return self._directory / device

    async def _make_place(self, device: str) -> None:
        place = self._place(device)
        for name, mode in (("pipe", 0o755), ("log", 0o700), ("shm", 0o1777)):
            (place / name).mkdir(parents=True, exist_ok=True)
            (place / name).chmod(mode)
        if self._own_shm and not (place / "shm").is_mount():
            options = f"size={SHM_BYTES},mode=1777,nosuid,nodev,noexec"
            status, words = await self._run(["mount", "-t", "tmpfs", "-o", options, "atoll-mps", str(place / "shm")], device)
            if status != 0:
                raise Unavailable(f"no shared memory for the MPS daemon of {device}: {words}")

    def _wrapped(self, device: str) -> list[str]:
        if not self._own_shm:
            return []
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", _IN_OWN_SHM, "sh", str(self._place(device) / "shm")]

    async def _answers(self, device: str) -> bool:
        """Ask the daemon itself: a process number may be another's by now."""
        if not (self._place(device) / "pipe").is_dir():
            return False
        status, _ = await self._say(device, "get_server_list\n")
        return status == 0

    async def _say(self, device: str, words: str) -> tuple[int, str]:
        return await self._run([str(self._binary)], device, words)

    def _kill(self, device: str) -> None:
        """End a daemon that does not hear."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self._place(device) / "pipe" / f"{BINARY}.pid").read_text())
            if pid > 1 and BINARY.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    async def _run(self, command: list[str], device: str, words: str = "") -> tuple[int, str]:
        """Run a tool to its end, and return its status and what it said. One that takes too long is killed: status -1."""
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE if words else DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env=self._environment(device),
                start_new_session=True,
            )
        except OSError as error:
            return -1, str(error)
        try:
            async with asyncio.timeout(COMMAND_S):
                out = await _communicate(process, words)
                return await process.wait(), out
        except TimeoutError:
            return -1, f"no answer within {COMMAND_S:g} s"
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    def _environment(self, device: str) -> Mapping[str, str]:
        place = self._place(device)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
            "CUDA_VISIBLE_DEVICES": device,
            "CUDA_MPS_PIPE_DIRECTORY": str(place / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(place / "log"),
        }


async def _communicate(process: asyncio.subprocess.Process, words: str) -> str:
    """Say `words`, and return the beginning of the answer. A daemon that keeps the pipe open does not hold this up."""
    assert process.stdout is not None  # noqa: S101 - asked for above
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(words.encode())
            await process.stdin.drain()
        process.stdin.close()
    reading = asyncio.ensure_future(process.stdout.read(_OUTPUT_MAX))
    await process.wait()
    done, _ = await asyncio.wait({reading}, timeout=1.0)
    if not done:
        reading.cancel()
        return ""
    return reading.result().decode(errors="replace").strip()


def _find() -> Path | None:
    found = shutil.which(BINARY)
    if found is not None:
        return Path(found)
    return next((Path(place, BINARY) for place in BINARY_DIRECTORIES if Path(place, BINARY).exists()), None)
