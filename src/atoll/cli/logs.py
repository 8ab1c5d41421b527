"""`atoll logs`: what the instances of an app or job wrote, merged by time; with -f as they write it."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import click

from atoll.cli import names
from atoll.cli.session import Session, command
from atoll.model.errors import AtollError, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from atoll.model.streams import LogLine
    from atoll.model.views import InstanceView
    from atoll.sdk.client import Client

PALETTE = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")
FOLLOWED_MAX = 200
"""Instances whose logs are followed at once."""
REOPEN_S = 1.0
"""How long after a log's stream broke it is opened again."""
LASTED_S = 10.0
"""A stream that broke after so long was there, though nothing was written."""
READ_TOGETHER = 16
"""Logs that are read at once without -f."""


@command(example="atoll logs hello --tail 20\natoll logs -f hello")
@names.argument("name", "running", metavar="APP|JOB|INSTANCE")
@click.option("--follow", "-f", is_flag=True, help="Go on and print what is written, until Ctrl-C.")
@click.option("--tail", "-n", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.option("--since", metavar="SPAN", help="Only lines of the last SPAN, such as 10m or 1h30m.")
@click.option("--timestamps", "-t", is_flag=True, help="Print when each line was written.")
@click.option("--prefix/--no-prefix", default=None, help="Print which instance wrote each line; else only when there are several.")
async def logs(
    session: Session, name: str, follow: bool, tail: int | None, since: str | None, timestamps: bool, prefix: bool | None
) -> None:
    """Print what an app, a job or an instance wrote on its output."""
    async with session.client() as client:
        await print_logs(session, client, name, follow=follow, tail=tail, since=since, timestamps=timestamps, prefix=prefix)


async def print_logs(
    session: Session,
    client: Client,
    name: str,
    *,
    follow: bool = False,
    tail: int | None = None,
    since: str | None = None,
    timestamps: bool = False,
    prefix: bool | None = None,
) -> None:
    """Print the lines. Raises NotFound for a name that stands for nothing, or what keeps every log from being read."""
    from atoll.cli.instances import named
    from atoll.model.streams import LogOptions

    views = await named(client, session.project, name)
    options = LogOptions(follow=follow, tail=tail, since=_since(since))
    several = len(views) > 1 or (follow and bool(views) and views[0].instance.id != name and views[0].instance.release > 0)
    printer = _Printer(session, timestamps=timestamps, prefix=several if prefix is None else prefix)
    if follow:
        await _follow(session, client, name, views, options, printer)
        return
    if not views:
        raise NotFound(f"'{name}' has no instances, so there is no log", mend=await _where_else(client, session.project, name))
    await _print_kept(session, client, views, options, printer)


async def _where_else(client: Client, project: str, name: str) -> str:
    """Return where there is something to read: a schedule has no instances of its own, its runs have."""
    try:
        schedule = (await client.job(project, name)).job.spec.schedule
    except NotFound:
        schedule = None
    return (
        f"it runs by a schedule; its latest run: atoll jobs logs {name}" if schedule else f"see what happened: atoll events {name}"
    )


async def _print_kept(session: Session, client: Client, views: list[InstanceView], options: Any, printer: _Printer) -> None:
    from rich.markup import escape

    together = asyncio.Semaphore(READ_TOGETHER)
    failures: list[AtollError] = []

    async def read(view: InstanceView) -> list[tuple[LogLine, str]]:
        async with together:
            try:
                return [(line, view.instance.id) async for line in client.logs(session.project, view.instance.id, options)]
            except AtollError as error:
                failures.append(error)
                if len(views) > 1:
                    session.output.say(f"[yellow]{view.instance.id}[/]: {escape(str(error))}")
                return []

    merged = [line for lines in await asyncio.gather(*(read(view) for view in views)) for line in lines]
    merged.sort(key=lambda line: line[0].at)
    for line, id in merged if options.tail is None else merged[max(0, len(merged) - options.tail) :]:
        printer.print(line, id)
    if len(failures) == len(views):
        raise failures[0]


async def _follow(session: Session, client: Client, name: str, views: list[InstanceView], options: Any, printer: _Printer) -> None:
    """Follow the instances there are and those that come. Ends when `name` is one instance, or a job, and it has ended."""
    from msgspec.structs import replace
    from rich.markup import escape

    from atoll.model.errors import Exhausted

    followed: set[str] = set()
    running = 0
    single = bool(views) and views[0].instance.id == name
    more = not single

    def say(id: str, error: AtollError) -> None:
        session.output.say(f"[yellow]{id}[/]: {escape(str(error))}")

    async def read(id: str, wanted: Any) -> None:
        nonlocal running
        try:
            async for line in _lines(client, session.project, id, wanted, patient=lambda: more, broke=lambda error: say(id, error)):
                printer.print(line, id)
        except AtollError as error:
            if single:
                raise
            say(id, error)
        finally:
            running -= 1

    async with asyncio.TaskGroup() as group:

        def begin(id: str, wanted: Any) -> None:
            nonlocal running
            if id in followed:
                return
            if running >= FOLLOWED_MAX:
                raise Exhausted(f"'{name}' has more than {FOLLOWED_MAX} instances", mend="follow one instance's log")
            followed.add(id)
            running += 1
            group.create_task(read(id, wanted))

        for view in views:
            if view.status is not None:
                begin(view.instance.id, options)
        if not single:
            async for id in _begun(client, session.project, name):
                begin(id, replace(options, tail=None))
            more = False


async def _lines(
    client: Client, project: str, id: str, options: Any, *, patient: Callable[[], bool], broke: Callable[[AtollError], None]
) -> AsyncIterator[LogLine]:
    """Yield the lines of an instance, each once, however often the stream of them breaks; `broke` is told of it.

    Raises what keeps it from being read: at once where it never was, else after a time; not while `patient` says that it may wait.
    """
    from msgspec.structs import replace

    from atoll.model.errors import Retry
    from atoll.sdk.watching import GIVE_UP_S

    loop = asyncio.get_running_loop()
    at: float = 0.0
    told: list[str] = []
    """When the last line was written, and what has been told of that moment: before it there may be lines that nobody asked for."""
    worked, away_since = False, None
    while True:
        began, before, came = loop.time(), told.copy(), False
        try:
            async for line in client.logs(project, id, options):
                came = True
                if line.at != at:
                    at, told, before = line.at, [], []
                if before:
                    if line.text == before[0]:
                        del before[0]
                    continue
                told.append(line.text)
                yield line
            return
        except AtollError as error:
            now = loop.time()
            if came or now - began >= LASTED_S:
                worked, away_since = True, None
            waited_s = now - away_since if away_since is not None else 0.0
            if error.retry is not Retry.SAFE or (not patient() and (not worked or waited_s > GIVE_UP_S)):
                raise
            if away_since is None:
                away_since = now
                broke(error)
        await asyncio.sleep(REOPEN_S)
        if told:
            options = replace(options, tail=None, since=at)


async def _begun(client: Client, project: str, name: str) -> AsyncIterator[str]:
    """Yield the instances of an app or job that have a log, again and again; end when `name` is a job that has ended.

    Of a job those count too that have ended already: a short one may have come and gone between two looks.
    """
    from atoll.model import codec
    from atoll.model.records import Instance, JobStatus, OwnerKind, Status

    owners: dict[str, OwnerKind] = {}
    statuses: dict[str, Status] = {}
    ended = complete = False
    async for line in client.watch(("instances", "statuses", "job-statuses"), project=project, bookmarks=True):
        id = (line.key or "").partition("/")[2]
        if line.kind is None:
            complete = True
        elif line.kind == "job-statuses" and id == name:
            ended = line.record is None or codec.convert_known(line.record, JobStatus).phase.final
        elif line.record is None:
            owners.pop(id, None)
            statuses.pop(id, None)
        elif line.kind == "instances" and (instance := codec.convert_known(line.record, Instance)).owner == name:
            owners[id] = instance.owner_kind
        elif line.kind == "statuses":
            statuses[id] = codec.convert_known(line.record, Status)
        for known in owners.keys() & statuses.keys():
            status = statuses[known]
            if status.phase.live or (owners[known] is OwnerKind.JOB and status.started_at is not None):
                yield known
        if ended and complete:
            return


class _Printer:
    """Prints lines, each instance's in its own colour."""

    def __init__(self, session: Session, *, timestamps: bool, prefix: bool) -> None:
        self._session = session
        self._timestamps = timestamps
        self._prefix = prefix
        self._colours: dict[str, str] = {}
        self._plain = not session.output.out.is_terminal or session.output.out.no_color

    def print(self, line: LogLine, id: str) -> None:
        """Print one line. Escape sequences of the instance reach a terminal as they would from a local program."""
        if self._session.json:
            self._session.output.json_line(
                {"instance": id, "at": line.at, "stream": line.stream, "text": line.text, "partial": line.partial}
            )
            return
        head = f"{_stamp(line.at)} " if self._timestamps else ""
        tail = "" if line.partial else "\n"
        if self._prefix and self._plain:
            head += f"{id} | "
        elif self._prefix:
            from rich.markup import escape

            colour = self._colours.setdefault(id, PALETTE[len(self._colours) % len(PALETTE)])
            self._session.output.out.print(f"[{colour}]{escape(id)} │[/] ", end="", soft_wrap=True)
        sys.stdout.write(f"{head}{line.text}{tail}")
        sys.stdout.flush()


def _stamp(at: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _since(span: str | None) -> float | None:
    if span is None:
        return None
    import time

    from atoll.model.errors import Invalid
    from atoll.model.units import Seconds

    try:
        return time.time() - Seconds.parse(span if not span.isdigit() else int(span))
    except ValueError as error:
        raise Invalid(f"--since: {error}", field="since") from None
