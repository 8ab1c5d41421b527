"""The output of instances: two pipes each, read a bounded piece at a time, kept in bounded files.

The agent holds both ends of each pipe, so that it never sees an end of file; the runtime does so too, so that the process
outlives an agent, and what it wrote meanwhile (up to the pipe's size) is read by the next. A process that writes faster
than its budget waits in `write`, as at any slow terminal: it costs the node neither memory nor its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from atoll.model.errors import Exhausted
from atoll.model.ports.clock import Clock
from atoll.model.streams import LogLine, LogOptions
from atoll.node.directories import Directories
from atoll.node.log_files import LogReader, LogWriter, decode_line, encode_line, remove_kept

PIPE_BYTES = 1 << 20
"""Asked of the kernel; what it refuses (`/proc/sys/fs/pipe-user-pages-soft`) stays at 64 KiB."""
LINE_BYTES_MAX = 16 << 10
"""A longer line is kept in parts."""
TURN_BYTES = 128 << 10
"""What is read from one pipe before the next has its turn."""
RATE_BYTES_S = 8 << 20
"""Budget of one pipe, in bytes of output per second; BURST_BYTES may come at once."""
BURST_BYTES = 16 << 20
DRAIN_BYTES_MAX = 4 << 20
"""What is taken in at the end of a process; a child that goes on writing must not hold up its end."""
PARTIAL_S = 1.0
"""A line without its end is kept as a part after so long: a prompt is seen, and an agent's death loses little."""
FOLLOW_POLL_S = 5.0
"""A follower looks so often even when nobody woke it."""

log = structlog.get_logger()


class _Pipe:
    """One stream of one instance."""

    def __init__(self, path: Path, stream: str) -> None:
        self.path = path
        self.stream = stream
        self.rest = b""
        self.budget = float(BURST_BYTES)
        self.filled_at = 0.0
        self.resume: asyncio.TimerHandle | None = None
        self.flush: asyncio.TimerHandle | None = None
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path)
            # Open to all, since a process that is not root may open /dev/stdout anew; its directory is root's alone.
            path.chmod(0o666)
        # Reading and writing: with a writing end of our own there is never an end of file to spin on.
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def lines(self, data: bytes, at: float) -> bytes:
        """Take in `data`; return the lines that are whole now, as they are kept."""
        *whole, rest = (self.rest + data).split(b"\n") if self.rest else data.split(b"\n")
        out: list[bytes] = []
        for line in whole:
            while len(line) > LINE_BYTES_MAX:
                out.append(encode_line(at, self.stream, line[:LINE_BYTES_MAX], partial=True))
                line = line[LINE_BYTES_MAX:]
            out.append(encode_line(at, self.stream, line))
        while len(rest) > LINE_BYTES_MAX:
            out.append(encode_line(at, self.stream, rest[:LINE_BYTES_MAX], partial=True))
            rest = rest[LINE_BYTES_MAX:]
        self.rest = rest
        return b"".join(out)


class _Instance:
    def __init__(self, directory: Path, pipes: tuple[_Pipe, _Pipe]) -> None:
        self.writer = LogWriter(directory)
        self.pipes = pipes
        self.full = False


