"""`atoll ingresses`: those that have registered, and to forget one that is gone for good."""

from __future__ import annotations

import click

from atoll.cli.session import Session, command, group


@group(example="atoll ingresses\natoll ingresses forget edge-2")
def ingresses() -> None:
    """List the ingresses; forget one that is gone for good."""


@command(name="list", example="atoll ingresses list")
async def list_ingresses(session: Session) -> None:
    """List the ingresses, with when the server last heard of each."""
    from rich.markup import escape

    async with session.client() as client:
        views = await client.ingresses()
    if session.json:
        session.output.json(views)
        return
    rows = [
        (
            view.ingress.name,
            view.ingress.site,
            f"{view.ingress.address or 'localhost'}:{view.ingress.http_port}",
            "–" if view.silent_s is None else f"{view.silent_s:.0f} s ago",
            f"{view.requests_per_s:g}",
            str(view.problems) if view.problems else "",
        )
        for view in views
    ]
    session.output.table(("INGRESS", "SITE", "ADDRESS", "HEARD OF>", "REQUESTS/S>", "PROBLEMS>"), rows, empty="no ingress yet")
    for view in views:
        if view.problem:
            session.output.say(f"[yellow]![/] {escape(view.ingress.name)}: {escape(view.problem)}")


@command(example="atoll ingresses forget edge-2")
@click.argument("name", metavar="INGRESS")
async def forget(session: Session, name: str) -> None:
    """Forget an ingress that is gone for good.

    Until then every instance that drains waits for its word, and no app is put to sleep while it is silent. It is refused while
    the ingress is heard of, and in the first 35 s of a server. One that comes back after all must join anew.
    """
    async with session.client() as client:
        view = await client.forget_ingress(name)
    if session.json:
        session.output.json(view)
    else:
        session.output.say(f"[green]✓[/] ingress {name} is forgotten")


for _each in (list_ingresses, forget):
    ingresses.add_command(_each)
