"""`atoll exec`: a command inside a running instance, with its terminal, its input and its exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from atoll.cli import names
from atoll.cli.finding import Finder, of_any, of_sandbox
from atoll.cli.session import Session, command, report
from atoll.model.errors import AtollError, CommandNotFound, Invalid, Unavailable
from atoll.model.streams import ExecOptions, Kind

if TYPE_CHECKING:
    from atoll.sdk.streams import Exec

READ_BYTES = 32_768
SHELL = ("/bin/sh",)
EXIT_COMMAND_NOT_FOUND = 127
"""As a shell says it."""


def exec_command(find: Finder, *, kind: str, metavar: str, example: str, help: str) -> click.Command:
    """Return an `exec` that works in what `find` finds; the shell completes names of `kind`."""

    @command(
        name="exec",
        example=example,
        help=help,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.option("--interactive", "-i", is_flag=True, help="Pass stdin on.")
    @click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
    @click.option("--env", "-e", multiple=True, metavar="NAME=VALUE", help="Set a variable for the command (not for secrets).")
    @click.option("--workdir", "-w", metavar="DIR", help="Where the command starts.")
    @click.option("--user", "-u", metavar="USER[:GROUP]", help="Who the command runs as.")
    @names.argument("name", kind, metavar=metavar)
    @click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND…")
    async def made(
        session: Session,
        interactive: bool,
        tty: bool,
        env: tuple[str, ...],
        workdir: str | None,
        user: str | None,
        name: str,
        argv: tuple[str, ...],
    ) -> None:
        argv = argv[1:] if argv[:1] == ("--",) else argv
        if tty and not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise Invalid("--tty: stdin and stdout are not a terminal", field="tty", mend="leave out -t")
        rows, columns = _size()
        options = ExecOptions(
            argv=argv or SHELL, env=variables(env, tty=tty), workdir=workdir, user=user, tty=tty, rows=rows, columns=columns
        )
        async with session.client() as client:
            running = await client.exec(session.project, await find(client, session.project, name), options)
            try:
                with _raw_terminal() if tty else contextlib.nullcontext():
                    code = await _attend(running, interactive=interactive, tty=tty)
            except CommandNotFound as error:
                report(error)
                code = EXIT_COMMAND_NOT_FOUND
            finally:
                await running.close()
        click.get_current_context().exit(code)

    return made


execute = exec_command(
    of_any,
    kind="running",
    metavar="APP|INSTANCE",
    example="atoll exec hello -- ls -l /app\natoll exec -it hello   # a shell\necho hi | atoll exec -i hello -- cat",
    help="""Run a command inside a running instance; its exit status becomes this command's own.

    It is 127 for a command that is not there. Of an app, a ready instance is taken. Without a command, a shell.
    """,
)


execute_sandbox = exec_command(
    of_sandbox,
    kind="sandboxes",
    metavar="SANDBOX",
    example="atoll sandbox exec try -- python -V\natoll sandbox exec -it try   # a shell",
    help="""Run a command inside a sandbox; its exit status becomes this command's own. Without a command, a shell.""",
)


async def _attend(running: Exec, *, interactive: bool, tty: bool) -> int:
    """Carry input, output, signals and sizes until the command has ended; return its exit status."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(number: signal.Signals) -> None:
        with contextlib.suppress(Unavailable):  # it has ended meanwhile
            await (running.resize(*_size()) if number is signal.SIGWINCH else running.signal(number.name))

    def on_signal(number: signal.Signals) -> None:
        task = loop.create_task(pass_on(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in (signal.SIGWINCH,) if tty else (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    if tty:
        on_signal(signal.SIGWINCH)  # it may have changed since the command was asked for, with nobody there to hear it
    feeder = asyncio.ensure_future(_feed(running) if interactive else _no_input(running))
    try:
        async for kind, data in running:
            stream = sys.stdout if kind is Kind.STDOUT else sys.stderr
            stream.buffer.write(data)
            stream.buffer.flush()
        return running.code if running.code is not None else 1
    finally:
        feeder.cancel()
        await asyncio.gather(feeder, *tasks, return_exceptions=True)


async def _no_input(running: Exec) -> None:
    with contextlib.suppress(Unavailable):
        await running.end_input()


async def _feed(running: Exec) -> None:
    """Pass stdin on, whatever it is: a terminal, a pipe or a file."""
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()
    try:
        while data := await _read(loop, descriptor):
            await running.send(data)
        await running.end_input()
    except (Unavailable, AtollError):
        pass  # the command has ended; its exit status is on the way


async def _read(loop: asyncio.AbstractEventLoop, descriptor: int) -> bytes:
    """Wait until there is input and return it. A file cannot be waited for, and never has to be."""
    ready = loop.create_future()
    try:
        loop.add_reader(descriptor, lambda: None if ready.done() else ready.set_result(None))
    except PermissionError:
        return os.read(descriptor, READ_BYTES)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, READ_BYTES)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Let every key through to the command, and give the terminal back as it was."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _size() -> tuple[int, int]:
    """Return the terminal's rows and columns."""
    try:
        size = os.get_terminal_size(sys.stdin.fileno())
    except (OSError, ValueError):
        return 24, 80
    return size.lines, size.columns


def variables(pairs: tuple[str, ...], *, tty: bool = False) -> dict[str, str]:
    """Return what `--env NAME=VALUE` options set. Raises Invalid."""
    made = {"TERM": os.environ.get("TERM", "xterm")} if tty else {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise Invalid(f"--env: {pair!r} is not NAME=VALUE", field="env")
        made[name] = value
    return made
