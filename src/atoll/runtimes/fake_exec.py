"""Commands of the fake runtime: a handful of programs, run in memory."""

from __future__ import annotations

import asyncio

from atoll.model.errors import CommandNotFound
from atoll.runtimes.signals import signal_number

OUTPUT_CHUNKS_MAX = 64
CHUNK_BYTES_MAX = 64 << 10

IGNORED_BY_DEFAULT = frozenset({"SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH"})


class FakeExecution:
    """A command that runs beside a fake instance's process."""

    def __init__(self, *, tty: bool, rows: int, columns: int) -> None:
        self.tty = tty
        self.size = (rows, columns)
        self.code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.stdin_closed = False
        self.echoes = False
        """Its output is its input, until that ends."""
        self._output: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue(OUTPUT_CHUNKS_MAX + 1)
        self._silent = False
        self._room = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self.code.done()

    def emit(self, stream: int, data: bytes) -> None:
        for at in range(0, len(data), CHUNK_BYTES_MAX):
            if self._output.qsize() < OUTPUT_CHUNKS_MAX:
                self._output.put_nowait((1 if self.tty else stream, data[at : at + CHUNK_BYTES_MAX]))

    def end(self, code: int) -> None:
        if not self.code.done():
            self.code.set_result(code)
            self._output.put_nowait(None)
            self._room.set()

    def kill(self) -> None:
        self.end(137)

    async def read(self) -> tuple[int, bytes] | None:
        if self._silent:
            return None
        item = await self._output.get()  # as long as the command runs and says nothing
        self._silent = item is None
        self._room.set()
        return item

    async def write(self, data: bytes) -> None:
        if self.ended or self.stdin_closed or not self.echoes:
            return
        if self._output.qsize() >= OUTPUT_CHUNKS_MAX:
            self._room.clear()
            await self._room.wait()  # until someone reads, or the command ends
        self.emit(1, data)

    async def close_stdin(self) -> None:
        self.stdin_closed = True
        if self.echoes:
            self.end(0)

    async def resize(self, rows: int, columns: int) -> None:
        self.size = (rows, columns)

    async def signal(self, name: str) -> None:
        number = signal_number(name)
        if name not in IGNORED_BY_DEFAULT:
            self.end(128 + number)

    async def wait(self) -> int:
        return await asyncio.shield(self.code)

    async def close(self) -> None:
        self.kill()


def run_command(argv: tuple[str, ...], *, tty: bool, rows: int, columns: int) -> FakeExecution:
    """Start `true`, `false`, `exit N`, `echo WORDS`, `cat`, `sleep SECONDS`, `sh -c "exit N"`; all else ends with 0.

    Raises CommandNotFound for `missing` and for no command at all.
    """
    execution = FakeExecution(tty=tty, rows=rows, columns=columns)
    match argv:
        case () | ("missing", *_):
            name = argv[0] if argv else ""
            raise CommandNotFound(f'exec: "{name}": executable file not found in $PATH', mend="check the command and the image")
        case ("false", *_):
            execution.end(1)
        case ("exit", code, *_):
            execution.end(int(code))
        case ("sh", "-c", script) if script.startswith("exit "):
            execution.end(int(script.removeprefix("exit ")))
        case ("echo", *words):
            execution.emit(1, (" ".join(words) + "\n").encode())
            execution.end(0)
        case ("cat",):
            execution.echoes = True
        case ("sleep", seconds, *_):
            asyncio.get_running_loop().call_later(float(seconds), execution.end, 0)
        case _:
            execution.end(0)
    return execution