class FileLogs:
    """Implements `tools.Logs` on FIFOs and files; needs an event loop with `add_reader`."""

    def __init__(self, directories: Directories, clock: Clock) -> None:
        self._directories = directories
        self._clock = clock
        self._instances: dict[str, _Instance] = {}
        self._changed: dict[str, asyncio.Event] = {}
        """Where someone waits for more; each is set once and dropped."""

    def open(self, project: str, id: str) -> tuple[Path, Path]:
        known = self._instances.get(id)
        if known is None:
            try:
                known = self._instances[id] = self._open(project, id)
            except OSError as error:
                raise Exhausted(f"cannot make the instance's pipes and logs: {error}", mend="free some disk space") from None
        return known.pipes[0].path, known.pipes[1].path

    def _open(self, project: str, id: str) -> _Instance:
        place = self._directories.instances / id
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        pipes: list[_Pipe] = []
        try:
            for stream in ("stdout", "stderr"):
                pipes.append(_Pipe(place / stream, stream))
            instance = _Instance(self._kept(project, id), (pipes[0], pipes[1]))
        except OSError:
            for pipe in pipes:
                os.close(pipe.fd)
            raise
        loop = asyncio.get_running_loop()
        for pipe in pipes:
            loop.add_reader(pipe.fd, self._read_turn, id, instance, pipe)
        return instance

    def _kept(self, project: str, id: str) -> Path:
        return self._directories.logs / project / id

    def _read_turn(self, id: str, instance: _Instance, pipe: _Pipe) -> None:
        size = self._read(id, instance, pipe)
        loop = asyncio.get_running_loop()
        if pipe.rest and pipe.flush is None:
            pipe.flush = loop.call_later(PARTIAL_S, self._flush, id, instance, pipe)
        now = self._clock.monotonic()
        pipe.budget = min(float(BURST_BYTES), pipe.budget + (now - pipe.filled_at) * RATE_BYTES_S) - size
        pipe.filled_at = now
        if pipe.budget < 0 and pipe.resume is None:
            loop.remove_reader(pipe.fd)
            pipe.resume = loop.call_later(-pipe.budget / RATE_BYTES_S, self._resume, id, instance, pipe)

    def _resume(self, id: str, instance: _Instance, pipe: _Pipe) -> None:
        pipe.resume = None
        asyncio.get_running_loop().add_reader(pipe.fd, self._read_turn, id, instance, pipe)

    def _flush(self, id: str, instance: _Instance, pipe: _Pipe) -> None:
        pipe.flush = None
        if pipe.rest:
            self._keep(id, instance, encode_line(self._clock.now(), pipe.stream, pipe.rest, partial=True))
            pipe.rest = b""

    def _read(self, id: str, instance: _Instance, pipe: _Pipe) -> int:
        try:
            data = os.read(pipe.fd, TURN_BYTES)
        except BlockingIOError:
            return 0
        self._keep(id, instance, pipe.lines(data, self._clock.now()))
        return len(data)

    def _keep(self, id: str, instance: _Instance, lines: bytes) -> None:
        if not lines:
            return
        kept = instance.writer.write(lines)
        if kept is instance.full:
            instance.full = not kept
            lost = instance.writer.lost_bytes
            if kept:
                instance.writer.lost_bytes = 0
            log.warning("logs are kept again" if kept else "logs are lost: the disk is full", instance=id, lost_bytes=lost)
        self._wake(id)

    def _wake(self, id: str) -> None:
        changed = self._changed.pop(id, None)
        if changed is not None:
            changed.set()

    def drain(self, id: str) -> None:
        instance = self._instances.get(id)
        if instance is None:
            return
        for pipe in instance.pipes:
            taken = 0
            while taken < DRAIN_BYTES_MAX and (size := self._read(id, instance, pipe)):
                taken += size
            if pipe.rest:
                self._keep(id, instance, encode_line(self._clock.now(), pipe.stream, pipe.rest))
                pipe.rest = b""

    def close(self, id: str) -> None:
        instance = self._instances.pop(id, None)
        if instance is None:
            return
        self._let_go(instance)
        for pipe in instance.pipes:
            pipe.path.unlink(missing_ok=True)
        self._wake(id)

    def _let_go(self, instance: _Instance) -> None:
        loop = asyncio.get_running_loop()
        for pipe in instance.pipes:
            for timer in (pipe.resume, pipe.flush):
                if timer is not None:
                    timer.cancel()
            loop.remove_reader(pipe.fd)
            os.close(pipe.fd)
        instance.writer.close()

    def remove(self, project: str, id: str) -> None:
        self.close(id)
        remove_kept(self._kept(project, id))
        self._wake(id)

    def strangers(self, known: set[str]) -> list[tuple[str, str]]:
        root = self._directories.logs
        if not root.is_dir():
            return []
        projects = sorted(path for path in root.iterdir() if path.is_dir())
        return [(project.name, path.name) for project in projects for path in sorted(project.iterdir()) if path.name not in known]

    def shut(self) -> None:
        for instance in self._instances.values():
            self._let_go(instance)
        self._instances.clear()

    async def read(self, project: str, id: str, options: LogOptions) -> AsyncIterator[LogLine]:
        with LogReader(self._kept(project, id), tail=options.tail) as reader:
            while True:
                # Taken before reading, so that what comes after the last read is not slept through.
                changed = self._changed.setdefault(id, asyncio.Event()) if id in self._instances else None
                while lines := reader.read():
                    for line in lines:
                        entry = decode_line(line)
                        if entry is not None and (options.since is None or entry.at >= options.since):
                            yield entry
                    await asyncio.sleep(0)  # a long log is read in turns
                if changed is None or not options.follow:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FOLLOW_POLL_S):
                        await changed.wait()
