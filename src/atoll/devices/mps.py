"""Sharing by MPS: NVIDIA's daemon that lets several programs run on one device at the same time, one daemon for each device.

The daemon outlives the agent and is adopted by the next one; it ends with the last instance that uses it. Each instance finds the
daemon's pipes at INSIDE, and its own limits in its environment (NVIDIA MPS documentation, "Environment Variables"). A tenant can
change these, but no program gets more than the daemon says, of whose word and its own the lesser holds (same place, and
"nvidia-cuda-mps-control"). The daemon has one word for all: it is the largest share that anybody holds of the device. Where shares
are equal, nobody escapes from theirs. Limits are each program's, not each instance's. Clients need neither the daemon's ids nor its
/dev/shm nor its ipc namespace (measured with driver 580), so that the pipes are all they have in common.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from atoll.model.devices import MILLI, GpuDevice, GpuGrant
from atoll.model.errors import Unavailable, Unsupported
from atoll.model.ports.devices import Edits, FileMount

BINARY = "nvidia-cuda-mps-control"
SERVER = "nvidia-cuda-mps-server"
"""What the daemon starts for its clients; it holds the device."""
BINARY_DIRECTORIES = ("/usr/bin", "/usr/local/nvidia/bin", "/run/nvidia/driver/usr/bin", "/usr/local/bin")
INSIDE = "/run/nvidia-mps"
"""Where an instance finds the pipes; not the daemon's usual place, so that only who is told uses it."""
COMMAND_S = 10.0
"""Deadline of one call of the tool."""
QUIT_S = 2
"""How long a daemon waits for its clients before it ends them."""
SOCKET_PATH_MAX = 107
_OUTPUT_MAX = 400
_WRITABLE = ("rw", "nosuid", "nodev", "noexec", "rbind")

log = structlog.get_logger()


