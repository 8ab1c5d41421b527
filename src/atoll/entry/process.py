"""What every Atoll process does first: options, logs, signals, and dying with its supervisor."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
import uvloop

from atoll.entry.config import (
    API_DEFAULT,
    DATA_DEFAULT,
    DOMAIN_DEFAULT,
    INGRESS_DEFAULT,
    SUBNET_DEFAULT,
    Config,
)
from atoll.model.errors import AtollError

PR_SET_PDEATHSIG = 1
EXIT_FAILED = 1

Main = Callable[[Config, asyncio.Event], Awaitable[None]]


def parse(role: str, arguments: list[str] | None = None) -> Config:
    """Return the settings in the process's arguments."""
    parser = argparse.ArgumentParser(prog=f"atoll {role}")
    parser.add_argument("--data", type=Path, default=DATA_DEFAULT)
    parser.add_argument("--api", default=API_DEFAULT)
    parser.add_argument("--ingress", default=INGRESS_DEFAULT)
    parser.add_argument("--subnet", default=SUBNET_DEFAULT)
    parser.add_argument("--domain", default=DOMAIN_DEFAULT)
    parser.add_argument("--node", default="")
    parser.add_argument("--site", default="local")
    parser.add_argument("--region", default="local")
    parser.add_argument("--default-registry", default="")
    parser.add_argument("--log-json", action="store_true")
    return Config(**vars(parser.parse_args(arguments)))


def run(role: str, main: Main) -> None:
    """Run a process until SIGTERM or SIGINT, which set the event that `main` got; then `main` ends in its own time.

    Exits 1 with one line that names the cause and the mend when it cannot go on.
    """
    config = parse(role)
    set_up_logs(role, as_json=config.log_json)
    die_with_parent()
    try:
        uvloop.run(_until_stopped(main, config))
    except* AtollError as group:
        for error in _leaves(group):
            report(error)
        sys.exit(EXIT_FAILED)


async def _until_stopped(main: Main, config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await main(config, stop)


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
    """Write structured events to stderr: for people on a terminal, as JSON otherwise when asked."""
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


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the supervisor dies, so that none is left without one."""
    if os.environ.get("ATOLL_SUPERVISOR") == str(os.getppid()):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.environ["ATOLL_SUPERVISOR"] != str(os.getppid()):
            sys.exit(EXIT_FAILED)
