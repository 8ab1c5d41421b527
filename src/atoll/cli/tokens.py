"""`atoll token`: who may call the API."""

from __future__ import annotations

import click

from atoll.cli.session import Session, command, group
from atoll.model.errors import Invalid

ROLES = ("admin", "deploy", "read", "agent", "ingress")


@group(example="atoll token create ci --role deploy --project shop --expires 30d\natoll token list")
def token() -> None:
    """Make and withdraw access tokens."""


@command(example="atoll token create ci --role deploy --project shop --expires 30d", fields={"expires_in_s": "expires"})
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), default="deploy", show_default=True, help="What it may do.")
@click.option("--subject", metavar="NAME", help="The node (role agent) or the ingress (role ingress) that it stands for.")
@click.option("--expires", metavar="SPAN", help="When it stops working, such as 12h or 30d; else never.")
@click.option("--all-projects", is_flag=True, help="Valid in every project.")
async def create(session: Session, name: str, role: str, subject: str | None, expires: str | None, all_projects: bool) -> None:
    """Make a token and print it: once, for nobody can read it again."""
    from atoll.model.records import Role
    from atoll.model.views import TokenRequest

    everywhere = all_projects or role in ("admin", "agent", "ingress")
    project = session.project_given if session.project_given and not all_projects else "*" if everywhere else session.project
    request = TokenRequest(name=name, role=Role(role), project=project, expires_in_s=span(expires), subject=subject or "")
    async with session.client() as client:
        view = await client.create_token(request)
    if session.json:
        session.output.json(view)
        return
    where = "every project" if view.project == "*" else f"project {view.project}"
    session.output.say(f"token {view.id} ({view.role}, {where}); it is shown only now:")
    click.echo(view.token)


def span(text: str | None) -> float | None:
    """Return the seconds in `--expires`. Raises Invalid."""
    from atoll.model.units import Seconds

    if text is None:
        return None
    try:
        return float(Seconds.parse(text))
    except ValueError as error:
        raise Invalid(f"--expires: {error}", field="expires") from None


@command(name="list", example="atoll token list")
async def list_tokens(session: Session) -> None:
    """List the tokens, without what makes them work."""
    from atoll.cli.output import age, clock

    async with session.client() as client:
        views = await client.tokens()
    if session.json:
        session.output.json(views)
        return
    rows = [
        (view.id, view.name, view.role, view.project, age(view.created_at), clock(view.expires_at) if view.expires_at else "never")
        for view in views
    ]
    session.output.table(("TOKEN", "NAME", "ROLE", "PROJECT", "AGE>", "EXPIRES"), rows, empty="no tokens")


@command(example="atoll token delete k3x9\natoll token delete ci")
@click.argument("id", metavar="TOKEN|NAME")
async def delete(session: Session, id: str) -> None:
    """Withdraw a token, by its id or by a name that only one has; it stops working at once."""
    from atoll.model.errors import Conflict

    async with session.client() as client:
        named = [view.id for view in await client.tokens() if id in (view.id, view.name)]
        if len(named) > 1:
            raise Conflict(f"{len(named)} tokens are called '{id}'", mend=f"say which by its id: {', '.join(named)}")
        await client.delete_token(named[0] if named else id)
    if session.json:
        session.output.json({"deleted": id})
    else:
        session.output.say(f"[green]✓[/] {id} no longer works")


for _each in (create, list_tokens, delete):
    token.add_command(_each)
