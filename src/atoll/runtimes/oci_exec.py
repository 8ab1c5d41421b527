"""A command beside an instance's process, by an OCI runtime's detached `exec` under a shim of its own.

The command holds its pipes or its terminal directly: no byte of it is copied by the runtime's tool.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from atoll.model.errors import NotFound
from atoll.runtimes.exec_tool import ExecFiles, ExecTool, Inner, inner_file
from atoll.runtimes.oci import process as oci_process
from atoll.runtimes.oci_box import NETNS, SavedConfig, load_config, user_in, write_private
from atoll.runtimes.oci_console import ConsoleSocket, Stream, set_size
from atoll.runtimes.oci_container import failure
from atoll.runtimes.oci_filter import Filter, handed
from atoll.runtimes.readiness import ready
from atoll.runtimes.shim import Launch
from atoll.runtimes.signals import signal_number
from atoll.runtimes.users import User

DRAIN_S = 1.0
"""How long output is awaited, in silence, after the command's end: its children may hold the pipes for ever."""
CLOSE_S_MAX = 2.0
EXEC_S_MAX = 60.0
_KILLED = 137
_LOST = 128
"""What stands for a command ends with it when it loses sight of the command."""
_EOT = b"\x04"


class OciExecution:
    """Made by a runtime's `exec` when the command runs; see `model.ports.runtime.Execution`."""

    def __init__(
        self, launch: Launch, pid: int, *, stdin: Stream, outputs: dict[int, Stream], tty: bool, inner: Inner | None
    ) -> None:
        self._launch = launch
        self._inner = inner
        self._inner_pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pidfd = _open_pid(pid)
        self._stdin = stdin
        self._outputs = outputs
        self._tty = tty
        self._last = 0
        self._closed = False
        self._code: asyncio.Task[int] = asyncio.create_task(self._await_code())

    async def _await_code(self) -> int:
        while (news := await self._launch.news(None)) is not None:  # as long as the command runs
            if news[0] == "inner":
                self._inner_pid.set_result(news[1])
            if news[0] == "exit":
                code = os.waitstatus_to_exitcode(news[1]) if os.WIFEXITED(news[1]) else 128 + os.WTERMSIG(news[1])
                if self._inner is not None and code == _LOST and await self._inner.gone():
                    return _KILLED
                return code
        return _KILLED  # its shim was killed, and the command with it

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def ended(self) -> bool:
        return self._code.done()

    async def read(self) -> tuple[int, bytes] | None:
        while self._outputs:
            for number in sorted(self._outputs, key=lambda number: number == self._last):
                data = self._outputs[number].read()
                if data:
                    self._last = number
                    return number, data
                if data is not None:
                    self._end_output(number)
            if self._outputs and not await self._output_ready():
                for number in list(self._outputs):
                    self._end_output(number)
        return None

    def _end_output(self, number: int) -> None:
        stream = self._outputs.pop(number)
        if stream is not self._stdin:
            stream.close()

    async def _output_ready(self) -> bool:
        """Wait until there is output; return False when the command ended and nothing came for DRAIN_S."""
        waits = {asyncio.create_task(ready(stream.fd)) for stream in self._outputs.values()}
        try:
            done, _ = await asyncio.wait({*waits, self._code}, return_when=asyncio.FIRST_COMPLETED)
            if done & waits:
                return True
            done, _ = await asyncio.wait(waits, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            await self._stdin.write(data)

    async def close_stdin(self) -> None:
        if self._tty:
            await self.write(_EOT)
        else:
            self._stdin.close()

    async def resize(self, rows: int, columns: int) -> None:
        if self._tty and self._stdin.fd >= 0:
            set_size(self._stdin.fd, rows, columns)

    async def signal(self, name: str) -> None:
        await self._send(signal_number(name))

    async def _send(self, number: int) -> None:
        if self._inner is not None and not self.ended:
            waits: set[asyncio.Future[Any]] = {self._inner_pid, self._code}
            await asyncio.wait(waits, timeout=CLOSE_S_MAX, return_when=asyncio.FIRST_COMPLETED)
            if self._inner_pid.done():
                await self._inner.send(self._inner_pid.result(), number)
        elif self._pidfd >= 0 and not self.ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(NotFound):  # with its instance it went, too
            await self._send(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # in a paused instance even this signal waits; the shim then does the rest
            await asyncio.wait_for(asyncio.shield(self._code), CLOSE_S_MAX)
        self._launch.close()
        self._code.cancel()
        for stream in (self._stdin, *self._outputs.values()):
            stream.close()
        self._outputs.clear()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _open_pid(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


async def start_execution(
    directory: Path,
    tool: ExecTool,
    *,
    argv: Sequence[str],
    env: Sequence[tuple[str, str]],
    workdir: str | None,
    user: str | None,
    size: tuple[int, int] | None,
    base_id: int | None,
    inner: Inner | None = None,
    filter: Filter | None = None,
) -> OciExecution:
    """Start `argv` with `tool` in the container whose box is in `directory`; with `size` (rows, columns) it gets a terminal.

    Where the box relies on it, `filter` puts the filter on. Raises RuntimeFailed, ImageError (no such user).
    """
    directory = directory / "exec"
    directory.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as files:
        names = iter(f"{uuid.uuid4().hex[:12]}.{kind}" for kind in ("json", "log", "out", "pid", "console"))
        process, log_path, output, pid_file, console_name = (directory / name for name in names)
        for path in (process, log_path, output):
            files.callback(path.unlink, missing_ok=True)
        config = load_config(directory.parent)
        body, owner = _process(config, argv, env, workdir, user, size, base_id)
        descriptors = files.enter_context(handed(directory.parent, filter, body))
        write_private(process, tool.encode(filter.process(body) if filter and descriptors else body))
        shim = ["exec", config.annotations[NETNS], str(pid_file)]
        if descriptors:
            shim = ["filtered", str(log_path), *shim]
        if inner is not None:
            shim += [str(inner_file(pid_file)), *inner.command("@", signal.SIGKILL)]
        if size is None:
            command = [*shim, "--", *tool.command(ExecFiles(process, log_path, pid_file, None))]
            return await _start_on_pipes(command, output, owner, argv[0], log_path, inner, descriptors)
        console = ConsoleSocket(directory, console_name.name)
        files.callback(console.close)
        command = [*shim, "--", *tool.command(ExecFiles(process, log_path, pid_file, console.path))]
        launch = Launch(command, stdio=None, output=output, handed=descriptors, close_at_end=True)
        pid = await _started(launch, log_path, argv[0])
        try:
            terminal = Stream(await console.terminal())
        except BaseException:
            launch.close()
            raise
        set_size(terminal.fd, *size)
        return OciExecution(launch, pid, stdin=terminal, outputs={1: terminal}, tty=True, inner=inner)


async def _start_on_pipes(
    arguments: list[str],
    output: Path,
    owner: tuple[int, int],
    name: str,
    log_path: Path,
    inner: Inner | None,
    descriptors: Sequence[int],
) -> OciExecution:
    ours: list[int] = []
    with ExitStack() as theirs:
        ends = []
        for writing in (True, False, False):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            ours.append(writer if writing else reader)
            ends.append(reader if writing else writer)
            theirs.callback(os.close, ends[-1])
            os.fchown(ends[-1], *owner)  # so that /dev/stdout can be opened by name
        try:
            stdio = (ends[0], ends[1], ends[2])
            launch = Launch(arguments, stdio=stdio, output=output, handed=descriptors, close_at_end=True)
            theirs.close()
            pid = await _started(launch, log_path, name)
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
    stdin, stdout, stderr = (Stream(fd) for fd in ours)
    return OciExecution(launch, pid, stdin=stdin, outputs={1: stdout, 2: stderr}, tty=False, inner=inner)


async def _started(launch: Launch, log_path: Path, name: str) -> int:
    try:
        news = await launch.news(EXEC_S_MAX)
        if news is None or news[0] != "pid":
            raise failure(log_path, name)
    except BaseException:
        launch.close()  # should it start after all, its shim kills it
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(launch.ending.event.wait(), CLOSE_S_MAX)
        raise
    return news[1]


def _process(
    config: SavedConfig,
    argv: Sequence[str],
    env: Sequence[tuple[str, str]],
    workdir: str | None,
    user: str | None,
    size: tuple[int, int] | None,
    base_id: int | None,
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Return the command's `process`, and the ids on the node that it runs as."""
    own = config.process
    who = own["user"]
    variables = [(name, value) for name, _, value in (entry.partition("=") for entry in own["env"])]
    if user is None:
        account = User(who["uid"], who["gid"], tuple(who.get("additionalGids", ())))
    else:
        account = user_in(Path(config.root["path"]), user)
        variables = [*((name, value) for name, value in variables if name != "HOME"), ("HOME", account.home)]
    body = oci_process(argv, [*variables, *env], workdir or own["cwd"], account, tty=size is not None)
    if size is not None:
        body["consoleSize"] = {"height": size[0], "width": size[1]}
    return body, ((base_id or 0) + account.uid, (base_id or 0) + account.gid)
