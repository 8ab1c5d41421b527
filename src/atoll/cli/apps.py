"""The commands of an app's life: apps, status, scale, restart, releases, rollback, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from atoll.cli import names
from atoll.cli.session import Session, command
from atoll.model.errors import Invalid
from atoll.model.units import format_count, format_seconds

if TYPE_CHECKING:
    from atoll.model.spec import Resources, Scale
    from atoll.model.views import AppView
    from atoll.sdk.client import Client

EVENTS_SHOWN = 8
CHANGED_S = 1.0
"""A change so much later than its release was none of making it: scaled, restarted, or gone back to."""

detach = click.option("--detach", "-d", is_flag=True, help="Return at once; do not follow the rollout.")


@command(example="atoll apps\natoll apps --json | jq -r '.[].urls[]'")
async def apps(session: Session) -> None:
    """List the apps of the project."""
    async with session.client() as client:
        views = await client.apps(session.project)
    if session.json:
        session.output.json(views)
        return
    session.output.table(
        ("APP", "STATE", "READY>", "RELEASE>?", "CHANGED>?", "URL", "NOTE?"),
        [_app_row(view) for view in views],
        empty=f"no apps in project '{session.project}'; deploy one: atoll deploy examples/hello",
    )


def _app_row(view: AppView) -> tuple[Any, ...]:
    from atoll.cli.output import age, dim, state

    app, status = view.app, view.status
    return (
        app.name,
        state(word(view)),
        f"{status.ready if status else 0}/{app.wanted(status)}{_bounds(view)}{_standby(view)}",
        app.release,
        age(app.updated_at),
        view.urls[0] if view.urls else "–",
        dim(status.message if status else ""),
    )


def _gpu(resources: Resources) -> str:
    gpu = resources.gpu
    if gpu is None:
        return ""
    return f" · {gpu.count:g} GPU" + "".join(f" {word}" for word in (gpu.model, gpu.profile) if word)


def _bounds(view: AppView) -> str:
    """Return between what the number of instances is, where it follows a metric."""
    app = view.app
    return "" if app.most is None else f" of {app.replicas}–{app.most}"


def _standby(view: AppView) -> str:
    """Return how many stand by, of those that should where not all are parked."""
    parked, wanted = view.status.parked if view.status else 0, view.app.standby
    if not parked and not wanted:
        return ""
    return f", {parked} parked" if parked == wanted else f", {parked} of {wanted} parked"


def _scaling(view: AppView) -> str:
    scale = view.app.spec.scale
    if not scale or view.app.most is None:
        return ""
    words = ", ".join(_sources(scale))
    text = f", by {words}" if words else ""
    if not view.app.sleeps:
        return text
    if scale.idle == "predict":
        return f"{text}, asleep and awake by its history"
    return f"{text}, asleep after {format_seconds(scale.idle_after)} without a request"


def _sources(scale: Scale) -> Iterator[str]:
    """Yield what the number of instances follows, in words."""
    each = {
        scale.metric: scale.target,
        "requests under way": scale.concurrency,
        "requests a second": scale.rps,
        "the query": scale.prometheus.target if scale.prometheus is not None else None,
    }
    yield from (f"{name} ≤ {target:g} each" for name, target in each.items() if name and target is not None)
    shares = {"cpu": scale.cpu, "memory": scale.memory, "gpu": scale.gpu}
    yield from (f"{name} ≤ {100 * share:g} %" for name, share in shares.items() if share is not None)
    if scale.windows:
        yield "1 window" if len(scale.windows) == 1 else f"{len(scale.windows)} windows"


def _dependency(name: str, view: AppView) -> str:
    waits = view.status is not None and name in view.status.waits_for
    return f"{name} (waits for it)" if waits else name


def word(view: AppView) -> str:
    """Return the one word for how an app stands."""
    if view.app.deleting:
        return "deleting"
    return str(view.status.phase) if view.status else "deploying"


@command(example="atoll status hello")
@names.argument("app", "apps")
async def status(session: Session, app: str) -> None:
    """Show one app: its state, its instances and its last events."""
    project = session.project
    async with session.client() as client:
        view = await client.app(project, app)
        instances, events, rollout = await asyncio.gather(
            client.instances(project, app=app),
            client.events(project, subject=f"app/{app}", limit=EVENTS_SHOWN),
            client.rollout(project, app),
        )
        releases = await client.releases(project, app) if not session.json else []
    if session.json:
        session.output.json({"app": view, "instances": instances, "events": events.items, "releases": rollout.releases})
        return
    made = next((release.created_at for release in releases if release.number == view.app.release), view.app.created_at)
    _show_app(session, view, made)
    if len(rollout.releases) > 1 or any(each.requests for each in rollout.releases):
        from atoll.cli import rollouts

        session.output.print("", rollouts.releases(rollout))
    from atoll.cli import events as event_lines
    from atoll.cli import instances as instance_lines

    session.output.print("")
    session.output.table(*instance_lines.lines(instances, leave_out={"OWNER?"}), empty="no instances")
    if events.items:
        session.output.print("")
        session.output.table(event_lines.COLUMNS, [event_lines.row(each) for each in reversed(events.items)])


def _show_app(session: Session, view: AppView, made: float) -> None:
    """Print how an app stands; `made` is when its release was."""
    from rich.table import Table
    from rich.text import Text

    from atoll.cli.output import age, state
    from atoll.model.units import format_bytes

    app, spec = view.app, view.app.spec
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    told = view.status.message if view.status else ""
    ready = view.status.ready if view.status else 0
    lines: list[tuple[str, Any]] = [
        ("app", f"{app.project}/{app.name}"),
        ("state", state(word(view), told)),
        (
            "ready",
            (f"{ready}/{app.wanted(view.status)}{_bounds(view)}{_scaling(view)}" if app.most else f"{ready} of {app.replicas}")
            + _standby(view),
        ),
        ("release", f"{app.release}, made {age(made)} ago"),
        *([("changed", f"{age(app.updated_at)} ago")] if app.updated_at - made > CHANGED_S else []),
        *([("depends on", ", ".join(_dependency(name, view) for name in spec.depends_on))] if spec.depends_on else []),
        ("image", spec.image or "–"),
        ("isolation", f"{spec.isolation}" + (f" ({spec.runtime})" if spec.runtime else "")),
        ("resources", f"{spec.resources.cpu:g} cores · {format_bytes(spec.resources.memory)} memory{_gpu(spec.resources)}"),
        ("ports", ", ".join(f"{port.name} {port.port}/{port.protocol}" for port in spec.ports) or "none"),
        ("url", "\n".join(view.urls) or "–"),
        *((("left out", Text(f"by ingress {ingress}: {words}", "red")) for ingress, words in view.refused.items())),
    ]
    for name, value in lines:
        grid.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    session.output.print(grid)


@command(example="atoll scale hello 5")
@names.argument("app", "apps")
@click.argument("replicas", type=click.IntRange(min=0))
@detach
async def scale(session: Session, app: str, replicas: int, detach: bool) -> None:
    """Change how many instances an app has, and follow it until they are ready. One that scales by a metric has at least so many;
    0 stops either."""
    async with session.client() as client:
        view = await client.scale(session.project, app, replicas)
        await follow(session, client, view, detach=detach)


@command(example="atoll restart hello")
@names.argument("app", "apps")
@detach
async def restart(session: Session, app: str, detach: bool) -> None:
    """Replace every instance of an app, new ones first, so that it keeps serving."""
    async with session.client() as client:
        view = await client.restart(session.project, app)
        await follow(session, client, view, detach=detach)


@command(example="atoll releases hello")
@names.argument("app", "apps")
async def releases(session: Session, app: str) -> None:
    """List what was deployed, newest first; `atoll rollback` goes back to one."""
    from atoll.cli.output import age, dim, short_image

    async with session.client() as client:
        view = await client.app(session.project, app)
        found = await client.releases(session.project, app)
    if session.json:
        session.output.json(found)
        return
    rows = [
        (
            release.number,
            "●" if release.number == view.app.release else "",
            age(release.created_at),
            release.author,
            short_image(release.spec.image),
            dim(release.note),
        )
        for release in found
    ]
    session.output.table(("RELEASE>", "NOW", "AGE>", "BY", "IMAGE~", "NOTE"), rows, empty="no releases")


@command(example="atoll rollback hello\natoll rollback hello --to 3")
@names.argument("app", "apps")
@click.option(
    "--to", "release", type=click.IntRange(min=1), metavar="RELEASE", help="The release; else the one before the current."
)
@detach
async def rollback(session: Session, app: str, release: int | None, detach: bool) -> None:
    """Deploy an earlier release again."""
    async with session.client() as client:
        view = await client.rollback(session.project, app, release)
        await follow(session, client, view, detach=detach)


@command(example="atoll delete hello\natoll delete hello --yes   # ask nothing")
@names.argument("app", "apps")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@detach
async def delete(session: Session, app: str, yes: bool, detach: bool) -> None:
    """Delete an app: its instances are drained and stopped, its routes are free again. Volumes stay on their nodes."""
    async with session.client() as client:
        view = await client.app(session.project, app)
        if not yes:
            confirm(f"Delete app '{app}' with {format_count(view.app.wanted(view.status), 'instance')}?")
        await client.delete_app(session.project, app)
        if not detach:
            from atoll.cli.rollout import until_gone

            await until_gone(session, client, app)
    if session.json:
        session.output.json({"deleted": app})
    else:
        session.output.say(f"[green]✓[/] {app} is {'being deleted' if detach else 'deleted'}")


def confirm(question: str) -> None:
    """Ask on a terminal; elsewhere raise Invalid, because nobody can answer."""
    import sys

    if not sys.stdin.isatty():
        raise Invalid(f"{question.rstrip('?')}: nobody is there to be asked", mend="pass --yes")
    click.confirm(question, abort=True, err=True)


async def follow(session: Session, client: Client, view: AppView, *, detach: bool) -> None:
    """Follow a rollout to its end and print what came of it. Raises why it failed."""
    from atoll.cli.rollout import follow_rollout, heard_from_ingresses, show_result

    if detach:
        if session.json:
            session.output.json(view)
        else:
            session.output.say(f"{view.app.name} goes to release {view.app.release}; follow it with: atoll status {view.app.name}")
        return
    took_s = await follow_rollout(session, client, view)
    show_result(session, await heard_from_ingresses(client, view.app.name, view.app.project, took_s), took_s)
