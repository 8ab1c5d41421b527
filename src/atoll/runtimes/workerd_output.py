"""What a process of several workers writes, given to each of them: lines of JSON on one pipe, marked by `workerd_config`.

What nobody's mark is on (V8's last words, say) concerns all, and all are told. A worker whose own pipe is full loses lines, and is
told how many: the others must not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from atoll.runtimes.workerd_config import MARK

PIPE_BYTES = 1 << 20
TURN_BYTES = 128 << 10
REST_BYTES_MAX = 256 << 10
"""A longer line is taken as it is."""
ATOMIC_BYTES = 4096
"""pipe(7): as much is written whole or not at all."""
_ERRORS = frozenset({"error", "warn", "fatal"})
_OF_SERVICE = re.compile(r"service ([^\s/]+)/\S+: (.*)", re.DOTALL)
_TOLD_BY_TAIL = "Uncaught exception: "
_CACHE = "bootstrap compile cache failed its compatibility check"
"""Said of each worker's start under flags of V8 that workerd was not built with; it costs less than a millisecond."""


class _Line(Struct, frozen=True):
    message: str = ""
    level: str = "log"


_decoder = msgspec.json.Decoder(_Line)


class Pipes:
    """One worker's stdout and stderr: FIFOs that somebody reads."""

    def __init__(self, stdout: Path, stderr: Path) -> None:
        # For reading too: neither end is ever the last, and none is waited for.
        self._fds = [os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for path in (stdout, stderr)]
        self._lost = [0, 0]

    def write(self, text: str, *, error: bool) -> None:
        """Write a line, or drop it where the pipe is full."""
        at = 1 if error else 0
        if not self._fds:
            return
        if self._lost[at]:
            if not self._put(at, f"atoll: {self._lost[at]} lines were written too fast, and are lost\n".encode()):
                self._lost[at] += 1
                return
            self._lost[at] = 0
        data = text.encode(errors="replace") + b"\n"
        for start in range(0, len(data), ATOMIC_BYTES):
            if not self._put(at, data[start : start + ATOMIC_BYTES]):
                self._lost[at] += 1
                return

    def _put(self, at: int, data: bytes) -> bool:
        try:
            os.write(self._fds[at], data)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


class Output:
    """Reads the pipe of one process from its making until `close`."""

    def __init__(self, path: Path, readers: Mapping[str, Pipes]) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._readers = readers
        self._rest = b""
        self.blamed: set[str] = set()
        """Workers of which workerd says that they are at fault."""
        asyncio.get_running_loop().add_reader(self._fd, self._turn)

    def drain(self) -> None:
        """Take in what is there now."""
        while self._fd >= 0 and self._turn():
            pass
        if self._rest:
            self._take(self._rest)
            self._rest = b""

    def close(self) -> None:
        """Take in the last, and remove the pipe."""
        if self._fd < 0:
            return
        self.drain()
        self.let_go()
        self._path.unlink(missing_ok=True)

    def let_go(self) -> None:
        """Leave the pipe to the next agent."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _turn(self) -> bool:
        try:
            data = os.read(self._fd, TURN_BYTES)
        except BlockingIOError:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > REST_BYTES_MAX:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._take(line)
        return True

    def _take(self, data: bytes) -> None:
        try:
            line = _decoder.decode(data)
        except msgspec.MsgspecError:
            line = _Line(data.decode(errors="replace"), "fatal")
        error = line.level in _ERRORS
        start, name, text = (*line.message.split(MARK, 2), "", "")[:3]
        if not start and name in self._readers:
            self._readers[name].write(text, error=error)
        elif (found := _OF_SERVICE.match(line.message)) is not None and found[1] in self._readers:
            if line.level != "warn":
                self.blamed.add(found[1])
            self._readers[found[1]].write(found[2], error=True)
        elif line.message and not line.message.startswith(_TOLD_BY_TAIL) and _CACHE not in line.message:
            for pipes in self._readers.values():
                pipes.write(f"shared process: {line.message}", error=True)
