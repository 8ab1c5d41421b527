"""`atoll join-token`, `atoll servers`, `atoll authority`: who belongs to the cell."""

from __future__ import annotations

import click

from atoll.cli.session import Session, command, group
from atoll.cli.tokens import span


@group(example="atoll join-token create\natoll join-token create --node node-3 --expires 10m\natoll join-token list")
def join_token() -> None:
    """Let new machines join: make and withdraw join tokens."""


@command(
    example="atoll join-token create\natoll join-token create --node node-3\natoll join-token create --ingress edge --expires 1d",
    fields={"expires_in_s": "expires", "subject": ("node", "ingress")},
)
@click.option("--node", metavar="NAME", help="Only for this node; it may be one that joined before, or was revoked.")
@click.option("--ingress", metavar="NAME", help="For an ingress of this name, in place of a node.")
@click.option("--expires", metavar="SPAN", default="1h", show_default=True, help="How long it may be used, once.")
async def create(session: Session, node: str | None, ingress: str | None, expires: str) -> None:
    """Make a token that lets one machine join, and print the command to run there.

    The token holds the fingerprint of the cell's authority, by which the new machine knows the cell.
    """
    from atoll.model.membership import JoinTokenRequest, MemberKind

    if node and ingress:
        raise click.UsageError("--node and --ingress: one token is for one machine")
    kind = MemberKind.INGRESS if ingress else MemberKind.NODE
    request = JoinTokenRequest(kind=kind, subject=node or ingress or "", expires_in_s=span(expires) or 0.0)
    async with session.client() as client:
        view = await client.create_join_token(request)
    if session.json:
        session.output.json(view)
        return
    session.output.say(f"join token {view.id}, good once within {expires}; on the new machine, as root:")
    what = "ingress" if ingress else "agent"
    click.echo(f"atoll {what} --server {','.join(view.servers)} --join {view.token}")


@command(name="list", example="atoll join-token list")
async def list_join_tokens(session: Session) -> None:
    """List the join tokens, without what makes them work."""
    import time

    from atoll.cli.output import age, clock

    async with session.client() as client:
        views = await client.join_tokens()
    if session.json:
        session.output.json(views)
        return
    rows = []
    for view in views:
        state = f"used by {view.used_by}" if view.used_at else "expired" if view.expires_at <= time.time() else "unused"
        rows.append((view.id, view.kind, view.subject or "any", state, age(view.created_at), clock(view.expires_at)))
    session.output.table(("TOKEN", "FOR", "NAME", "STATE", "AGE>", "EXPIRES"), rows, empty="no join tokens")


@command(example="atoll join-token delete 3f9a0c11d2e4")
@click.argument("id", metavar="TOKEN")
async def delete(session: Session, id: str) -> None:
    """Withdraw a join token, by its id. Who has joined with it stays."""
    async with session.client() as client:
        await client.delete_join_token(id)
    if session.json:
        session.output.json({"deleted": id})
    else:
        session.output.say(f"[green]✓[/] {id} lets nobody join any more")


@command(example="atoll servers")
async def servers(session: Session) -> None:
    """Show the servers that run, and which of them leads."""
    from atoll.cli.output import age

    async with session.client() as client:
        views = await client.servers()
    if session.json:
        session.output.json(views)
        return
    rows = [
        (one.server.id, "leads" if one.leads else "", " ".join(one.server.urls), one.server.version, age(one.server.started_at))
        for one in views
    ]
    session.output.table(("SERVER", "ROLE", "URL", "VERSION", "AGE>"), rows, empty="no server is listed yet")


@group(example="atoll authority\natoll authority rotate")
def authority() -> None:
    """Show and rotate the cell's certificate authority."""


@command(name="list", example="atoll authority list")
async def list_authorities(session: Session) -> None:
    """List the authorities that are trusted, with the fingerprints to pin."""
    from atoll.cli.output import clock

    async with session.client() as client:
        views = await client.authorities()
    if session.json:
        session.output.json(views)
        return
    rows = [
        (
            view.id,
            "signs" if view.signs else f"signs from {clock(view.signs_from)}" if view.retired_at is None else "trusted",
            clock(view.retired_at) if view.retired_at else "–",
            view.fingerprint,
        )
        for view in views
    ]
    session.output.table(("AUTHORITY", "STATE", "RETIRED", "FINGERPRINT"), rows, empty="no authority: no server has spoken TLS yet")


@command(example="atoll authority rotate\natoll authority rotate --at-once --yes")
@click.option("--at-once", is_flag=True, help="Trust no older authority from now on: every machine must join anew.")
@click.option("--yes", is_flag=True, help="Do not ask.")
async def rotate(session: Session, at_once: bool, yes: bool) -> None:
    """Make a new certificate authority.

    It is trusted now, and signs when every machine has renewed once; then the old one ends by itself.
    """
    if at_once and not yes:
        click.confirm("Every machine must join anew. Go on?", abort=True, err=True)
    async with session.client() as client:
        views = await client.rotate_authority(at_once=at_once)
    if session.json:
        session.output.json(views)
        return
    from atoll.cli.output import clock

    new = views[-1]
    when = "signs now" if new.signs else f"signs from {clock(new.signs_from)}"
    session.output.say(f"[green]✓[/] authority {new.id} is trusted, and {when}; its fingerprint: {new.fingerprint}")


for _each in (create, list_join_tokens, delete):
    join_token.add_command(_each)
for _each in (list_authorities, rotate):
    authority.add_command(_each)
