"""What every Atoll process does first: options, logs, signals, and dying with its supervisor."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog
import uvloop

from atoll.entry.config import (
    API_DEFAULT,
    DATA_DEFAULT,
    DOMAIN_DEFAULT,
    EXIT_HOPELESS,
    INGRESS_DEFAULT,
    Config,
)
from atoll.entry.unbreakable import guard_stderr
from atoll.model.errors import AtollError, Retry, Unauthenticated

PR_SET_PDEATHSIG = 1
EXIT_FAILED = 1
TOKEN_WAIT_S = 60.0
"""How long a token file may take to appear; the server writes it when it first starts."""


class Stop(asyncio.Event):
    """Set when the process is told to end; `signal` is how. The agent stops its instances on SIGINT, and not on SIGTERM."""

    signal: int = 0

    def by(self, number: int) -> None:
        self.signal = number
        self.set()


Main = Callable[[Config, Stop], Awaitable[None]]


def parse(role: str, arguments: list[str] | None = None) -> Config:
    """Return the settings in the process's arguments."""
    parser = argparse.ArgumentParser(prog=f"atoll {role}")
    parser.add_argument("--data", type=Path, default=DATA_DEFAULT)
    parser.add_argument("--api", default=API_DEFAULT)
    parser.add_argument("--ingress", default=INGRESS_DEFAULT)
    parser.add_argument("--ingress-tls-port", default="")
    parser.add_argument("--otlp", default="")
    parser.add_argument("--trace-percent", type=float, default=Config.trace_percent)
    parser.add_argument("--subnet", default="")
    parser.add_argument("--fabric-address", default="")
    parser.add_argument("--no-ipv6", action="store_true")
    parser.add_argument("--ipv6-address", default="")
    parser.add_argument("--domain", default=DOMAIN_DEFAULT)
    parser.add_argument("--node", default="")
    parser.add_argument("--site", default="local")
    parser.add_argument("--region", default="local")
    for name in ("label", "taint"):
        parser.add_argument(f"--{name}", dest=f"{name}s", action="append", default=[])
    parser.add_argument("--default-registry", default="")
    parser.add_argument("--registry-auth", type=Path)
    parser.add_argument("--nvproxy-driver", default="")
    parser.add_argument("--prometheus", default="")
    parser.add_argument("--cdi-devices", default="")
    parser.add_argument("--log-json", action="store_true")
    parser.add_argument("--store", default="")
    for name in ("ca", "cert", "key"):
        parser.add_argument(f"--store-{name}", type=Path)
    for name in ("listen", "advertise", "server", "ca"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--certificate-life", default=Config.certificate_life)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--insecure-plain", action="store_true")
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return Config(**given)


def run(role: str, main: Main) -> None:
    """Run a process until SIGTERM or SIGINT, which set the event that `main` got; then `main` ends in its own time.

    When it cannot go on it says the cause and the mend, and exits 1, or `EXIT_HOPELESS` where another try cannot help.
    """
    config = parse(role)
    set_up_logs(role, as_json=config.log_json)
    die_with_parent()
    raise_open_files()
    if status := status_of(lambda: uvloop.run(_until_stopped(main, config))):
        sys.exit(status)


def status_of(work: Callable[[], object]) -> int:
    """Do `work`; report the errors that it raises, alone or in groups, and return the exit status that they mean."""
    errors: list[AtollError] = []
    try:
        work()
    except* AtollError as group:
        errors = _leaves(group)
    # Not inside of the clause above: what is raised there comes out within a group, SystemExit too.
    for error in errors:
        report(error)
    if not errors:
        return 0
    return EXIT_HOPELESS if any(error.retry is Retry.NEVER for error in errors) else EXIT_FAILED


async def _until_stopped(main: Main, config: Config) -> None:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.by, number)
    await main(config, stop)


async def run_until(stop: Stop, work: Coroutine[Any, Any, None], last: Callable[[], Awaitable[None]] | None = None) -> None:
    """Run `work` until `stop`, then `last` beside it, then cancel it and wait for its end. What `work` raises is raised."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if last is not None and not working.done():
            await last()
    finally:
        stopping.cancel()
        working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Run all of `work` at once; when one raises, the others are cancelled."""
    async with asyncio.TaskGroup() as group:
        for part in work:
            group.create_task(part)


async def read_token(path: Path, stop: Stop) -> str | None:
    """Return the token in a file, waiting until it is there; None when told to stop first."""
    for _ in range(int(TOKEN_WAIT_S / 0.05)):
        if stop.is_set():
            return None
        if path.exists():
            return path.read_text().strip()
        await asyncio.sleep(0.05)
    raise Unauthenticated(f"there is no token in {path}", mend="write one there; `atoll token create` makes one")


def _leaves(group: BaseExceptionGroup[AtollError]) -> list[AtollError]:
    found: list[AtollError] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


def report(error: AtollError) -> None:
    """Say on stderr what went wrong and what would help."""
    print(f"error: {error}", file=sys.stderr)
    if error.mend:
        print(f"mend: {error.mend}", file=sys.stderr)


def set_up_logs(role: str, *, as_json: bool) -> None:
    """Write structured events to stderr: for people on a terminal, as JSON otherwise when asked. No log line ever raises."""
    guard_stderr()
    colours = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=24)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S.%f", utc=as_json),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=role)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{role} %(levelname)s %(name)s: %(message)s")


def raise_open_files() -> None:
    """Let this process open as many files as it may: each connection that is held is one, and service managers begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a kernel's own bound may be lower: it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the supervisor dies, so that none is left without one."""
    if os.environ.get("ATOLL_SUPERVISOR") == str(os.getppid()):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.environ["ATOLL_SUPERVISOR"] != str(os.getppid()):
            sys.exit(EXIT_FAILED)
