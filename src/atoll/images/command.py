"""Running a tool of the machine during a build, with its words passed on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from atoll.model.errors import DeadlineExceeded

LINE_BYTES_MAX = 64 << 10
LINES_KEPT = 200
"""Of what a tool says, the last so many lines are kept for its error."""
_CREDENTIALS = re.compile(r"(://)[^/@\s]+@")
_NETWORK = re.compile(
    r"Could not resolve|Temporary failure|Could not connect|Unable to connect|Connection (?:timed out|refused|failed|reset)"
    r"|Network is unreachable|Failed to establish a new connection|NewConnectionError|ConnectTimeout|ReadTimeout|No route to host",
    re.IGNORECASE,
)


class Finished(Struct, frozen=True):
    status: int
    output: str
    """The last lines of stdout and stderr, without credentials."""

    @property
    def lacks_network(self) -> bool:
        return _NETWORK.search(self.output) is not None

    def last(self, prefix: str = "") -> str:
        """Return the last line that begins with `prefix`, or the last of all."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if line.startswith(prefix)), lines[-1] if lines else "it said nothing")


async def run_tool(
    argv: Sequence[str], *, env: Mapping[str, str], deadline_s: float, on_line: Callable[[str], None], isolated: bool = False
) -> Finished:
    """Run `argv` to its end; whatever happens, it has ended on return, and all it started with `isolated`.

    `isolated` gives it mount and process namespaces of its own, so that neither mounts nor processes outlive it, even
    if this process is killed. Raises DeadlineExceeded.
    """
    if isolated:
        namespaces = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private", "--")
        argv = ("setpriv", "--pdeathsig", "KILL", "--", *namespaces, *argv)
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=dict(env),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=LINE_BYTES_MAX,
    )
    lines: list[str] = []
    try:
        async with asyncio.timeout(deadline_s):
            await _read_lines(process, lines, on_line)
            status = await process.wait()
    except TimeoutError:
        raise DeadlineExceeded(
            f"{_name(argv)} took more than {deadline_s:.0f} s", mend="check the network and the mirrors"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Finished(status, "\n".join(lines))


async def _read_lines(process: asyncio.subprocess.Process, lines: list[str], on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None  # noqa: S101 (it was asked for above)
    while True:
        try:
            data = await process.stdout.readline()
        except ValueError:  # a line over the limit; it has been dropped
            continue
        if not data:
            return
        line = _CREDENTIALS.sub(r"\1…@", data.decode("utf-8", "replace").rstrip())
        lines.append(line)
        del lines[:-LINES_KEPT]
        on_line(line)


def _name(argv: Sequence[str]) -> str:
    tools = ("mmdebstrap", "pip")
    return next((tool for tool in tools if tool in argv), argv[0])
