"""`atoll projects`: tenants."""

from __future__ import annotations

import click

from atoll.cli.session import Session, command, group


@group(example="atoll projects create shop\natoll deploy -p shop")
def projects() -> None:
    """List and make projects: names, secrets and tokens of one stay in it."""


@command(name="list", example="atoll projects list")
async def list_projects(session: Session) -> None:
    """List the projects."""
    from atoll.cli.output import age

    async with session.client() as client:
        found = await client.projects()
    if session.json:
        session.output.json(found)
        return
    session.output.table(("PROJECT", "AGE>"), [(project.name, age(project.created_at)) for project in found], empty="no projects")


@command(example="atoll projects create shop")
@click.argument("name")
async def create(session: Session, name: str) -> None:
    """Make a project; one that is there already stays as it is."""
    async with session.client() as client:
        made = await client.put_project(name)
    if session.json:
        session.output.json(made)
    else:
        session.output.say(f"[green]✓[/] project {made.name}")


for _each in (list_projects, create):
    projects.add_command(_each)
