"""`atoll events`: what happened, oldest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from atoll.cli.session import Session, command

if TYPE_CHECKING:
    from atoll.model.records import Event
    from atoll.sdk.client import Client

COLUMNS = ("WHEN", "SUBJECT", "EVENT", "MESSAGE")


@command(example="atoll events hello\natoll events -f")
@click.argument("subject", required=False, metavar="[APP|KIND/NAME]")
@click.option("--follow", "-f", is_flag=True, help="Go on and print events as they happen, until Ctrl-C.")
@click.option("--limit", "-n", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many of the newest.")
async def events(session: Session, subject: str | None, follow: bool, limit: int) -> None:
    """Show what happened in the project, or to one subject: APP, app/NAME, job/NAME, instance/ID, node/NAME."""
    subject = f"app/{subject}" if subject and "/" not in subject else subject
    async with session.client() as client:
        page = await client.events(session.project, subject=subject, limit=limit)
        oldest_first = list(reversed(page.items))
        if session.json:
            if not follow:
                session.output.json(oldest_first)
                return
            for event in oldest_first:
                session.output.json_line(event)
        elif follow:
            for event in oldest_first:
                _print(session, event)
        else:
            session.output.table(COLUMNS, [row(event) for event in oldest_first], empty="nothing has happened yet")
        if follow:
            await _follow(session, client, subject, page.revision + 1)


async def _follow(session: Session, client: Client, subject: str | None, start: int) -> None:
    from atoll.model import codec
    from atoll.model.records import Event

    async for line in client.watch(("events",), project=session.project, start=start):
        if line.record is None:
            continue  # an old event was cleared away
        event = codec.convert(line.record, Event)
        if subject in (None, event.subject, f"app/{event.data.get('app')}"):
            if session.json:
                session.output.json_line(event)
            else:
                _print(session, event)


def row(event: Event) -> tuple[Any, ...]:
    """Return an event's line in a table."""
    from atoll.cli.output import clock, dim

    return (dim(clock(event.at)), event.subject, _code(event), event.message)


def _code(event: Event) -> Any:
    from rich.text import Text

    return Text(event.code, style={"error": "red", "warning": "yellow"}.get(event.severity, ""))


def _print(session: Session, event: Event) -> None:
    from rich.text import Text

    from atoll.cli.output import clock

    line = Text.assemble((clock(event.at), "dim"), f"  {event.subject:<28}  ", _code(event), "  ", event.message)
    session.output.print(line)
