"""The agent's side of the shim: start a container's parent, hear when it ends, find it again after a crash of the agent."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import struct
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from atoll.model.errors import DeadlineExceeded, RuntimeFailed
from atoll.runtimes.native import shim_path
from atoll.runtimes.readiness import ready

_NEWS_FD = 3
_NEWS_BYTES_MAX = 4096
_FLOCK = "@hhqqi4x"
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


class ShimFiles(Struct, frozen=True):
    """The files in a container's directory by which a shim and later agents know each other."""

    directory: Path

    @property
    def pid(self) -> Path:
        return self.directory / "pid"

    @property
    def exit(self) -> Path:
        return self.directory / "exit"

    @property
    def lock(self) -> Path:
        return self.directory / "shim.lock"

    def read_pid(self) -> int | None:
        text = _read(self.pid)
        return int(text) if text.isdecimal() else None

    def read_exit(self) -> tuple[int, float] | None:
        """Return the wait(2) status and the time of the recorded end."""
        status, _, at = _read(self.exit).partition(" ")
        return (int(status), float(at)) if at else None

    def holder(self) -> int | None:
        """Return the pid of the shim that lives; the kernel knows it by its lock, so a pid that was used again cannot deceive."""
        try:
            fd = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        finally:
            os.close(fd)
        return None if kind == fcntl.F_UNLCK else pid

    def clear(self) -> None:
        for path in (self.pid, self.exit, self.lock):
            path.unlink(missing_ok=True)


class Ending:
    """Waits for the end of a process, ours or adopted, without a thread and without polling."""

    def __init__(self, pid: int, *, close_at_end: bool = False) -> None:
        """Raises ProcessLookupError when it is gone already. `close_at_end` is for those that nobody will `close`."""
        self.pid = pid
        self._close_at_end = close_at_end
        self.fd = os.pidfd_open(pid)
        self.event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.fd, self._ended)

    def _ended(self) -> None:
        self._loop.remove_reader(self.fd)
        with contextlib.suppress(ChildProcessError):  # adopted ones are another's children
            os.waitpid(self.pid, os.WNOHANG)
        self.event.set()
        if self._close_at_end:
            self.close()

    def signal(self, number: int) -> None:
        """Send a signal; a process that has ended is no error."""
        if self.fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.fd, number)

    def over(self) -> bool:
        return self.event.is_set() or (self.fd >= 0 and bool(select.select([self.fd], [], [], 0)[0]))

    def close(self) -> None:
        if self.fd >= 0:
            self._loop.remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1


ABANDON_TRIES = 50
ABANDON_STEP_S = 0.02


class Launch:
    """A shim that was just started; `news` gives its words, in their order, each once."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdio: tuple[int, int, int] | None,
        output: Path,
        handed: Sequence[int] = (),
        close_at_end: bool = False,
    ) -> None:
        """`stdio` goes to the tool; without it, stdin is empty and what the tool itself says goes to the file `output`.

        `handed` become the shim's descriptors from 4 on; their own numbers are above those.
        """
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writer, True)
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
        if stdio is None:
            actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))
            actions.append((os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            actions.append((os.POSIX_SPAWN_DUP2, 1, 2))
        else:
            actions.extend((os.POSIX_SPAWN_DUP2, given, target) for target, given in enumerate(stdio))
        actions.append((os.POSIX_SPAWN_DUP2, writer, _NEWS_FD))
        actions.extend((os.POSIX_SPAWN_DUP2, given, _NEWS_FD + 1 + at) for at, given in enumerate(handed))
        path = str(shim_path())
        try:
            # posix_spawn shares the address space until exec: its cost does not grow with this process.
            self.pid = os.posix_spawn(path, [path, *arguments], _ENVIRONMENT, file_actions=actions, setsigmask=[])
        except OSError as error:
            os.close(self._reader)
            raise RuntimeFailed(f"cannot start the shim: {error}") from None
        finally:
            os.close(writer)
        self.ending = Ending(self.pid, close_at_end=close_at_end)
        self._buffer = b""

    async def news(self, deadline_s: float | None) -> tuple[str, int] | None:
        """Return the next word and number, or None when there will be none. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(deadline_s):
                while b"\n" not in self._buffer:
                    chunk = await self._chunk()
                    if not chunk or len(self._buffer) > _NEWS_BYTES_MAX:
                        return None
                    self._buffer += chunk
        except TimeoutError:
            raise DeadlineExceeded(f"the runtime's tool did not finish within {deadline_s} s") from None
        line, _, self._buffer = self._buffer.partition(b"\n")
        word, _, number = line.decode().partition(" ")
        return word, int(number)

    async def _chunk(self) -> bytes:
        while True:
            try:
                return os.read(self._reader, 512)
            except BlockingIOError:
                await ready(self._reader)

    def close(self) -> None:
        """Hang up: an `exec` shim then kills its command, as soon as that has started."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    async def abandon(self) -> None:
        """End what the shim started, then the shim, and let go of it; returns when both have ended."""
        await end_all(self.ending)
        self.ending.close()
        self.close()


async def end_all(shim: Ending) -> None:
    """End what a shim started, then the shim, be it ours or adopted; returns when both have ended.

    What it started goes first: the shim then collects it, where a killed shim would leave that to an init that may be slow.
    """
    for _ in range(ABANDON_TRIES):
        found = _descendants(shim.pid)
        if not shim.over():  # else its pid may be another's by now
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # the shim has not ended, so neither is any of these pids a stranger's
        try:
            async with asyncio.timeout(ABANDON_STEP_S):
                await shim.event.wait()
            return
        except TimeoutError:
            continue
    if not shim.over():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(shim.pid, signal.SIGKILL)  # it leads a session of its own
    shim.signal(signal.SIGKILL)
    await shim.event.wait()  # SIGKILL was sent


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(ProcessLookupError):  # it ended while its file was open
        for child in _read(Path(f"/proc/{pid}/task/{pid}/children")).split():
            found += [*_descendants(int(child)), int(child)]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
