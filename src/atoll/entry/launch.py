"""Start `atoll up` in the background and see that it serves; end it again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from atoll.entry.config import Config
from atoll.entry.preflight import check_settings, data_error, make_data
from atoll.entry.up import check, holder, log_path
from atoll.model.errors import AtollError, Conflict, DeadlineExceeded, NotFound
from atoll.model.records import NodeHealth
from atoll.sdk.client import Client
from atoll.sdk.context import load

READY_S = 60.0
"""From the start of `atoll up` until node and ingress have reported."""
STOP_S = 90.0
"""The longest an orderly end may take: every child's, one after the other."""
POLL_S = 0.02
LOG_LINES = 20
LOG_BYTES_MAX = 4 << 20
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d+ |\{")
"""How an event begins in the log, for people or as JSON."""


def launch(config: Config, *, progress: Callable[[str], None] = lambda _: None) -> int:
    """Start `atoll up` in the background, wait until it serves, and return its process id.

    Raises Conflict, Unsupported before anything is started; AtollError with the last log lines when it ended by itself;
    DeadlineExceeded after `READY_S`, and then it has been stopped.
    """
    if (pid := holder(config)) is not None:
        raise Conflict(
            f"{config.data} is in use by another `atoll up`, process {pid}",
            mend="use that one, end it with `atoll down`, or give another --data",
        )
    check(config)
    check_settings(config)
    make_data(config)
    command = [sys.executable, "-m", "atoll.entry.up", *config.arguments()]
    try:
        log = open(log_path(config), "ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise data_error(config, error) from None
    with log:
        begin = log.tell()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/")
    try:
        asyncio.run(_wait_ready(config, child, begin, progress))
    except AtollError:
        child.terminate()
        child.wait(STOP_S)
        raise
    return child.pid


async def _wait_ready(config: Config, child: subprocess.Popen[bytes], begin: int, progress: Callable[[str], None]) -> None:
    deadline = time.monotonic() + READY_S
    waiting_for = "the server"
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise _ended(config, begin, child.returncode)
        progress(waiting_for)
        with contextlib.suppress(AtollError):
            lacking = await missing(config)
            if lacking is None:
                return
            waiting_for = lacking
        await asyncio.sleep(POLL_S)
    raise DeadlineExceeded(f"{waiting_for} was not ready after {READY_S:.0f} s; the log's last lines:\n{_tail(config, begin)}")


async def missing(config: Config) -> str | None:
    """Return what does not serve yet; None when all does. Raises AtollError while the server does not answer."""
    saved = load(config.client_file)
    if saved is None:
        return "the server"
    async with Client.connect(saved.address, saved.token, ca=saved.ca) as client:
        if not (await client.info()).ingresses:
            return "the ingress"
        node = next((view for view in await client.nodes() if view.node.name == config.node_name), None)
        return None if node is not None and node.heartbeat is not None and node.health is NodeHealth.READY else "the agent"


def _ended(config: Config, begin: int, status: int) -> AtollError:
    """Return why `atoll up` ended: what a process of it said was wrong; where none did, the log's last lines."""
    cause = error_in(_logged(config, begin))
    if cause is None:
        return AtollError(f"`atoll up` ended with status {status}; its last lines:\n{_tail(config, begin)}")
    said, mend = cause
    return AtollError(said, mend=mend or f"see {log_path(config)}")


def error_in(lines: Sequence[str]) -> tuple[str, str] | None:
    """Return the message and the mend of the first error that a process reported (`process.report`), among its log lines."""
    for index, line in enumerate(lines):
        if line.startswith("error: "):
            said = [line.removeprefix("error: ")]
            for after in lines[index + 1 :]:
                if after.startswith("mend: "):
                    return "\n".join(said), after.removeprefix("mend: ")
                if LOG_LINE.match(after) or after.startswith("atoll: "):
                    break
                said.append(after)
            return "\n".join(said), ""
    return None


def _tail(config: Config, begin: int) -> str:
    return "\n".join(_logged(config, begin)[-LOG_LINES:])


def _logged(config: Config, begin: int) -> list[str]:
    """Return the lines that were logged since `begin`, a position in bytes."""
    with open(log_path(config), "rb") as log:
        log.seek(begin)
        return log.read(LOG_BYTES_MAX).decode(errors="replace").splitlines()


def terminate(config: Config, *, keep_running: bool = False) -> int:
    """End the `atoll up` that holds the data directory, and return the process id that it had.

    Its instances are stopped too, unless `keep_running`: then the next `atoll up` adopts them. Raises NotFound: none runs;
    DeadlineExceeded: it has not ended after `STOP_S`, and may yet.
    """
    pid = holder(config)
    if pid is None:
        raise NotFound(f"no `atoll up` runs over {config.data}", mend="name its directory with --data")
    os.kill(pid, signal.SIGHUP if keep_running else signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while holder(config) is not None:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"`atoll up`, process {pid}, has not ended after {STOP_S:.0f} s", mend=f"see {log_path(config)}")
        time.sleep(POLL_S)
    return pid
