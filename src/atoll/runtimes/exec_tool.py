"""What a runtime's tool is asked for a command beside an instance, and how such a command is reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec import Struct


class Inner(Protocol):
    """How commands are reached that the node's kernel does not know, because another kernel runs them."""

    def command(self, process: str, number: int) -> list[str]:
        """Return what sends signal `number` to `process`."""
        ...

    async def gone(self) -> bool:
        """Return whether the instance has ended, and its commands with it."""
        ...

    async def send(self, process: int, number: int) -> None:
        """Send it; a process that has ended is no error."""
        ...


class ExecFiles(Struct, frozen=True):
    """Where a runtime's tool finds what it is to run beside an instance, and where it leaves its answers."""

    process: Path
    log: Path
    """JSON, a line each."""
    pid: Path
    console: str | None
    """A unix socket for the terminal that the command gets; None for a command on the tool's own stdio."""


class ExecTool(Protocol):
    """What starts a command beside an instance, detached: it ends once the command runs."""

    hands_on: bool
    """Whether the command begins with the descriptors that were handed to the shim."""

    def encode(self, process: dict[str, Any]) -> bytes:
        """Return the `process` of an OCI configuration as the tool reads it."""
        ...

    def command(self, files: ExecFiles) -> list[str]: ...


class OciExecTool:
    """An OCI runtime's `exec --detach`; `tool` gives its command with the global options, which logs to a path."""

    hands_on = False

    def __init__(self, tool: Callable[[Path], list[str]], id: str, inner: Inner | None) -> None:
        self._tool = tool
        self._id = id
        self._inner = inner

    def encode(self, process: dict[str, Any]) -> bytes:
        return msgspec.json.encode(process)

    def command(self, files: ExecFiles) -> list[str]:
        command = [*self._tool(files.log), "exec", "--detach", "--pid-file", str(files.pid), "--process", str(files.process)]
        if self._inner is not None:
            command += ["--internal-pid-file", str(inner_file(files.pid))]
        if files.console is not None:
            command += ["--console-socket", files.console]
        return [*command, self._id]


def inner_file(pid: Path) -> Path:
    return pid.with_suffix(".inner")
