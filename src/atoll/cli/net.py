"""`atoll net`: what reaches what, and the fabric between nodes."""

from __future__ import annotations

import click

from atoll.cli import names
from atoll.cli.session import EXIT_FAILED, Session, command, group


@group(example="atoll net check web db --port 5432\natoll net nodes\natoll net rotate-keys")
def net() -> None:
    """Say what reaches what; show the fabric between nodes."""


@command(example="atoll net check web db --port 5432\natoll net check web api --port 80 --to-project shop --json")
@names.argument("source", "apps", metavar="FROM")
@names.argument("target", "apps", metavar="TO")
@click.option("--port", type=click.IntRange(1, 65_535), required=True, help="The port of TO.")
@click.option("--udp", is_flag=True, help="UDP instead of TCP.")
@click.option("--to-project", metavar="NAME", help="TO's project, if another.")
async def check(session: Session, source: str, target: str, port: int, udp: bool, to_project: str | None) -> None:
    """Say whether FROM reaches a port of TO, and if not, which rule or link stops it: apps, jobs or instances.

    Exits 1 when it does not.
    """
    async with session.client() as client:
        view = await client.reach(session.project, source, target, port, protocol="udp" if udp else "tcp", to_project=to_project)
    if session.json:
        session.output.json(view)
    else:
        rows = [(step.what, "yes" if step.ok else "NO", step.detail, step.mend) for step in view.steps]
        session.output.table(("STEP", "OK", "WHY", "MEND"), rows, empty="")
        stops = next((step for step in view.steps if not step.ok), None)
        words = "[green]✓[/] reaches" if stops is None else "[red]✗[/] does not reach"
        session.output.say(f"{view.source} {words} {view.protocol} {view.port} of {view.target}")
    if not view.ok:
        click.get_current_context().exit(EXIT_FAILED)


@command(name="nodes", example="atoll net nodes --json")
async def list_nodes(session: Session) -> None:
    """List the nodes of the fabric: their prefixes, and where others reach them."""
    async with session.client() as client:
        nodes = await client.fabric()
    if session.json:
        session.output.json(nodes)
        return
    rows = [
        (node.name, node.site, node.region, node.prefix, node.endpoint or "–", "yes" if node.public_key else "no") for node in nodes
    ]
    session.output.table(("NODE", "SITE", "REGION", "PREFIX", "ENDPOINT", "WIREGUARD"), rows, empty="no node has joined the fabric")


@command(name="rotate-keys", example="atoll net rotate-keys")
async def rotate_keys(session: Session) -> None:
    """Have every node make a new WireGuard key. Packets between sites may be lost for a second."""
    async with session.client() as client:
        await client.rotate_fabric_keys()
    session.output.say("[green]✓[/] every node that is connected makes a new key now, all others when they are")


for one in (check, list_nodes, rotate_keys):
    net.add_command(one)
