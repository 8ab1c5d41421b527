"""Names that a shell may complete: asked of the API, in the time that a key press allows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.session import Session
from atoll.model.errors import AtollError

if TYPE_CHECKING:
    from atoll.sdk.client import Client

PATIENCE_S = 1.0
"""After so long there is nothing to complete."""

Completer = Callable[[click.Context, click.Parameter, str], list[str]]


def name_from(text: str) -> str:
    """Return a name made of `text`: `site=fra` becomes `site-fra`."""
    import re

    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (words if words[:1].isalpha() else f"all-{words}".strip("-"))[:40].strip("-")


def argument(name: str, kind: str, **options: Any) -> Callable[[Any], Any]:
    """A `click.argument` whose values the shell completes; `kind` is `apps`, `jobs`, `sandboxes`, `sites`, `nodes`, `projects` or
    `running`."""
    return click.argument(name, shell_complete=_completer(kind), **options)


def _completer(kind: str) -> Completer:
    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        session = context.find_object(Session) or Session()
        session.api_given = session.api_given or context.params.get("api")
        session.project_given = session.project_given or context.params.get("project")
        try:
            names = asyncio.run(_names(session, kind))
        except (AtollError, TimeoutError):
            return []  # a shell has no place for an error
        return [name for name in names if name.startswith(incomplete)]

    return complete


async def _names(session: Session, kind: str) -> list[str]:
    async with asyncio.timeout(PATIENCE_S), session.client() as client:
        return sorted(await _ask(client, session.project, kind))


async def _ask(client: Client, project: str, kind: str) -> set[str]:
    match kind:
        case "apps":
            return {view.app.name for view in await client.apps(project)}
        case "jobs":
            return {view.job.name for view in await client.jobs(project)}
        case "sandboxes":
            return {view.job.name for view in await client.jobs(project) if view.job.spec.sandbox and view.job.spec.pool is None}
        case "sites":
            return {view.site.name for view in await client.sites()}
        case "projects":
            return {project.name for project in await client.projects()}
        case "nodes":
            return {view.node.name for view in await client.nodes()}
        case _:
            views = await client.instances(project)
            return {view.instance.id for view in views} | {view.instance.owner for view in views}