class Mps(Protocol):
    """What a node needs of the sharing daemon. Every call is bounded."""

    def missing(self) -> str:
        """Return why this node cannot share so; nothing where it can."""
        ...

    async def start(self, device: GpuDevice) -> None:
        """See to it that the device's daemon runs. Safe to repeat. Raises Unavailable, Unsupported; nothing runs then."""
        ...

    async def limit(self, device: str, grants: Sequence[GpuGrant]) -> None:
        """Let no program on the device have more than the largest of `grants`, which are all that is held of it. What runs already
        keeps what it began with. Safe to repeat; raises nothing: a daemon that would not is told of in the log."""
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
    """The real one. `directory` holds a directory for each device; `binary` None: looked up in PATH and where drivers put it."""

    def __init__(self, directory: Path, *, binary: Path | None = None) -> None:
        self._directory = directory
        self._binary = binary or _find()
        self._limits: dict[str, tuple[int, int]] = {}
        """Device → per cent of its threads and MiB of its memory that its daemon was told last."""

    def missing(self) -> str:
        if self._binary is None or not os.access(self._binary, os.X_OK):
            return f"{BINARY} is not installed"
        return ""

    def place(self, device: str) -> Path:
        """Return the directory of a device's daemon; its name is short, since paths of sockets must be."""
        return self._directory / hashlib.sha256(device.encode()).hexdigest()[:12]

    async def start(self, device: GpuDevice) -> None:
        if reason := self.missing():
            raise Unsupported(f"this node cannot share by MPS: {reason}", mend="install the driver's compute tools")
        place = self.place(device.id)
        if len(os.fsencode(place / "pipe" / "control_privileged")) > SOCKET_PATH_MAX:
            raise Unsupported(f"the path of the MPS daemon's pipes is too long: {place}", mend="use a shorter data directory")
        if await self._answers(place):
            return
        for name, mode in (("pipe", 0o755), ("log", 0o700)):
            (place / name).mkdir(parents=True, exist_ok=True)
            (place / name).chmod(mode)
        words = ""
        # one server for clients of any user, where the driver can; else it serves one user at a time
        for options in (("-multiuser-server",), ()):
            status, words = await _run([str(self._binary), "-d", *options], _environment(place, device.id))
            if status == 0 and await self._answers(place):
                self._limits.pop(device.id, None)
                log.info("mps daemon started", device=device.id, options=options)
                return
        if _alive(_number(place / "pipe" / f"{BINARY}.pid"), BINARY):
            # What shares the device runs by its servers, which would end with it.
            raise Unavailable(f"the MPS daemon of {device.id} does not answer", mend="try again")
        await self._end(place)
        raise Unavailable(f"the MPS daemon of {device.id} does not start: {words or 'it says nothing'}")

    async def limit(self, device: str, grants: Sequence[GpuGrant]) -> None:
        percent = max(map(_percent, grants), default=100)
        mebibytes = max((grant.memory_bytes >> 20 for grant in grants), default=0)
        if self._limits.get(device) == (percent, mebibytes):
            return
        if await self._tell(self.place(device), device, percent, mebibytes):
            self._limits[device] = percent, mebibytes
        else:
            self._limits.pop(device, None)
            log.warning("mps daemon takes no limits: programs are held by their environment alone", device=device)

    def edits(self, device: GpuDevice, grant: GpuGrant) -> Edits:
        place = self.place(device.id)
        env = [("CUDA_MPS_PIPE_DIRECTORY", INSIDE), ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(_percent(grant)))]
        if grant.memory_bytes:
            # inside there is one device only, which is number 0 there
            env.append(("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", f"0={grant.memory_bytes >> 20}M"))
        return Edits(mounts=(FileMount(str(place / "pipe"), INSIDE, _WRITABLE),), env=tuple(env))

    async def stop(self, device: str) -> None:
        self._limits.pop(device, None)
        await self._end(self.place(device))

    async def keep(self, devices: Collection[str]) -> None:
        wanted = {self.place(device) for device in devices}
        try:
            found = [entry for entry in self._directory.iterdir() if entry.is_dir()]
        except OSError:
            return
        for place in found:
            if place not in wanted:
                await self._end(place)

    async def _answers(self, place: Path) -> bool:
        """Ask the daemon itself: a process number may be another's by now."""
        return (place / "pipe").is_dir() and await self._servers(place) is not None

    async def _servers(self, place: Path) -> tuple[int, ...] | None:
        """Return the daemon's servers; None where it does not answer."""
        status, words = await self._ask(place, "get_server_list\n")
        return tuple(int(word) for word in words.split() if word.isdecimal()) if status == 0 else None

    async def _tell(self, place: Path, device: str, percent: int, mebibytes: int) -> bool:
        """Give the daemon's servers, and those that it will start, these limits; False where it does not take all of them."""
        servers = await self._servers(place)
        if servers is None:
            return False
        for pid in ("", *map(str, servers)):
            default, server = ("", f"{pid} ") if pid else ("default_", "")
            if await self._say(place, f"set_{default}active_thread_percentage {server}{percent}\n") != 0:
                return False
            limit = f"set_{default}device_pinned_mem_limit {server}{{}} {mebibytes}M\n"
            # Older drivers know a device by its number only, which is 0 for the one that this daemon has.
            if mebibytes and await self._say(place, limit.format(device)) != 0 and await self._say(place, limit.format("0")) != 0:
                return False
        return True

    async def _say(self, place: Path, words: str) -> int:
        status, _ = await self._ask(place, words)
        return status

    async def _ask(self, place: Path, words: str) -> tuple[int, str]:
        return await _run([str(self._binary)], _environment(place), words)

    async def _end(self, place: Path) -> None:
        if not place.exists():
            return
        daemon = _number(place / "pipe" / f"{BINARY}.pid")
        servers = set(_children(daemon))
        if not self.missing() and (told := await self._servers(place)) is not None:
            servers.update(told)
            await self._say(place, f"quit -t {QUIT_S}\n")
        _kill(daemon, BINARY)
        for pid in servers:  # none of them ends with a daemon that is killed
            _kill(pid, SERVER)
        shutil.rmtree(place, ignore_errors=True)


def _percent(grant: GpuGrant) -> int:
    return max(1, grant.milli * 100 // MILLI)


def _number(file: Path) -> int:
    """Return the process that a file names; 0 for none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def _children(parent: int) -> list[int]:
    """Return the processes that `parent` started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat") if parent > 1 else ():
        with contextlib.suppress(OSError, ValueError, IndexError):
            # after the name, which may have any character: state, parent
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def _alive(pid: int, name: str) -> bool:
    """Return whether there is such a process, and it is (still) one of this name."""
    try:
        return pid > 1 and name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _kill(pid: int, name: str) -> None:
    """End a process that did not hear, if it is (still) one of this name."""
    if _alive(pid, name):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _environment(place: Path, device: str = "") -> dict[str, str]:
    visible = {"CUDA_VISIBLE_DEVICES": device} if device else {}
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        "CUDA_MPS_PIPE_DIRECTORY": str(place / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(place / "log"),
        **visible,
    }


async def _run(command: Sequence[str], environment: Mapping[str, str], words: str = "") -> tuple[int, str]:
    """Run a tool to its end, and return its status and what it said. One that takes too long is killed: status -1."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE if words else DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            env=environment,
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
