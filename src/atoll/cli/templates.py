"""`atoll template`: sandboxes that are kept running, so that who wants one has it at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from atoll.cli import names
from atoll.cli.quantities import SPAN
from atoll.cli.sandboxes import sandbox_spec
from atoll.cli.session import Session, command, group

if TYPE_CHECKING:
    from atoll.model.units import Seconds
    from atoll.model.views import InstanceView


@group(
    example="atoll template create tools --image HOST/tools:1 --isolation vm --pool 4\natoll sandbox create try --template tools"
)
def template() -> None:
    """Keep sandboxes ready, to be taken by `atoll sandbox create NAME --template TEMPLATE`."""


@command(
    example="atoll template create tools --image HOST/tools:1 --isolation vm --pool 4 --time-limit 1h --idle-limit 10m",
    fields={"deadline": "time_limit"},
)
@click.argument("name", metavar="NAME")
@click.option("--pool", type=click.IntRange(min=0), required=True, help="How many sandboxes are kept ready.")
@click.option("--file", "-f", "file", type=click.Path(path_type=Path), help="A job's spec to begin with: TOML, JSON or YAML.")
@click.option("--image", metavar="REF", help="The image they are made from.")
@click.option("--isolation", type=click.Choice(["container", "sandbox", "vm"]), help="How much they are kept apart.")
@click.option("--runtime", metavar="RUNTIME", help="What they run with; else as their isolation says.")
@click.option("--time-limit", type=SPAN, metavar="DURATION", help="Each ends so long after it was taken (default 1h).")
@click.option(
    "--idle-limit", type=SPAN, metavar="DURATION", help="Each ends when nobody has used it for so long after it was taken."
)
@click.option("--snapshot", metavar="DIGEST", help="They go on from this snapshot, on the node of --node.")
@click.option("--node", metavar="NODE", help="The node that they must be on.")
@click.option("--env", "-e", multiple=True, metavar="NAME=VALUE", help="Set a variable (not for secrets).")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND…]")
async def create(
    session: Session,
    name: str,
    pool: int,
    file: Path | None,
    image: str | None,
    isolation: str | None,
    runtime: str | None,
    time_limit: Seconds | None,
    idle_limit: Seconds | None,
    snapshot: str | None,
    node: str | None,
    env: tuple[str, ...],
    argv: tuple[str, ...],
) -> None:
    """Make or change a template. What waits in its pool is replaced where that was made otherwise; what was taken goes on."""
    given: dict[str, str | Seconds | None] = {
        "image": image,
        "isolation": isolation,
        "runtime": runtime,
        "deadline": time_limit,
        "idle_limit": idle_limit,
    }
    given["pool"] = str(pool)
    spec = sandbox_spec(session, name, file, given, env, argv, snapshot=snapshot, node=node)
    async with session.client() as client:
        if node:
            await client.node(node)  # one that is not there would be waited for
        view = await client.put_job(spec)
    if session.json:
        session.output.json(view)
    else:
        session.output.say(f"[green]✓[/] template {name} keeps {pool} ready; take one: atoll sandbox create NEW --template {name}")


@command(example="atoll template list", name="list")
async def list_templates(session: Session) -> None:
    """List the project's templates, and how many of each are ready."""
    from atoll.cli.output import short_image
    from atoll.sdk.sandboxes import templates

    async with session.client() as client:
        views = await templates(client, session.project)
        pools = {view.job.name: await client.instances(session.project, job=view.job.name) for view in views}
    if session.json:
        session.output.json(views)
        return
    rows = [
        (
            view.job.name,
            f"{sum(_ready(each) for each in pools[view.job.name])}/{view.job.spec.pool}",
            view.job.spec.runtime or view.job.spec.isolation,
            short_image(view.job.spec.image),
            view.status.message if view.status else "",
        )
        for view in views
    ]
    columns = ("TEMPLATE", "READY>", "ISOLATION", "IMAGE~", "NOTE")
    session.output.table(columns, rows, empty="no templates; make one with: atoll template create")


def _ready(view: InstanceView) -> bool:
    return view.instance.standby and view.status is not None and view.status.phase == "running" and view.status.ready


@command(example="atoll template rm tools", name="rm")
@names.argument("name", "jobs", metavar="TEMPLATE")
async def remove(session: Session, name: str) -> None:
    """Remove a template and end its pool; sandboxes that were taken from it go on."""
    from atoll.sdk.sandboxes import template_of

    async with session.client() as client:
        await template_of(client, session.project, name)
        await client.delete_job(session.project, name)
    if session.json:
        session.output.json({"removed": name})
    else:
        session.output.say(f"[green]✓[/] template {name} is removed, and its pool ends")


for _each in (create, list_templates, remove):
    template.add_command(_each)
