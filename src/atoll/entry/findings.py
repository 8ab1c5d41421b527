"""What `atoll doctor` says of one part of the machine."""

from __future__ import annotations

import enum
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import NoReturn

from msgspec import Struct

PROBE_S = 5.0
"""The longest that one probe may take; then the part counts as not answering."""
POLL_S = 0.005


class Level(enum.StrEnum):
    OK = "ok"
    DEGRADED = "degraded"
    """It works, with less; or only use will tell."""
    MISSING = "missing"


class Finding(Struct, frozen=True, kw_only=True):
    """One part: what was found, why it matters, and how to mend it. Without a `core` part nothing can run."""

    area: str
    name: str
    level: Level
    found: str
    why: str = ""
    mend: str = ""
    core: bool = False


class Part(Struct, frozen=True):
    """A part that is looked at; call it with what was found."""

    area: str
    name: str
    why: str
    core: bool = False

    def __call__(self, level: Level, found: str, mend: str = "") -> Finding:
        mend = "" if level is Level.OK else mend
        return Finding(area=self.area, name=self.name, level=level, found=found, why=self.why, mend=mend, core=self.core)


def version_of(*command: str) -> str | None:
    """Return the first line that a tool says of its version; None when it is not there; `""` when it does not say."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = (done.stdout or done.stderr).strip()
    return said.splitlines()[0].strip() if said else ""


def works_in_child(attempt: Callable[[], None], *, deadline_s: float = PROBE_S) -> str | None:
    """Run `attempt` in a process of its own, which cannot leave anything behind; return its error, None when it worked."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _try(attempt, write)
    os.close(write)
    try:
        deadline = time.monotonic() + deadline_s
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"no answer within {deadline_s:g} s"
            time.sleep(POLL_S)
        said = os.read(read, 4096).decode(errors="replace")
        return said or (f"the probe ended with {ended[1]}" if ended[1] else None)
    finally:
        os.close(read)


def _try(attempt: Callable[[], None], report: int) -> NoReturn:
    try:
        attempt()
    except OSError as error:
        os.write(report, (os.strerror(error.errno) if error.errno else str(error)).encode())
    except BaseException as error:  # noqa: BLE001 - a probe's child has nobody else to tell
        os.write(report, f"{type(error).__name__}: {error}".encode()[:4000])
    finally:
        os._exit(0)
